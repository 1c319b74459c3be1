"""`python -m para_jax`."""

import sys

from .cli import program

sys.exit(program())
