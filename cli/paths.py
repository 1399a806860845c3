"""Which files a command reads and writes by default, and what it must not overwrite."""

from __future__ import annotations

from pathlib import Path

import click

from bntools.backends import SUFFIXES, is_saved_model
from bntools.errors import BntoolsError
from bntools.files import State, state

# Suffixes of one form, or of forms that are written in place of each other.
PICKLED, KERAS = (".pt", ".pth", ".bin", ".ckpt"), (".keras", ".h5", ".hdf5")
ALIKE = {**dict.fromkeys(PICKLED, "pickled"), **dict.fromkeys(KERAS, "Keras")}
FOLDER = "SavedModel"
KERAS_WEIGHTS = ".weights.h5"


def destination(model: Path, word: str, output: Path | None, in_place: bool) -> Path:
    """Where the changed model goes: ``-o``, MODEL itself, or ``model.WORD.pt`` beside it.

    Raises click.UsageError for ``-o`` together with ``--in-place``, BntoolsError for a suffix of another form.
    """
    if output is not None and in_place:
        raise click.UsageError("-o and --in-place exclude each other")
    if model.is_dir() and not is_saved_model(model):
        raise BntoolsError(f"{model} is a folder; expected a model file or a SavedModel")
    if output is not None and output.is_dir() and not is_saved_model(output):
        raise BntoolsError(f"{output} is a folder; expected the name of a file to write")
    if in_place:
        return model
    if output is None:
        return beside(model, word)
    if _form(output) not in ((FOLDER, "Keras") if _form(model) == FOLDER else (_form(model),)):
        expected = "a folder, or the suffix '.keras'" if _form(model) == FOLDER else f"the suffix {model.suffix!r}"
        raise BntoolsError(
            f"{output}: a model is written back in the form it came in: expected {expected}, found {output.suffix!r}"
        )
    return output


def beside(model: Path, word: str) -> Path:
    """``model.pt`` -> ``model.WORD.pt``, and a folder ``model`` -> ``model.WORD``."""
    suffix = "" if _form(model) == FOLDER else model.suffix
    if model.name.lower().endswith(KERAS_WEIGHTS):
        suffix = model.name[-len(KERAS_WEIGHTS) :]
    return model.with_name(f"{model.name.removesuffix(suffix)}.{word}{suffix}")


def record_of(model: Path) -> Path:
    """Where the record of a written model lies: under its name with ``.json``, which a folder's name gets."""
    return model.with_name(f"{model.name}.json") if _form(model) == FOLDER else model.with_suffix(".json")


def refuse_existing(*paths: Path, force: bool, option: str = "-o") -> None:
    """Raise BntoolsError if a file would be overwritten without ``--force``, or cannot be created there."""
    for path in paths:
        if path.is_dir() and not is_saved_model(path):
            raise BntoolsError(f"{path} is a folder: expected the name of a file to write")
        if not path.parent.is_dir():
            raise BntoolsError(f"{path}: there is no folder {path.parent}")
        if path.exists() and not force:
            raise BntoolsError(f"{path} exists: choose another name with {option}, or overwrite it with --force")


def check_source(model: Path, written: Path, before: State) -> None:
    """Raise BntoolsError if the file to be replaced is MODEL and somebody has changed it since ``before`` it was read.

    What they wrote would be lost.
    """
    if written.exists() and written.samefile(model) and state(model) != before:
        raise BntoolsError(f"{model}: was changed while bntools worked on it, so it was not replaced: begin again")


def newest_model(export: Path) -> tuple[Path, list[Path]]:
    """The model that belongs to ``model.onnx``, and all that could.

    That is the newest of ``model.recalibrated.*``, ``model.applied.*`` and ``model.*`` in the same folder; of two of
    the same age the first named. Raises BntoolsError where there is none.
    """
    candidates = [
        path
        for stem in (f"{export.stem}.recalibrated", f"{export.stem}.applied", export.stem)
        for path in [*sorted(export.parent.glob(f"{_escaped(stem)}.*")), export.with_name(stem)]
        if _is_model(path, stem) and not _is_export(path, export)
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


def is_keras(path: Path) -> bool:
    """Whether a path is that of a Keras model."""
    return path.suffix.lower() in KERAS or is_saved_model(path)


def is_folder_form(path: Path) -> bool:
    """Whether a path is, or would be, that of a SavedModel folder: it has no suffix of a model file."""
    return _form(path) == FOLDER


def _is_export(path: Path, export: Path) -> bool:
    return is_onnx(path) and path.stem == export.stem


def _is_model(path: Path, stem: str) -> bool:
    """Whether a path is a model of this name: a file with a known suffix, or a SavedModel folder."""
    if path.is_dir():
        return path.name == stem and is_saved_model(path)
    return path.stem == stem and path.suffix.lower() in SUFFIXES and path.is_file()


def _form(path: Path) -> str:
    """What a path is, or would be; a name without a known suffix is that of a SavedModel folder."""
    suffix = path.suffix.lower()
    if is_saved_model(path) or (suffix not in SUFFIXES and not path.is_file()):
        return FOLDER
    return ALIKE.get(suffix, suffix)


def _escaped(stem: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in stem)
