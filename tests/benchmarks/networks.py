"""The networks that are measured: random weights, and statistics of random data."""

from __future__ import annotations

from itertools import pairwise

import shim
import torch
from torch import nn

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
