"""Tables, whose rows are samples: of images, or of numbers as arrays.

A table has ``order(generator, most)``, the numbers of its rows in a random order that can be read in little memory,
``most`` of them drawn from all, None for a stream; ``rows(numbers)``, number and cells of each; ``place(number)``, the
folder and the name by which messages call a row; and ``drawn``, whether the first of that order stand for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from bntools import arrays, images
from bntools.errors import BntoolsError
from bntools.reading import Reading
from bntools.resizing import to_numpy

if TYPE_CHECKING:
    from bntools.sources.huggingface import DatasetRows, StreamRows
    from bntools.sources.parquet import ParquetRows

    Table: TypeAlias = "DatasetRows | StreamRows | ParquetRows"

Row = tuple[int, dict[str, Any]]  # its number and its cells
AHEAD = 256  # rows whose bytes are held while they wait to be decoded


class ImageRows:
    """The images of a table, as :class:`bntools.sources.pictures.Pictures` reads them."""

    other = "other column"
    ahead = AHEAD

    def __init__(self, table: Table):
        self._table = table
        self.container, self.heads = table.container, table.heads
        self.origin = f" from {table.columns.words} of {table.origin}"
        self.total, self.ignored = table.total, table.columns.others
        self.unlisted: list[images.Unreadable] = []

    @property
    def drawn(self) -> bool:
        """As the table has it."""
        return self._table.drawn

    def order(self, generator: np.random.Generator, most: int | None) -> np.ndarray | None:
        """As the table has it."""
        return self._table.order(generator, most)

    def entries(self, numbers: Any) -> Iterator[images.Entry]:
        """The images of these rows."""
        (name,) = self._table.columns.names
        for number, row in self._table.rows(numbers):
            yield self._entry(number, row[name])

    def _entry(self, number: int, cell: Any) -> images.Entry:
        place, name = self._table.place(number)
        if isinstance(cell, dict):
            path, cell = cell.get("path"), cell.get("bytes")
            if cell is None and path and self.container == "dataset":  # of a folder that the user loaded
                return images.Entry(number, "", str(path))
        return images.Entry(number, place, name, b"" if cell is None else cell)


@dataclass(frozen=True)
class Rows:
    """The numbers of a table as batches: arrays, or dicts of arrays by column."""

    source: str
    table: Table
    reading: Reading
    numbers: np.ndarray | None
    like: arrays.Arrays  # of some rows, which says what is done to them

    @property
    def drawn(self) -> bool:
        """Whether the first samples are drawn from all."""
        return self.table.drawn

    @property
    def samples(self) -> int | None:
        """How many samples there are; None for a stream."""
        return None if self.numbers is None else len(self.numbers)

    def batches(self, most: int | None = None, skip: int = 0) -> Iterator[Any]:
        """Batches of the samples to read here but the first ``skip``, or of the first ``most`` of all."""
        found: Iterator[Row]
        if self.numbers is None:
            found = islice(self.reading.share(self.table.rows(None), most), skip, None)
        else:
            found = self.table.rows((self.numbers[:most] if most else self.reading.dealt(self.numbers))[skip:])
        while group := list(islice(found, self.reading.batch_size)):
            yield from _arrays(self.source, self.table, self.reading, group).batches()

    def details(self) -> dict[str, Any]:
        """What was read and how, for the record."""
        return {
            **self.like.details(),
            "container": self.table.container,
            "columns": list(self.table.columns.names),
            "files": self.table.total,
        }

    def description(self) -> str:
        """What was read and how, in a line."""
        total = self.table.total
        drawn = "" if total is None or self.samples == total else f" drawn from {total:,}"
        count = "a stream of samples" if self.samples is None else f"{self.samples:,} samples"
        return f"{count}{drawn}: {self.like.words()} from {self.table.columns.words} of {self.table.origin}"


def rows(source: str, table: Table, reading: Reading) -> Rows:
    """A table of numbers as data. Raises BntoolsError where it is empty, or options do not fit it."""
    order = table.order(np.random.default_rng(reading.seed), reading.max_samples)
    numbers = None if order is None else order[: reading.max_samples]
    first = list(islice(table.rows(numbers), 1))
    if not first:
        raise BntoolsError(f"{source}: has no rows")
    like = _arrays(source, table, reading, first)
    arrays.check_options(source, like.content, reading)
    return Rows(source, table, reading, numbers, like)


def _arrays(source: str, table: Table, reading: Reading, group: list[Row]) -> arrays.Arrays:
    """Some rows as arrays, one for a single column."""
    content = {name: _stacked(source, table, name, group) for name in table.columns.names}
    whole = next(iter(content.values())) if len(content) == 1 else content
    whole_reading = replace(reading, shard=None, max_samples=None)  # these rows are those to read already
    return arrays.Arrays(whole, whole_reading, np.arange(len(group)), len(group))


def _stacked(source: str, table: Table, name: str, group: list[Row]) -> np.ndarray:
    values = [to_numpy(row[name]) for _, row in group]
    shapes = {value.shape for value in values}
    if len(shapes) == 1 and values[0].dtype.kind in "fiub":
        return np.stack(values)
    other = next((i for i, value in enumerate(values) if value.shape != values[0].shape), 0)
    found = f"shape {values[other].shape}, and before it {values[0].shape}" if other else str(values[0].dtype)
    raise BntoolsError(
        f"{source}: {table.place(group[other][0])[1]}: the column {name!r} has {found}; expected numbers of one shape "
        f"in every row"
    )
