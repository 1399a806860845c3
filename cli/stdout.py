"""A stdout that outlives its reader: ``bntools ... | head -1`` does its work to the end."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any


class Patient:
    """A stream that prints into nothing once nobody reads it any more; other failures are raised."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write text. click tries an empty one out on every stream, and ignores its failure."""
        if text == "":
            return 0
        try:
            self._stream.write(text)
        except OSError as error:
            self._give_up(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Lead the stream into nothing: what it still holds would fail again when Python ends."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)
        if not isinstance(error, BrokenPipeError):
            raise error


@contextmanager
def patient() -> Iterator[None]:
    """Print so while the block runs; where stdout or stderr was closed beforehand, into nothing."""
    out: Any = Patient(sys.stdout or _nothing())
    err: Any = sys.stderr or _nothing()
    with redirect_stdout(out), redirect_stderr(err):
        yield


def _nothing() -> Any:
    """Open as long as the process: a file that was opened later would else get the number of stdout."""
    return open(os.devnull, "w", encoding="utf-8")
