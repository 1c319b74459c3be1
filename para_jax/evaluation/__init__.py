"""Scores of a backbone with adapters on tasks."""
