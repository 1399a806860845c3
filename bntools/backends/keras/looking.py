"""HDF5 files of Keras, opened where they lie; and a first look at one, in a process of its own.

HDF5's library believes what a file says of itself: on about one damaged file in a thousand it loops for ever, takes
gigabytes or ends the process, inside a call that nothing can interrupt. So a child with little time and memory goes
through the whole structure first. It runs this file as a script, which therefore imports nothing of bntools.
"""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])  # where the parent found its h5py

import h5py

WEIGHTS = "model.weights.h5"  # in a .keras archive
SECONDS = 3  # of computing, and one more for each PER_SECOND bytes of the file; a look takes milliseconds
PER_SECOND = 20 << 20
WAITING = 20  # times as long a slow disk or a busy machine may take
ROOM = 1 << 30  # bytes of address space that the look may add
SLACK = 64 << 20  # bytes: below this nothing is called a bomb
RATIO = 8  # float weights hardly compress, and Keras does not even try
BEGUN, WHOLE = "begun", "whole"


class Unreadable(Exception):
    """HDF5's library cannot be let loose on this file; the message says what it did."""


def look(path: str) -> None:
    """Go through an HDF5 file, or the one in a ``.keras`` archive, in a child process. Raises Unreadable.

    Where no child can be started (a program that embeds Python) there is no look: the file is opened all the same.
    """
    seconds = SECONDS + os.path.getsize(path) // PER_SECOND
    try:
        told = child(path, seconds)
    except subprocess.TimeoutExpired:
        raise Unreadable(f"HDF5's library does not come to an end in {seconds * WAITING:g} s") from None
    except OSError:
        return
    if told == [BEGUN]:
        raise Unreadable("HDF5's library does not come to an end, or fails, on it")
    if told and told != [BEGUN, WHOLE]:
        raise Unreadable(told[-1])


def child(path: str, seconds: int) -> list[str]:
    """What a child says of a file: BEGUN, and how it ended if it came so far; nothing where it could not begin."""
    if getattr(sys, "frozen", False) or "python" not in os.path.basename(sys.executable or "").lower():
        return []  # another program, which would start itself
    # Not from where we happen to be: files from strangers may lie there.
    places = [place for place in sys.path if isinstance(place, str) and os.path.isabs(place)]
    command = [sys.executable, "-I", "-S", __file__, json.dumps(places), path, str(seconds)]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=seconds * WAITING,
        check=False,
    )
    return done.stdout.decode("utf-8", "replace").splitlines()


def examine(path: str, seconds: int) -> Iterator[str]:
    """What the child says. It has ``seconds`` of computing, after which it dies."""
    _limit(seconds)
    yield BEGUN
    try:
        with opened(path) as file:
            _walk(file, set(), RATIO * os.path.getsize(path) + SLACK)
    except Exception as error:
        line = (str(error).strip().splitlines() or [type(error).__name__])[0]
        greedy = isinstance(error, MemoryError) or "memory allocation failed" in line
        yield "it asks for more memory than such a file can need" if greedy else line
    else:
        yield WHOLE


@contextmanager
def opened(path: str) -> Iterator[h5py.File]:
    """An HDF5 file, or the weights inside a ``.keras`` archive, read where they lie."""
    if not path.lower().endswith(".keras"):
        with h5py.File(path, "r") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        entry = archive.getinfo(WEIGHTS)
        # Keras stores members uncompressed; going back and forth in one through zipfile would read it again and again.
        stored = entry.compress_type == zipfile.ZIP_STORED
        source = _Window(path, entry) if stored else io.BytesIO(archive.read(entry))
        with source, h5py.File(source, "r") as file:
            yield file


def _walk(group: h5py.Group, seen: set[Any], most: int) -> None:
    """Everything that reading the model will ask of HDF5's library, but numbers that lie in one piece.

    Arrays that claim more than ``most`` bytes are refused later, unread.
    """
    dict(group.attrs)
    for name in group:
        if isinstance(group.get(name, getlink=True), (h5py.SoftLink, h5py.ExternalLink)):
            continue
        one = group[name]
        dict(one.attrs)
        if isinstance(one, h5py.Group) and one not in seen:
            seen.add(one)
            _walk(one, seen, most)
        elif isinstance(one, h5py.Dataset) and not one.external and not one.is_virtual:
            claimed = math.prod(one.shape or ()) * one.dtype.itemsize
            if one.chunks is not None and claimed <= most:
                for place in one.iter_chunks():
                    one[place]
            elif one.dtype.hasobject and claimed <= most:
                one[()]


def _limit(seconds: int) -> None:
    try:
        import resource
    except ImportError:  # on Windows
        return
    used = resource.getrusage(resource.RUSAGE_SELF)  # to begin with
    end = seconds + math.ceil(used.ru_utime + used.ru_stime)
    resource.setrlimit(resource.RLIMIT_CPU, (end, end))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if os.path.exists("/proc/self/statm"):  # on Linux; elsewhere the address space says little
        with open("/proc/self/statm") as file:
            room = int(file.read().split()[0]) * resource.getpagesize() + ROOM
        resource.setrlimit(resource.RLIMIT_AS, (room, room))


class _Window(io.RawIOBase):
    """One uncompressed member of a zip archive as a file of its own."""

    def __init__(self, path: str, entry: zipfile.ZipInfo):
        self._file = open(path, "rb")  # noqa: SIM115 - closed with the window
        self._file.seek(entry.header_offset)
        header = self._file.read(30)  # the local header; its last two numbers are the lengths of name and extra field
        lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        self._start, self._size = entry.header_offset + 30 + lengths, entry.file_size
        self._file.seek(self._start)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        left = max(0, self._start + self._size - self._file.tell())
        data = self._file.read(min(len(buffer), left))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self.tell(), os.SEEK_END: self._size}[whence]
        self._file.seek(self._start + base + offset)
        return self.tell()

    def tell(self) -> int:
        return self._file.tell() - self._start

    def close(self) -> None:
        self._file.close()
        super().close()


if __name__ == "__main__":
    for line in examine(sys.argv[2], int(sys.argv[3])):
        print(line, flush=True)
