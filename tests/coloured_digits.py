"""A small network that reads coloured digits, and the digits as other cameras take them."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch
from torch import nn

from bntools.cli import digits

INK = np.array([1.0, 0.75, 0.4])[:, None, None]  # how bright it is in red, green and blue
PAPER = np.array([0.15, 0.05, 0.0])[:, None, None]


def taken(ink: np.ndarray) -> np.ndarray:
    """Images of digits (n, 8, 8), RGB in 0..1 that fill the range: float32 (n, 3, 8, 8)."""
    return (PAPER + (1 - PAPER) * INK * ink[:, None]).astype(np.float32)


@cache
def known() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that the network has been trained on."""
    found = digits.load()
    return taken(found.ink), found.labels


@cache
def held_out() -> tuple[np.ndarray, np.ndarray]:
    """Images and labels that it has not seen, 597 of them."""
    found = digits.load()
    return taken(found.held_out_ink), found.held_out_labels


@cache
def trained() -> nn.Sequential:
    """The network, trained in a second: to be copied before it is changed."""
    images, labels = (torch.from_numpy(part) for part in known())
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 24, 3, padding=1, stride=2), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.Conv2d(24, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 10)),
        )
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
        for _ in range(6):
            for chosen in torch.randperm(len(images)).split(64):
                optimizer.zero_grad()
                nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
                optimizer.step()
    return model.eval()


def batches(images: np.ndarray, size: int = 64) -> list[np.ndarray]:
    """The images in batches."""
    return [images[start : start + size] for start in range(0, len(images), size)]
