"""The record that lies beside a model bntools wrote: what was done, with what, and how it went."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from bntools import __version__, datafiles
from bntools.errors import BntoolsError

from . import paths
from .output import jsonable

PACKAGES = ("torch", "numpy", "pillow", "onnx", "onnxruntime", "onnx-ir", "onnxscript", "keras", "tensorflow")


def destinations(model: Path, target: Path | None, in_place: bool, force: bool) -> tuple[Path, Path]:
    """Where a recalibrated model and its record go.

    Raises BntoolsError if that would overwrite something: only ``--in-place`` replaces the model, and
    then also the record of an earlier time, but no other file of that name.
    """
    written = paths.destination(model, "recalibrated", target, in_place)
    record = paths.record_of(written)
    paths.refuse_existing(written, force=force or in_place)
    paths.refuse_existing(record, force=force or (in_place and read(record) is not None))
    return written, record


def provenance(verb: str, model: Path, output: Path) -> dict[str, Any]:
    """What a record begins with: command, date, versions, and the file that was read."""
    return {
        "bntools": __version__,
        "verb": verb,
        "command": click.get_current_context().obj,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version(), **_versions()},
        "source": {"file": str(model), "sha256": _sha256(model)},
        "output": str(output),
    }


def recalibration(result: Any) -> dict[str, Any]:
    """What a recalibration did: figures first, then statistics before and after, layer by layer."""
    return {
        "method": result.method,
        "samples": result.samples,
        "virtual_batches": result.virtual_batches,
        "residual": result.residual,
        "standard_error": result.standard_error,
        "convergence": result.convergence,
        "notes": list(result.notes),
        "untouched": dict(result.untouched),
        "layers": [
            {
                "name": layer.name,
                "drift": layer.drift,
                "before": {"mean": layer.before.mean, "var": layer.before.var},
                "after": {"mean": layer.after.mean, "var": layer.after.var},
            }
            for layer in result.layers
        ],
    }


def text(record: dict[str, Any]) -> str:
    """The record as JSON, with one line for each layer: there are thousands of numbers in it."""
    head = jsonable({**record, "layers": []})
    lines = ",\n".join(f"    {json.dumps(jsonable(layer), allow_nan=False)}" for layer in record.get("layers", ()))
    body = json.dumps(head, indent=2, allow_nan=False)
    return body.removesuffix("[]\n}") + (f"[\n{lines}\n  ]\n}}\n" if lines else "[]\n}\n")


def read(path: Path) -> dict[str, Any] | None:
    """The record at this path; None if there is none or the file is something else."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, UnicodeDecodeError, json.JSONDecodeError):
        return None
    return record if isinstance(record, dict) and "bntools" in record else None


def write_both(model: Any, output: Path, record: dict[str, Any], record_path: Path, *, overwrite: bool = True) -> None:
    """Write a model and its record, or neither: a failure of one leaves both files as they were.

    Two processes that write the same files do so one after the other. One that is killed in between leaves a model
    without a record, never with that of another model.
    """
    import bntools
    from bntools.files import atomic_write

    place, record_place = (Path(os.path.realpath(path)) for path in (output, record_path))
    with (
        datafiles.turn(place.parent),
        _kept(place, overwrite) as written,
        _kept(record_place, overwrite),
        atomic_write(record_path, overwrite=overwrite) as temporary,
    ):
        temporary.write_text(text(record), encoding="utf-8")
        if overwrite:
            record_place.unlink(missing_ok=True)
        bntools.save(model, output, overwrite=overwrite)
        written()


@contextmanager
def _kept(path: Path, overwrite: bool) -> Iterator[Callable[[], None]]:
    """If the block fails, put back the file that was at this path, or none if there was none; new data files go.

    Where nothing is to be overwritten, what is there may be another's: it goes only after the block has said, by what
    it is given, that it has written it. The old data file is not touched before the end of the turn. A second name for
    it, as for the file itself, would be left by a process that is killed, and onnx refuses to read data from a file
    with two names.
    """
    data, own = _data_files(path), [overwrite]
    backup = _backup(path) if path.exists() else None
    try:
        yield lambda: own.append(True)
    except BaseException:
        if any(own):
            for new in _data_files(path) - data:
                _remove(new)
            if backup is None or backup.is_dir():
                _remove(path)
            if backup is not None:
                os.replace(backup, path)
        raise
    finally:
        if backup is not None:  # also after putting it back: renaming one of two names of a file removes neither
            _remove(backup)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _data_files(path: Path) -> set[Path]:
    """The files with external weights that were written together with a model file."""
    from bntools import backends

    if path.suffix.lower() not in backends.SUFFIXES:  # a folder holds all of its files itself
        return set()
    referred = getattr(backends.of_path(path), "external_files", None)
    return datafiles.owned(path, referred) if referred else set()


def _backup(path: Path) -> Path:
    """A second name for a file, or each file of a folder, or a copy where the file system knows no second names."""
    try:
        if path.is_dir():
            folder = tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent)
            return Path(shutil.copytree(path, folder, copy_function=_linked, dirs_exist_ok=True))
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        os.unlink(name)
        _linked(path, name)
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be replaced: {error}") from error
    return Path(name)


def _linked(source: Any, target: Any) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _sha256(path: Path) -> str:
    """The hash of a file; of a folder, that of the list of its files and their hashes."""
    if path.is_dir():
        files = sorted(each for each in path.rglob("*") if each.is_file())
        listed = "".join(f"{_sha256(each)}  {each.relative_to(path).as_posix()}\n" for each in files)
        return hashlib.sha256(listed.encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
