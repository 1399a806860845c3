"""Writing a folder all or not at all."""

from __future__ import annotations

import ctypes
import errno
import os
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bntools.datafiles import flush, taken
from bntools.errors import BntoolsError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of Linux: fcntl.h, fs.h


@contextmanager
def atomic_folder(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Write a folder all or not at all: yields an empty folder beside it to fill.

    When the block ends, what was written is flushed to the disk and takes the place of ``path``; when it raises,
    anything at all, it is removed and ``path`` is as before. Where the system cannot exchange two folders in one step
    (Linux can, on its usual file systems), a crash in between leaves the old one beside its place, under a hidden
    name. With ``overwrite=False`` nothing is replaced.

    Raises BntoolsError where the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise BntoolsError(f"{path}: is a file; expected the name of a folder to write")
    if not target.parent.is_dir():
        raise BntoolsError(f"{path}: the folder {target.parent} does not exist; create it first")
    if not overwrite and target.exists():
        raise taken(path)
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for place in temporary.rglob("*"):
            if place.is_file():
                flush(place)
        _swap(temporary, target, overwrite)
    except OSError as error:
        if not overwrite and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise taken(path) from error
        raise BntoolsError(
            f"{path}: cannot be written: {error.strerror or error} "
            f"({'the folder there is as before' if target.exists() else 'nothing was left behind'})"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path, overwrite: bool) -> None:
    if not overwrite or not target.exists():
        new.rename(target)  # fails where a folder with anything in it has appeared
        return
    if _exchanged(new, target):
        shutil.rmtree(new, ignore_errors=True)
        return
    old = target.with_name(f"{new.name}.old")
    target.rename(old)
    try:
        new.rename(target)
    except BaseException:
        with suppress(OSError):
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two folders were exchanged in one step, by Linux's renameat2, for which Python has no name."""
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "renameat2"):
        return False
    return libc.renameat2(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(other), ctypes.c_uint(RENAME_EXCHANGE)) == 0
