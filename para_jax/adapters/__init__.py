"""Adapter methods, batches of adapters, and the adapter folder."""
