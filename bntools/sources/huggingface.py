"""Datasets of Hugging Face's library ``datasets``, which is not imported here unless a folder asks for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bntools.batches import said
from bntools.errors import BntoolsError
from bntools.sources import columns

CLASSES = ("Dataset", "IterableDataset", "DatasetDict", "IterableDatasetDict")
TOGETHER = 32  # rows that are fetched at a time
HEADS = 256  # rows of images that are looked at before reading
SHUFFLED = 1000  # rows of a stream among which the next is drawn


def is_dataset(value: Any) -> bool:
    """Whether a value is a dataset or a dict of them; nobody has one who has not imported the library."""
    library = sys.modules.get("datasets")
    classes = tuple(getattr(library, name) for name in CLASSES if hasattr(library, name))
    return isinstance(value, classes)


def saved(folder: Path) -> Any:
    """The dataset in a folder that ``save_to_disk`` wrote. Raises BntoolsError where it cannot be read."""
    try:
        import datasets
    except ModuleNotFoundError as error:
        raise BntoolsError(
            f"{folder}: a dataset that needs the package {error.name!r}, which is not installed: pip install datasets"
        ) from error
    try:
        return datasets.load_from_disk(str(folder))
    except Exception as error:
        # The library raises its own, Arrow's and json's errors for what is damaged.
        raise BntoolsError(f"{folder}: no readable dataset: {said(error)}") from error


def named(dataset: Any) -> str:
    """A dataset that came as an object, in words for messages and records."""
    fingerprint = getattr(dataset, "_fingerprint", None)
    return f"datasets.{type(dataset).__name__}{f' {fingerprint}' if fingerprint else ''}"


def table(source: str, dataset: Any, column: str | None, seed: int) -> DatasetRows | StreamRows:
    """The rows of a dataset. Raises BntoolsError for several splits, and where no column holds images or numbers."""
    if isinstance(dataset, dict):  # a DatasetDict is one
        if len(dataset) != 1:
            raise BntoolsError(
                f"{source}: holds the splits {', '.join(map(str, dataset)) or 'none'}: give one of them, as in "
                f"dataset['train'] or the folder of that name"
            )
        dataset = next(iter(dataset.values()))
    if isinstance(dataset, sys.modules["datasets"].Dataset):
        return DatasetRows(source, dataset, column)
    return StreamRows(source, dataset, column, seed)


class DatasetRows:
    """The rows of a ``datasets.Dataset``, which lies in memory-mapped files: any row can be had at any time."""

    container = "dataset"
    heads = HEADS
    origin = "a dataset"
    drawn = True

    def __init__(self, source: str, dataset: Any, column: str | None):
        self._source = source
        if not len(dataset):
            raise BntoolsError(f"{source}: the dataset has no rows")
        self.total = len(dataset)
        self._arrow = (dataset.format or {}).get("type") != "custom"
        if self._arrow:
            self._rows = dataset.with_format("arrow")
            kinds = columns.kinds_of(self._rows[:0].schema.with_metadata(dataset.features.arrow_schema.metadata))
            self.columns = columns.choose(source, kinds, column)
            self._rows = self._rows.select_columns(list(self.columns.names))
        else:  # a transform of the user's own, such as one that augments
            self._rows = dataset
            self.columns = columns.choose(source, columns.kinds_of_row(_fetched(source, lambda: dataset[0])), column)

    def order(self, generator: np.random.Generator, most: int | None) -> np.ndarray:
        """The numbers of all rows in a random order."""
        return generator.permutation(self.total)

    def rows(self, numbers: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """Number and cells of these rows."""
        for start in range(0, len(numbers), TOGETHER):
            chosen = numbers[start : start + TOGETHER].tolist()
            found = _fetched(self._source, lambda chosen=chosen: self._rows[chosen])
            yield from zip(chosen, self._each(found), strict=True)

    def place(self, number: int) -> tuple[str, str]:
        """By its number, which is all that it has."""
        return "", f"row {number}"

    def _each(self, found: Any) -> Iterator[dict[str, Any]]:
        names = self.columns.names
        if self._arrow:
            yield from columns.rows(found, names)
            return
        for values in zip(*(found[name] for name in names), strict=True):
            yield dict(zip(names, values, strict=True))


class StreamRows:
    """The rows of a ``datasets.IterableDataset``, which come as they come, shuffled by the library."""

    container = "dataset"
    heads = HEADS
    origin = "a streamed dataset"
    total = None
    drawn = False

    def __init__(self, source: str, dataset: Any, column: str | None, seed: int):
        self._source = source
        for name, feature in (dataset.features or {}).items():
            if type(feature).__name__ == "Image" and feature.decode:
                dataset = dataset.cast_column(name, type(feature)(decode=False))
        first = _fetched(source, lambda: next(iter(dataset), None))
        if first is None:
            raise BntoolsError(f"{source}: the dataset has no rows")
        kinds = columns.kinds_of_row(first)
        for name, feature in (dataset.features or {}).items():
            if type(feature).__name__ == "ClassLabel":
                kinds[name] = "label"
        self.columns = columns.choose(source, kinds, column)
        self._dataset = dataset.shuffle(seed=seed, buffer_size=SHUFFLED)

    def order(self, generator: np.random.Generator, most: int | None) -> None:
        """None: rows have no numbers by which they could be had."""

    def rows(self, numbers: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        """All rows, counted as they come."""
        found = iter(self._dataset)
        number = 0
        while (row := _fetched(self._source, lambda: next(found, None))) is not None:
            yield number, {name: row.get(name) for name in self.columns.names}
            number += 1

    def place(self, number: int) -> tuple[str, str]:
        """By its place in the stream."""
        return "", f"row {number}"


def _fetched(source: str, fetch: Any) -> Any:
    """What the library or the user's own transform gives, whose errors become BntoolsErrors."""
    try:
        return fetch()
    except BntoolsError:
        raise
    except Exception as error:
        raise BntoolsError(f"{source}: the dataset raised {said(error)}") from error
