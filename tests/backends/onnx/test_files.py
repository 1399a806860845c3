"""Loading, saving and rewriting .onnx files."""

from __future__ import annotations

import os
import re

import numpy as np
import onnx
import onnx_ir
import pytest
from listing import contents
from onnx_files import images, keep, small

import bntools
from bntools import BntoolsError, backends, files
from bntools.backends.onnx import predict, storing


def data_files(folder) -> list[str]:
    """What lies beside the models of a folder."""
    return sorted(name for name in os.listdir(folder) if not name.endswith(".onnx"))


def location(path) -> set[str]:
    """The files that a model keeps its weights in."""
    return set(backends.backend("onnx").external_files(path))


def test_the_form_of_a_loaded_model(tmp_path):
    """A file loads as ModelProto; one with external weights as onnx_ir.Model, whose tensors stay in their file."""
    plain = bntools.load(keep(small(), tmp_path / "plain.onnx"))
    assert plain == small()
    model = bntools.load(keep(small(), tmp_path / "external.onnx", external=True))
    assert isinstance(model, onnx_ir.Model)
    weight = model.graph.initializers["w1"].const_value
    assert isinstance(weight, onnx_ir.ExternalTensor)
    np.testing.assert_array_equal(weight.numpy(), onnx.numpy_helper.to_array(small().graph.initializer[0]))


@pytest.mark.parametrize("external", [False, True])
def test_saved_models_compute_the_same(tmp_path, external):
    """A model in each form is saved as a file that passes the checker, computes the same and keeps its metadata."""
    source = keep(small(), tmp_path / "model.onnx", external)
    expected = predict(source, images())["scores"]
    forms = {"loaded": bntools.load(source), "document": files.working(source), "path": source}
    for name, model in forms.items():
        (tmp_path / name).mkdir()
        target = tmp_path / name / "copy.onnx"
        bntools.save(model, target)
        onnx.checker.check_model(str(target))
        np.testing.assert_array_equal(predict(target, images())["scores"], expected)
        assert {one.key: one.value for one in onnx.load(target).metadata_props} == {"team": "vision"}
        assert bool(location(target)) == external
        assert all(re.fullmatch(r"copy\.[0-9a-f]{8}\.data", one) for one in data_files(tmp_path / name))


def test_external_weights_follow_the_model(tmp_path):
    """A copy refers to its own data file only, small tensors stay inside, and nothing is stored twice."""
    source = keep(small(), tmp_path / "model.onnx", external=True)
    bntools.save(bntools.load(source), tmp_path / "copy.onnx")
    (name,) = location(tmp_path / "copy.onnx")
    tensors = {one.name: one for one in onnx.load(tmp_path / "copy.onnx", load_external_data=False).graph.initializer}
    assert tensors["w1"].data_location == onnx.TensorProto.EXTERNAL
    assert tensors["bn2.weight"].raw_data
    before, after = (tmp_path / "weights.bin").stat().st_size, (tmp_path / name).stat().st_size
    assert after < before + 64 * len(tensors)


def test_saving_over_a_file_replaces_its_data(tmp_path):
    """Another model saved under the same name leaves one data file: its own."""
    source = bntools.load(keep(small(), tmp_path / "model.onnx", external=True))
    target = tmp_path / "out" / "copy.onnx"
    target.parent.mkdir()
    bntools.save(source, target)
    first = location(target)
    bntools.save(source, target)
    assert location(target) != first
    assert set(data_files(target.parent)) == location(target)


def test_saving_a_model_over_its_own_file_keeps_its_data(tmp_path):
    """What the model in memory still reads from stays where it is; the statistics alone are new."""
    path = tmp_path / "model.onnx"
    weights = contents_of(keep(small(), path, external=True).with_name("weights.bin"))
    model = bntools.load(path)
    bntools.reset(model)
    bntools.save(model, path)
    assert data_files(tmp_path) == ["weights.bin"]
    assert contents_of(tmp_path / "weights.bin") == weights
    assert all((layer.var == 1).all() for layer in bntools.inspect(path))


def contents_of(path) -> bytes:
    """What is in a file."""
    return path.read_bytes()


