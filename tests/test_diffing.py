"""The BN state of two models, compared."""

from __future__ import annotations

import copy

import keras
import numpy as np
import onnx_files
import pytest
import safetensors.torch
import torch
from keras import layers as L
from keras_nets import residual_net
from models import cnn
from small_pair import pair
from torch import nn

import bntools
from bntools.matching import match

BACKENDS = {"torch": cnn, "keras": residual_net, "onnx": onnx_files.small}


def drifted(model) -> tuple[str, float]:
    """Statistics of one layer moved by applying others; the name of the layer and its drift."""
    stats = bntools.statistics(model)
    last = stats.layers[-1]
    drift = 0.25 / float(np.sqrt(last.var[1] + last.eps))
    last.mean[1] += 0.25
    bntools.apply(model, stats)
    return last.name, drift


def twin(module: nn.Module) -> keras.Model:
    """A Keras model with the BN layers of ``pair``, under other names."""
    inputs = L.Input((8, 8, 3))
    y = L.BatchNormalization(epsilon=1e-5, name="first")(L.Conv2D(40, 3)(inputs))
    model = keras.Model(inputs, L.BatchNormalization(epsilon=1e-5, name="second")(L.Conv2D(5, 1)(y)))
    for name, layer in (("first", module.bn1), ("second", module.bn2)):
        values = (layer.weight, layer.bias, layer.running_mean, layer.running_var)
        model.get_layer(name).set_weights([value.detach().numpy() for value in values])
    return model


@pytest.fixture(params=list(BACKENDS))
def model(request):
    """A model of each framework."""
    return BACKENDS[request.param]()


def test_a_model_is_the_same_as_itself(model):
    """Nothing differs, in no layer, and so it is for its statistics alone."""
    for found in (bntools.diff(model, model), bntools.diff(model, bntools.statistics(model))):
        assert found.same
        assert [layer.name for layer in found] == [layer.name for layer in bntools.inspect(model)]
        assert (found.drift, found.worst(), found.notes, found.matched) == (0, [], [], "by name")


def test_one_channel_that_moved_is_found(model):
    """The layer, its drift in standard deviations, and the channel; the other layers are the same."""
    before = bntools.statistics(model)
    name, drift = drifted(model)
    found = bntools.diff(before, model)
    (worst,) = found.worst()
    assert worst.name == name
    assert worst.drift == found.drift == pytest.approx(drift, rel=1e-5)
    assert np.flatnonzero(worst.mean_shift).tolist() == [1]
    np.testing.assert_array_equal(worst.std_ratio, 1)
    assert worst.changes == (f"mean in 1 of {worst.a.features} channels",)
    assert not found.same


