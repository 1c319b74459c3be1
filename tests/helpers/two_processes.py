"""Two processes of four CPU devices each on this machine, joined over loopback, as two hosts of a slice are."""

import os
import re
import socket
import subprocess
import sys
from tempfile import TemporaryFile
from typing import NamedTuple

import quick_compiler

#: A line of Gloo, "[Gloo] Rank 1 is connected to 7 peer ranks. Expected number of connected peer ranks is : 7", or a
#: piece of it.
GLOO = re.compile(r"\[Gloo\]|is connected to|peer ranks|^\s*\d?\s*$")
LIMIT = 400  # seconds, so that processes that wait for each other for ever fail


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
    flags = f"--xla_force_host_platform_device_count=4 {quick_compiler.FLAGS}{quick_compiler.OLD_EMITTERS}"
    started = []
    for process in range(2):
        own = [argument[process] if isinstance(argument, tuple) else argument for argument in arguments]
        own = [part.replace("{address}", at).replace("{process}", str(process)) for part in own]
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "TF_CPP_MIN_LOG_LEVEL": "2"} | variables
        # files, since a process that waits for its pipe to be read would keep the other from ending
        files = {"stdout": TemporaryFile("w+"), "stderr": TemporaryFile("w+")}
        started.append((subprocess.Popen([sys.executable, *own], env=environment, **files), files.values()))
    try:
        for process, _ in started:
            process.wait(LIMIT)
    finally:
        for process, _ in started:
            process.kill()
    return [Ended(process.returncode, *map(said, files)) for process, files in started]


def address() -> str:
    """host:port, a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def said(file) -> str:
    """What was written to the file, without Gloo's lines; closes it. Gloo's threads write a line in pieces, so that
    some of it may stand alone: the number of its peers, or nothing."""
    with file:
        file.seek(0)
        return "".join(line for line in file if not GLOO.search(line))
