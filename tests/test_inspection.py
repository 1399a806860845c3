"""inspect: every BN layer as a record, with what is wrong with it."""

from __future__ import annotations

import dataclasses
import warnings

import models
import numpy as np
import pytest
import shim
import torch
from torch import nn

import bntools
from bntools.layer import BatchNorm, distance, select

torchvision = shim.import_torchvision()


def one(layer):
    """The record of a layer."""
    (record,) = bntools.inspect(nn.Sequential(layer))
    return record


def trained(layer, updates=10_000, lowest=0.5):
    """A layer whose statistics look trained."""
    with torch.no_grad():
        layer.running_mean.copy_(torch.arange(layer.num_features) + 0.5)
        layer.running_var.copy_(torch.arange(layer.num_features) + lowest)
        layer.num_batches_tracked.fill_(updates)
    return layer


def test_a_record_holds_what_the_layer_holds():
    """Names, arrays of shape (features,), eps, momentum and counter, as the framework has them."""
    layer = trained(nn.BatchNorm2d(3, eps=1e-3, momentum=0.25), updates=7)
    with torch.no_grad():
        layer.weight.mul_(2)
    record = one(layer)
    assert (record.name, record.kind, record.features, record.axis) == ("0", "BatchNorm2d", 3, 1)
    assert (record.eps, record.momentum, record.updates, record.dtype) == (1e-3, 0.25, 7, "float32")
    for array, tensor in zip(
        (record.mean, record.var, record.scale, record.shift),
        (layer.running_mean, layer.running_var, layer.weight, layer.bias),
        strict=True,
    ):
        assert array.shape == (3,)
        assert array.dtype == np.float64
        assert np.array_equal(array, tensor.detach().numpy())


def test_records_are_copies():
    """The old value of a comparison must not follow the new one."""
    layer = trained(nn.BatchNorm1d(3).double())
    record = one(layer)
    with torch.no_grad():
        layer.running_mean.add_(1)
    assert np.array_equal(record.mean, [0.5, 1.5, 2.5])
    record.mean[:] = 9
    assert layer.running_mean[0] == 1.5


def test_every_kind_is_found_under_the_name_the_model_gives_it():
    """Nested, shared, wrapped; subclasses, frozen variants, instance norm; definition order."""
    shared = nn.BatchNorm1d(3)
    model = nn.ModuleDict(
        {
            "z": nn.Sequential(nn.Conv2d(3, 3, 1), models.BnRelu(3)),
            "a": shared,
            "again": shared,
            "frozen": torchvision.ops.FrozenBatchNorm2d(2),
            "instance": nn.InstanceNorm2d(2, track_running_stats=True),
            "plain_instance": nn.InstanceNorm2d(2),
            "lazy": nn.LazyBatchNorm3d(),
            "sync": nn.SyncBatchNorm(4),
            "group": nn.GroupNorm(1, 2),
        }
    )
    found = [(layer.name, layer.kind) for layer in bntools.inspect(model)]
    assert found == [
        ("z.1", "BnRelu"),
        ("a", "BatchNorm1d"),
        ("frozen", "FrozenBatchNorm2d"),
        ("instance", "InstanceNorm2d"),
        ("lazy", "LazyBatchNorm3d"),
        ("sync", "SyncBatchNorm"),
    ]
    assert [layer.name for layer in bntools.inspect(nn.DataParallel(model))] == [name for name, _ in found]
    assert [layer.name for layer in bntools.inspect(torch.compile(model, backend="eager"))] == [n for n, _ in found]


@pytest.mark.parametrize("library", ["timm", "detectron2"])
def test_frozen_variants_of_other_libraries_are_found(library):
    """Four buffers, no parameters: frozen, statistics and affine, whatever the library."""
    if library == "timm":
        from timm.layers.norm_act import FrozenBatchNormAct2d

        layer = FrozenBatchNormAct2d(3)
    else:

        class FrozenBatchNorm2d(nn.Module):  # the layout of detectron2.layers.FrozenBatchNorm2d
            def __init__(self):
                super().__init__()
                self.eps = 1e-5
                for name, fill in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 1.0)):
                    self.register_buffer(name, torch.full((3,), fill))

        layer = FrozenBatchNorm2d()
    record = one(layer)
    assert record.stats_frozen
    assert record.affine_frozen
    assert record.eps == 1e-5
    assert record.scale.shape == (3,)
    assert record.momentum is None


def corrupted(**values):
    """A trained layer whose channel 1 has these values."""
    layer = trained(nn.BatchNorm1d(4))
    with torch.no_grad():
        for name, value in values.items():
            getattr(layer, name)[1] = value
    return layer


