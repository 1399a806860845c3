"""The network of ``onnx_files.small`` as an nn.Module as well, with the same names and weights."""

from __future__ import annotations

import onnx
import onnx_files
import torch
from onnx import numpy_helper
from torch import nn


def pair() -> tuple[nn.Module, onnx.ModelProto]:
    """The module in eval mode, and its ONNX model."""
    model = onnx_files.small()
    values = {one.name: torch.from_numpy(numpy_helper.to_array(one).copy()) for one in model.graph.initializer}
    values |= {"conv1.weight": values.pop("w1"), "conv2.weight": values.pop("w2")}
    module = nn.Sequential()
    for name, layer in {
        "conv1": nn.Conv2d(3, 40, 3, padding=1, bias=False),
        "bn1": nn.BatchNorm2d(40),
        "relu": nn.ReLU(),
        "conv2": nn.Conv2d(40, 5, 1, bias=False),
        "bn2": nn.BatchNorm2d(5),
    }.items():
        module.add_module(name, layer)
    module.load_state_dict(values, strict=False)
    return module.eval(), model
