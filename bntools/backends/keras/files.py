"""Model files of Keras: reading one, and writing a model back in the form it came in."""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import keras

from bntools.backends.keras import contents, hdf5
from bntools.backends.keras.contents import Contents
from bntools.backends.keras.found import remember, remembered, training_steps
from bntools.backends.keras.naming import named, norms
from bntools.backends.keras.optimizers import SKIPPED, restore
from bntools.backends.keras.trust import admitted, sized
from bntools.errors import BntoolsError

FORMS = {".keras": "archive", ".h5": "hdf5", ".hdf5": "hdf5"}


@dataclass(frozen=True)
class Origin:
    """Where a model came from, so that it can be written back in kind.

    ``form`` is that of its contents, or ``saved model``. ``state`` is the model's config and step counter
    as they were loaded: where both are as before, its file is kept but for the weights.
    """

    path: str
    form: str
    state: tuple[str, int | None] = ("", None)
    holds: Any = None

    @property
    def folder(self) -> bool:
        """Whether the model is written back as a folder."""
        return self.form == "saved model"


def load(path: str, arch: Any = None, allow: Sequence[str] = ()) -> tuple[keras.Model, Origin]:
    """The model in a file or SavedModel folder, compiled if it was saved so, and its origin.

    ``arch`` is a built keras.Model, or a callable without arguments that returns one, for files that hold weights
    alone. ``allow`` names packages whose Keras classes and functions may be used. Nothing in the file is executed.

    Raises BntoolsError where the file is none of Keras's forms, needs what is not admitted, or does not fit.
    """
    if Path(path).is_dir():
        from bntools.backends.keras import savedmodel

        _no_arch(path, arch, "a SavedModel")
        model, holds = savedmodel.load(path, allow)
        return model, Origin(path, "saved model", holds=holds)
    held = contents.read(path)
    if held.config is None:
        model = _built(path, arch)
        _fill(held, model)
        remember(model, held.updates)
        return model, Origin(path, held.form)
    _no_arch(path, arch, "a whole model")
    if held.form == "archive" and (0,) < _number(held.version) < (3,):
        raise BntoolsError(
            f"{path}: an archive of Keras {held.version}, whose layout Keras 3 cannot read: load it there (tf_keras) "
            f"and save it as .h5"
        )
    custom = admitted(path, (held.config, held.training), allow)
    with quiet(), explained(path, held.version), sized(path, os.path.getsize(path)):
        model = _archived(held, custom) if held.form == "archive" else _legacy(held, custom)
    if not isinstance(model, keras.Model):
        raise BntoolsError(f"{path}: holds a {type(model).__name__}, which is no keras.Model")
    remember(model, _counted(held, model))
    return model, Origin(path, held.form, _state(model) if held.form == "hdf5" else ("", None))


def save(
    model: keras.Model, path: str, temporary: Path, origin: Origin | None = None, data: Path | None = None
) -> None:
    """Write a model to ``temporary`` in the form that its origin and the suffix of ``path`` ask for.

    ``temporary`` is a file, or for a SavedModel an empty folder. No form needs a second file, ``data``. Raises
    BntoolsError where the form cannot hold the model; ``path`` names it in messages.
    """
    form = origin.form if origin else ""
    if temporary.is_dir():
        from bntools.backends.keras import savedmodel

        if origin is None or form != "saved model":
            raise BntoolsError(f"{path}: only a model loaded from a SavedModel can be saved as one; save it as .keras")
        savedmodel.save(model, path, temporary, origin.path, origin.holds)
        return
    suffix = FORMS[Path(path).suffix.lower()]
    with quiet(), _unsaved(path):
        if suffix == "archive":
            _save_archive(model, temporary)
        elif path.lower().endswith(".weights.h5") or (origin and form == "weights"):
            _save_weights(model, temporary)
        elif origin and (form == "legacy weights" or (form == "hdf5" and _state(model) == origin.state)):
            hdf5.rewrite(origin.path, model, temporary)
            _note(model, temporary)
        else:
            _save_whole(model, path, temporary)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Keras from recommending other formats, which a user of these files has not asked about."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _archived(held: Contents, custom: dict[str, Any]) -> Any:
    with _called(held.path, "model.keras") as place:
        model = keras.saving.load_model(place, custom_objects=custom, safe_mode=True)
        restore(place, model)
        return model


def _legacy(held: Contents, custom: dict[str, Any]) -> Any:
    """The model in an HDF5 file. Where Keras cannot read back its own compile config, the model is not compiled.

    (``compile(loss="mse")`` is such a case in Keras 3. What the file holds of it stays there when it is written back.)
    """
    modern = hdf5.modernized(held.config)
    with _called(held.path, "model.h5", copied=modern != held.config) as place:
        if modern != held.config:
            with h5py.File(place, "r+") as file:
                file.attrs["model_config"] = json.dumps(modern)
        try:
            model = keras.saving.load_model(place, custom_objects=custom, safe_mode=True)
            hdf5.restore_optimizer(place, model)
            return model
        except (ValueError, TypeError):
            if held.training is None:
                raise
            return keras.saving.load_model(place, custom_objects=custom, safe_mode=True, compile=False)


def _counted(held: Contents, model: Any) -> dict[str, int]:
    """What bntools noted of updates, and for a model that is not compiled the steps its file tells of."""
    if held.form != "hdf5" or training_steps(model) is not None or (steps := hdf5.steps(held.path)) is None:
        return dict(held.updates)
    return {name: steps for name, layer in norms(model).items() if layer.trainable} | dict(held.updates)


def _fill(held: Contents, model: keras.Model) -> None:
    name = "model.weights.h5" if held.form == "weights" else "model.h5"
    with quiet(), _called(held.path, name) as place:
        try:
            model.load_weights(place)
        except Exception as error:
            raise BntoolsError(f"{held.path}: its weights do not fit the arch: {said(error)}") from error


