"""Statistics apart from their model: taken, kept, applied, and refused where they do not fit."""

from __future__ import annotations

from dataclasses import replace

import keras
import numpy as np
import onnx_files
import pytest
import torch
from keras_nets import residual_net
from models import cnn
from onnx_nets import run
from small_pair import pair
from torch import nn

import bntools
from bntools.stats import LayerStatistics, Statistics

BACKENDS = {"torch": cnn, "keras": residual_net, "onnx": onnx_files.small}


@pytest.fixture(scope="module", params=list(BACKENDS))
def model(request):
    """A model of each framework; every test leaves it as it found it."""
    return BACKENDS[request.param]()


def numbers(model) -> dict[str, tuple]:
    """What a model stores, by layer."""
    return {one.name: (one.mean.tolist(), one.var.tolist(), one.updates) for one in bntools.inspect(model)}


def other(stats: Statistics, **changes) -> Statistics:
    """The same description with other numbers."""
    layers = [LayerStatistics(one.name, one.mean + 0.5, one.var * 2, one.eps, one.axis, 7, one.affine) for one in stats]
    facts = {"framework": stats.framework, "weights": stats.weights, "samples": 3, "note": "other"} | changes
    return Statistics(tuple(layers), **facts)


def test_a_file_gives_back_what_was_taken(model, tmp_path):
    """Numbers, description and fingerprint come back, in a file of kilobytes."""
    stats = bntools.statistics(model, samples=12, note="hall 2")
    path = tmp_path / "site.safetensors"
    bntools.save_stats(stats, path)
    back = bntools.load_stats(path)
    assert [one.name for one in back] == [one.name for one in bntools.inspect(model)]
    for one, again in zip(stats, back, strict=True):
        np.testing.assert_array_equal(one.mean, again.mean)
        np.testing.assert_array_equal(one.var, again.var)
        assert (one.eps, one.axis, one.updates, one.affine) == (again.eps, again.axis, again.updates, again.affine)
    assert (back.samples, back.note, back.date, back.versions) == (12, "hall 2", stats.date, stats.versions)
    assert back.fingerprint == stats.fingerprint == bntools.statistics(model).fingerprint
    assert back.versions["bntools"]
    assert path.stat().st_size < 4096


def test_applied_and_taken_back(model):
    """A model gets other statistics, and by undo its own, bit by bit."""
    before = numbers(model)
    mine = bntools.statistics(model)
    theirs = other(mine)
    with bntools.apply(model, theirs) as applied:
        for layer in bntools.inspect(model):
            np.testing.assert_array_equal(layer.mean, np.float32(theirs[layer.name].mean))
            np.testing.assert_array_equal(layer.var, np.float32(theirs[layer.name].var))
        assert bntools.statistics(model).weights == mine.weights  # they are not part of what they have to fit
        assert applied.layers == list(before)
    assert numbers(model) == before


def test_other_weights_are_refused(model):
    """Statistics measured behind other weights are refused with both digests, unless that is meant."""
    before = numbers(model)
    theirs = other(bntools.statistics(model), weights="0123456789abcdef")
    with pytest.raises(bntools.BntoolsError, match=r"weights outside of BN.*0123456789abcdef.*strict=False"):
        bntools.apply(model, theirs)
    assert numbers(model) == before
    applied = bntools.apply(model, theirs, strict=False)
    assert "not compared" in applied.notes[0]
    applied.undo()
    assert numbers(model) == before


def test_other_layers_are_refused_always(model):
    """A layer more, less, or of another width is named, with strict=False as well."""
    stats = bntools.statistics(model)
    first, *rest = stats
    wide = LayerStatistics(first.name, np.zeros(first.features + 1), np.ones(first.features + 1), first.eps, first.axis)
    stranger = LayerStatistics("stranger", first.mean, first.var, first.eps, first.axis)
    for layers, message in (
        ((wide, *rest), f"{first.name} has {first.features} channels"),
        (tuple(rest), f"nothing for its layer {first.name}"),
        ((*stats, stranger), "the model has no stranger"),
    ):
        with pytest.raises(bntools.BntoolsError, match=message):
            bntools.apply(model, Statistics(layers, stats.framework, stats.weights), strict=False)


def test_another_eps_is_refused():
    """What is divided by, and where the channels lie, is part of what statistics fit."""
    model = cnn()
    stats = bntools.statistics(model)
    model[4].eps = 1e-3
    with pytest.raises(bntools.BntoolsError, match=r"4 has eps=0\.001, and they were taken with eps=1e-05"):
        bntools.apply(model, stats)
    elsewhere = replace(stats, layers=tuple(replace(layer, axis=3) for layer in stats))
    with pytest.raises(bntools.BntoolsError, match="1 has its channels on axis 1, and they were taken with axis 3"):
        bntools.apply(model, elsewhere)


