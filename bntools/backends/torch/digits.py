"""A small network with BN for images of digits, and its training: for the demo and the samples."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

EPOCHS = 8
BATCH = 64


def network() -> nn.Sequential:
    """Three blocks of convolution, BN and ReLU, then a classifier: (n, 1, 8, 8) -> (n, 10)."""
    return nn.Sequential(
        *_block(1, 32),
        *_block(32, 64),
        nn.MaxPool2d(2),
        *_block(64, 64),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(64, 10),
    )


def trained(images: np.ndarray, labels: np.ndarray, seed: int = 0) -> nn.Sequential:
    """Train the network on images (n, 1, 8, 8) float32 and labels (n,) int64; returned in eval mode.

    Seconds on one core. The seed fixes the initial weights and the order of the samples, and leaves
    the caller's random state alone.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = network()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        inputs, targets = torch.from_numpy(images), torch.from_numpy(labels)
        for _ in range(EPOCHS):
            for chosen in torch.randperm(len(inputs)).split(BATCH):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(inputs[chosen]), targets[chosen]).backward()
                optimizer.step()
    return model.eval()


def _block(channels_in: int, channels_out: int) -> list[nn.Module]:
    return [nn.Conv2d(channels_in, channels_out, 3, padding=1), nn.BatchNorm2d(channels_out), nn.ReLU()]
