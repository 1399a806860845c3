"""The networks that are measured: random weights, and statistics of random data."""

from __future__ import annotations

import warnings
from itertools import pairwise
from pathlib import Path

import shim
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

vision = shim.import_torchvision().models


class UNet3d(nn.Module):
    """A small 3-D U-Net: two levels down, two up, skip connections by concatenation."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.down1, self.down2 = _block(1, width), _block(width, 2 * width)
        self.bottom = _block(2 * width, 4 * width)
        self.up2, self.up1 = _up(4 * width), _up(2 * width)
        self.merge2, self.merge1 = _block(4 * width, 2 * width), _block(2 * width, width)
        self.head = nn.Conv3d(width, 2, 1)
        self.pool = nn.MaxPool3d(2)

    def forward(self, x):
        """(N, 1, D, H, W) to (N, 2, D, H, W)."""
        a = self.down1(x)
        b = self.down2(self.pool(a))
        c = self.up2(self.bottom(self.pool(b)))
        c = self.up1(self.merge2(torch.cat([b, c], 1)))
        return self.head(self.merge1(torch.cat([a, c], 1)))


def mlp() -> nn.Sequential:
    """Four hidden layers with BN."""
    sizes = [64, 256, 256, 128, 128]
    layers = [part for a, b in pairwise(sizes) for part in (nn.Linear(a, b, bias=False), nn.BatchNorm1d(b), nn.ReLU())]
    return nn.Sequential(*layers, nn.Linear(128, 10))


def small() -> nn.Sequential:
    """Three convolutions with BN."""
    sizes = [3, 16, 32, 32]
    layers = [
        part
        for a, b in pairwise(sizes)
        for part in (nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU())
    ]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def as_trained(model: nn.Module) -> nn.Module:
    """Scales below 1 where a residual branch ends, as training leaves them: an untrained ResNet multiplies rounding."""
    for module in model.modules():
        if isinstance(module, vision.resnet.Bottleneck):
            nn.init.uniform_(module.bn3.weight, 0.1, 0.5)
    return model


def with_statistics(model: nn.Module) -> nn.Module:
    """Statistics, scales and shifts that are nowhere 0 or 1."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            nn.init.normal_(module.running_mean, 0, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    return model


def write_onnx(model: nn.Module, pixels: int, path: Path) -> Path:
    """The model as an ONNX file in which every BN is a node; input ``x`` of any number of images."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the exporter that leaves BN alone is the older one
        torch.onnx.export(
            model.eval(),
            (torch.zeros(2, 3, pixels, pixels),),
            str(path),
            dynamo=False,
            do_constant_folding=False,
            training=torch.onnx.TrainingMode.PRESERVE,
            input_names=["x"],
            dynamic_axes={"x": {0: "n"}},
        )
    return path


def _block(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv3d(inside, outside, 3, padding=1, bias=False),
        nn.BatchNorm3d(outside),
        nn.ReLU(),
        nn.Conv3d(outside, outside, 3, padding=1, bias=False),
        nn.BatchNorm3d(outside),
        nn.ReLU(),
    )


def _up(inside: int) -> nn.Sequential:
    half = inside // 2
    return nn.Sequential(nn.ConvTranspose3d(inside, half, 2, stride=2, bias=False), nn.BatchNorm3d(half), nn.ReLU())
