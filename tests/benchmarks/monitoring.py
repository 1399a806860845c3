"""What bntools.watch costs of a training step: finite at every step, figures to TensorBoard every 50 steps."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator

import torch
from measure import Row, at_most, seconds
from networks import vision
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter

import bntools
from bntools.backends.torch.digits import network

STEPS = 200  # of the watch, which is measured by itself: a thousandth would be lost in the noise of the steps


def rows() -> Iterator[Row]:
    """ResNet-50, 16 images of 128 pixels, and the small network of the demo, 64 images of 8 pixels."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for what, model, images in (
        ("ResNet-50, 16 images of 128 px", vision.resnet50(), torch.randn(16, 3, 128, 128)),
        ("3 layers of BN, 64 images of 8 px", network(), torch.randn(64, 1, 8, 8)),
    ):
        share = _share(model.to(device), images.to(device))
        yield at_most(f"{what}, {device}: bntools.watch / training step", 100 * share, 2.0, "{:.2f} %")


def _share(model: torch.nn.Module, images: torch.Tensor) -> float:
    """The time of a step of the watch, the mean over four times that it logs, over the median of a training step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    labels = torch.zeros(len(images), dtype=torch.long, device=images.device)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
        if images.is_cuda:
            torch.cuda.synchronize()

    step()
    trained = sorted(seconds(step) for _ in range(7))[3]
    with (
        tempfile.TemporaryDirectory() as folder,
        SummaryWriter(folder) as writer,
        bntools.watch(model, every=50, log=writer) as watch,
    ):
        watch.step()
        return seconds(lambda: [watch.step() for _ in range(STEPS)]) / STEPS / trained
