"""The neutral graph of a module: what is seen of a forward pass, and which of it outlives the pass."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from folding_nets import Net, folds, image, randomized
from torch import nn
from torch.nn import functional as F

import bntools
from bntools.backends.torch.graph import graph
from bntools.backends.torch.operators import given_arguments, order_of, transparent
from bntools.graph import (
    Add,
    Bias,
    Concat,
    Identity,
    Linear,
    Norm,
    Other,
    Pad,
    Permute,
    Pool,
    Reduce,
    Reshape,
    Resize,
    Slice,
)


class Small(nn.Module):
    """A bit of everything."""

    def __init__(self):
        super().__init__()
        self.conv = nn.ConvTranspose2d(4, 6, 2, groups=2, bias=False)
        self.bn = nn.BatchNorm2d(6)
        self.fc = nn.Linear(6, 5)

    def forward(self, x):
        y = F.relu_(self.bn(self.conv(x)))
        return self.fc(F.dropout(y, training=False).mean((2, 3)))


def test_a_graph_has_one_node_for_each_operation():
    """Slots, axes and labels are those of the modules; what does nothing in eval mode is not there."""
    nodes = graph(Small().eval(), image(4)).nodes
    conv = Linear("conv.weight", "conv.bias", 1, 0, 2, 1, 1, "", "gives its outputs from different numbers of inputs")
    fc = Linear("fc.weight", "fc.bias", 0, 1, 1, 1, 1)
    assert [node.op for node in nodes] == [conv, Norm("bn", 1), Other(), Reduce("average", (2, 3), False), fc]
    labels = ["transposed conv 'conv'", "batch norm 'bn'", "relu", "mean", "dense 'fc'"]
    assert [node.label for node in nodes] == labels
    assert nodes[0].reads == {"conv.weight"}
    assert nodes[4].reads == {"fc.weight", "fc.bias"}
    assert nodes[1].reads == {"bn.weight", "bn.bias", "bn.running_mean", "bn.running_var"}


def test_values_are_linked_by_what_reads_them():
    """Each node reads what an earlier one made; the last value is the only one seen from outside."""
    found = graph(Small().eval(), image(4))
    chain = [(node.inputs, node.outputs) for node in found.nodes]
    for (_, outputs), (inputs, _) in pairwise(chain):
        assert inputs == outputs
    assert dict(found.outputs) == {chain[-1][1][0]: "an output of the model"}
    assert [found.shapes[outputs[0]] for _, outputs in chain][-2:] == [(2, 6), (2, 5)]


CALLS = [
    (lambda x: x.flatten(1), Reshape()),
    (lambda x: x.unsqueeze(1), Reshape()),
    (lambda x: x.view(2, 4, -1), Reshape()),
    (lambda x: x.transpose(1, -1), Permute((0, 3, 2, 1))),
    (lambda x: x.permute(0, 2, 3, 1), Permute((0, 2, 3, 1))),
    (lambda x: x.movedim(1, -1), Permute((0, 2, 3, 1))),
    (lambda x: x.swapaxes(0, 1), Permute((1, 0, 2, 3))),
    (lambda x: x.clone(), Identity()),
    (lambda x: x.to(torch.bfloat16), Identity()),
    (lambda x: torch.cat([x, x], -3), Concat(1)),
    (lambda x: x[:, 1:-1], Slice(1, 1, 3)),
    (lambda x: x[:, ::2], Slice(1, 0, 4, 2)),
    (lambda x: x.narrow(1, -3, 2), Slice(1, 1, 3)),
    (lambda x: x.chunk(2, 1)[1], Slice(1, 2, 4)),
    (lambda x: x.split([1, 3], 1)[1], Slice(1, 1, 4)),
    (lambda x: F.avg_pool2d(x, 2), Pool("average", (2, 3))),
    (lambda x: F.avg_pool2d(x, 2, padding=1), Pool("average", (2, 3), partial=True)),
    (lambda x: F.avg_pool2d(x, 2, padding=1, count_include_pad=False), Pool("average", (2, 3))),
    (lambda x: F.avg_pool2d(x, 2, divisor_override=3), Pool("average", (2, 3), partial=True)),
    (lambda x: F.max_pool2d(x, 2, padding=1), Pool("max", (2, 3))),
    (lambda x: F.max_pool2d(x, 2, return_indices=True)[0], Pool("max", (2, 3))),
    (lambda x: F.adaptive_avg_pool2d(x, 2), Pool("average", (2, 3))),
    (lambda x: F.adaptive_max_pool2d(x, 2), Pool("max", (2, 3))),
    (lambda x: F.max_pool1d(x.flatten(2), 3), Pool("max", (2,))),
    (lambda x: F.avg_pool3d(x[None], 1), Pool("average", (2, 3, 4))),
    (lambda x: x.mean(-1, keepdim=True), Reduce("average", (3,), True)),
    (lambda x: x.mean(), Reduce("average", (0, 1, 2, 3), False)),
    (lambda x: x.amax((2, 3)), Reduce("max", (2, 3), False)),
    (lambda x: F.interpolate(x, scale_factor=2), Resize((2, 3))),
    (lambda x: F.interpolate(x, size=3, mode="bicubic", antialias=True), Resize((2, 3))),
    (lambda x: F.pad(x, (1, 0, 0, 1)), Pad((3, 2), 0.0)),
    (lambda x: F.pad(x, (1, 1, 0, 0), value=2.0), Pad((3,), 2.0)),
    (lambda x: F.pad(x, (0, 0, 1, 1), mode="reflect"), Pad((2,), None)),
    (lambda x: F.pad(x, (0, 0, 1, 1), mode="circular"), Pad((2,), None)),
    (lambda x: x + 1, Other()),
    (lambda x: x.int(), Other()),
    (lambda x: x.view(torch.int32), Other()),
    (lambda x: x.half().view(torch.bfloat16), Other()),
    (lambda x: x.clone().unsqueeze_(0), Other()),
    (lambda x: x.sum(1), Other()),
    (lambda x: F.lp_pool2d(x.abs(), 2, 2), Other()),
    (lambda x: F.grid_sample(x, torch.zeros(2, 3, 3, 2), align_corners=True), Other()),
]


@pytest.mark.parametrize(("function", "op"), CALLS)
def test_each_call_has_its_meaning(function, op):
    """The last operation of a forward pass, as it is seen in inference mode."""
    model = Net(lambda m, x: function(x), bn=nn.BatchNorm2d(4))
    assert graph(model.eval(), image(4)).nodes[-1].op == op


@pytest.mark.parametrize(("function", "op"), CALLS)
def test_each_call_has_its_meaning_taken_apart(function, op, monkeypatch):
    """Where inference mode cannot be used, a call is seen as its parts: one of them stands for it."""
    monkeypatch.setattr(torch, "inference_mode", torch.no_grad)
    model = Net(lambda m, x: function(x), bn=nn.BatchNorm2d(4))
    ops = [node.op for node in graph(model.eval(), image(4)).nodes]
    apart = {Pad((2,), None): Other(), Pool("max", (2,)): Pool("max", (2, 3))}  # circular padding; max_pool1d
    assert op in ops or apart.get(op) in ops


def test_a_sum_with_a_stored_array_is_a_bias():
    """Only where the array is the model's own parameter and the value keeps its shape."""
    model = Net(lambda m, x: m.inner(x) + x, inner=WithArray())
    assert [node.op for node in graph(model, image(4)).nodes] == [Bias("inner.own", (4, 1, 1)), Add()]


