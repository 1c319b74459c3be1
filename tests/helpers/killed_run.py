"""`python killed_run.py ARGUMENTS`: `para-jax ARGUMENTS`, which says on stdout what it is doing, for test_kills.py.

It lingers LINGER seconds in each phase, so that a kill can hit it, and does nothing else than `para-jax`.
"""

import os
import sys
import threading
import time

from para_jax import cli
from para_jax.evaluation.scoring import Tasks
from para_jax.runs import loop

LINGER = float(os.environ.get("LINGER", 0))  # seconds before and after the work of a phase


def say(line):
    """One write a line: the lines of two threads don't mix, as those of print can."""
    os.write(1, f"{line}\n".encode())


def spoken(where, name, before, after=None):
    """Wraps a function of a module, so that each call says its phase."""
    real = getattr(where, name)

    def speaking(*arguments, **settings):
        say(before)
        time.sleep(LINGER)
        found = real(*arguments, **settings)
        time.sleep(LINGER)
        if after:
            after(*arguments)
        return found

    setattr(where, name, speaking)


def when_written(checkpoints, *_):
    """Says "written" when the save that goes on in the background is done, while the steps go on."""

    def wait():
        while checkpoints.is_saving_in_progress():
            time.sleep(0.001)
        say("written")

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    spoken(loop, "train_step", "step")
    spoken(Tasks, "scores", "evaluation")
    spoken(loop, "save_checkpoint", "save", when_written)
    sys.exit(cli.main(sys.argv[1:]))
