"""One design as a model of PyTorch, of Keras and of ONNX, with the same weights."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import keras
import numpy as np
import onnx
import torch
from keras import layers as L
from onnx_nets import Builder
from random_nets import SLOPE, Design, Step, Weights, steps
from torch import nn


class InTorch(nn.Module):
    """The design as a module."""

    def __init__(self, design: Design):
        super().__init__()
        self.steps = steps(design)
        for step in self.steps:
            if step.kind == "bn":
                norm = nn.BatchNorm2d if design.pixels and step.makes != "last" else nn.BatchNorm1d
                self.add_module(step.makes, norm(step.out, eps=step.eps))
            elif step.kind == "dense":
                self.add_module(step.makes, nn.Linear(step.into, step.out))
            elif step.kind == "conv":
                block = step.block
                options = {"stride": block.stride, "padding": block.padding, "groups": block.groups}
                self.add_module(step.makes, nn.Conv2d(step.into, step.out, block.kernel, **options))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Step by step."""
        functions = {"relu": nn.functional.relu, "add": torch.add, "pool": lambda value: value.mean((2, 3))}
        functions["leaky"] = lambda value: nn.functional.leaky_relu(value, SLOPE)
        values = {"x": x}
        for step in self.steps:
            run = functions[step.kind] if step.kind in functions else getattr(self, step.makes)
            values[step.makes] = run(*[values[name] for name in step.reads])
        return values["head"]


def in_torch(design: Design, weights: Weights) -> nn.Module:
    """An nn.Module with these weights."""
    model = InTorch(design)
    tensors = {name: torch.from_numpy(values.copy()) for name, values in weights.items()}
    model.load_state_dict(tensors, strict=False)  # without the counters
    return model


def in_keras(design: Design, weights: Weights) -> keras.Model:
    """A Keras model with these weights: the same object whenever the design is the same."""
    model = _keras(design)
    for step in steps(design):
        if step.kind in ("conv", "dense", "bn"):
            parts = ["weight", "bias"] + (["running_mean", "running_var"] if step.kind == "bn" else [])
            arrays = [weights[f"{step.makes}.{part}"] for part in parts]
            if step.kind != "bn":  # (out, in, ...) to (..., in, out)
                arrays[0] = np.moveaxis(arrays[0], (0, 1), (-1, -2))
            model.get_layer(step.makes).set_weights(arrays)
    return model


@lru_cache(maxsize=8)
def _keras(design: Design) -> keras.Model:
    values = {"x": L.Input((*[design.pixels] * (2 if design.pixels else 0), design.channels))}
    for step in steps(design):
        values[step.makes] = _keras_layer(step)(*_given([values[name] for name in step.reads]))
    return keras.Model(values["x"], values["head"])


def _given(inputs: list[Any]) -> list[Any]:
    return inputs if len(inputs) == 1 else [inputs]


def _keras_layer(step: Step) -> keras.Layer:
    match step.kind:
        case "bn":
            return L.BatchNormalization(epsilon=step.eps, name=step.makes)
        case "dense":
            return L.Dense(step.out, name=step.makes)
        case "conv":
            block = step.block
            padding = "same" if block.padding else "valid"
            return L.Conv2D(step.out, block.kernel, block.stride, padding, groups=block.groups, name=step.makes)
        case "add":
            return L.Add(name=step.makes)
        case "pool":
            return L.GlobalAveragePooling2D(name=step.makes)
        case kind:
            return L.LeakyReLU(SLOPE if kind == "leaky" else 0.0, name=step.makes)


def in_onnx(design: Design, weights: Weights) -> onnx.ModelProto:
    """An ONNX model with these weights."""
    b, values = Builder(), {"x": "x"}
    for step in steps(design):
        inputs = [values[name] for name in step.reads]
        parts = [name for name in weights if name.startswith(f"{step.makes}.")]
        values[step.makes] = _onnx_node(b, step, inputs, [b.const(weights[name], name) for name in parts])
    return b.model([values["head"]], ("n", design.channels, *[design.pixels] * (2 if design.pixels else 0)))


def _onnx_node(b: Builder, step: Step, inputs: list[str], parts: list[str]) -> str:
    kinds = {"relu": "Relu", "add": "Add", "conv": "Conv", "bn": "BatchNormalization"}
    match step.kind:
        case "bn":
            return b.op(kinds["bn"], *inputs, *parts, name=step.makes, epsilon=step.eps)
        case "conv":
            block = step.block
            options = {"strides": [block.stride] * 2, "pads": [block.padding] * 4, "group": block.groups}
            return b.op("Conv", *inputs, *parts, name=step.makes, **options)
        case "dense":
            return b.op("Gemm", *inputs, *parts, name=step.makes, transB=1)
        case "pool":
            return b.op("Flatten", b.op("GlobalAveragePool", *inputs))
        case "leaky":
            return b.op("LeakyRelu", *inputs, alpha=SLOPE)
        case kind:
            return b.op(kinds[kind], *inputs)
