"""What a Keras model says about its inputs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from bntools.backends.keras.calls import nodes_of, symbolic_inputs
from bntools.backends.keras.feeding import input_names
from bntools.backends.keras.naming import named
from bntools.inputs import Input

IMAGE = 4  # the rank of a batch of images
IMAGE_CHANNELS = (1, 3, 4)
PIXEL_SCALE = 0.02  # a Rescaling layer of at most this is meant for 0..255: usual are 1/255 and 1/127.5


def takes(model: Any) -> list[Input]:
    """The inputs of a functional or Sequential model; of one written in Python the rank and width it was built for."""
    inputs = symbolic_inputs(model)
    first = _first_convolution(model)
    if not inputs:
        return _built_for(model, first)
    names = input_names(model) or [one.name for one in inputs]
    return [_input(name, one, first, _scales_pixels(model)) for name, one in zip(names, inputs, strict=True)]


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


def _built_for(model: Any, first: Any) -> list[Input]:
    config = model.get_build_config() if model.built else None
    shape = (config or {}).get("input_shape")
    if not isinstance(shape, (tuple, list)) or not all(size is None or isinstance(size, int) for size in shape):
        return []
    axis = _channel_axis(tuple(shape), first) if len(shape) == IMAGE else len(shape) - 1
    free = tuple(size if i == axis and i else None for i, size in enumerate(shape))
    if len(shape) != IMAGE or axis is None:
        return [Input("input", "float32", free)]
    return [Input("input", "float32", free, axis, shape[axis])]


def _scales_pixels(model: Any) -> bool:
    """Whether the first thing that a model does to its input is to scale it down, from 0..255."""
    nodes = nodes_of(model) or []
    operations = [node.operation for node in nodes if not isinstance(node.operation, keras.layers.InputLayer)]
    first = operations[0] if operations else None
    if isinstance(first, keras.layers.Rescaling):
        return bool(np.max(np.abs(first.scale)) <= PIXEL_SCALE)
    return isinstance(first, keras.Model) and _scales_pixels(first)


def _input(name: str, tensor: Any, first: Any, pixels: bool) -> Input:
    shape = tuple(tensor.shape)
    axis = None
    if len(shape) == IMAGE:
        axis = _channel_axis(shape, first)
    dtype = keras.backend.standardize_dtype(tensor.dtype)
    dtype = dtype if dtype in np.sctypeDict else "float32"
    return Input(name, dtype, shape, axis, shape[axis] if axis else None, pixels and axis is not None)


def _channel_axis(shape: tuple[int | None, ...], first: Any) -> int | None:
    """Where the channels of images lie: as the first convolution says, where the sizes allow it."""
    order = (3, 1) if first is None or first.data_format == "channels_last" else (1, 3)
    return next((axis for axis in order if shape[axis] in IMAGE_CHANNELS), order[0] if first is not None else None)


def _first_convolution(model: Any) -> Any:
    layers = named(model).values()
    return next((layer for layer in layers if hasattr(layer, "data_format") and hasattr(layer, "kernel_size")), None)
