"""Hostile input: mutated files, requests and schedules for every public entry point (docs/reliability.md)."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1] / "helpers"))
