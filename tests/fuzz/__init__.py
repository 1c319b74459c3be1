"""Hostile input: mutated files, requests and schedules for every public entry point (docs/reliability.md)."""
