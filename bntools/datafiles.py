"""The second file of a model whose weights do not lie in the first: it appears and goes with it."""

from __future__ import annotations

import os
import re
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bntools.errors import BntoolsError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_threads = threading.RLock()
_turns: set[Path] = set()  # folders that are locked
_obsolete: set[Path] = set()  # data files in them that no file refers to any more


@contextmanager
def data_file(
    path: str | os.PathLike[str], referred: Callable[[Path], set[str]], name: Path | None = None
) -> Iterator[Path]:
    """A new name for the weights of ``path``, to be written before ``path`` itself is replaced in the block.

    ``name`` is one from ``new_name`` that was taken already.
    ``referred`` tells the files beside it that a model file refers to. When the block ends, those go that
    the replaced file alone referred to and that bear such a name; when it raises, the new file goes. Inside of a
    ``turn`` the old ones go at its end, if that is a good one. So at any moment the model file that is there finds
    its weights: a crash leaves the old pair or the new one, and at most a data file too many.
    """
    target = Path(os.path.realpath(path))
    data = new_name(target) if name is None else name
    with turn(target.parent):  # else another process could replace the file after it was looked into
        before = owned(target, referred)
        try:
            yield data
        except BaseException:
            with suppress(OSError):
                data.unlink()
            raise
        _obsolete.update(before - owned(target, referred))


def new_name(path: str | os.PathLike[str]) -> Path:
    """A name for a data file of this model file that no other has."""
    target = Path(os.path.realpath(path))
    return target.with_name(f"{target.stem}.{secrets.token_hex(4)}.data")


@contextmanager
def turn(folder: Path) -> Iterator[None]:
    """Write files that belong together while no other bntools does so in this folder: processes wait for each other.

    The lock is on the folder itself: no file of it is left, and it goes with its process. Where a system or file
    system knows no such locks, files are written without.
    """
    with _threads:
        if folder in _turns:
            yield
            return
        with _locked(folder):
            _turns.add(folder)
            try:
                yield
                for old in [one for one in _obsolete if one.parent == folder]:
                    with suppress(OSError):  # the new file is in place: what the old one leaves behind harms nobody
                        old.unlink()
            finally:
                _turns.discard(folder)
                _obsolete.difference_update([one for one in _obsolete if one.parent == folder])


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        yield
        return
    try:
        with suppress(OSError):
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def owned(target: Path, referred: Callable[[Path], set[str]]) -> set[Path]:
    """The data files that a model file refers to and that were written with it, under a name from ``data_file``."""
    named = re.compile(rf"{re.escape(target.stem)}\.[0-9a-f]{{8}}\.data")
    names = referred(target) if target.is_file() else set()
    return {target.with_name(name) for name in names if named.fullmatch(name)}


def taken(path: str | os.PathLike[str]) -> BntoolsError:
    """The error for a file that is there and not to be replaced."""
    return BntoolsError(f"{path} exists and was not to be overwritten: it is as before. Choose another name")


def flush(path: Path) -> None:
    """Wait until what a file holds is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
