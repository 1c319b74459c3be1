"""`python -m para_jax`."""

import sys

from .cli import program

if __name__ == "__main__":  # not in a process that imports this module again, as multiprocessing does
    sys.exit(program())