def test_statistics_that_are_not_finite_are_the_worst():
    """NaN on one side is the largest drift there is, and on both sides none."""
    a = nn.Sequential(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    b = copy.deepcopy(a)
    a[1].running_mean[2] = torch.nan
    b[0].running_mean[0] = 1
    found = bntools.diff(a, b)
    assert ([layer.name for layer in found.worst()], found.drift) == (["1", "0"], np.inf)
    assert bntools.diff(a, copy.deepcopy(a)).drift == 0


def test_every_other_part_of_a_layer_is_compared():
    """Variance, scale, shift, eps, momentum, missing statistics and width: each is named."""
    a = nn.ModuleDict({name: nn.BatchNorm1d(4) for name in ("one", "two", "three", "four", "five", "six")})
    b = copy.deepcopy(a)
    with torch.no_grad():
        b["one"].running_var *= 4
        b["two"].weight[2] = 0.5
        b["two"].bias[1] = -3
    b["three"].eps, b["three"].momentum = 1e-3, 0.01
    b["four"] = nn.BatchNorm1d(4, track_running_stats=False)
    b["five"] = nn.BatchNorm1d(3)
    b["six"] = nn.BatchNorm1d(4, affine=False)
    b["six"].running_mean += 3
    b["six"].running_var *= 4
    found = bntools.diff(a, b)
    assert {layer.name: layer.changes for layer in found.worst()} == {
        "one": ("variance in 4 of 4 channels",),
        "two": ("scale by up to 0.5", "shift by up to 3"),
        "three": ("eps 1e-05 against 0.001", "momentum 0.1 against 0.01"),
        "four": ("keeps statistics only in the first",),
        "five": ("4 channels against 3",),
        "six": ("mean in 4 of 4 channels", "variance in 4 of 4 channels"),
    }
    assert found.layers[0].drift == pytest.approx(1, abs=1e-4)
    assert found.layers[0].std_ratio == pytest.approx(2, abs=1e-4)
    assert found.layers[5].mean_shift == pytest.approx(3, abs=1e-4)  # in standard deviations of the first
    assert {layer.name for layer in found.worst()[:2]} == {"four", "five"}  # what cannot be compared comes first
    assert found.drift == found.layers[5].drift


def test_layers_of_one_side_alone():
    """Layers that only one model has are listed."""
    a, b = nn.ModuleDict({"x": nn.BatchNorm1d(2), "y": nn.BatchNorm1d(2)}), nn.ModuleDict({"x": nn.BatchNorm1d(2)})
    found = bntools.diff(a, b)
    assert (found.only_in_a, found.only_in_b, found.same) == (["y"], [], False)
    found = bntools.diff(b, a)
    assert (found.only_in_a, found.only_in_b, found.same) == ([], ["y"], False)


def test_statistics_lost_in_an_average():
    """An average of the weights alone leaves statistics as they were created: that is said in words."""
    torch.manual_seed(0)
    model = cnn()
    average = copy.deepcopy(model)
    for _ in range(3):
        model(torch.randn(8, 3, 8, 8) + 2)
        for mine, theirs in zip(average.parameters(), model.parameters(), strict=True):
            mine.data.lerp_(theirs.data, 0.1)
    found = bntools.diff(model, average)
    assert "in 2 of 2 layers the second has mean 0 and variance 1, as if never trained" in found.notes[0]
    assert "in 2 of 2 layers the first has" in bntools.diff(average, model).notes[0]
    assert found.drift > 0.1
    bntools.apply(average, bntools.statistics(model), strict=False)
    assert bntools.diff(model, average).same


def test_files_of_every_form(tmp_path):
    """A whole module, checkpoints with prefixes, safetensors, ONNX, and statistics hold the same BN state."""
    module, model = pair()
    torch.save(module, tmp_path / "whole.pt")
    state = {"epoch": 3, "state_dict": {f"module.{key}": value for key, value in module.state_dict().items()}}
    torch.save(state, tmp_path / "checkpoint.ckpt")
    wrapped = {f"_orig_mod.{key}": value for key, value in module.state_dict().items()}
    safetensors.torch.save_file(wrapped, tmp_path / "weights.safetensors")
    bntools.save_stats(module, tmp_path / "statistics.safetensors")
    onnx_files.keep(model, tmp_path / "model.onnx", external=True)
    whole = tmp_path / "whole.pt"
    for name, notes in (
        ("checkpoint.ckpt", 1),
        ("weights.safetensors", 1),
        ("statistics.safetensors", 0),
        ("model.onnx", 0),
    ):
        found = bntools.diff(whole, tmp_path / name)
        assert (found.same, len(found), len(found.notes)) == (True, 2, notes), name
    with torch.no_grad():
        module.bn2.weight[0] += 1
    found = bntools.diff(tmp_path / "checkpoint.ckpt", module)
    assert [(layer.name, layer.changes) for layer in found.worst()] == [("bn2", ("scale by up to 1",))]
    for name in ("none.pt", "empty.pt"):
        (tmp_path / "empty.pt").touch()
        with pytest.raises(bntools.BntoolsError, match=rf"{name}: "):
            bntools.diff(whole, tmp_path / name)


def test_arch_tells_what_a_state_dict_does_not(tmp_path):
    """With the model that a state dict belongs to, eps and momentum are compared; the other side needs none."""
    model = cnn()
    torch.save(model.state_dict(), tmp_path / "state.pt")
    torch.save(model, tmp_path / "whole.pt")

    def other():
        made = cnn()
        made[1].eps = 1e-3
        return made

    found = bntools.diff(tmp_path / "state.pt", tmp_path / "whole.pt", arch=other)
    assert [layer.changes for layer in found.worst()] == [("eps 0.001 against 1e-05",)]
    assert not bntools.diff(tmp_path / "state.pt", tmp_path / "whole.pt").worst()


def test_hostile_pickles_are_not_executed(tmp_path):
    """A pickle that calls something is refused, as everywhere."""

    class Bomb:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"bn.running_mean": torch.zeros(2), "x": Bomb()}, tmp_path / "bomb.pt")
    with pytest.raises(bntools.BntoolsError, match="print"):
        bntools.diff(tmp_path / "bomb.pt", cnn())


