"""Statistics apart from their model: taken, in files, applied, and refused where they do not fit."""

from __future__ import annotations

import json

import keras
import numpy as np
import onnx_files
import pytest
import safetensors.numpy
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


@pytest.fixture
def written(tmp_path):
    """A file of statistics of a small module, and its bytes."""
    path = tmp_path / "site.safetensors"
    bntools.save_stats(cnn(), path)
    return path, path.read_bytes()


def crafted(written, change) -> bytes:
    """The file with a changed header: ``change(header, facts)`` edits both in place."""
    _, data = written
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["bntools.statistics"])
    change(header, facts)
    header["__metadata__"]["bntools.statistics"] = json.dumps(facts)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


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
    """What is divided by is part of what statistics fit."""
    model = cnn()
    stats = bntools.statistics(model)
    model[4].eps = 1e-3
    with pytest.raises(bntools.BntoolsError, match=r"4 has eps=0\.001, and they were taken with eps=1e-05"):
        bntools.apply(model, stats)


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


def test_the_safetensors_package_reads_it(written):
    """The file is one of safetensors, its tensors called as in a state dict, which it loads into."""
    path, _ = written
    tensors = safetensors.numpy.load_file(path)
    assert {name: array.dtype.name for name, array in tensors.items()} == {
        f"{layer}.{kind}": "float32" for layer in "14" for kind in ("running_mean", "running_var")
    }
    values = {name: torch.from_numpy(array) for name, array in tensors.items()}
    assert not cnn().load_state_dict(values, strict=False).unexpected_keys


def test_float64_stays_exact(tmp_path):
    """Numbers that float32 does not hold come back as they are."""
    layers = (LayerStatistics("bn", np.array([0.1, 1e300]), np.array([1.0, 2.0]), 1e-5, 1),)
    bntools.save_stats(Statistics(layers, "torch", "abc"), tmp_path / "s.safetensors")
    assert bntools.load_stats(tmp_path / "s.safetensors")["bn"].mean.tolist() == [0.1, 1e300]
    assert safetensors.numpy.load_file(tmp_path / "s.safetensors")["bn.running_var"].dtype == np.float32


def test_every_truncation_is_refused(written):
    """A file cut off anywhere is refused as one line that names it."""
    path, data = written
    for length in (*range(0, len(data), 5), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(bntools.BntoolsError, match=r"site\.safetensors: ") as refused:
            bntools.load_stats(path)
        assert "\n" not in str(refused.value)


def test_no_damaged_byte_surfaces_as_anything_else(written):
    """Whatever byte is changed, the file is read or refused; nothing else is raised."""
    path, data = written
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            bntools.load_stats(path)
        except bntools.BntoolsError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, f: h["1.running_mean"].update(dtype="I64"), "is of dtype 'I64'"),
        (lambda h, f: h["1.running_mean"].update(shape=[2, 2]), "damaged"),
        (lambda h, f: h["1.running_mean"].update(shape=[2**61]), "does not lie where"),
        (lambda h, f: h["1.running_mean"].update(data_offsets=[4, 24]), "does not lie where"),
        (lambda h, f: h.pop("1.running_var"), "damaged"),
        (lambda h, f: h.update({"9.running_var": h.pop("1.running_var")}), "it lacks '1.running_var'"),
        (lambda h, f: f["layers"].pop(), "belongs to no layer"),
        (lambda h, f: f["layers"].append(f["layers"][0]), "it lacks '1.running_mean'"),
        (lambda h, f: f["layers"][0].update(eps=-1), "other types"),
        (lambda h, f: f["layers"][0].update(updates="many"), "other types"),
        (lambda h, f: f.update(format=2), "in format 2"),
        (lambda h, f: f.update(samples=-1), "other types"),
        (lambda h, f: f.update(versions=[]), "damaged"),
        (lambda h, f: f.pop("weights"), "it lacks 'weights'"),
    ],
)
def test_crafted_headers_are_refused(written, change, message):
    """What a header claims is checked before it is believed."""
    path, _ = written
    path.write_bytes(crafted(written, change))
    with pytest.raises(bntools.BntoolsError, match=message):
        bntools.load_stats(path)


def test_crafted_numbers_are_refused(written):
    """NaN and a negative variance are no statistics, whoever wrote the file."""
    path, data = written
    for value, message in ((np.nan, "not finite"), (-1, "negative variance")):
        path.write_bytes(data[:-4] + np.float32(value).tobytes())
        with pytest.raises(bntools.BntoolsError, match=message):
            bntools.load_stats(path)


def test_other_files_are_refused(written, tmp_path):
    """A missing file, a folder, a model's weights, text, and a huge header are told apart."""
    path, data = written
    weights = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, weights)
    for place, content, message in (
        (tmp_path / "none.safetensors", None, "no such file"),
        (tmp_path, None, "is a folder"),
        (weights, None, "of 1 tensors, not of statistics"),
        (path, b"hello, this is text", "found text"),
        (path, (1 << 60).to_bytes(8, "little") + data[8:], "truncated or damaged"),
        (path, (70000).to_bytes(8, "little") + b'{"a":' * 14000, "damaged"),
    ):
        if content is not None:
            place.write_bytes(content)
        with pytest.raises(bntools.BntoolsError, match=message):
            bntools.load_stats(place)
    with pytest.raises(bntools.BntoolsError, match="expected that suffix"):
        bntools.save_stats(cnn(), tmp_path / "site.pt")
    with pytest.raises(bntools.BntoolsError, match="found a dict where statistics were expected"):
        bntools.apply(cnn(), {})


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