@pytest.mark.parametrize("external", [False, True])
def test_verbs_on_a_path_rewrite_the_file(tmp_path, external):
    """reset and recalibrate of a path change the file itself, and undo brings it back."""
    path = keep(small(), tmp_path / "model.onnx", external)
    before = bntools.inspect(path)
    result = bntools.recalibrate(path, [images()])
    after = bntools.inspect(path)
    assert result.residual < 1e-5
    assert all((a.mean != b.mean).any() for a, b in zip(after, before, strict=True))
    result.undo()
    for a, b in zip(bntools.inspect(path), before, strict=True):
        np.testing.assert_array_equal(a.var, b.var)
    bntools.reset(path)
    assert all((layer.mean == 0).all() for layer in bntools.inspect(path))
    assert data_files(tmp_path) == (["weights.bin"] if external else [])


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failing_system_call_leaves_the_old_pair(tmp_path, monkeypatch, step):
    """When the disk fails in the middle, model and data file are as before and nothing is left behind."""
    source = bntools.load(keep(small(), tmp_path / "model.onnx", external=True))
    target = tmp_path / "out" / "copy.onnx"
    target.parent.mkdir()
    bntools.save(source, target)
    before = contents(tmp_path)

    def fails(*arguments, **named):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(BntoolsError, match="No space left"):
        bntools.save(source, target)
    with pytest.raises(BntoolsError, match="No space left"):
        bntools.reset(tmp_path / "model.onnx")
    monkeypatch.undo()
    assert contents(tmp_path) == before


def test_data_is_there_before_its_model(tmp_path, monkeypatch):
    """When the model file takes its place, its data file is complete and the old one still there."""
    source = bntools.load(keep(small(), tmp_path / "model.onnx", external=True))
    target = tmp_path / "copy.onnx"
    bntools.save(source, target)
    old, replace, seen = location(target), os.replace, []

    def watched(a, b):
        assert old <= set(os.listdir(tmp_path))
        replace(a, b)
        onnx.checker.check_model(str(target))
        seen.append(b)

    monkeypatch.setattr(os, "replace", watched)
    bntools.save(source, target)
    assert len(seen) == 1
    assert not old & set(os.listdir(tmp_path))


def test_weights_beyond_a_message_become_external(tmp_path, monkeypatch):
    """A model too large for one message is saved with a data file, and computes the same."""
    monkeypatch.setattr(storing, "MOST", 1000)
    bntools.save(small(), tmp_path / "model.onnx")
    assert len(location(tmp_path / "model.onnx")) == 1
    expected = predict(small(), images())["scores"]
    np.testing.assert_array_equal(predict(tmp_path / "model.onnx", images())["scores"], expected)


def test_shared_weights_are_written_once(tmp_path):
    """Two tensors that refer to the same bytes of a file still do so in the copy."""
    path = keep(small(), tmp_path / "model.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    twin = model.graph.initializer.add()
    twin.CopyFrom(model.graph.initializer[0])
    twin.name = "twin"
    path.write_bytes(model.SerializeToString())
    bntools.save(bntools.load(path), tmp_path / "copy.onnx")
    tensors = {one.name: one for one in onnx.load(tmp_path / "copy.onnx", load_external_data=False).graph.initializer}
    places = [[(entry.key, entry.value) for entry in tensors[name].external_data] for name in ("w1", "twin")]
    assert places[0] == places[1]


def test_other_forms_are_refused(tmp_path):
    """An ONNX model is saved as .onnx only, and needs no arch=."""
    with pytest.raises(BntoolsError, match=r"model\.pt: a ModelProto is not saved as \.pt; an ONNX model is saved as"):
        bntools.save(small(), tmp_path / "model.pt")
    with pytest.raises(BntoolsError, match="needs no arch="):
        bntools.load(keep(small(), tmp_path / "model.onnx"), arch=lambda: None)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"location": "weights.bin", "offset": "999999999"}, "holds .* bytes"),
        ({"location": "weights.bin", "offset": "0", "length": "12"}, "12 are said to be there"),
        ({"location": "weights.bin", "offset": "-4"}, "holds .* bytes"),
        ({"location": "weights.bin", "offset": "zero"}, "invalid literal"),
    ],
)
def test_places_that_do_not_fit(tmp_path, entries, words):
    """A weight whose offset or length does not fit its file is named when it is copied, and nothing is written."""
    path = keep(small(), tmp_path / "model.onnx", external=True)
    model = onnx.load(path, load_external_data=False)
    del model.graph.initializer[0].external_data[:]
    for key, value in entries.items():
        model.graph.initializer[0].external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    before = contents(tmp_path)
    with pytest.raises(BntoolsError, match=f"the values of 'w1' cannot be read: .*{words}"):
        bntools.save(files.working(path), tmp_path / "copy.onnx")
    assert contents(tmp_path) == before
