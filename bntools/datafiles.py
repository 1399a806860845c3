"""The second file of a model whose weights do not lie in the first: it appears and goes with it."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def data_file(path: str | os.PathLike[str], referred: Callable[[Path], set[str]]) -> Iterator[Path]:
    """A new name for the weights of ``path``, to be written before ``path`` itself is replaced in the block.

    ``referred`` tells the files beside it that a model file refers to. When the block ends, those go that
    the replaced file alone referred to and that bear such a name; when it raises, the new file goes. So at any moment
    the model file that is there finds its weights: a crash leaves the old pair or the new one, and at most a
    data file too many.
    """
    target = Path(os.path.realpath(path))
    data = target.with_name(f"{target.stem}.{secrets.token_hex(4)}.data")
    before = owned(target, referred)
    try:
        yield data
    except BaseException:
        with suppress(OSError):
            data.unlink()
        raise
    for old in before - owned(target, referred):
        with suppress(OSError):  # the new file is in place: what the old one leaves behind harms nobody
            old.unlink()


def owned(target: Path, referred: Callable[[Path], set[str]]) -> set[Path]:
    """The data files that a model file refers to and that were written with it, under a name from ``data_file``."""
    named = re.compile(rf"{re.escape(target.stem)}\.[0-9a-f]{{8}}\.data")
    names = referred(target) if target.is_file() else set()
    return {target.with_name(name) for name in names if named.fullmatch(name)}


def flush(path: Path) -> None:
    """Wait until what a file holds is on the disk."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
