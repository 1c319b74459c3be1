"""GGUF files: their model, their tokenizer, and their conversion to a Hugging Face folder."""
