"""Text from a backbone with adapters: prefill, the decode loop, sampling."""
