"""Opening what holds samples: which reader serves it, and what is asked of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bntools import arrays, factories, sources
from bntools.errors import BntoolsError
from bntools.reading import Reading
from bntools.sources import huggingface

if TYPE_CHECKING:
    from bntools.sources.pictures import Pictures, Stock
    from bntools.sources.tables import Rows, Table

    Source = Pictures | Rows | arrays.Arrays | factories.Factory

UNNAMED = "datasets."  # how the source of data begins that came as an object


def opened(source: Any, reading: Reading) -> tuple[str, str, Source]:
    """What kind of samples a source holds (images, arrays or factory), its name, and what reads it.

    Raises BntoolsError where there is nothing to read, or it cannot be read as asked.
    """
    if huggingface.is_dataset(source):
        return _dataset(huggingface.named(source), source, reading)
    try:
        found = sources.find(source)
        if found is not None:
            return _at(str(source), found, reading)
    except OSError as error:
        raise BntoolsError(f"{source}: cannot be read: {error.strerror or error}") from error
    name = str(source)
    if "://" in name:
        raise BntoolsError(f"{name}: an address; data is read from this machine: download it first, or name a factory")
    if ":" in name:
        factory = factories.find(name, reading)
        if huggingface.is_dataset(made := factory.begin()):
            return _dataset(name, made, reading)
        factory.check()
        return "factory", name, factory
    raise BntoolsError(
        f"{name}: no such file or folder; expected a folder of images, tar or Parquet files, a file of arrays "
        f"({', '.join(arrays.SUFFIXES)}) or a factory package.module:function"
    )


def _at(name: str, found: sources.Found, reading: Reading) -> tuple[str, str, Source]:
    path = found.paths[0]
    if found.kind == "dataset":
        return _dataset(name, huggingface.saved(path), reading)
    if found.kind == "parquet":
        from bntools.sources.parquet import ParquetRows

        return _table(name, ParquetRows(found.paths, reading.column), reading)
    if reading.column is not None:
        raise BntoolsError(f"{name}: column= (--column) is for Parquet files and datasets; this is neither")
    if found.kind == "arrays":
        return "arrays", name, arrays.read(path, reading)
    return _images(name, _stock(found), reading)


def _stock(found: sources.Found) -> Stock:
    path = found.paths[0]
    _check_pillow()
    from bntools.sources import folders, tars
    from bntools.sources.suffixes import IMAGES

    if found.kind == "tar":
        return tars.index(found.paths)
    if found.kind == "folder":
        return folders.find(path)
    if path.suffix.lower() not in IMAGES:
        raise BntoolsError(
            f"{path}: unknown kind of data file; expected images, tar, Parquet or {', '.join(arrays.SUFFIXES)}"
        )
    return folders.one(path)


def _dataset(name: str, dataset: Any, reading: Reading) -> tuple[str, str, Source]:
    return _table(name, huggingface.table(name, dataset, reading.column, reading.seed), reading)


def _table(name: str, table: Table, reading: Reading) -> tuple[str, str, Source]:
    from bntools.sources import tables

    if not table.columns.images:
        return "arrays", name, tables.rows(name, table, reading)
    _check_pillow()
    return _images(name, tables.ImageRows(table), reading)


def _images(name: str, stock: Stock, reading: Reading) -> tuple[str, str, Source]:
    from bntools.sources import pictures

    return "images", name, pictures.survey(name, stock, reading)


def _check_pillow() -> None:
    try:
        import PIL  # noqa: F401
    except ModuleNotFoundError as error:
        raise BntoolsError(f"reading images needs the package {error.name!r}: pip install pillow") from error
