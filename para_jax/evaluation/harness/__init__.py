"""lm-eval: its requests, tasks, model interface and command line."""
