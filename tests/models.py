"""Small PyTorch models in which batch normalization is easily got wrong."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F


def cnn(channels: int = 3) -> nn.Sequential:
    """Two convolutions with BN and ReLU, then a linear head; every BN has its own width."""
    return nn.Sequential(
        nn.Conv2d(channels, 5, 3, padding=1, bias=False),
        nn.BatchNorm2d(5),
        nn.ReLU(),
        nn.Conv2d(5, 7, 3, stride=2),
        nn.BatchNorm2d(7),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(7, 4),
    )


class TwoInputs(nn.Module):
    """Takes two keyword inputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.bn = nn.BatchNorm1d(4)

    def forward(self, left, right):
        return self.bn(self.a(left) + self.b(right))


class Remembers(nn.Module):
    """Stores a value on itself before a BN and reads it back behind it, as many models do."""

    def __init__(self):
        super().__init__()
        self.first, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.second, self.bn2 = nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.kept = None
        self.seen = []

    def forward(self, x):
        self.calls += 1
        self.seen.clear()
        self.kept = self.first(x)
        self.seen.append(self.kept)
        y = self.bn(self.kept)
        return self.bn2(self.second(y + self.kept) + self.seen[0] * len(self.seen))


class Branches(nn.Module):
    """Sends a batch through an optional block, defined after what follows it, by what it holds."""

    def __init__(self):
        super().__init__()
        self.last = nn.BatchNorm1d(3)
        self.stem = nn.BatchNorm1d(3)
        self.optional = nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.stem(x)
        if x[0, 0] > 0:
            x = torch.tanh(self.optional(x * 3 + 1))
        return self.last(x * x)


class Exits(nn.Module):
    """Stops early for some batches."""

    def __init__(self):
        super().__init__()
        self.stem, self.late = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

    def forward(self, x):
        x = self.stem(x)
        return x if x[0, 0] > 0 else self.late(x**3)


class Shared(nn.Module):
    """Calls one BN twice, on independent inputs."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.unused = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(x) + self.bn(x * 2 + 5)


class BnRelu(nn.BatchNorm2d):
    """A subclass that does more in forward: BN, then ReLU."""

    def forward(self, x):
        return F.relu(super().forward(x))


class ReluBn(nn.BatchNorm2d):
    """A subclass that changes its input before it normalizes."""

    def forward(self, x):
        return super().forward(F.relu(x) * 2)


class WrittenOut(nn.BatchNorm2d):
    """A subclass that writes the arithmetic out instead of calling batch_norm."""

    def forward(self, x):
        mean, var, scale, shift = (
            t[:, None, None] for t in (self.running_mean, self.running_var, self.weight, self.bias)
        )
        return (x - mean) / torch.sqrt(var + self.eps) * scale + shift


class Switches(nn.Module):
    """Switches grad mode, inference mode and autocast around its layers."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.three = (nn.BatchNorm1d(3) for _ in range(3))
        self.linear = nn.Linear(3, 3)
        self.modes = []

    def forward(self, x):
        with torch.enable_grad():
            x = self.one(x)
            assert torch.is_grad_enabled()
        assert not torch.is_grad_enabled()
        with torch.autocast("cpu", torch.bfloat16):
            x = self.two(self.linear(x))
            assert torch.is_autocast_enabled("cpu")
            x = self.linear(x)
            assert x.dtype == torch.bfloat16
        assert not torch.is_autocast_enabled("cpu")
        with torch.inference_mode():
            x = self.three(x.float())
            assert torch.is_inference_mode_enabled()
        return x.clone()
