"""What counts as a decision on values, and what does not."""

from __future__ import annotations

import models
import numpy as np
import pytest
import shim
import torch
from torch import nn

from bntools.backends.torch.decisions import watching

torchvision = shim.import_torchvision()
timm = pytest.importorskip("timm")


def decisions(model, x):
    """What is seen of a run: the path and manner of the first value read, and of the first size."""
    with torch.no_grad(), watching(model) as found:
        model.eval()(x)
    return [decision and (decision.path, decision.how) for decision in (found.read, found.sized)]


class Calls(nn.Module):
    """Gives what a function makes of its input, a parameter, a buffer and a tensor on an attribute."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.scale, self.table = nn.Parameter(torch.tensor(2.0)), torch.tensor([1.0, 2.0])
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        return self.function(self, x)


ITEM = "if, float, int, item"


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (lambda m, x: x if x.max() > 0 else -x, ITEM),
        (lambda m, x: x * float(x.std()), ITEM),
        (lambda m, x: x[: int(x[0, 0])], ITEM),
        (lambda m, x: x * x.max().item(), ITEM),
        (lambda m, x: x if torch.equal(x, x * 2) else -x, "torch.equal"),
        (lambda m, x: x if torch.allclose(x, x * 2) else -x, "torch.allclose"),
        (lambda m, x: x + x.tolist()[0][0], "tolist"),
        (lambda m, x: x + x.numpy().max(), "numpy"),
        (lambda m, x: x + np.asarray(x).max(), "numpy"),
        (lambda m, x: x + np.from_dlpack(x).max(), "dlpack"),
        (lambda m, x: x * m.calls.copy_(x.max()).item(), ITEM),
        (lambda m, x: x if torch.zeros(3).add_(x[0]).sum() > 0 else -x, ITEM),
        (lambda m, x: x if x[x > 9].sum() > 0 else -x, ITEM),
    ],
)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_values_that_reach_python(function, how, mode):
    """Every way by which Python gets a value that depends on the input is seen, with the innermost module."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), Calls(function)))
    with mode():
        found = decisions(model, torch.randn(4, 3))[0]
    assert found[0] == "1.1"
    assert found[1] == how


@pytest.mark.parametrize(
    ("function", "how"),
    [
        (lambda m, x: x[x > 0], "index"),
        (lambda m, x: x.masked_select(x > 0), "masked_select"),
        (lambda m, x: torch.where(x > 0)[0], "nonzero"),
        (lambda m, x: x.unique(), "_unique2"),
        (lambda m, x: x[:, 0].repeat_interleave(x[:, 0].abs().long()), "repeat_interleave"),
    ],
)
def test_sizes_that_depend_on_values(function, how):
    """A tensor whose size depends on the values of the input is seen."""
    assert decisions(nn.Sequential(Calls(function)), torch.ones(4, 3)) == [None, ("0", how)]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: x * m.scale.item() if m.scale > 1 else x,
        lambda m, x: x * m.table.tolist()[1] * m.table.sum().item(),
        lambda m, x: x * m.calls.add_(1).item(),
        lambda m, x: x if x.shape[0] > 2 and len(x) == x.size(0) else -x,
        lambda m, x: x * torch.arange(3)[torch.arange(3) > 0].sum().item(),
        lambda m, x: x * torch.tensor(2.0).item(),
        lambda m, x: x[torch.arange(2)] + x[:, [0, 1, 2]][:2],
        lambda m, x: torch._assert(x.shape[1] == 3, "width") or torch.where(x > 0, x, -x),
    ],
)
def test_what_is_no_decision_on_values(function):
    """Shapes, parameters, buffers, constants and indices are read as one likes: they do not depend on values."""
    assert decisions(nn.Sequential(Calls(function)), torch.ones(4, 3)) == [None, None]


def test_the_module_is_named():
    """The innermost module is named, the model itself by an empty path."""
    assert decisions(models.Branches(), torch.randn(4, 3))[0][0] == ""
    assert decisions(nn.Sequential(models.Branches()), torch.randn(4, 3))[0][0] == "0"


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("resnet18", 32),
        ("mobilenet_v3_small", 32),
        ("densenet121", 32),
        ("inception_v3", 80),
        ("googlenet", 32),
        ("timm/efficientnet_b0", 32),
        ("timm/levit_128s", 224),
        ("timm/mobilevit_xxs", 64),
    ],
)
def test_ordinary_networks_decide_on_no_values(name, size):
    """Ordinary architectures look at shapes only."""
    options = {"init_weights": False} if name in ("inception_v3", "googlenet") else {}
    if name.startswith("timm/"):
        model = timm.create_model(name.removeprefix("timm/"))
    else:
        model = torchvision.models.get_model(name, weights=None, **options)
    assert decisions(model, torch.randn(1, 3, size, size)) == [None, None]