PROBLEMS = {
    "never updated": (nn.BatchNorm1d(3), "never updated: the statistics still have their initial values 0 and 1"),
    "initial share": (trained(nn.BatchNorm1d(3), updates=5, lowest=0.6), "59% of the initial value is still inside"),
    "nan": (corrupted(running_mean=float("nan")), "NaN or Inf in the statistics in 1 of 4 channels (first: 1)"),
    "inf": (corrupted(running_var=float("inf")), "NaN or Inf in the statistics"),
    "negative": (corrupted(running_var=-0.5), "negative variance in 1 of 4"),
    "zero": (corrupted(running_var=0.0), "zero variance (a dead channel?) in 1 of 4"),
    "below eps": (corrupted(running_var=1e-6), "variance below eps=1e-05 in 1 of 4"),
    "huge": (corrupted(running_var=1e9), "huge variance, above 1e+08 in 1 of 4"),
    "scale": (corrupted(weight=1e-5), "scale near zero, below 0.001 in 1 of 4"),
    "nan scale": (corrupted(weight=float("nan")), "NaN or Inf in the scale"),
    "nan shift": (corrupted(bias=float("inf")), "NaN or Inf in the shift"),
    "untracked": (nn.BatchNorm1d(3, track_running_stats=False), "statistics are not tracked"),
    "momentum 0": (trained(nn.BatchNorm1d(3, momentum=0.0)), "momentum 0: training never moves the statistics"),
    "momentum 1": (trained(nn.BatchNorm1d(3, momentum=1.0)), "momentum 1: the statistics are those of the last batch"),
    "momentum None": (trained(nn.BatchNorm1d(3, momentum=None)), "momentum None: a cumulative average"),
    "half": (trained(nn.BatchNorm1d(3)).half(), "half-precision statistics (float16)"),
    "bfloat": (trained(nn.BatchNorm1d(3)).bfloat16(), "half-precision statistics (bfloat16)"),
    "lazy": (nn.LazyBatchNorm2d(), "not initialized yet"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROBLEMS)
def test_each_problem_is_named(case):
    """One sentence for each thing that is wrong, with the channels."""
    layer, message = PROBLEMS[case]
    assert any(message in problem for problem in one(layer).problems), one(layer).problems


def test_a_healthy_layer_has_no_problems():
    """Trained statistics at the usual momentum: nothing to say."""
    assert one(trained(nn.BatchNorm1d(3))).problems == []


def test_a_variance_below_the_share_of_the_initial_one_disproves_it():
    """59 % of an initial variance of 1 cannot be inside a variance of 0.5: something else wrote the statistics."""
    assert one(trained(nn.BatchNorm1d(3), updates=5, lowest=0.5)).problems == []


def test_late_untracking_is_said():
    """track_running_stats=False set later: eval mode uses statistics that training no longer moves."""
    layer = trained(nn.BatchNorm1d(3))
    layer.track_running_stats = False
    assert any("was switched off" in problem for problem in one(layer).problems)


def test_recalibrated_and_loaded_statistics_are_not_called_initial():
    """A counter of 0 over trained statistics (old checkpoints) and few samples of recalibration say nothing wrong."""
    old = trained(nn.BatchNorm1d(3), updates=0)
    assert not any("never updated" in problem for problem in one(old).problems)
    model = nn.Sequential(nn.BatchNorm1d(3))
    for momentum in (0.1, 0.01, 1.0, None):
        model[0].momentum = momentum
        bntools.recalibrate(model, torch.randn(8, 3) * 3)
        assert not any("initial" in problem for problem in bntools.inspect(model)[0].problems)


def test_the_distance_is_the_worst_channel_in_standard_deviations():
    """abs(mean_seen - mean) / std and abs(std_seen / std - 1), with std = sqrt(var + eps)."""
    stored = np.array([0.0, 0.0]), np.array([3.0, 1.0])
    assert distance(stored, (np.array([1.0, 0.0]), np.array([3.0, 1.0])), eps=1.0) == pytest.approx(0.5)
    assert distance(stored, (np.array([0.0, 0.0]), np.array([3.0, 7.0])), eps=1.0) == pytest.approx(1.0)
    assert distance(stored, stored, eps=1.0) == 0


def test_selection_is_names_globs_and_predicates():
    """In definition order, each layer once."""
    record = one(nn.BatchNorm1d(2))
    layers = [dataclasses.replace(record, name=name) for name in ("a.bn1", "a.bn2", "b.bn1")]
    assert select(layers, None) == layers
    assert [layer.name for layer in select(layers, ["b.bn1", "a.*", "a.bn1"])] == ["a.bn1", "a.bn2", "b.bn1"]
    assert [layer.name for layer in select(layers, "*.bn1")] == ["a.bn1", "b.bn1"]
    assert [layer.name for layer in select(layers, lambda layer: layer.name < "a.bn2")] == ["a.bn1"]
    assert isinstance(layers[0], BatchNorm)


def test_what_is_no_model_and_torchscript_are_refused():
    """The error says what was found and what is served."""
    with pytest.raises(bntools.BntoolsError, match=r"found a builtins\.dict where a model was expected"):
        bntools.inspect({})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch deprecates TorchScript
        script = torch.jit.trace(nn.Sequential(nn.BatchNorm1d(2)).eval(), torch.zeros(1, 2))
    with pytest.raises(bntools.BntoolsError, match="found a TorchScript module"):
        bntools.inspect(script)
