"""Rows of Parquet files in a random order, in little memory.

A row group can only be read from its beginning on. So row groups are read one after another in a random order, each
once, and rows are mixed within a window: as many bytes as are held at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np

from bntools.errors import BntoolsError
from bntools.sources import columns
from bntools.sources.names import each
from bntools.sources.parts import Stamp, stamp

try:
    import pyarrow.parquet as pq
except ModuleNotFoundError as missing:
    raise BntoolsError(
        f"reading Parquet needs the package {missing.name!r}, which is not installed: pip install 'bntools[parquet]'"
    ) from missing

WINDOW = 64 << 20  # bytes of rows, unpacked, that are held so that they come in a random order
HEADS = 256  # rows of images that are looked at before reading: more would mean to read them all twice
ROWS, BUFFER = 16, 1 << 20  # rows and bytes that are read from a file at a time


class ParquetRows:
    """The rows of Parquet files; their numbers count through the files and their row groups in order."""

    container = "parquet"
    heads = HEADS

    def __init__(self, paths: Sequence[Path], column: str | None):
        self._paths = paths
        found = [_looked_into(path, column) for path in paths]
        self.columns = found[0][0]
        for path, (mine, *_) in zip(paths, found, strict=True):
            if (mine.names, mine.images) != (self.columns.names, self.columns.images):
                raise BntoolsError(f"{path}: has {mine.words}, and {paths[0]} has {self.columns.words}")
        self._metadata = [metadata for _, metadata, _ in found]
        self._stamps = [stamped for *_, stamped in found]
        groups = [(i, g) for i, metadata in enumerate(self._metadata) for g in range(metadata.num_row_groups)]
        self._file, self._group = np.array(groups, np.int64).reshape(-1, 2).T
        self._ends = np.cumsum([self._metadata[i].row_group(g).num_rows for i, g in groups], dtype=np.int64)
        self._starts = np.concatenate([[0], self._ends])
        self._bytes = np.array([self._row_bytes(i, g) for i, g in groups])
        self._rank = np.arange(len(groups))  # of a group in the order of reading
        self.drawn = True

    @property
    def origin(self) -> str:
        """Where the rows lie, in words."""
        return "a Parquet file" if len(self._paths) == 1 else f"{len(self._paths):,} Parquet files"

    @property
    def total(self) -> int:
        """How many rows there are."""
        return int(self._starts[-1])

    def order(self, generator: np.random.Generator, most: int | None) -> np.ndarray:
        """The numbers of all rows, or of ``most`` drawn from all, at random as far as a window reaches."""
        arranged = generator.permutation(len(self._group))
        self._rank = np.argsort(arranged)
        numbers = np.arange(self.total)
        if most is not None and most < self.total:
            numbers = generator.permutation(self.total)[:most]
        windows = self._window(numbers)
        self.drawn = len(numbers) < self.total or windows.max(initial=0) == 0
        return numbers[np.lexsort((generator.random(len(numbers)), windows))]

    def rows(self, numbers: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and cells of these rows, whose order is one that ``order`` gave, or a part of it."""
        windows = self._window(numbers)
        scan = self._scan(numbers[np.lexsort((numbers, self._rank[self._group_of(numbers)]))])
        for _, window in groupby(zip(each(windows), each(numbers), strict=True), key=lambda pair: pair[0]):
            wanted = [number for _, number in window]
            held = dict(islice(scan, len(wanted)))
            for number in wanted:
                yield number, held.pop(number)

    def place(self, number: int) -> tuple[str, str]:
        """The folder of a row's file, and the name of the file with the row's place in it."""
        index = int(self._file[self._group_of(np.array([number]))[0]])
        first = int(self._starts[int(np.searchsorted(self._file, index))])
        path = self._paths[index]
        return os.path.join(path.parent, ""), f"{path.name}: row {number - first}"

    def _group_of(self, numbers: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._ends, numbers, side="right")

    def _window(self, numbers: np.ndarray) -> np.ndarray:
        """Which windowful of bytes each row lies in, counted in the order of reading."""
        groups = self._group_of(numbers)
        size = self._bytes * np.diff(self._starts)
        before = (np.cumsum(size[np.argsort(self._rank)]))[self._rank] - size
        return ((before[groups] + (numbers - self._starts[groups]) * self._bytes[groups]) // WINDOW).astype(np.int64)

    def _row_bytes(self, file: int, group: int) -> float:
        """What a row of a group takes in memory, by what the file says, other columns included."""
        # Not from its columns: pyarrow ends the process (SIGABRT) where their metadata is damaged (26.0, column).
        found = self._metadata[file].row_group(group)
        return max(1.0, found.total_byte_size / max(1, found.num_rows))

    def _scan(self, numbers: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        """These rows in the order of reading, in which they have to come."""
        groups = self._group_of(numbers)
        for group, pairs in groupby(zip(each(groups), each(numbers), strict=True), key=lambda pair: pair[0]):
            start, index = int(self._starts[group]), int(self._file[group])
            path = self._paths[index]
            with _reading(path), open(path, "rb") as file:
                if stamp(file.fileno()) != self._stamps[index]:
                    raise BntoolsError(f"{path}: was changed while it was read; run again once nobody writes to it")
                opened = pq.ParquetFile(file, metadata=self._metadata[index], buffer_size=BUFFER, pre_buffer=False)
                batches = opened.iter_batches(
                    ROWS, row_groups=[int(self._group[group])], columns=list(self.columns.names), use_threads=False
                )
                yield from _picked(batches, [number - start for _, number in pairs], start, self.columns.names)


def _picked(
    batches: Any, wanted: list[int], start: int, names: tuple[str, ...]
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Of the batches of a row group the wanted rows, whose places in the group ascend."""
    first, left = 0, iter(wanted)
    place = next(left, None)
    for batch in batches:
        chosen = []
        while place is not None and place < first + batch.num_rows:
            chosen.append(place - first)
            place = next(left, None)
        if chosen:
            cells = columns.rows(batch.take(chosen) if len(chosen) < batch.num_rows else batch, names)
            for offset, row in zip(chosen, cells, strict=True):
                yield start + first + offset, row
        if place is None:
            return
        first += batch.num_rows
    raise ValueError(f"it has {first} rows in a row group, fewer than it says")


def _looked_into(path: Path, column: str | None) -> tuple[columns.Columns, Any, Stamp]:
    """The columns of a file, its metadata, and what tells that it is still the same."""
    with _reading(path), open(path, "rb") as file:
        opened = pq.ParquetFile(file)
        found = columns.choose(str(path), columns.kinds_of(opened.schema_arrow), column)
        return found, opened.metadata, stamp(file.fileno())


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except BntoolsError:
        raise
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be read as Parquet: {error}") from error
    except Exception as error:
        # Arrow's and Thrift's readers raise many things for damaged files, which all mean the same here.
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BntoolsError(f"{path}: no readable Parquet file: {said}") from error
