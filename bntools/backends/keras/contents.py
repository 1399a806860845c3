"""What a model file of Keras holds, looked at without Keras: config, versions, its weights, and what is amiss.

A ``.keras`` file is a zip archive of ``config.json``, ``metadata.json`` and ``model.weights.h5``; ``.h5`` is HDF5 with
the config in an attribute. bntools's own notes go where Keras does not look: the archive's comment, or a dataset.
"""

from __future__ import annotations

import json
import lzma
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import h5py

from bntools import sniff
from bntools.backends.keras import looking
from bntools.backends.keras.looking import RATIO, SLACK, WEIGHTS
from bntools.errors import BntoolsError

CONFIG, METADATA, WEIGHTS_NPZ = "config.json", "metadata.json", "model.weights.npz"
NOTES = "bntools"  # the key of our notes in the comment of an archive, and the name of our dataset
MOST_NOTES = 65535  # bytes in the comment of a zip archive
LONGEST = 1 << 20  # bytes of JSON beyond the size of the file
DAMAGES = (  # what zipfile and h5py raise for bytes that are not as they should be
    zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error, lzma.LZMAError, struct.error, NotImplementedError,
    RuntimeError, ValueError, KeyError, TypeError,
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """What is known of a file without building its model.

    ``form`` is ``archive`` (.keras), ``hdf5`` (a whole model), ``weights`` (Keras 3) or ``legacy weights``. ``config``
    describes the model and ``training`` its optimizer and losses, None where the file has none. ``version`` is
    the Keras that wrote it, "" if it does not say. ``updates`` are those that bntools noted, by layer name.
    """

    path: str
    form: str
    config: dict[str, Any] | None = None
    training: dict[str, Any] | None = None
    version: str = ""
    updates: Mapping[str, int] = field(default_factory=dict)


def read(path: str) -> Contents:
    """Look into a file. Raises BntoolsError where it is none of Keras's, damaged, or claims to be absurdly large."""
    if Path(path).suffix.lower() == ".keras":
        return _read_archive(path)
    with hdf5(path, first=True) as file:
        check_datasets(path, file)
        updates = notes(_bytes(file[NOTES][()]) if isinstance(file.get(NOTES), h5py.Dataset) else b"")
        version = _attribute(file, "keras_version")
        if "model_config" in file.attrs:
            config = _object(path, "model_config", _attribute(file, "model_config"))
            training = _attribute(file, "training_config")
            told = _object(path, "training_config", training) if training else None
            if "model_weights" not in file:
                raise BntoolsError(f"{path}: holds a model's config, but no weights: the file is damaged")
            return Contents(path, "hdf5", config, told, version, updates)
        if "layer_names" in file.attrs:
            return Contents(path, "legacy weights", None, None, version, updates)
        if {"layers", "vars", "_layer_checkpoint_dependencies"} & set(file.keys()):
            return Contents(path, "weights", None, None, version, updates)
        found = ", ".join(list(file.keys())[:4]) or "nothing"
    raise BntoolsError(f"{path}: an HDF5 file, but no model or weights that Keras wrote (it holds {found})")


@contextmanager
def hdf5(path: str, first: bool = False) -> Iterator[h5py.File]:
    """An HDF5 file, open for reading; BntoolsError where it is none or damaged. ``first``: nobody has looked yet."""
    if not h5py.is_hdf5(path):
        found = sniff.describe(path)
        found = "a damaged or truncated HDF5 file" if found.startswith("an HDF5 file") else found
        raise BntoolsError(f"{path}: found {found} where a Keras model was expected (HDF5)")
    if first:
        _look(path, "HDF5 file")
    with _damaged(path, "HDF5 file"), looking.opened(path) as file:
        yield file


@contextmanager
def weights(path: str) -> Iterator[h5py.File]:
    """The weights inside a ``.keras`` archive, read where they lie."""
    with _damaged(path, "archive"), zipfile.ZipFile(path) as archive:
        if WEIGHTS not in archive.namelist():
            raise BntoolsError(f"{path}: an archive without {WEIGHTS}")
        with looking.opened(path) as file:
            yield file


def dataset(group: Any, name: str) -> h5py.Dataset:
    """A dataset of an HDF5 group that lies in this file. Raises BntoolsError for anything else under that name."""
    if isinstance(group.get(name, getlink=True), (h5py.SoftLink, h5py.ExternalLink)):
        raise BntoolsError(f"{group.file.filename}: {name} is a link, which Keras does not write: not read")
    found = group[name]
    if not isinstance(found, h5py.Dataset) or found.external or found.is_virtual:
        raise BntoolsError(f"{group.file.filename}: {name} is no array that lies in the file: not read")
    return found


def check_datasets(path: str, file: h5py.File) -> None:
    """Refuse what no honest file has: links out of it, and arrays that claim to be far larger than what is stored."""
    claimed = 0
    for name, one in _datasets(path, file, {file["/"]}):
        if one.external or one.is_virtual:
            raise BntoolsError(f"{path}: its array {name} lies in another file, which Keras does not write: not read")
        claimed += math.prod(one.shape or ()) * one.dtype.itemsize  # under each of its names
    _check_size(path, claimed, os.path.getsize(path))


def comment(updates: Mapping[str, int]) -> bytes:
    """The updates of layers as bntools's note in a file; b"" where there are none, or more than fit."""
    groups: dict[int, list[str]] = {}
    for name, number in updates.items():
        groups.setdefault(number, []).append(name)
    listed = [{"updates": number, "layers": names} for number, names in groups.items()]
    text = json.dumps({NOTES: listed}, separators=(",", ":")).encode() if listed else b""
    return text if len(text) <= MOST_NOTES else b""


def loads(path: str, what: str, text: str | bytes) -> Any:
    """JSON from a file; BntoolsError where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BntoolsError(f"{path}: damaged: its {what} is no JSON ({error})") from error


def _read_archive(path: str) -> Contents:
    if not sniff.is_zip(path):
        found = sniff.describe(path)
        found = "a damaged or truncated zip archive" if found == "a zip archive" else found
        hint = "; rename it to .h5" if found.startswith("an HDF5") else ""
        raise BntoolsError(f"{path}: found {found} where a .keras archive was expected{hint}")
    with _damaged(path, "archive"), zipfile.ZipFile(path) as archive:
        _check_members(path, archive)
        names = set(archive.namelist())
        if CONFIG not in names or not {WEIGHTS, WEIGHTS_NPZ} & names:
            raise BntoolsError(
                f"{path}: a zip archive, but no Keras model: it holds {', '.join(sorted(names)[:4]) or 'nothing'}; "
                f"expected {CONFIG} and {WEIGHTS}, as model.save writes them"
            )
        config = _object(path, CONFIG, _text(path, archive, CONFIG))
        metadata = _object(path, METADATA, _text(path, archive, METADATA)) if METADATA in names else {}
        updates = notes(archive.comment)
    if WEIGHTS in names:
        _look(path, "archive")
        with weights(path) as file:
            check_datasets(path, file)
    version = metadata.get("keras_version")
    return Contents(
        path, "archive", config, config.get("compile_config"), version if isinstance(version, str) else "", updates
    )


def _text(path: str, archive: zipfile.ZipFile, name: str) -> bytes:
    """A member that is read as JSON, each byte of which may take a hundred in memory."""
    size, actual = archive.getinfo(name).file_size, os.path.getsize(path)
    if size > actual + LONGEST:
        raise BntoolsError(
            f"{path}: its {name} claims to unpack to {size:,} bytes, and the file has {actual:,}: not read"
        )
    return archive.read(name)


def _check_members(path: str, archive: zipfile.ZipFile) -> None:
    for name in archive.namelist():
        if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name.replace("\\", "/")).parts:
            raise BntoolsError(f"{path}: its entry {name!r} leads out of the archive, which no model does: not read")
    _check_size(path, sum(entry.file_size for entry in archive.infolist()), os.path.getsize(path))


def _check_size(path: str, claimed: int, stored: int) -> None:
    if claimed > RATIO * stored + SLACK:
        raise BntoolsError(
            f"{path}: claims to unpack from {stored:,} to {claimed:,} bytes, which no model does: not read"
        )


def _datasets(path: str, group: Any, seen: set[Any], prefix: str = "") -> Iterator[tuple[str, h5py.Dataset]]:
    for name in group:
        if isinstance(group.get(name, getlink=True), (h5py.SoftLink, h5py.ExternalLink)):
            raise BntoolsError(f"{path}: its entry {prefix}{name} is a link, which Keras does not write: not read")
        one = group[name]
        if isinstance(one, h5py.Dataset):
            yield f"{prefix}{name}", one
        elif isinstance(one, h5py.Group) and one not in seen:  # hard links can form a loop
            seen.add(one)
            yield from _datasets(path, one, seen, f"{prefix}{name}/")
        elif isinstance(one, h5py.Group):
            raise BntoolsError(f"{path}: its group {prefix}{name} stands in two places, as Keras writes none: not read")
        else:
            raise BntoolsError(f"{path}: its entry {prefix}{name} is no array or group: not read")


def _look(path: str, what: str) -> None:
    try:
        looking.look(path)
    except looking.Unreadable as error:
        raise BntoolsError(f"{path}: a damaged or truncated {what} ({error})") from error


def _object(path: str, what: str, text: str | bytes) -> dict[str, Any]:
    value = loads(path, what, text)
    if not isinstance(value, dict):
        raise BntoolsError(f"{path}: damaged: its {what} holds a {type(value).__name__}, expected a JSON object")
    return value


def notes(text: bytes) -> dict[str, int]:
    """The updates in bntools's note; anything else that someone wrote there is left alone."""
    try:
        groups = json.loads(text)[NOTES] if text else []
        return {str(name): int(one["updates"]) for one in groups for name in one["layers"]}
    except (ValueError, TypeError, KeyError):
        return {}


def _attribute(file: h5py.File, name: str) -> str:
    value = file.attrs.get(name, "")
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _bytes(value: Any) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode()


@contextmanager
def _damaged(path: str, what: str) -> Iterator[None]:
    """Everything that the readers of a damaged file raise means the same."""
    try:
        yield
    except BntoolsError:
        raise
    except DAMAGES as error:
        raise BntoolsError(f"{path}: a damaged or truncated {what} ({_line(error)})") from error
    except (OSError, EOFError) as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise
        raise BntoolsError(f"{path}: a damaged or truncated {what} ({_line(error)})") from error


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