class WithArray(nn.Module):
    """A layer that adds its own array."""

    def __init__(self):
        super().__init__()
        self.own = nn.Parameter(torch.zeros(4, 1, 1))

    def forward(self, x):
        return x + self.own


def test_the_order_of_axes_is_found_with_telling_lengths():
    """For every permuting operation alike, from the shape of what it gives."""
    func, args = torch.ops.aten.movedim.intlist, (torch.zeros(2, 2, 2), [0, 1], [2, 0])
    assert order_of(func, given_arguments(func, args, {}), 3) == (1, 2, 0)


def test_dropout_in_training_is_not_the_identity():
    """A model that leaves dropout on in eval mode does something else at each call."""
    func, x = torch.ops.aten.dropout.default, torch.zeros(2, 3)
    assert transparent(func, {"p": 0.5, "train": False}, [x], [x]) == [Identity()]
    assert transparent(func, {"p": 0.5, "train": True}, [x], [x]) is None


def test_a_model_that_needs_gradients_inside_is_seen_as_well():
    """autograd.grad in forward does not run in inference mode: then the decomposed calls are watched."""

    def run(m, x):
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (slope,) = torch.autograd.grad(z.square().sum(), z)
        return m.fc(m.bn(m.conv(slope.detach())).relu().mean((2, 3)))

    parts = {"conv": nn.Conv2d(3, 4, 3, padding=1), "bn": nn.BatchNorm2d(4), "fc": nn.Linear(4, 2)}
    assert folds(randomized(Net(run, **parts)), image(3)).folded == ["bn"]


