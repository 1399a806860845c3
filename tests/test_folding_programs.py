"""Random programs folded: whatever the graph allows must be right by itself, before any comparison."""

from __future__ import annotations

import copy

import torch
from folding_nets import randomized
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import bntools

CHANNELS, SIZE = 4, 6

# Each takes the network and two values of shape (N, CHANNELS, SIZE, SIZE), and gives another one.
STEPS = {
    "bn0": lambda m, x, y: m.bn[0](x),
    "bn1": lambda m, x, y: m.bn[1](x),
    "bn2": lambda m, x, y: m.bn[2](x),
    "bn3": lambda m, x, y: m.bn[3](x),
    "conv": lambda m, x, y: m.conv(x),
    "padded": lambda m, x, y: m.padded(x),
    "circular": lambda m, x, y: m.circular(x),
    "grouped": lambda m, x, y: m.grouped(x),
    "transposed": lambda m, x, y: m.transposed(x),
    "wide": lambda m, x, y: m.narrow(torch.cat([x, m.bn[4](y)], 1)),
    "dense": lambda m, x, y: m.dense(x.permute(0, 2, 3, 1)).movedim(-1, 1),
    "dense on pixels": lambda m, x, y: m.pixels(x.flatten(2)).view_as(x),
    "relu": lambda m, x, y: x.relu(),
    "relu in place": lambda m, x, y: x.relu_(),
    "half in place": lambda m, x, y: x.mul_(0.5),
    "half a view in place": lambda m, x, y: (x.flatten(1).mul_(0.5), x)[1],
    "max pool": lambda m, x, y: F.max_pool2d(x, 3, 1, 1),
    "average": lambda m, x, y: F.avg_pool2d(x, 3, 1, 1),
    "average inside": lambda m, x, y: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
    "resized": lambda m, x, y: F.interpolate(F.avg_pool2d(x, 2), scale_factor=2.0),
    "add": lambda m, x, y: x + y,
    "add in place": lambda m, x, y: x.add_(y),
    "array": lambda m, x, y: x + m.array,
    "shuffled": lambda m, x, y: x.view(-1, 2, 2, SIZE, SIZE).transpose(1, 2).reshape(-1, CHANNELS, SIZE, SIZE),
    "swapped": lambda m, x, y: torch.cat([x[:, 2:], y[:, :2]], 1),
    "mirrored": lambda m, x, y: F.pad(x, (0, 1, 1, 0), mode="reflect")[:, :, :SIZE, 1:],
    "shifted": lambda m, x, y: F.pad(x, (1, 0, 0, 0))[..., :SIZE],
    "gated": lambda m, x, y: x * y.sigmoid(),
}


class Program(nn.Module):
    """Runs steps one after the other; each names the values it reads by how far back they were made."""

    def __init__(self, steps):
        super().__init__()
        self.bn = nn.ModuleList([nn.BatchNorm2d(CHANNELS, affine=i != 1) for i in range(5)])
        self.conv = nn.Conv2d(CHANNELS, CHANNELS, 1, bias=False)
        self.padded = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        self.circular = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, padding_mode="circular")
        self.grouped = nn.Conv2d(CHANNELS, CHANNELS, 1, groups=2)
        self.transposed = nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, padding=1, groups=2)
        self.narrow = nn.Conv2d(2 * CHANNELS, CHANNELS, 1)
        self.dense = nn.Linear(CHANNELS, CHANNELS)
        self.pixels = nn.Linear(SIZE * SIZE, SIZE * SIZE)
        self.array = nn.Parameter(torch.randn(CHANNELS, 1, 1))
        self.steps = steps

    def forward(self, x):
        values = [x.clone()]
        for name, first, second in self.steps:
            values.append(STEPS[name](self, values[-1 - first % len(values)], values[-1 - second % len(values)]))
        return values[-1], values[-2], values[-3].mean()


STEP = st.tuples(st.sampled_from(sorted(STEPS)), st.sampled_from([0, 0, 0, 0, 1, 2]), st.integers(0, 3))


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(st.lists(STEP, min_size=2, max_size=9), st.integers(0, 9), st.booleans())
def test_random_programs_keep_their_function(steps, seed, positive):
    """No fold that the graph allows has to be undone, and the function is the same on inputs never seen."""
    torch.manual_seed(seed)
    model = randomized(Program(steps), seed, positive).double()
    x = torch.randn(2, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    before = copy.deepcopy(model.state_dict())
    result = bntools.fold(model, x)
    assert not [reason for reason in result.kept.values() if reason.startswith("undone")], result
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    fresh = torch.randn(3, CHANNELS, SIZE, SIZE, dtype=torch.float64)
    assert bntools.verify(model, result.model, [fresh]).error < 1e-10
