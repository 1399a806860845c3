"""Writing through PyTorch's zip writer to a disk that may be full."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO


class _Sink(io.RawIOBase):
    """A file that remembers the first write that failed and takes all later ones as if nothing had happened.

    PyTorch's zip writer finishes its archive when it is destroyed, and ends the whole process (SIGABRT,
    an exception in a C++ destructor) where the disk is full then; what it raises earlier says "enforce fail".
    """

    def __init__(self, file: BinaryIO):
        super().__init__()
        self.file = file
        self.failure: OSError | None = None

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._attempt(lambda: self.file.seek(offset, whence), 0)

    def tell(self) -> int:
        return self.file.tell()

    def write(self, data: Any) -> int:
        return self._attempt(lambda: self.file.write(data), memoryview(data).nbytes)

    def flush(self) -> None:
        if not self.file.closed:
            self._attempt(lambda: self.file.flush() or 0, 0)

    def _attempt(self, step: Callable[[], int], pretended: int) -> int:
        if self.failure is None:
            try:
                return step()
            except OSError as error:
                self.failure = error
        return pretended


@contextmanager
def written(path: Path) -> Iterator[BinaryIO]:
    """A file to write to in the block, which raises no OSError before its end. Raises OSError then."""
    with open(path, "wb") as file:
        sink = _Sink(file)
        yield sink  # type: ignore[misc]
        sink.flush()
    if sink.failure is not None:
        raise sink.failure
