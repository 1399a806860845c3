"""Residual and invariance of exact recalibration, and its accuracy on data with a large mean."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from measure import Row, at_most
from networks import UNet3d, mlp, vision

import bntools
from bntools.layer import distance

SIZES = (1, 2, 4, 16, 64)


def rows() -> Iterator[Row]:
    """One row an architecture, and one for the offset."""
    torch.manual_seed(0)
    images = torch.randn(64, 3, 128, 128)
    cases = {
        "ResNet-18": (vision.resnet18(), images),
        "ResNet-50": (vision.resnet50(), images),
        "MobileNetV3-large": (vision.mobilenet_v3_large(), images),
        "DenseNet-121": (vision.densenet121(), images),
        "3-D U-Net": (UNet3d(), torch.randn(64, 1, 16, 16, 16)),
        "MLP": (mlp(), torch.randn(64, 64)),
    }
    for name, (model, data) in cases.items():
        residual, spread = _invariance(model, data)
        yield at_most(f"{name}, 64 samples: worst residual at micro-batch 1, 2, 4, 16, 64", residual, 1e-5)
        yield at_most(f"{name}: statistics between those micro-batches, shuffled", spread, 1e-5)
    yield at_most("Data with mean 1e4 times its standard deviation: relative error of the variance", _offset(), 1e-3)


def _invariance(model: torch.nn.Module, data: torch.Tensor) -> tuple[float, float]:
    residuals, records = [], []
    for size in SIZES:
        twin = copy.deepcopy(model)
        order = torch.randperm(len(data))
        residuals.append(bntools.recalibrate(twin, data[order].split(size)).residual)
        records.append(bntools.inspect(twin))
    spread = max(
        distance(a.stats, b.stats, a.eps) for other in records for a, b in zip(records[-1], other, strict=True)
    )
    return max(residuals), spread


def _offset() -> float:
    x = (torch.randn(64, 8, 64, 64, dtype=torch.float64) * 0.01 + 100).float()
    model = torch.nn.Sequential(torch.nn.BatchNorm2d(8), torch.nn.Conv2d(8, 8, 1))
    bntools.recalibrate(model, x.split(16), check=False)
    true = x.double().var((0, 2, 3), correction=0)
    return float((model[0].running_var.double() / true - 1).abs().max())
