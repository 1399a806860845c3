"""The state of an optimizer in a ``.keras`` archive, where Keras itself does not take it.

An optimizer that was built before layers were frozen holds state for their variables too. Keras builds it for the
variables that train now, finds other numbers of them, and leaves the state out with a warning.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from typing import Any

import h5py
import numpy as np

from bntools.backends.keras.compiled import rebuild
from bntools.backends.keras.naming import named

SKIPPED = "Skipping variable loading for optimizer"  # how Keras's warning begins
UNTRAINED = 2  # the step counter and the learning rate, which are all that an optimizer has before its first step


def restore(path: str, model: Any) -> None:
    """Give the optimizer of a model that was just loaded the state that its archive holds, frozen layers included.

    Where it fits no set of the model's variables, a warning says that it is lost.
    """
    optimizer = getattr(model, "optimizer", None)
    if optimizer is None or len(stored := _stored(path)) <= UNTRAINED or _fits(optimizer, stored):
        return
    own = {id(variable) for layer in (model, *named(model).values()) for variable in layer._trainable_variables}
    rebuild(optimizer, [variable for variable in model.variables if id(variable) in own])
    if _fits(optimizer, stored):
        for variable, value in zip(optimizer.variables, stored, strict=True):
            variable.assign(value)
        return
    rebuild(optimizer, model.trainable_variables)
    warnings.warn(
        f"{path}: the state of its optimizer ({len(stored)} variables) fits neither the variables that train now nor "
        f"all of them: training would begin with a new one",
        stacklevel=2,
    )


def _stored(path: str) -> list[np.ndarray]:
    with zipfile.ZipFile(path) as archive:
        if "model.weights.h5" not in archive.namelist():
            return []
        with h5py.File(io.BytesIO(archive.read("model.weights.h5")), "r") as file:
            group = file.get("optimizer/vars", {})
            return [group[name][()] for name in sorted(group, key=int)]


def _fits(optimizer: Any, stored: list[np.ndarray]) -> bool:
    return [tuple(variable.shape) for variable in optimizer.variables] == [value.shape for value in stored]
