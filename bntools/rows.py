"""The rows of a ``.npy`` file, read when they are asked for."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from threading import Lock

import numpy as np

from bntools.errors import BntoolsError


class Rows:
    """An array on the disk, from which rows are taken by number.

    They are read and not mapped: where a mapped file is cut short, touching what is gone ends the process. The file
    stays open, so that one put in its place changes nothing here.
    """

    def __init__(self, path: Path, mapped: np.memmap):
        self._path, self._start = path, mapped.offset
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115 - closed when the object goes
        weakref.finalize(self, self._file.close)
        self._turn = Lock()
        self.dtype, self.shape, self.ndim, self.size = mapped.dtype, mapped.shape, mapped.ndim, mapped.size

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, chosen: np.ndarray) -> np.ndarray:
        """The rows with these numbers. Raises BntoolsError where the file has become shorter."""
        found = np.empty((len(chosen), *self.shape[1:]), self.dtype)
        size = math.prod(self.shape[1:]) * self.dtype.itemsize
        room = found.reshape(-1).view(np.uint8).data
        with self._turn:
            for place, row in enumerate(chosen.tolist()):
                self._file.seek(self._start + row * size)
                self._fill(room[place * size : (place + 1) * size])
        return found

    def _fill(self, room: memoryview) -> None:
        while len(room):
            if not (count := self._file.readinto(room)):
                raise changed(self._path)
            room = room[count:]


def changed(path: Path) -> BntoolsError:
    """What is raised where the file is not what it was when it was opened."""
    return BntoolsError(f"{path}: was changed while it was read: begin again when it is written to its end")
