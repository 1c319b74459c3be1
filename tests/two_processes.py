"""Two processes of four CPU devices each on this machine, joined over loopback, as two hosts of a slice are."""

import os
import socket
import subprocess
import sys
from typing import NamedTuple

LIMIT = 120  # seconds, so that processes that wait for each other for ever fail


class Ended(NamedTuple):
    """How a process ended and what it said, without what Gloo, which moves the bytes on CPUs, says of itself."""

    code: int
    out: str
    err: str


def run_two(*arguments, **variables: str) -> list[Ended]:
    """Runs `python ARGUMENTS` as process 0 and process 1; in an argument that is a pair, each has its own part.
    {address}, {process} in an argument are the coordinator's address and the process. Variables: of the environment.
    """
    at = address()
    flags = "--xla_force_host_platform_device_count=4 --xla_backend_optimization_level=0"
    started = []
    for process in range(2):
        own = [argument[process] if isinstance(argument, tuple) else argument for argument in arguments]
        own = [part.replace("{address}", at).replace("{process}", str(process)) for part in own]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"} | variables
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, *own], env=environment, **pipes))
    try:
        printed = [process.communicate(timeout=LIMIT) for process in started]
    finally:
        for process in started:
            process.kill()
    return [Ended(process.returncode, *map(without_gloo, both)) for process, both in zip(started, printed, strict=True)]


def address() -> str:
    """host:port, a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def without_gloo(text: str) -> str:
    return "".join(line for line in text.splitlines(keepends=True) if "[Gloo]" not in line and "peer ranks" not in line)
