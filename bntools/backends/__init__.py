"""Which back end serves a model or a path.

A back end is a package of plain functions under the same names:

    layers  edit  write  commit  digest  freeze  unfreeze  reset  measuring  graph  absorb  handed  predict  export
    load  save  parts

and, where its kind of model calls for them, ``takes``, ``absence``, ``to_inference``, ``external_files``, ``live``,
``counters``, ``described``, ``ranks``, ``world``, ``join``, ``refuse_freezing``, ``precision`` and ``double`` (with
``autocast``), for which verbs ask with hasattr.

It is found by looking at the model's type and at what is already imported, so that asking imports
no framework that the caller does not have in hand (the way einops does it).
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any, ParamSpec, TypeVar

from bntools import processes
from bntools.alone import alone
from bntools.errors import BntoolsError
from bntools.processes import Group

P = ParamSpec("P")
T = TypeVar("T")

# back end -> the types it serves, as (imported module, attribute)
SERVED = {
    # first: on Keras's torch back end a keras.Model is an nn.Module as well
    "keras": [("keras", "Model"), ("bntools.backends.keras.archive", "Archive")],
    "torch": [("torch.nn", "Module")],
    "onnx": [("onnx", "ModelProto"), ("onnx_ir", "Model"), ("bntools.backends.onnx.document", "Document")],
}
SUFFIXES = {
    ".pt": "torch",
    ".pth": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".pt2": "torch",
    ".safetensors": "torch",
    ".onnx": "onnx",
    ".keras": "keras",
    ".h5": "keras",
    ".hdf5": "keras",
}
SAVED_MODEL = "saved_model.pb"  # the file that makes a folder a SavedModel of TensorFlow


def of(model: Any) -> ModuleType:
    """The back end of a model in memory, or of an ONNX file by its path."""
    if isinstance(model, (str, Path)):
        return _of_onnx_path(Path(model))
    for name, types in SERVED.items():
        for module, attribute in types:
            served = getattr(sys.modules.get(module), attribute, None)
            if served is not None and isinstance(model, served):
                return backend(name)
    raise BntoolsError(
        f"found a {type(model).__module__}.{type(model).__qualname__} where a model was expected: "
        f"bntools serves torch.nn.Module, keras.Model (of Keras 3), onnx.ModelProto, onnx_ir.Model and the path of an "
        f".onnx file"
    )


def of_path(path: str | Path) -> ModuleType:
    """The back end that reads and writes a file, by its suffix, or a SavedModel folder."""
    if is_saved_model(path):
        return backend("keras")
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise BntoolsError(f"{path}: unknown kind of model file {suffix!r}: expected one of {', '.join(SUFFIXES)}")
    return backend(SUFFIXES[suffix])


def is_saved_model(path: str | Path) -> bool:
    """Whether a path is that of a SavedModel, which is a folder."""
    return Path(path, SAVED_MODEL).is_file()


def _of_onnx_path(path: Path) -> ModuleType:
    if path.suffix.lower() == ".onnx":
        return backend("onnx")
    raise BntoolsError(
        f"found the path {str(path)!r} where a model was expected: only an .onnx file is taken by its path; "
        f"load any other first, with bntools.load"
    )


def one_at_a_time(verb: Callable[P, T]) -> Callable[P, T]:
    """A verb whose first argument is a model: it has that model for itself while it runs, or refuses to."""

    @wraps(verb)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> T:
        if not args and "model" not in kwargs:
            return verb(*args, **kwargs)  # which says what is missing
        model = args[0] if args else kwargs["model"]
        with alone(of(model).parts(model)):
            return verb(*args, **kwargs)

    return guarded


def fed(model: Any, batches: Any, max_samples: int | None = None, *, whole: bool = False, joined: bool = False) -> Any:
    """What a user gave as batches for a model, as batches that every verb understands.

    ``whole`` leaves each batch as it came, for a forward of the user's own. With ``joined``, small ones may come
    together as one, where that is faster.
    """
    found = getattr(of(model), "feed", None)
    return batches if found is None else found(model, batches, max_samples, whole, joined)


def canonical(model: Any, example: Any) -> Any:
    """What a user gave as one batch for a model, as every verb understands it."""
    found = getattr(of(model), "canonical", None)
    return example if found is None else found(model, example)


def absence(model: Any) -> Callable[[], str] | None:
    """What says in words what a model without BN has instead; None where the back end cannot tell."""
    found = getattr(of(model), "absence", None)
    return None if found is None else partial(found, model)


def group(model: Any, given: Any = None) -> Group:
    """The processes that measure a model together: those ``given``, a Group or a process group of torch.distributed.

    By default those in whose group the model itself is (DistributedDataParallel), or this process alone.
    """
    if isinstance(given, Group):
        return given
    found = backend("torch").ranks if given is not None else getattr(of(model), "ranks", None)
    return Group(None if found is None else found(model, given), processes.PATIENCE)


def precision(model: Any) -> str | None:
    """The dtype to which the framework casts around this call (torch.autocast); None where it does not."""
    found = getattr(of(model), "precision", None)
    return None if found is None else found(model)


def counters(model: Any) -> Callable[[], None]:
    """What puts back, after the statistics, counts of updates that a model itself does not hold."""
    found = getattr(of(model), "counters", None)
    return (lambda: None) if found is None else found(model)


def backend(name: str) -> ModuleType:
    """The back end of this name; its framework is imported now."""
    return imported(f"bntools.backends.{name}", name)


def imported(module: str, name: str) -> ModuleType:
    """A module of the back end ``name``.

    Raises BntoolsError where a package that it needs is missing, and says what to install.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("bntools"):
            raise
        raise BntoolsError(
            f"{name} models need the package {error.name!r}, which is not installed: pip install 'bntools[{name}]'"
        ) from error
