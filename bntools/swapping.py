"""Writing a folder all or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bntools.datafiles import flush
from bntools.errors import BntoolsError


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Write a folder all or not at all: yields an empty folder beside it to fill.

    When the block ends, what was written is flushed to the disk and takes the place of ``path``; when it raises,
    anything at all, it is removed and ``path`` is as before. No system replaces a folder in one step: a
    crash of the machine in between leaves the old one beside its place, under a hidden name.

    Raises BntoolsError where the folder cannot be written.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_dir():
        raise BntoolsError(f"{path}: is a file; expected the name of a folder to write")
    if not target.parent.is_dir():
        raise BntoolsError(f"{path}: the folder {target.parent} does not exist; create it first")
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
        yield temporary
        for place in temporary.rglob("*"):
            if place.is_file():
                flush(place)
        _swap(temporary, target)
    except OSError as error:
        raise BntoolsError(
            f"{path}: cannot be written: {error.strerror or error} "
            f"({'the folder there is as before' if target.exists() else 'nothing was left behind'})"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _swap(new: Path, target: Path) -> None:
    if not target.exists():
        new.rename(target)
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
