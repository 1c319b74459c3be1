"""Runs one case again, in this process: PYTHONPATH=tests python -m fuzz TARGET NUMBER"""

import argparse
import os

from .cases import FAILURES, run_case
from .runner import prepare


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target")
    options.add_argument("number", type=int)
    given = options.parse_args()
    prepare()
    outcome = run_case(given.target, given.number)
    print(f"{outcome.kind}: {outcome.detail}", flush=True)
    os._exit(int(outcome.kind in FAILURES))  # clients of a failed schedule may still be waiting


if __name__ == "__main__":
    main()
