"""Google Cloud Storage: paths (bucket.py), the connection (service.py) and local copies (cache.py). A bucket has no
locks: the launcher sees to it that a folder has one writer."""
