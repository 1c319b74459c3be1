"""What a run needs, before it runs: memory, time, the compiler's own numbers."""
