from copy import deepcopy

import numpy as np
import pytest
import torch
from models import BnRelu, cnn
from torch import nn

import bntools
from bntools.conversion import groups_for
from bntools.errors import BntoolsError


def trained(model, size=(8, 3, 6, 6), seed=0):
    """A model whose statistics, scales and shifts are no longer the initial ones."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(3):
        model(torch.randn(size, generator=generator) * 2 + 1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            with torch.no_grad():
                module.weight.uniform_(0.5, 2, generator=generator)
                module.bias.normal_(generator=generator)
    return model


def synchronized():
    """The small CNN as its BN would be for several processes."""
    return nn.SyncBatchNorm.convert_sync_batchnorm(cnn())


def noted(module, args, output):
    """A hook."""
    module.heard = True


def test_synchronized_layers_become_what_they_were():
    """The state dict, eval outputs and outputs in training are those of a model that was never synchronized."""
    plain = trained(cnn())
    sync = nn.SyncBatchNorm.convert_sync_batchnorm(deepcopy(plain))
    result = bntools.convert(sync, "batchnorm")
    assert result.converted == ["1", "4"]
    assert [type(result.model[index]) for index in (1, 4)] == [nn.BatchNorm2d] * 2
    assert type(sync[1]) is nn.SyncBatchNorm
    assert list(result.model.state_dict()) == list(plain.state_dict())
    x = torch.randn(4, 3, 6, 6)
    torch.testing.assert_close(result.model(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(result.model.eval()(x), plain.eval()(x), rtol=0, atol=0)
    assert "Not preserved" in result.notes[0]


def test_everything_about_a_synchronized_layer_is_kept():
    """Mode, frozen state, requires_grad, dtype, momentum, eps, hooks and plain attributes survive."""
    model = synchronized().double()
    model.eval()
    layer = model[1]
    layer.momentum, layer.eps, layer.mark = None, 1e-2, "mine"
    layer.register_forward_hook(noted)
    layer.weight.requires_grad = False
    bntools.freeze(model, layers="4", affine=False)
    new = bntools.convert(model, "batchnorm").model
    assert (new[1].momentum, new[1].eps, new[1].mark, new[1].training) == (None, 1e-2, "mine", False)
    assert (new[1].weight.requires_grad, new[1].weight.dtype) == (False, torch.float64)
    new(torch.randn(2, 3, 6, 6, dtype=torch.float64))
    assert new[1].heard
    new.train()
    assert [layer.stats_frozen for layer in bntools.inspect(new)] == [False, True]
    bntools.unfreeze(new)
    assert new[4].training
    assert not model[4].training


def test_the_kind_comes_from_the_layer_before_or_from_an_example():
    """Linear, Conv1d and Conv3d tell; where nothing does, it is said, and an example shows it."""
    kinds = [nn.Linear(3, 4), nn.Conv1d(3, 4, 1), nn.Conv3d(3, 4, 1)]
    for before, kind in zip(kinds, (nn.BatchNorm1d, nn.BatchNorm1d, nn.BatchNorm3d), strict=True):
        assert type(bntools.convert(nn.Sequential(before, nn.SyncBatchNorm(4)), "batchnorm").model[1]) is kind
    alone = nn.Sequential(nn.SyncBatchNorm(4), nn.Conv2d(4, 4, 1), nn.Flatten(2), nn.SyncBatchNorm(4))
    assert "give example=" in bntools.convert(alone, "batchnorm").kept["0"]
    result = bntools.convert(alone, "batchnorm", example=np.ones((2, 4, 3, 3), np.float32))
    assert [type(result.model[index]) for index in (0, 3)] == [nn.BatchNorm2d, nn.BatchNorm1d]
    assert all(not module._forward_pre_hooks for module in result.model.modules())
    with pytest.raises(BntoolsError, match="does not run on the example"):
        bntools.convert(alone, "batchnorm", example=np.ones((2, 5, 3, 3), np.float32))


@pytest.mark.parametrize("affine", [True, False])
def test_frozen_layers_compute_what_eval_mode_did(affine):
    """To float64 rounding, also in training, where nothing moves; nothing is left to train in the layer."""
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5, affine=affine), nn.ReLU(), nn.SyncBatchNorm(5))
    model = trained(model).double()
    x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
    expected = model.eval()(x)
    result = bntools.convert(model, "frozen")
    torch.testing.assert_close(result.model.train()(x), expected, rtol=1e-12, atol=1e-12)
    assert sorted(result.model.state_dict()) == ["0.bias", "0.weight", "1.scale", "1.shift", "3.scale", "3.shift"]
    assert [name for name, _ in result.model.named_parameters()] == ["0.weight", "0.bias"]
    with pytest.raises(BntoolsError, match="no BN layers"):
        bntools.inspect(result.model) or bntools.recalibrate(result.model, [x])


def test_frozen_layers_keep_half_precision_inputs_in_half_precision(tmp_path):
    """An input in bfloat16 gives one, a state dict of such a model loads, and a pickled one loads in bntools."""
    result = bntools.convert(trained(cnn()), "frozen")
    layer = result.model[1]
    assert layer(torch.ones(1, 5, 2, 2, dtype=torch.bfloat16)).dtype == torch.bfloat16
    twin = bntools.convert(cnn(), "frozen").model
    twin.load_state_dict(result.model.state_dict())
    x = torch.randn(2, 3, 6, 6)
    bntools.save(result.model, tmp_path / "model.pt")
    loaded = bntools.load(tmp_path / "model.pt")
    for other in (twin, loaded):
        torch.testing.assert_close(other(x), result.model(x), rtol=0, atol=0)


def test_a_layer_without_usable_statistics_is_kept_with_its_reason():
    """NaN, statistics that are not tracked and classes that do more stay what they are, and say why."""
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False), BnRelu(3), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    )
    model[0].running_mean[1] = float("nan")
    result = bntools.convert(model, "frozen", layers=["0", "1", "2", "3"])
    assert result.converted == ["3"]
    assert "NaN" in result.kept["0"]
    assert "keeps no statistics" in result.kept["1"]
    assert "BnRelu" in result.kept["2"]
    assert result.kept["4"] == "not selected by layers="
    assert str(result).startswith("converted 1 of 5 BN layers, kept 4:\n  0: its mean is NaN")
    assert list(result.kept) == ["0", "1", "2", "4"]


@pytest.mark.parametrize(
    ("channels", "groups"), [(256, 32), (512, 32), (64, 8), (96, 12), (48, 6), (20, 2), (12, 1), (5, 1), (17, 1)]
)
def test_groups_are_chosen_by_the_largest_divisor(channels, groups):
    """At most 32 groups, of at least 8 channels, that divide; else one group."""
    assert groups_for(channels) == groups


def test_group_norm_takes_scale_and_shift_over():
    """The layer is PyTorch's GroupNorm with BN's parameters, names and order, and computes its closed form."""
    model = trained(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, eps=1e-3), nn.ReLU()))
    names = [name for name, _ in model.named_parameters()]
    bntools.freeze(model, affine=False)
    result = bntools.convert(model, "groupnorm", groups=4)
    layer = result.model[1]
    assert (type(layer), layer.num_groups, layer.eps, layer.training) == (nn.GroupNorm, 4, 1e-3, True)
    assert result.groups == {"1": 4}
    assert [name for name, _ in result.model.named_parameters()] == names
    fresh = nn.GroupNorm(4, 16, eps=1e-3)
    fresh.load_state_dict(layer.state_dict())
    assert set(vars(layer)) == set(vars(fresh))
    np.testing.assert_array_equal(layer.weight.detach(), model[1].weight.detach())
    x = torch.randn(2, 16, 3, 3)
    grouped = x.view(2, 4, -1).double()
    normal = (grouped - grouped.mean(-1, keepdim=True)) / (grouped.var(-1, keepdim=True, correction=0) + 1e-3).sqrt()
    expected = normal.view(2, 16, 3, 3) * layer.weight.view(-1, 1, 1) + layer.bias.view(-1, 1, 1)
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)
    optimizer = torch.optim.Adam(result.model.parameters())
    optimizer.load_state_dict(torch.optim.Adam(model.parameters()).state_dict())
    result.model.train()(torch.randn(1, 3, 6, 6)).sum().backward()
    optimizer.step()


def test_what_was_shared_stays_shared():
    """A layer in two places, and parameters that two layers share, are converted once and stay one."""
    bn, other = nn.BatchNorm2d(16), nn.BatchNorm2d(16)
    other.weight = bn.weight
    model = nn.ModuleDict({"a": bn, "b": bn, "c": other})
    result = bntools.convert(model, "groupnorm")
    assert result.converted == ["a", "c"]
    assert result.model["a"] is result.model["b"]
    assert result.model["a"].weight is result.model["c"].weight
    assert type(bn) is nn.BatchNorm2d


def test_groups_that_do_not_fit_are_refused():
    """The layer and its channels are named; so are groups where they mean nothing, and other targets."""
    with pytest.raises(BntoolsError, match=r"'1': its 5 channels must be divisible by groups \(=2\)"):
        bntools.convert(cnn(), "groupnorm", groups=2)
    for groups in (0, 1.5, True):
        with pytest.raises(BntoolsError, match="a number of groups"):
            bntools.convert(cnn(), "groupnorm", groups=groups)
    with pytest.raises(BntoolsError, match="only 'groupnorm' has groups"):
        bntools.convert(cnn(), "frozen", groups=2)
    with pytest.raises(BntoolsError, match="expected one of batchnorm, frozen, groupnorm"):
        bntools.convert(cnn(), "layernorm")


def test_other_frameworks_are_refused_with_a_reason():
    """Keras models and ONNX files have their layers in a graph."""
    import keras
    from onnx_nets import Builder

    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.BatchNormalization()])
    with pytest.raises(BntoolsError, match="baked into their graphs"):
        bntools.convert(model, "frozen")
    b = Builder()
    with pytest.raises(BntoolsError, match="baked into their graphs"):
        bntools.convert(b.model([b.bn("x", 3)], ("n", 3, 4, 4)), "frozen")