@pytest.mark.parametrize("between", [lambda x: x, lambda x: torch.einsum("nchw->nchw", x)], ids=["plain", "einsum"])
def test_autocast_inside_forward_is_followed(between):
    """Casts that autocast makes, of values and of weights, do not hide what they cast."""

    def run(m, x):
        with torch.autocast("cpu", torch.bfloat16):
            return m.bn(m.conv(between(x)))

    model = randomized(Net(run, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    result = bntools.fold(model, image(3))
    assert result.folded == ["bn"]
    assert result.check.error < 2e-2


def test_batch_statistics_in_eval_mode_are_no_scale_and_shift():
    """A layer that normalizes with its batch's own statistics, whatever its mode, is fixed."""

    class Always(nn.BatchNorm2d):
        def forward(self, x):
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), Always(4)).eval()
    assert graph(model, image(3)).fixed == {"1": "it normalizes with its batch's own statistics"}


def test_nothing_of_the_watch_stays():
    """After a graph was taken, also one that failed, the model's modules have their own forward."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    graph(model, image(3))
    with pytest.raises(bntools.BntoolsError):
        graph(model, image(5))
    assert all("forward" not in vars(module) for module in model.modules())


def test_values_in_the_hands_of_others_are_seen_from_outside():
    """What an unregistered container, a closure or an attribute still holds counts as an output."""

    class Result:
        def __init__(self, features):
            self.features = features

    held = []
    model = Net(lambda m, x: Result(m.conv(x)), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    found = graph(model.eval(), image(3))
    assert list(found.outputs.values()) == ["kept after the forward pass"]
    model.run = lambda m, x: (held.append(m.conv(x)), x.relu())[1]
    assert sorted(graph(model, image(3)).outputs.values()) == ["an output of the model", "kept after the forward pass"]


def test_reference_cycles_do_not_look_like_outputs():
    """Values that only garbage refers to are not taken for outputs."""

    def run(m, x):
        y = m.conv(x)
        cycle = [y]
        cycle.append(cycle)
        return m.bn(y)

    model = randomized(Net(run, conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4)))
    assert folds(model, image(3)).folded == ["bn"]


@pytest.mark.filterwarnings("ignore:.*torch.jit.* is (deprecated|not supported)")
def test_scripted_parts_are_seen_by_their_calls():
    """A TorchScript convolution is no module that can be rewritten; a scripted BN layer is refused by name."""
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 1)))
    model = randomized(nn.Sequential(scripted, nn.BatchNorm2d(4)))
    assert "its weight is computed in the forward pass" in bntools.fold(model, image(3)).kept["1"]
    model[1] = torch.jit.script(nn.BatchNorm2d(4))
    with pytest.raises(bntools.BntoolsError, match=r"found a TorchScript module \(1\)"):
        bntools.fold(model, image(3))


def test_layers_that_are_not_initialized_are_refused():
    """Lazy layers have no weights to fold into before their first batch."""
    with pytest.raises(bntools.BntoolsError, match="not initialized yet: run one batch through it first"):
        bntools.fold(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()).eval(), image(3))
