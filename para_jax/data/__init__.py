"""Data: tokenizer, sources, tasks, records, examples (the token boundary between prompt and completion) and batches."""
