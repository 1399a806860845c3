"""Looks at HDF5 files as bntools does, in copies of one small process in place of new ones.

A new process takes 0.12 s, which for 100,000 inputs would be more than three hours.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

from bntools.backends.keras import looking


class Looker:
    """Stands in for ``looking.child``."""

    def __init__(self) -> None:
        command = [sys.executable, __file__]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __call__(self, path: str, seconds: int) -> list[str]:
        """What a child says of a file."""
        asking, telling = self._process.stdin, self._process.stdout
        assert asking is not None
        assert telling is not None
        asking.write(json.dumps([path, seconds]) + "\n")
        asking.flush()
        return json.loads(telling.readline())


def _serve() -> None:
    for asked in sys.stdin:
        receiving, sending = os.pipe()
        if (pid := os.fork()) == 0:
            for line in looking.examine(*json.loads(asked)):
                os.write(sending, f"{line}\n".encode())
            os._exit(0)
        os.close(sending)
        with os.fdopen(receiving, errors="replace") as channel:
            told = channel.read().splitlines()
        os.waitpid(pid, 0)
        print(json.dumps(told), flush=True)


if __name__ == "__main__":
    _serve()
