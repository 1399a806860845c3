"""How far what each stores is from what one batch of all the data gives in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from measure import Row
from networks import as_trained, vision
from peers import PEERS
from torch import nn

import bntools
from bntools.layer import distance

SAMPLES, PIXELS = 128, 64
GOAL = 1e-5


def rows() -> Iterator[Row]:
    """Two networks, the worst channel of all their layers, at three sizes of micro-batches and a ragged one."""
    torch.manual_seed(0)
    images = torch.randn(SAMPLES, 3, PIXELS, PIXELS)
    for name, make in {"ResNet-18": vision.resnet18, "MobileNetV3-small": vision.mobilenet_v3_small}.items():
        model = _without_dropout(as_trained(make()))
        truth = _whole(model, images)
        for size in (4, 16, 64, 120):
            ragged = f", {SAMPLES % size} in the last" if SAMPLES % size else ""
            what = f"{name}, {SAMPLES} images, micro-batch {size}{ragged}"
            yield _row(what, model, truth, images.split(size))


def _row(what: str, model: nn.Module, truth: list, batches: tuple[torch.Tensor, ...]) -> Row:
    ours = copy.deepcopy(model)
    bntools.recalibrate(ours, batches, check=False)
    gaps = {"bntools": _apart(truth, ours)}
    for name, peer in PEERS.items():
        twin = copy.deepcopy(model)
        peer(twin, batches)
        gaps[name] = _apart(truth, twin)
    cells = {name: f"{gap:.2g}" for name, gap in gaps.items()}
    return Row(what, "", f"bntools at most {GOAL:g}", gaps["bntools"] <= GOAL, cells)


def _whole(model: nn.Module, images: torch.Tensor) -> list:
    """The definition: the moments of each layer's input in one batch of all, which normalizes with them, in float64."""
    exact = copy.deepcopy(model).double().train()
    found = []
    for module in exact.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            module.register_forward_pre_hook(
                lambda one, args: found.append(torch.var_mean(args[0], (0, 2, 3), correction=0))
            )
    with torch.no_grad():
        exact(images.double())
    return [(mean.numpy(), var.numpy()) for var, mean in found]


def _apart(truth: list, model: nn.Module) -> float:
    """The largest distance, in standard deviations; layers in the order in which these networks run them."""
    layers = bntools.inspect(model)
    return max(distance(right, layer.stats, layer.eps) for right, layer in zip(truth, layers, strict=True))


def _without_dropout(model: nn.Module) -> nn.Module:
    """Which other helpers leave on: it would be held against them here."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.eval()
