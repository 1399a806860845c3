"""What a Keras model says about its inputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from bntools.backends.keras.calls import symbolic_inputs
from bntools.backends.keras.feeding import input_names
from bntools.backends.keras.naming import named
from bntools.inputs import Input

IMAGE_CHANNELS = (1, 3, 4)


def takes(model: Any) -> list[Input]:
    """The inputs of a functional or Sequential model; none of a model that is written in Python."""
    inputs = symbolic_inputs(model)
    names = input_names(model) or [one.name for one in inputs]
    first = _first_convolution(model)
    return [_input(name, one, first) for name, one in zip(names, inputs, strict=True)]


def input_channels(model: Any) -> int | None:
    """Channels of the images that the model takes; None where nothing says so."""
    channels = [one.channels for one in takes(model) if one.channel_axis]
    if channels:
        return channels[0]
    first = _first_convolution(model)
    if first is None or not first.built or first.input_spec is None:
        return None
    axes = first.input_spec.axes or {}
    return next(iter(axes.values()), None)


def _input(name: str, tensor: Any, first: Any) -> Input:
    shape = tuple(tensor.shape)
    axis = None
    if len(shape) == 4:
        axis = _channel_axis(shape, first)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    dtype = dtype if dtype in np.sctypeDict else "float32"
    return Input(name, dtype, shape, axis, shape[axis] if axis else None)


def _channel_axis(shape: tuple[int | None, ...], first: Any) -> int | None:
    """Where the channels of images lie: as the first convolution says, where the sizes allow it."""
    order = (3, 1) if first is None or first.data_format == "channels_last" else (1, 3)
    return next((axis for axis in order if shape[axis] in IMAGE_CHANNELS), order[0] if first is not None else None)


def _first_convolution(model: Any) -> Any:
    layers = named(model).values()
    return next((layer for layer in layers if hasattr(layer, "data_format") and hasattr(layer, "kernel_size")), None)
