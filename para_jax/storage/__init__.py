"""Buckets: paths, folders, locks and a cache of gs://."""
