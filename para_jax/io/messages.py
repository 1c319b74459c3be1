"""Messages for the user, through `logging.getLogger("para_jax")`. Only the first process of a run speaks.

Python shows warnings and hides the rest by default. The command line shows all of them; `log_to_stderr` does so too.
"""

import logging
import sys

LOGGER = logging.getLogger("para_jax")


def say(text: str) -> None:
    """Logs what the program does, such as its devices or that it compiles."""
    if speaks():
        LOGGER.info(text)


def warn(text: str) -> None:
    """Logs what the user may want to act on."""
    if speaks():
        LOGGER.warning(text)


def speaks() -> bool:
    """Whether this is the first process, or the only one. It asks JAX for the process number only if processes have
    joined, because asking makes JAX take the devices, which other processes of this host may need."""
    jax = sys.modules.get("jax")
    return jax is None or not jax.distributed.is_initialized() or jax.process_index() == 0


def log_to_stderr(level: int = logging.INFO) -> None:
    """Shows para_jax's messages on stderr, above a progress bar if there is one.

    They then no longer reach the handlers of the root logger, so none appears twice.

    >>> log_to_stderr()
    """
    if not any(isinstance(handler, StderrHandler) for handler in LOGGER.handlers):
        LOGGER.addHandler(StderrHandler())
    LOGGER.setLevel(level)
    LOGGER.propagate = False


class StderrHandler(logging.Handler):
    """Writes each message as a line of its own, without breaking a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        if sys.stderr is None:  # a process without one; tqdm would write to stdout, among the answers
            return
        try:
            text = self.format(record)
            tqdm.write(f"warning: {text}" if record.levelno >= logging.WARNING else text, file=sys.stderr)
        except Exception:
            self.handleError(record)
