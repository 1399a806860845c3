"""Reading what the submodules of an nn.Module give."""

from __future__ import annotations

import copy

import models
import pytest
import torch
from torch import nn

from bntools.backends.torch import runners
from bntools.backends.torch.tracing import full_precision


def test_outputs_of_modules():
    """Outputs of submodules are read by path, as they were when the module finished, in one run."""
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU(inplace=True), nn.Identity(), nn.Sequential(nn.Linear(3, 2)))
    x = torch.randn(5, 3)
    trace = runners(model)[0].trace(x)
    assert trace.points == ("0", "1", "3.0", "3")
    values = trace.read(["0", "3"])
    with torch.no_grad():
        assert torch.equal(torch.from_numpy(values["0"]), model[0](x))
        assert torch.equal(torch.from_numpy(values["3"]), model(x))
    assert not any(module._forward_hooks for module in model.modules())


def test_calls_are_told_apart():
    """Each call of a shared module is a point of its own, and none stands for the module."""
    model = models.Shared()
    trace = runners(model)[0].trace(torch.randn(5, 3))
    assert trace.points == ("bn", "bn (call 2)")
    assert trace.modules == {}
    assert set(trace.read(trace.points)) == set(trace.points)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_runner(dtype):
    """A module runs where it is, and its least precise floating dtype is known."""
    (runner,) = runners(nn.Sequential(nn.Linear(3, 3).double(), nn.BatchNorm1d(3).to(dtype)))
    assert (runner.framework, runner.provider, runner.optimization) == ("torch", "cpu", None)
    assert runner.dtype == str(dtype).removeprefix("torch.")
    assert copy.copy(runner) == runner


@pytest.mark.parametrize("interface", ["old", "new", "mixed"])
def test_tf32_is_off_and_put_back(monkeypatch, interface):
    """TF32 is off while models are compared on CUDA and as before afterwards, whichever interface set it."""

    class Flags:
        def __init__(self):
            self.allow_tf32, self.fp32_precision = True, "tf32"

    class Mixed(Flags):
        allow_tf32 = property(lambda self: self.refuse(), lambda self, value: None)

        def refuse(self):
            raise RuntimeError("a mix of the legacy and new APIs")

    flags = Mixed() if interface == "mixed" else Flags()
    cudnn = Mixed() if interface != "old" else Flags()
    cudnn.conv, cudnn.rnn = Flags(), Flags()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cuda, "matmul", flags)
    monkeypatch.setattr(torch.backends, "cudnn", cudnn)
    with full_precision():
        if interface == "old":
            assert (flags.allow_tf32, cudnn.allow_tf32) == (False, False)
        else:
            assert {flags.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} == {"ieee"}
    assert {flags.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision} == {"tf32"}
    if interface == "old":
        assert flags.allow_tf32
        assert cudnn.allow_tf32
