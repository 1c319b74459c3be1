"""Data: the tokenizer, the token boundary, sources, tasks and batches."""