def test_the_digest_sees_every_weight_and_nothing_else():
    """Any parameter and any floating-point buffer changes the digest; statistics, counters and freezing do not."""
    model = cnn()
    model.register_buffer("grid", torch.ones(3))
    digest = bntools.statistics(model).weights
    model[1].running_mean += 1
    model[1].num_batches_tracked += 1
    bntools.freeze(model)
    assert bntools.statistics(nn.DataParallel(model)).weights == digest
    for tensor in (model[0].weight, model[1].bias, model[8].bias, model.grid):
        with torch.no_grad():
            tensor.view(-1)[-1] += 1
            assert bntools.statistics(model).weights != digest
            tensor.view(-1)[-1] -= 1
    assert bntools.statistics(model.half()).weights != digest


def test_statistics_of_a_module_apply_to_its_onnx_file(tmp_path):
    """Names agree, and so do scale and shift, which stand for the weights; both then compute the same."""
    module, model = pair()
    theirs = other(bntools.statistics(module))
    bntools.apply(module, theirs)
    path = onnx_files.keep(model, tmp_path / "model.onnx")
    applied = bntools.apply(path, theirs)
    assert "taken from a torch model" in applied.notes[0]
    image = onnx_files.images()
    with torch.no_grad():
        expected = module(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(run(path, image)["scores"], expected, rtol=1e-4, atol=1e-4)


def test_statistics_of_another_module_do_not_apply_to_an_onnx_file():
    """Another scale in one channel is another model; and where none has learned, nothing tells."""
    module, model = pair()
    stats = bntools.statistics(module)
    with torch.no_grad():
        module.bn2.weight[3] += 0.01
    with pytest.raises(bntools.BntoolsError, match="scale and shift differ in bn2"):
        bntools.apply(model, bntools.statistics(module))
    with torch.no_grad():
        for layer in (module.bn1, module.bn2):
            nn.init.ones_(layer.weight)
            nn.init.zeros_(layer.bias)
    bare = bntools.statistics(module)
    for tensor in model.graph.initializer:
        if tensor.name.endswith((".weight", ".bias")):
            values = np.full(tensor.dims[0], float(tensor.name.endswith(".weight")), np.float32)
            tensor.raw_data = values.tobytes()
    with pytest.raises(bntools.BntoolsError, match="no layer has learned"):
        bntools.apply(model, bare)
    with pytest.raises(bntools.BntoolsError, match="scale and shift differ in bn1, bn2"):
        bntools.apply(model, stats)


def test_where_nobody_counted_updates_enough_are_assumed():
    """Statistics of an ONNX file, applied to a fresh module, do not read as those of a module that hardly trained."""
    module, model = pair()
    module.bn1.num_batches_tracked.fill_(20)
    assert any("initial value" in problem for problem in bntools.inspect(module)[0].problems)
    bntools.apply(module, bntools.statistics(model))
    assert not bntools.inspect(module)[0].problems


def test_damaged_statistics_are_not_taken():
    """NaN in a layer is named before anything is written to a file."""
    model = cnn()
    model[4].running_var[2] = torch.nan
    with pytest.raises(
        bntools.BntoolsError, match=r"layer '4': found a variance that is not finite in 1 of 7 channels"
    ):
        bntools.statistics(model)
    with pytest.raises(bntools.BntoolsError, match="no BN"):
        bntools.statistics(nn.Linear(2, 2))


def test_a_value_that_does_not_fit_leaves_the_model_as_it_was():
    """A variance beyond half precision is refused before the first layer is written."""
    model = cnn()
    stats = bntools.statistics(model)
    stats["4"].var[:] = 1e6
    model[4].running_var = model[4].running_var.half()
    before = numbers(model)
    with pytest.raises(bntools.BntoolsError, match=r"layer '4': a variance of 1e\+06 does not fit"):
        bntools.apply(model, stats)
    assert numbers(model) == before


def test_a_bank_starts_every_domain_from_the_same(model):
    """Each domain has the statistics that it would have alone, and the model is as it was."""
    before = numbers(model)
    axis = (2, 3) if isinstance(model, keras.Model) else (3, 2)
    shape = (8, 12, 12, 3) if axis == (2, 3) else (8, 3, 8, 8)
    batches = {
        name: [np.random.default_rng(seed).normal(seed, 2, shape).astype("f")]
        for name, seed in zip("ab", (1, 2), strict=True)
    }
    found = bntools.bank(model, batches, prior=4, check=False)
    assert numbers(model) == before
    assert (list(found), found["a"].samples, found["b"].note) == (["a", "b"], 8, "domain b")
    result = bntools.recalibrate(model, batches["b"], prior=4, check=False)
    alone = bntools.statistics(model)
    result.undo()
    for layer in alone:
        np.testing.assert_array_equal(found["b"][layer.name].mean, layer.mean)
        assert np.abs(found["a"][layer.name].mean - layer.mean).max() > 0.01


def test_a_bank_fails_as_a_whole():
    """A domain without data is named, and the model is as it was."""
    model = cnn()
    before = numbers(model)
    with pytest.raises(bntools.BntoolsError, match=r"^b: "):
        bntools.bank(model, {"a": [torch.randn(4, 3, 8, 8)], "b": []})
    assert numbers(model) == before
    with pytest.raises(bntools.BntoolsError, match="no domains"):
        bntools.bank(model, {})
