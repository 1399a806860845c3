"""What bntools.watch costs of a training step: finite at every step, figures to TensorBoard every 50 steps."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterator

import numpy as np
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
    yield at_most(
        "Keras, ResNet-50, 16 images of 64 px: MonitorBatchNorm / training step", 100 * _in_keras(), 2.0, "{:.2f} %"
    )
    there, back = _switch(vision.resnet50().to(device))
    figure = f"{there * 1e3:.2f} ms, {back * 1e3:.2f} ms"
    yield Row(f"ResNet-50, {device}: other statistics by a prepared bntools.use, and back", figure, "", True)


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


def _switch(model: torch.nn.Module) -> tuple[float, float]:
    """The median times of entering and leaving the block of a ``use`` that was prepared."""
    use = bntools.use(model, bntools.statistics(model))
    times = [(seconds(use.__enter__), seconds(lambda: use.__exit__(None, None, None))) for _ in range(21)]
    there, back = zip(*times, strict=True)
    return statistics.median(there), statistics.median(back)


def _in_keras() -> float:
    """The callback's time at a batch, the mean over four times that it logs, over the median of a training step."""
    import keras

    from bntools.callbacks.keras import MonitorBatchNorm

    model = keras.applications.ResNet50(weights=None, input_shape=(64, 64, 3), classes=10)
    model.compile("sgd", "sparse_categorical_crossentropy")
    images, labels = np.zeros((16, 64, 64, 3), np.float32), np.zeros(16)

    def step() -> None:
        model.train_on_batch(images, labels)

    def batches() -> None:
        for batch in range(STEPS):
            callback.on_train_batch_begin(batch)
            callback.on_train_batch_end(batch)

    step()
    trained = statistics.median(seconds(step) for _ in range(7))
    with tempfile.TemporaryDirectory() as folder:
        callback = MonitorBatchNorm(folder, every=50)
        callback.set_model(model)
        callback.on_train_begin()
        share = seconds(batches) / STEPS / trained
        callback.on_train_end()
    return share
