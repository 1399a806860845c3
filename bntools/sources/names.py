"""Very many names in little memory."""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterable, Iterator

import numpy as np

CHUNK = 4096


class Names:
    """Names of files in an order, held as their bytes end to end: some 8 bytes each beside its own.

    A list of a million paths takes some 200 MB, which this takes some 40 of.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        self._bytes = bytearray()
        self._ends = array("Q")
        for name in names:
            self.append(name)

    def append(self, name: str) -> None:
        """Add a name at the end."""
        self._bytes += os.fsencode(name)
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, number: int) -> str:
        start = self._ends[number - 1] if number else 0
        return os.fsdecode(bytes(self._bytes[start : self._ends[number]]))


def each(numbers: np.ndarray) -> Iterator[int]:
    """The numbers of an array one by one, without a list of them all, which would take five times their memory."""
    for start in range(0, len(numbers), CHUNK):
        yield from numbers[start : start + CHUNK].tolist()
