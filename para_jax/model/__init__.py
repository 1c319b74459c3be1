"""The backbone and an adapter, run together."""
