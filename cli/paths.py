"""Which files a command reads and writes by default, and what it must not overwrite."""

from __future__ import annotations

from pathlib import Path

import click

from bntools.backends import SUFFIXES
from bntools.errors import BntoolsError

PICKLED = (".pt", ".pth", ".bin", ".ckpt")  # one form under four names


def destination(model: Path, word: str, output: Path | None, in_place: bool) -> Path:
    """Where the changed model goes: ``-o``, MODEL itself, or ``model.WORD.pt`` beside it.

    Raises click.UsageError for ``-o`` together with ``--in-place``, BntoolsError for a suffix of another form.
    """
    if output is not None and in_place:
        raise click.UsageError("-o and --in-place exclude each other")
    for path in filter(None, (model, output)):
        if path.is_dir():
            wanted = "a model file" if path is model else "the name of a file to write"
            raise BntoolsError(f"{path} is a folder; expected {wanted}")
    if in_place:
        return model
    if output is None:
        return beside(model, word)
    if _form(output) != _form(model):
        raise BntoolsError(
            f"{output}: a model is written back in the form it came in: expected the suffix {model.suffix!r}, "
            f"found {output.suffix!r}"
        )
    return output


def beside(model: Path, word: str) -> Path:
    """``model.pt`` -> ``model.WORD.pt``."""
    return model.with_name(f"{model.stem}.{word}{model.suffix}")


def record_of(model: Path) -> Path:
    """Where the record of a written model lies: under its name with the suffix ``.json``."""
    return model.with_suffix(".json")


def refuse_existing(*paths: Path, force: bool) -> None:
    """Raise BntoolsError if a file would be overwritten without ``--force``, or cannot be created there."""
    for path in paths:
        if path.is_dir():
            raise BntoolsError(f"{path} is a folder: expected the name of a file to write")
        if not path.parent.is_dir():
            raise BntoolsError(f"{path}: there is no folder {path.parent}")
        if path.exists() and not force:
            raise BntoolsError(f"{path} exists: choose another name with -o, or overwrite it with --force")


def newest_model(export: Path) -> tuple[Path, list[Path]]:
    """The model that belongs to ``model.onnx``, and all that could.

    That is the newest of ``model.recalibrated.*`` and ``model.*`` in the same folder; of two of the same
    age the recalibrated one. Raises BntoolsError where there is none.
    """
    candidates = [
        path
        for stem in (f"{export.stem}.recalibrated", export.stem)
        for path in sorted(export.parent.glob(f"{_escaped(stem)}.*"))
        if path.stem == stem and path.suffix.lower() in SUFFIXES and path.is_file() and not _is_export(path, export)
    ]
    if not candidates:
        raise BntoolsError(
            f"no MODEL was given, and beside {export} there is neither a {export.stem}.recalibrated.* nor a "
            f"{export.stem}.* that is a model: name the model, as in bntools fold model.pt --export {export}"
        )
    return max(candidates, key=lambda path: path.stat().st_mtime_ns), candidates


def is_onnx(path: Path) -> bool:
    """Whether a file is an ONNX file by its name."""
    return path.suffix.lower() == ".onnx"


def _is_export(path: Path, export: Path) -> bool:
    return is_onnx(path) and path.stem == export.stem


def _form(path: Path) -> str:
    suffix = path.suffix.lower()
    return "pickled" if suffix in PICKLED else suffix


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)
