"""freeze survives train(), undoes without loss, and keeps what else the model is."""

from __future__ import annotations

import copy
import io

import models
import pytest
import shim
import torch
from torch import nn

import bntools
from bntools import BntoolsError, NotFrozenError

torchvision = shim.import_torchvision()


def train(model, x, steps=3):
    """A few steps of an optimizer that moves whatever it may."""
    optimizer = torch.optim.SGD(list(model.parameters()), lr=0.1, momentum=0.9, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=False)
        model(x).square().mean().backward()
        optimizer.step()


def images():
    """Six small images."""
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1


def state(layer):
    """A copy of a layer's state dict."""
    return {key: value.clone() for key, value in layer.state_dict().items()}


def same(a, b):
    """Whether two state dicts are equal to the bit."""
    return all(torch.equal(a[key], b[key]) for key in a) and a.keys() == b.keys()


@pytest.fixture
def model():
    """A CNN that was trained a little, with gradients and optimizer state about."""
    torch.manual_seed(0)
    model = models.cnn()
    train(model, images())
    return model


@pytest.mark.parametrize("stats", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_statistics_and_affine_freeze_apart(model, stats, affine):
    """What is frozen stays to the bit through training with momentum and weight decay; the rest moves."""
    bntools.freeze(model, stats=stats, affine=affine)
    before, conv = state(model[1]), model[0].weight.clone()
    train(model, images())
    after = state(model[1])
    assert torch.equal(before["running_mean"], after["running_mean"]) == stats
    assert torch.equal(before["num_batches_tracked"], after["num_batches_tracked"]) == stats
    assert torch.equal(before["weight"], after["weight"]) == affine
    assert not torch.equal(conv, model[0].weight)
    layer = bntools.inspect(model)[0]
    assert (layer.stats_frozen, layer.affine_frozen) == (stats, affine)


def test_the_training_flag_set_by_hand_is_seen(model):
    """A trainer that writes back module.training wakes a layer: assert_frozen says so, the next train() mends it."""
    model.train()
    captured = {name: module.training for name, module in model.named_modules()}
    bntools.freeze(model)
    for name, module in model.named_modules():
        module.training = captured[name]
    with pytest.raises(NotFrozenError, match="statistics"):
        bntools.assert_frozen(model)
    model.train()
    bntools.assert_frozen(model)


def test_a_compiled_layer_stays_frozen():
    """torch.compile's wrapper sets the flag of the layer inside; the layer sets it back."""
    model = nn.Sequential(nn.Conv2d(3, 3, 1), torch.compile(nn.BatchNorm2d(3), backend="eager"))
    assert [layer.name for layer in bntools.inspect(model)] == ["1"]
    bntools.freeze(model)
    model.train()
    bntools.assert_frozen(model)
    before = model[1].running_mean.clone()
    with torch.no_grad():
        model(images())
    assert torch.equal(model[1].running_mean, before)


def test_requires_grad_and_eval_alone_are_not_frozen(model):
    """requires_grad=False leaves statistics moving, and the next train() undoes eval()."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.eval()
    with pytest.raises(NotFrozenError, match=r"2 of 2 BN layers are not frozen: 1 \(statistics\), 4 \(statistics\)"):
        bntools.assert_frozen(model)
    bntools.freeze(model)
    bntools.assert_frozen(model)
    model.train()
    bntools.assert_frozen(model)
    assert not model[1].training


def test_assert_frozen_names_what_moves(model):
    """Statistics, scale and shift are named apart; each can be left out."""
    bntools.freeze(model, affine=False)
    with pytest.raises(NotFrozenError, match=r"1 \(scale and shift\)"):
        bntools.assert_frozen(model)
    bntools.assert_frozen(model, affine=False)
    bntools.freeze(model, layers="1")
    bntools.assert_frozen(model, layers="1")


def test_undo_and_with_give_every_flag_back(model):
    """Modes and requires_grad come back as they were, layer by layer; the state dict never changed its keys."""
    model[4].eval()
    model[1].weight.requires_grad_(False)
    flags = [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model]
    keys, attributes = list(model.state_dict()), [sorted(vars(m)) for m in model]
    with bntools.freeze(model) as frozen:
        assert frozen.layers == ["1", "4"]
        assert list(model.state_dict()) == keys
        bntools.assert_frozen(model)
    frozen.undo()
    assert [(m.training, [p.requires_grad for p in m.parameters(recurse=False)]) for m in model] == flags
    assert [sorted(vars(m)) for m in model] == attributes


def test_undo_follows_the_mode_that_the_model_has_by_then(model):
    """A layer frozen in training and let go in evaluation is in eval mode, like the rest."""
    model.train()
    frozen = bntools.freeze(model)
    model.eval()
    frozen.undo()
    assert not model[1].training
    frozen = bntools.freeze(model)
    model.train()
    frozen.undo()
    assert model[1].training


def test_freezing_twice_undoes_once_each(model):
    """The inner handle leaves what the outer one has frozen."""
    model.train()
    outer = bntools.freeze(model, layers="1")
    with bntools.freeze(model):
        pass
    bntools.assert_frozen(model, layers="1")
    with pytest.raises(NotFrozenError):
        bntools.assert_frozen(model, layers="4")
    outer.undo()
    assert model[1].training


def test_freezes_undone_in_any_order_hold_until_the_last(model):
    """The first to be undone leaves the layers to the second; then everything is as it was."""
    model.train()
    first, second = bntools.freeze(model), bntools.freeze(model)
    first.undo()
    bntools.assert_frozen(model)
    second.undo()
    assert model[1].training
    assert model[1].weight.requires_grad
    third = bntools.freeze(model)
    bntools.unfreeze(model)
    third.undo()
    assert model[1].weight.requires_grad
    assert model[1].training


def test_with_undoes_also_when_training_raises(model):
    """An exception inside the block leaves the layers as before it."""
    with pytest.raises(ZeroDivisionError), bntools.freeze(model):
        raise ZeroDivisionError
    with pytest.raises(NotFrozenError):
        bntools.assert_frozen(model)


def test_unfreeze_wakes_whatever_was_frozen(model):
    """unfreeze needs no handle, and takes a selection."""
    bntools.freeze(model)
    bntools.unfreeze(model, layers="4")
    bntools.assert_frozen(model, layers="1")
    model.train()
    assert model[4].training
    assert model[4].weight.requires_grad


def test_a_frozen_model_copies_and_pickles(model):
    """Copies are frozen too, and independent of the original."""
    bntools.freeze(model)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        twin.train()
        bntools.assert_frozen(twin)
        bntools.unfreeze(twin)
        assert twin[1].training
        assert not model[1].training


def test_a_frozen_model_compiles(model):
    """torch.compile takes frozen layers, and follows freeze and unfreeze after compilation."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    x = images()
    for frozen in (True, False, True):
        (bntools.freeze if frozen else bntools.unfreeze)(compiled)
        compiled.train()
        before = state(model[1])
        compiled(x)
        assert same(before, state(model[1])) == frozen


def test_a_frozen_model_works_inside_distributed_data_parallel(model, tmp_path):
    """One gloo process: forward, backward and step leave the frozen layers alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        bntools.freeze(model)
        parallel = nn.parallel.DistributedDataParallel(model)
        before = state(model[1])
        train(parallel, images())
        assert same(before, state(model[1]))
        bntools.assert_frozen(parallel)
        assert [layer.name for layer in bntools.inspect(parallel)] == ["1", "4"]
    finally:
        torch.distributed.destroy_process_group()


KINDS = {
    "1d": (nn.BatchNorm1d(4), (5, 4)),
    "2d": (nn.BatchNorm2d(4), (5, 4, 3, 3)),
    "3d": (nn.BatchNorm3d(4), (5, 4, 2, 2, 2)),
    "sync": (nn.SyncBatchNorm(4), (5, 4, 3)),
    "subclass": (models.BnRelu(4), (5, 4, 3, 3)),
    "written out": (models.WrittenOut(4), (5, 4, 3, 3)),
    "not affine": (nn.BatchNorm2d(4, affine=False), (5, 4, 3, 3)),
    "instance": (nn.InstanceNorm2d(4, track_running_stats=True), (5, 4, 3, 3)),
    "frozen of torchvision": (torchvision.ops.FrozenBatchNorm2d(4), (5, 4, 3, 3)),
    "untracked": (nn.BatchNorm2d(4, track_running_stats=False), (5, 4, 3, 3)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_freezes_and_resets(kind):
    """Statistics do not move while frozen, and reset gives 0, 1 and a counter of 0."""
    layer, shape = KINDS[kind]
    model = nn.Sequential(copy.deepcopy(layer))
    x = torch.randn(shape) + 3
    if kind != "sync":  # its train mode wants a GPU
        model.train()(x)
    bntools.freeze(model)
    bntools.assert_frozen(model)
    before = state(model[0])
    model.train()(x)
    assert same(before, state(model[0]))
    if kind == "untracked":
        with pytest.raises(BntoolsError, match="nothing to reset"):
            bntools.reset(model, layers="0")
        return
    assert bntools.reset(model, layers="0") == ["0"]
    assert (model[0].running_mean == 0).all()
    assert (model[0].running_var == 1).all()
    assert getattr(model[0], "num_batches_tracked", 0) in (None, 0)


def test_dropout_inside_a_frozen_layer_follows_the_model():
    """Children of a layer (timm's BatchNormAct2d has dropout and an activation) keep their own mode."""

    class WithDropout(nn.BatchNorm1d):
        def __init__(self, features):
            super().__init__(features)
            self.drop = nn.Dropout()

    model = nn.Sequential(WithDropout(3))
    bntools.freeze(model)
    model.eval()
    assert not model[0].drop.training
    model.train()
    assert model[0].drop.training
    assert not model[0].training


def test_a_lazy_layer_stays_frozen_when_it_wakes_up():
    """freeze before the first batch holds after it."""
    model = nn.Sequential(nn.LazyBatchNorm1d())
    bntools.freeze(model)
    model.train()(torch.randn(4, 3))
    bntools.assert_frozen(model)
    assert (model[0].running_mean == 0).all()


def test_reset_takes_a_selection_and_leaves_frozen_layers(model):
    """Only what is named; a frozen layer when it is named."""
    before = state(model[4])
    assert bntools.reset(model, layers="1") == ["1"]
    assert same(before, state(model[4]))
    bntools.freeze(model, layers="4")
    assert bntools.reset(model) == ["1"]
    assert same(before, state(model[4]))
    bntools.freeze(model)
    with pytest.raises(BntoolsError, match="every BN layer is frozen"):
        bntools.reset(model)
    assert bntools.reset(model, layers="*") == ["1", "4"]


@pytest.mark.parametrize("verb", [bntools.freeze, bntools.unfreeze, bntools.assert_frozen, bntools.reset])
def test_a_selection_that_fits_nothing_is_an_error(model, verb):
    """Doing nothing in silence is how layers that were thought frozen move."""
    with pytest.raises(BntoolsError, match=r"layers='layer1\.bn' fits none of the model's 2 BN layers: did you mean"):
        verb(model, layers="layer1.bn")
    with pytest.raises(BntoolsError, match="the predicate given as layers= holds for none"):
        verb(model, layers=lambda layer: False)
    with pytest.raises(BntoolsError, match="no BN layers"):
        verb(nn.Linear(2, 2))
    with pytest.raises(BntoolsError, match=r"found the path 'model\.pt' where a model was expected"):
        verb("model.pt")
