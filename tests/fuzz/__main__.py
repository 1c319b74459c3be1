"""Runs one case again, in this process: PYTHONPATH=tests python -m fuzz TARGET NUMBER"""

import argparse

from .cases import FAILURES, run_case
from .runner import prepare


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("target")
    options.add_argument("number", type=int)
    given = options.parse_args()
    prepare()
    outcome = run_case(given.target, given.number)
    print(f"{outcome.kind}: {outcome.detail}")
    return int(outcome.kind in FAILURES)


if __name__ == "__main__":
    raise SystemExit(main())
