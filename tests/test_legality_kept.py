"""Which layers are kept, each with the reason in words, in PyTorch models."""

from __future__ import annotations

import pytest
from folding_nets import Net, folds, image, randomized
from torch import nn
from torch.nn import functional as F


def test_one_convolution_with_two_layers_is_kept():
    """Folded in turn, the weight would be scaled twice: this was off by 0.4 to 2.3 elsewhere."""
    model = Net(
        lambda m, x: m.bn1(m.conv(x)).relu() + m.bn2(m.conv(x.tanh())).relu(),
        conv=nn.Conv2d(3, 4, 1),
        bn1=nn.BatchNorm2d(4),
        bn2=nn.BatchNorm2d(4),
    )
    kept = folds(randomized(model), image(3)).kept
    assert set(kept) == {"bn1", "bn2"}
    assert "the weights of conv 'conv' are also used by another call of it" in kept["bn1"]
    one = Net(
        lambda m, x: m.bn1(y := m.conv(x)).relu() + m.bn2(y).relu(),
        conv=nn.Conv2d(3, 4, 1),
        bn1=nn.BatchNorm2d(4),
        bn2=nn.BatchNorm2d(4),
    )
    kept = folds(randomized(one), image(3)).kept
    assert "the output of conv 'conv' is read by batch norm 'bn1' and batch norm 'bn2'" in kept["bn1"]


def test_a_shared_layer_that_folds_in_one_call_only_is_kept():
    """Both calls are one module: what stands in the way of one keeps it."""
    model = Net(lambda m, x: m.bn(m.conv(x)) + m.bn(x.relu()), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    assert "relu stands between it and" in folds(randomized(model), image(3)).kept["bn"]
    twice = Net(lambda m, x: m.bn(m.bn(m.conv(x))), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    assert "it reads its own output" in folds(randomized(twice), image(3)).kept["bn"]


KEPT = {
    "another reader": (
        lambda m, x: m.bn(y := m.conv(x)) + y,
        "the output of conv 'conv' is read by batch norm 'bn' and add",
    ),
    "an output": (lambda m, x: (y := m.conv(x), m.bn(y)), "the output of conv 'conv' is an output of the model"),
    "relu": (lambda m, x: m.bn(m.conv(x).relu()), "relu stands between it and conv 'conv'"),
    "relu in place": (lambda m, x: m.bn(m.conv(x).relu_()), "relu stands between it and conv 'conv'"),
    "multiplied": (lambda m, x: m.bn(m.conv(x).mul_(2)), "mul stands between it and conv 'conv'"),
    "through a view": (
        lambda m, x: (y := m.conv(x), y.view(-1).add_(1.0), m.bn(y))[2],
        "the output of conv 'conv' is read by view and batch norm 'bn'",
    ),
    "a check of values": (
        lambda m, x: m.bn(y) if (y := m.conv(x)).isfinite().all() else x,
        "'Net' reads computed values or sizes into Python",
    ),
    "an integer": (lambda m, x: m.bn(m.conv(x).int().to(x.dtype)), "to stands between it and conv 'conv'"),
    "a penalty on the bias": (
        lambda m, x: (m.bn(m.conv(x)), m.conv.bias.abs().sum()),
        "the weights of conv 'conv' are also used by abs",
    ),
    "a penalty on the layer": (
        lambda m, x: (m.bn(m.conv(x)), m.bn.weight.abs().sum()),
        "its weights or statistics are also read by abs",
    ),
    "weights in a loop": (
        lambda m, x: m.bn(F.conv2d(x, m.conv.weight * 2)),
        "its weight is computed in the forward pass",
    ),
    "never reached": (lambda m, x: m.conv(x), "the example never reaches it"),
    "its own forward around": (
        lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, m.bn.weight, m.bn.bias, eps=m.bn.eps),
        "its statistics are used outside of its own forward",
    ),
    "nobody reads it": (lambda m, x: (m.bn(x.relu()), x)[1], "nothing reads the output of batch norm 'bn'"),
}


@pytest.mark.parametrize("case", KEPT)
def test_what_stands_in_the_way_is_named(case):
    """A layer that cannot be folded exactly stays, with what is in the way in words."""
    run, words = KEPT[case]
    model = Net(run, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    result = folds(randomized(model), image(3))
    assert words in result.kept["bn"], result
    assert str(result).startswith("folded 0 of 1, kept 1:\n  bn: ")


def test_an_input_that_is_overwritten_stays():
    """Without the layer its reader would read the input itself, after an in-place operation has destroyed it."""

    def run(m, x):
        x = x.relu()
        y = m.bn(x)
        x += 1.0
        return m.conv(y) + x

    model = Net(run, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    assert "an in-place operation overwrites its input" in folds(randomized(model), image(3)).kept["bn"]


def test_outputs_that_would_become_one_are_not_overwritten():
    """Two calls of a layer on one value give two tensors, and without it one: nothing may change one in place."""
    run = {
        True: lambda m, x: (m.bn(y := m.conv(x)).relu(), m.bn(y).tanh()),
        False: lambda m, x: (m.bn(y := m.conv(x)).relu_(), m.bn(y.flatten(1).view_as(y)).tanh()),
    }
    for folded, function in run.items():
        model = Net(function, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
        assert bool(folds(randomized(model), image(3)).folded) is folded
