"""lm-eval: its requests, tasks and model interface."""
