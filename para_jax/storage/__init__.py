"""Google Cloud Storage: paths (bucket.py), the connection (service.py), local copies (cache.py), a folder that is
replaced atomically (folder.py), a lock (lock.py), and files that grow (pieces.py, lines.py)."""
