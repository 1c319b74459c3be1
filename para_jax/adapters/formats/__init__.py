"""The formats of adapter folders: Hugging Face PEFT's and our own."""
