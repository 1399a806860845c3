"""Which columns of a table are data, and what is in their cells: images, or numbers and lists of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from bntools.errors import BntoolsError

LABELS = ("label", "labels")  # what tells a label from an input, where no type does
INDEX = "__index_level_"  # pandas's own


@dataclass(frozen=True)
class Columns:
    """The column that holds images, or those that hold numbers, and how many there are beside them."""

    names: tuple[str, ...]
    images: bool
    others: int

    @property
    def words(self) -> str:
        """For people: ``the column 'image'``."""
        listed = ", ".join(map(repr, self.names))
        return f"the column{'s' * (len(self.names) > 1)} {listed}"


def choose(source: str, kinds: Mapping[str, str], column: str | None) -> Columns:
    """The columns to read, of those that are of some kind: ``image``, ``bytes``, ``numbers``, ``label``, or another.

    ``column`` is what the user named. Otherwise images come before bytes, which may hold images, and those before
    numbers, of which all columns but labels are taken. Raises BntoolsError where that is not clear.
    """
    listed = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
    if column is not None:
        if column not in kinds:
            raise BntoolsError(f"{source}: has no column {column!r}; it has {listed}")
        if kinds[column] not in ("image", "bytes", "numbers", "label"):
            raise BntoolsError(
                f"{source}: the column {column!r} holds {kinds[column]}; expected images, numbers or lists of numbers"
            )
        return Columns((column,), kinds[column] in ("image", "bytes"), len(kinds) - 1)
    for wanted in ("image", "bytes"):
        found = [name for name, kind in kinds.items() if kind == wanted]
        if len(found) > 1 and "image" in found:
            found = ["image"]
        if len(found) > 1:
            raise BntoolsError(
                f"{source}: several columns may hold images ({', '.join(found)}): name one with column= (--column)"
            )
        if found:
            return Columns((found[0],), True, len(kinds) - 1)
    numbers = tuple(name for name, kind in kinds.items() if kind == "numbers")
    if not numbers:
        raise BntoolsError(f"{source}: no column of images or numbers; found {listed or 'no columns'}")
    return Columns(numbers, False, len(kinds) - len(numbers))


def kinds_of(schema: Any) -> dict[str, str]:
    """What each column of an Arrow schema holds, as :func:`choose` wants it."""
    told = _features(schema.metadata or {})
    return {
        field.name: _kind_of_type(field.type, told.get(field.name), field.name)
        for field in schema
        if not field.name.startswith(INDEX)
    }


def kinds_of_row(row: Mapping[str, Any]) -> dict[str, str]:
    """The same of a row of Python values."""
    return {str(name): _kind_of_value(value, str(name)) for name, value in row.items()}


def rows(table: Any, names: tuple[str, ...]) -> Iterator[dict[str, Any]]:
    """The rows of an Arrow table or record batch: a cell of images as bytes or a dict, numbers as an array."""
    cells = [_cells(table.column(name)) for name in names]
    for values in zip(*cells, strict=True):
        yield dict(zip(names, values, strict=True))


def is_picture(value: Any) -> bool:
    """Whether a Python value is an image of Pillow's, or bytes as Hugging Face writes those of an image."""
    return hasattr(value, "getbands") or (isinstance(value, dict) and {"bytes", "path"} >= set(value) and bool(value))


def _kind_of_type(kind: Any, told: str | None, name: str) -> str:
    import pyarrow as pa

    if pa.types.is_struct(kind):
        fields = {kind.field(i).name: kind.field(i).type for i in range(kind.num_fields)}
        image = told in (None, "Image") and "bytes" in fields and _is_bytes(fields["bytes"])
        return "image" if image else f"a {told or kind}"
    if _is_bytes(kind):
        return "bytes"
    leaf = _leaf(kind)
    if pa.types.is_integer(leaf) or pa.types.is_floating(leaf) or pa.types.is_boolean(leaf):
        return "label" if told == "ClassLabel" or (leaf == kind and name in LABELS) else "numbers"
    return str(kind)


def _kind_of_value(value: Any, name: str) -> str:
    if is_picture(value):
        return "image"
    if isinstance(value, bytes):
        return "bytes"
    array = np.asarray(value) if isinstance(value, (int, float, list, np.generic)) else value
    if hasattr(array, "shape") and getattr(np.asarray(array).dtype, "kind", "O") in "fiub":
        return "label" if not array.shape and name in LABELS else "numbers"
    return type(value).__name__


def _features(metadata: Mapping[bytes, bytes]) -> dict[str, str]:
    """What Hugging Face's datasets wrote of the types of columns: ``Image``, ``ClassLabel``, ``Audio``."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: str(feature["_type"]) for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _is_bytes(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _leaf(kind: Any) -> Any:
    """The type of the numbers in lists of lists."""
    import pyarrow as pa

    while True:
        if isinstance(kind, pa.ExtensionType):
            kind = kind.storage_type
        elif pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
            kind = kind.value_type
        else:
            return kind


def _cells(column: Any) -> Iterator[Any]:
    import pyarrow as pa

    column = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    while isinstance(column, pa.ExtensionArray):
        column = column.storage
    leaf = _leaf(column.type)
    if pa.types.is_struct(column.type) or _is_bytes(leaf):
        return (column[i].as_py() for i in range(len(column)))
    dtype = np.dtype(leaf.to_pandas_dtype())
    return (np.array(column[i].as_py(), dtype) for i in range(len(column)))
