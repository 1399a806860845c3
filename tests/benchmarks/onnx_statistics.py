"""The same weights as nn.Module and as ONNX file, recalibrated on the same data; residual and micro-batches."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from measure import Row, at_most
from networks import as_trained, small, vision, write_onnx

import bntools
from bntools.layer import BatchNorm, distance

PIXELS, SAMPLES = 128, 32
SIZES = (8, 4, 32)  # the first is the one that both forms are compared at


def rows() -> Iterator[Row]:
    """Three rows a network, in standard deviations, and both forms' distance from float64."""
    torch.manual_seed(0)
    images = torch.randn(SAMPLES, 3, PIXELS, PIXELS)
    networks = {
        "small CNN": small,
        "ResNet-18": vision.resnet18,
        "ResNet-50": vision.resnet50,
        "ResNet-50 with scales as trained": lambda: as_trained(vision.resnet50()),
    }
    for name, make in networks.items():
        with tempfile.TemporaryDirectory() as folder:
            yield from _compared(name, make(), images, Path(folder) / "model.onnx")


def _compared(name: str, model: torch.nn.Module, images: torch.Tensor, path: Path) -> Iterator[Row]:
    write_onnx(model, PIXELS, path)
    exact = copy.deepcopy(model).double()
    bntools.recalibrate(exact, images.double().split(8), check=False)
    truth = bntools.inspect(exact)
    bntools.recalibrate(model, images.split(SIZES[0]), check=False)
    module = bntools.inspect(model)
    residuals, files = [], []
    for size in SIZES:
        proto = bntools.load(path)
        order = torch.arange(SAMPLES) if size == SIZES[0] else torch.randperm(SAMPLES)
        batches = [batch.numpy() for batch in images[order].split(size)]
        residuals.append(bntools.recalibrate(proto, batches).residual)
        files.append(bntools.inspect(proto))
    apart = _apart(module, files[0])
    yield at_most(f"ONNX, {name}, {SAMPLES} samples: statistics of the nn.Module and of its file", apart, 1e-5)
    own = f"{_apart(truth, module):.1e} / {_apart(truth, files[0]):.1e}"
    yield Row(f"ONNX, {name}: distance from float64, nn.Module / file", own, "", True)
    sizes = ", ".join(map(str, sorted(SIZES)))
    yield at_most(f"ONNX, {name}: worst residual at micro-batch {sizes}", max(residuals), 1e-5)
    spread = max(_apart(files[0], other) for other in files[1:])
    yield at_most(f"ONNX, {name}: statistics between those micro-batches, shuffled", spread, 1e-5)


def _apart(one: list[BatchNorm], other: list[BatchNorm]) -> float:
    """The largest distance of two models' statistics, layer by layer in their common order."""
    assert [layer.features for layer in one] == [layer.features for layer in other]
    return max(distance(a.stats, b.stats, a.eps) for a, b in zip(one, other, strict=True))
