"""Google Cloud Storage: paths (bucket.py), the connection (service.py), local copies (cache.py), and files that
grow (pieces.py). A bucket has no locks: the launcher sees to it that a folder has one writer."""
