"""A part of a file, read as a file of its own: a member of an archive that is never unpacked."""

from __future__ import annotations

import io
import os
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from bntools.errors import BntoolsError

Stamp = tuple[int, int]  # of a file: its size, and when it was changed, in nanoseconds


@dataclass(frozen=True)
class Part:
    """So many bytes of a file from an offset on, as long as the file is what it was when they were found."""

    path: Path
    offset: int
    size: int
    stamp: Stamp

    def open(self) -> BinaryIO:
        """The bytes as a file. Raises BntoolsError where the file that holds them is another by now."""
        return cast(BinaryIO, _Bounded(_Window(self), self.size))


def opened(path: Path) -> BinaryIO:
    """A file that is read like a part that is all of it."""
    raw = io.FileIO(path)
    return cast(BinaryIO, _Bounded(raw, os.fstat(raw.fileno()).st_size))


def stamp(descriptor: int) -> Stamp:
    """What tells an open file from the same file after somebody wrote to it."""
    status = os.fstat(descriptor)
    return status.st_size, status.st_mtime_ns


class _Bounded(io.BufferedReader):
    """A reader that asks for no more memory than there are bytes; others take what a damaged length claims."""

    def __init__(self, raw: io.RawIOBase, size: int):
        super().__init__(raw)
        self._size = size

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size if size is None or size < 0 else min(size, max(0, self._size - self.tell())))


class _Window(io.RawIOBase):
    def __init__(self, part: Part):
        self._part, self._position = part, 0
        self._file = io.FileIO(part.path)
        if stamp(self._file.fileno()) != part.stamp:
            self._file.close()
            raise BntoolsError(f"{part.path}: was changed while it was read; run again once nobody writes to it")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._part.size}[whence]
        if start + offset < 0:
            raise ValueError(f"seek to {start + offset}, before the beginning")
        self._position = start + offset
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = min(len(buffer), max(0, self._part.size - self._position))
        self._file.seek(self._part.offset + self._position)
        read = self._file.readinto(memoryview(buffer)[:wanted]) or 0
        self._position += read
        return read

    def close(self) -> None:
        if hasattr(self, "_file"):  # not where opening it failed
            self._file.close()
        super().close()
