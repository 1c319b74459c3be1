"""What a run would compile and need, without running it."""
