"""Files, folders and buckets, the hub, and what is said to the user."""
