"""A model is worked on as it is: what a verb changes in it is changed at once."""

from __future__ import annotations

from collections.abc import Iterable

import keras
import numpy as np

from bntools.backends.keras.found import write
from bntools.backends.keras.naming import named, norms
from bntools.backends.keras.segments import forget_changed
from bntools.errors import BntoolsError


def edit(model: keras.Model) -> keras.Model:
    """What a verb works on: the model itself.

    Raises BntoolsError for a model whose variables do not exist yet.
    """
    forget_changed(model)
    layers = named(model)
    unbuilt = [name for name, layer in norms(model).items() if not layer.built]
    if unbuilt or (not model.built and not any(layer.variables for layer in layers.values())):
        what = f"its layer {unbuilt[0]!r} has no variables yet" if unbuilt else "it has no variables yet"
        raise BntoolsError(
            f"the model {model.name!r} was never built, {what}: call it on one batch first, model(batch), "
            f"or model.build(input_shape)"
        )
    return model


def commit(model: keras.Model) -> None:
    """Nothing is left to be stored."""


def handed(new: keras.Model, like: keras.Model) -> keras.Model:
    """A new model in the form in which the old one was given."""
    return new


def reset(model: keras.Model, names: Iterable[str]) -> None:
    """Statistics to mean 0 and variance 1, the update counter to 0."""
    found = norms(model)
    for name in names:
        size = found[name].moving_mean.shape[0]
        write(model, {name: (np.zeros(size), np.ones(size), 0)})
