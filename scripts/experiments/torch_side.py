"""A script of torch in a process of its own, which answers each line on its input with a line of JSON."""

import json
import subprocess
import sys
import time
from pathlib import Path

PAUSE = 0.4  # seconds before each step, in which the threads of the side before stop spinning


class TorchSide:
    def __init__(self, python: str, script: Path, *given: str):
        command = [python, str(script), *given]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self.answer()

    def ask(self, *words):
        """The answer to one line of these words."""
        time.sleep(PAUSE)
        print(*words, file=self.process.stdin, flush=True)
        return self.answer()

    def answer(self):
        line = self.process.stdout.readline()
        return json.loads(line) if line else sys.exit("the torch side ended; its message is above")
