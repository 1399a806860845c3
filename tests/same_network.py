"""One small network with the same weights in PyTorch, Keras and ONNX."""

from __future__ import annotations

import warnings
from pathlib import Path

import keras
import numpy as np
import onnx
import torch
from keras import layers as L
from torch import nn

EPS = 1e-3  # Keras's default; PyTorch's is 1e-5


def in_torch() -> nn.Sequential:
    """Two convolutions and a dense layer, each with BN, and a dense head; input (N, 3, 10, 10)."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.BatchNorm2d(6, eps=EPS),
        nn.ReLU(),
        nn.Conv2d(6, 5, 3, padding=1),
        nn.BatchNorm2d(5, eps=EPS),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(5, 7),
        nn.BatchNorm1d(7, eps=EPS),
        nn.Linear(7, 4),
    )
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
    return model


def in_keras(model: nn.Sequential) -> keras.Sequential:
    """The same, for input (N, 10, 10, 3)."""
    twin = keras.Sequential(
        [
            L.Input((10, 10, 3)),
            L.Conv2D(6, 3, use_bias=False),
            L.BatchNormalization(),
            L.ReLU(),
            L.Conv2D(5, 3, padding="same"),
            L.BatchNormalization(),
            L.ReLU(),
            L.GlobalAveragePooling2D(),
            L.Dense(7),
            L.BatchNormalization(),
            L.Dense(4),
        ]
    )
    weighty = [layer for layer in twin.layers if layer.weights]
    for source, layer in zip([m for m in model if list(m.parameters())], weighty, strict=True):
        weights = [tensor.detach().numpy() for tensor in source.state_dict().values() if tensor.ndim]
        if weights[0].ndim > 1:  # (out, in, ...) to (..., in, out)
            weights[0] = np.moveaxis(weights[0], (0, 1), (-1, -2))
        layer.set_weights(weights)
    return twin


def in_onnx(model: nn.Sequential, folder: Path) -> onnx.ModelProto:
    """The same as an ONNX file with its BN in it, for input (N, 3, 10, 10)."""
    path = folder / "same.onnx"
    dynamic = {"x": {0: "n"}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that leaves BN alone is the older one
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, 10, 10),),
            str(path),
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["x"],
            dynamic_axes=dynamic,
        )
    return onnx.load(str(path))
