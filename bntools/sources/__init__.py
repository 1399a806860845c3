"""Where samples lie, other than in one file of arrays: folders, tar files, Parquet files and datasets.

This module tells which of them a name stands for, and imports none of what reads them.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bntools import arrays
from bntools.errors import BntoolsError
from bntools.sources.suffixes import IMAGES

TAR, PARQUET = (".tar",), (".parquet", ".pq")
PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
PATTERN = re.compile(r"[*?{]|\[.+\]")
MOST = 100_000  # files that a pattern in braces may stand for
DATASET = (("dataset_dict.json",), ("dataset_info.json", "state.json"))  # what datasets' save_to_disk writes


@dataclass(frozen=True)
class Found:
    """What a name stands for: ``kind`` is folder, image, tar, parquet, dataset or arrays."""

    kind: str
    paths: tuple[Path, ...]


def find(source: str | Path) -> Found | None:
    """What a path, or a pattern such as ``train-{000..011}.tar`` or ``data/*.parquet``, stands for; None for nothing.

    A file or folder of just that name comes before a pattern. Raises BntoolsError for a pattern that fits nothing, or
    files of several kinds.
    """
    path = Path(source)
    if path.is_dir():
        return _folder(path)
    if path.is_file():
        return Found(_kind(path), (path,))
    text = str(source)
    if not PATTERN.search(text):
        return None
    paths = tuple(path for name in _expanded(text) for path in _globbed(text, name))
    kinds = {_kind(path) for path in paths}
    if len(kinds) == 1 and kinds <= {"tar", "parquet"}:
        return Found(kinds.pop(), paths)
    if len(paths) == 1:
        return find(paths[0])
    raise BntoolsError(
        f"{source}: stands for {len(paths):,} files ({paths[0]}, ...); expected tar or Parquet files only"
    )


def _folder(path: Path) -> Found:
    """A folder of images, unless datasets wrote it, or it holds tar or Parquet files and neither images nor folders."""
    if any(all((path / name).is_file() for name in names) for names in DATASET):
        return Found("dataset", (path,))
    files = _shards(path)
    kinds = {_kind(file) for file in files}
    if len(kinds) > 1:
        raise BntoolsError(f"{path}: holds tar files and Parquet files: name those to read, as in {path / '*.tar'}")
    return Found(kinds.pop(), tuple(files)) if kinds else Found("folder", (path,))


def _shards(path: Path) -> list[Path]:
    """The tar or Parquet files of a folder in which there are neither images nor folders; else none."""
    files = []
    with os.scandir(path) as entries:
        for one in entries:
            if one.name.startswith("."):
                continue
            suffix = os.path.splitext(one.name)[1].lower()
            if suffix in IMAGES or one.is_dir():
                return []
            if suffix in (*TAR, *PARQUET) or one.name.lower().endswith(PACKED):
                files.append(path / one.name)
    return sorted(files)


def _kind(path: Path) -> str:
    suffix, name = path.suffix.lower(), path.name.lower()
    if suffix in TAR or name.endswith(PACKED):
        return "tar"
    if suffix in PARQUET:
        return "parquet"
    return "arrays" if suffix in arrays.SUFFIXES else "image"


def _expanded(pattern: str) -> Iterator[str]:
    """The names that ``{000..011}`` and ``{a,b}`` stand for, as in a shell."""
    found = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", pattern)
    if found is None:
        yield pattern
        return
    first, last, listed = found.groups()
    if listed is None and abs(int(last) - int(first)) >= MOST:
        raise BntoolsError(f"{pattern}: stands for more than {MOST:,} files")
    step = 1 if listed is not None or int(first) <= int(last) else -1
    width = len(first or "") if (first or "").startswith("0") else 0
    each = listed.split(",") if listed is not None else range(int(first), int(last) + step, step)
    for one in each:
        value = one if isinstance(one, str) else f"{one:0{width}}"
        yield from _expanded(pattern[: found.start()] + value + pattern[found.end() :])


def _globbed(pattern: str, name: str) -> list[Path]:
    """The files that one of the names of a pattern stands for."""
    if not re.search(r"[*?]|\[.+\]", name) or Path(name).is_file():
        if not Path(name).is_file():
            raise BntoolsError(f"{pattern}: there is no file {name}")
        return [Path(name)]
    found = sorted(Path(one) for one in glob.glob(name, recursive=True) if Path(one).is_file())
    if not found:
        raise BntoolsError(f"{pattern}: no file has such a name")
    return found
