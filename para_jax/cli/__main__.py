"""`python -m para_jax.cli`."""

import sys

from . import program

sys.exit(program())