def test_across_frameworks(tmp_path):
    """Keras against PyTorch: by scale and shift where they tell, by a mapping, from a file; a drift is found."""
    module, _ = pair()
    other = twin(module)
    other.save(tmp_path / "twin.keras")
    for b in (other, tmp_path / "twin.keras"):
        found = bntools.diff(module, b)
        assert (found.same, found.matched) == (True, "by their scale and shift, which are the same in both")
    assert [layer.name for layer in found] == ["bn1 = first", "bn2 = second"]
    other.get_layer("first").moving_mean.assign_add(np.eye(40)[3])
    found = bntools.diff(module, other, mapping={"bn1": "first", "bn2": "second"})
    assert [layer.name for layer in found.worst()] == ["bn1 = first"]
    assert bntools.diff(module, other, mapping={"bn2": "second"}).only_in_a == ["bn1"]
    with torch.no_grad():
        module.bn1.weight[0] += 1
    assert "a guess" in bntools.diff(module, other).matched


def records(**features):
    """Fresh records of layers with these names and widths."""
    return bntools.inspect(nn.ModuleDict({name: nn.BatchNorm1d(width) for name, width in features.items()}))


def renamed(prefix: str, layers):
    """The same records with something before their names."""
    return [copy.copy(one) for one in layers if not object.__setattr__(one, "name", prefix + one.name)]


def test_names_are_matched_by_what_is_unambiguous():
    """By a prefix on one side, by order where widths agree, and else not at all."""
    plain = records(a=2, b=3, c=3)
    found = match(plain, renamed("model.", records(a=2, c=3, b=3)))
    assert found.pairs == {"a": "model.a", "b": "model.b", "c": "model.c"}
    assert "prefix 'model.'" in found.how
    assert match(renamed("net.", records(a=2)), plain).pairs == {"net.a": "a"}
    assert match(plain, records(x=2, y=3, z=3)).pairs == {"a": "x", "b": "y", "c": "z"}
    for others in (records(x=3, y=2, z=3), records(x=2, y=3)):
        with pytest.raises(bntools.BntoolsError, match=r"a, b, c.*give --map"):
            match(plain, others)


def test_mappings():
    """Globs carry over what they stand for; layers that are left out keep their names."""
    mine, theirs = renamed("net.", records(a=2, b=3)) + records(c=4), renamed("body.", records(a=2, b=3)) + records(c=4)
    assert match(mine, theirs, {"net.*": "body.*"}).pairs == {"net.a": "body.a", "net.b": "body.b", "c": "c"}
    assert match(mine, theirs, {"net.a": "body.b"}).pairs == {
        "net.a": "body.b",
        "c": "c",
    }
    for mapping, message in (
        ({"net.*": "body"}, "as many"),
        ({"nets.a": "body.a"}, "did you mean net.a"),
        ({"net.a": "body.z"}, "no such layer: did you mean body"),
        ({"net.a": "body.a", "net.b": "body.a"}, "to several layers: net.a, net.b"),
    ):
        with pytest.raises(bntools.BntoolsError, match=message):
            match(mine, theirs, mapping)