@contextmanager
def _called(path: str, name: str, copied: bool = False) -> Iterator[str]:
    """The file under a name by whose suffix Keras takes it for what it is; or a copy of it to change."""
    if not copied and path.endswith(Path(name).suffix) and path.endswith(".weights.h5") == ("weights" in name):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="bntools-") as folder:
        place = Path(folder, name)
        if copied:
            shutil.copyfile(path, place)
        else:
            place.symlink_to(os.path.abspath(path))
        yield str(place)


def _built(path: str, arch: Any) -> keras.Model:
    if arch is None:
        raise BntoolsError(
            f"{path}: holds weights without the model they belong to: pass arch='package.module:factory' (--arch), a "
            f"callable that returns the keras.Model"
        )
    try:
        model = keras.models.clone_model(arch) if isinstance(arch, keras.Model) else arch()
    except Exception as error:
        raise BntoolsError(f"{path}: calling arch failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, keras.Model):
        raise BntoolsError(f"{path}: arch returned a {type(model).__name__}; expected a keras.Model")
    if not model.built:
        raise BntoolsError(f"{path}: arch returned a model that was never built: call it on a batch, model(batch)")
    return model


def _save_archive(model: keras.Model, temporary: Path) -> None:
    keras.saving.save_model(model, temporary)
    if note := contents.comment(remembered(model)):
        with zipfile.ZipFile(temporary, "a") as archive:
            archive.comment = note


def _save_weights(model: keras.Model, temporary: Path) -> None:
    with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=f".{temporary.name}") as folder:
        place = Path(folder, "model.weights.h5")
        model.save_weights(place)
        os.replace(place, temporary)
    _note(model, temporary)


def _save_whole(model: keras.Model, path: str, temporary: Path) -> None:
    with tempfile.TemporaryDirectory(dir=temporary.parent, prefix=f".{temporary.name}") as folder:
        place = Path(folder, "model.h5")
        with _compile_config_kept(model):
            keras.saving.save_model(model, place)
        _check_readable(model, place, path)
        os.replace(place, temporary)
    _note(model, temporary)


def _check_readable(model: keras.Model, place: Path, path: str) -> None:
    """Keras writes .h5 files that it cannot read, of models with operations (``x * 2``) or written in Python."""
    layers = (model, *named(model).values())
    if any(isinstance(layer, keras.layers.Lambda) for layer in layers):
        return  # it could be bytecode, which is not run for this either
    own = {type(layer).__name__: type(layer) for layer in layers}
    try:
        keras.saving.load_model(place, custom_objects=own, compile=False)
    except Exception as error:
        raise BntoolsError(
            f"{path}: Keras cannot read this model back from an .h5 file ({said(error)}): save it as .keras"
        ) from error


@contextmanager
def _compile_config_kept(model: keras.Model) -> Iterator[None]:
    """Saving as .h5 takes the optimizer out of the config that the model itself remembers (Keras 3.15, model_metadata).

    Saved again it would come back with another one.
    """
    config = getattr(getattr(model, "_compile_config", None), "config", {})
    before = dict(config)
    try:
        yield
    finally:
        config.update(before)


def _note(model: keras.Model, place: Path) -> None:
    with h5py.File(place, "r+") as file:
        if contents.NOTES in file:
            del file[contents.NOTES]
        if note := contents.comment(remembered(model)):
            file[contents.NOTES] = note.decode()


def _state(model: keras.Model) -> tuple[str, int | None]:
    try:
        return json.dumps(keras.saving.serialize_keras_object(model), sort_keys=True), training_steps(model)
    except (TypeError, NotImplementedError, ValueError):
        return "", None


@contextmanager
def explained(path: str, version: str) -> Iterator[None]:
    """Whatever Keras says of a file that it cannot load, in a line with what to do. ``version`` wrote it."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", SKIPPED, UserWarning)  # what can be done is done in optimizers.py
            yield
    except (BntoolsError, MemoryError):
        raise
    except Exception as error:
        here = f"Keras {keras.__version__}"
        raise BntoolsError(f"{path}: {here} cannot load it{_age(version)}: {said(error)}") from error


def _age(version: str) -> str:
    if not version or _number(version) == _number(keras.__version__):
        return ""
    if _number(version)[0] < 3:
        return f", written by Keras {version} (load it there and save it as .h5, or call model.export)"
    newer = _number(version) > _number(keras.__version__)
    return f", written by Keras {version}{' (pip install --upgrade keras)' if newer else ''}"


def _number(version: str) -> tuple[int, ...]:
    return tuple(int(part) if part.isdecimal() else 0 for part in version.split(".")[:2])


def said(error: BaseException) -> str:
    """What an exception of Keras says, without the configs that it prints in full."""
    text = str(error).partition("config=")[0].partition("onfig: {")[0]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    short = " ".join(lines)[:300].strip() if lines else type(error).__name__
    return f"{type(error).__name__}: {short}" if lines else short


@contextmanager
def _unsaved(path: str) -> Iterator[None]:
    try:
        yield
    except (BntoolsError, OSError, MemoryError):
        raise
    except NotImplementedError as error:
        raise BntoolsError(
            f"{path}: the model is written in Python and has no get_config(), which this form needs: save it as .keras "
            f"with a get_config(), or its weights alone as .weights.h5"
        ) from error
    except Exception as error:
        raise BntoolsError(f"{path}: cannot be written: {said(error)}") from error


def _no_arch(path: str, arch: Any, what: str) -> None:
    if arch is not None:
        raise BntoolsError(f"{path}: holds {what}, which needs no arch=; leave it (--arch) out")
