"""What the tests of folding share: BN layers with telling numbers, and the comparison with float64."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

import bntools
from bntools.backends.torch.layers import modules
from bntools.folding import Folded


def image(channels: int, dims: int = 2, size: int = 5) -> torch.Tensor:
    """Two random samples with this many channels and spatial axes."""
    return torch.randn(2, channels, *[size] * dims, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Named parts, and a function that says how they work together."""

    def __init__(self, run, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x)


def randomized(model: nn.Module, seed: int = 0, positive: bool = False) -> nn.Module:
    """The model in eval mode with random statistics, scale (some negative) and shift, and an eps of its own a layer."""
    generator = torch.Generator().manual_seed(seed)
    for i, layer in enumerate(modules(model).values()):
        n = layer.running_mean.numel()
        layer.running_mean.copy_(torch.randn(n, generator=generator) * 0.5)
        layer.running_var.copy_(torch.rand(n, generator=generator) * 1.5 + 0.5)
        layer.eps = 1e-5 * 10 ** (i % 4)
        with torch.no_grad():
            if getattr(layer, "weight", None) is not None:
                sign = 1 if positive else torch.where(torch.rand(n, generator=generator) < 0.3, -1.0, 1.0)
                layer.weight.copy_((torch.rand(n, generator=generator) * 0.6 + 0.7) * sign)
            if getattr(layer, "bias", None) is not None:
                layer.bias.copy_(torch.randn(n, generator=generator) * 0.5)
    return model.eval()


def folds(model: nn.Module, x: object, **options: Any) -> Folded:
    """The model folded, after checking in float64 that its function is the same on the example and on another."""
    double = copy.deepcopy(model).double()
    exact = bntools.fold(double, as_double(x), **options)
    assert exact.check.error < 1e-12
    folded = bntools.fold(model, x, **options)
    assert folded.check.error < 1e-5
    assert (folded.folded, folded.kept) == (exact.folded, exact.kept)
    assert error(exact.model, double, other(as_double(x))) < 1e-12
    return folded


def error(model: nn.Module, reference: nn.Module, x: object) -> float:
    """Scale-relative error of all outputs."""
    return bntools.verify(reference, model, [x]).error


def other(x: object) -> object:
    """A batch like the example, with other numbers."""
    if isinstance(x, dict):
        return {key: other(value) for key, value in x.items()}
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)  # type: ignore[attr-defined]


def as_double(x: object) -> object:
    """The example in float64."""
    if isinstance(x, dict):
        return {key: as_double(value) for key, value in x.items()}
    return x.double() if isinstance(x, torch.Tensor) else x
