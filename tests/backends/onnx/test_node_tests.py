"""ONNX's own backend tests for BatchNormalization, through inspect and verify."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import numpy_helper, version_converter
from onnx.backend.test.case.node import _NodeTestCases
from onnx.backend.test.loader import load_model_tests

import bntools
from bntools import BntoolsError

try:
    from onnx.backend.test.case.node import batch_normalization
except ImportError:  # as older versions call it
    from onnx.backend.test.case.node import batchnorm as batch_normalization

assert batch_normalization.BatchNormalization  # defining it has added its cases to the list
NODES = {case.name: case for case in _NodeTestCases if case.name.startswith("test_batchnorm")}
FILES = {
    case.name: Path(case.model_dir)
    for case in load_model_tests(kind="pytorch-converted")
    if case.name.startswith("test_BatchNorm")
}
PLACES = ("s", "bias", "mean", "var")


def given(case):
    """The inputs and the expected outputs of a case, by name."""
    inputs, outputs = case.data_sets[0]
    graph = case.model.graph
    return (
        dict(zip([value.name for value in graph.input], inputs, strict=True)),
        dict(zip([value.name for value in graph.output], outputs, strict=True)),
    )


def stored(model, constants):
    """The model with some of its inputs stored in it."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    del made.graph.input[:]
    made.graph.input.extend(value for value in model.graph.input if value.name not in constants)
    made.graph.initializer.extend(numpy_helper.from_array(array, name) for name, array in constants.items())
    return made


def answering(model, outputs):
    """A model with the same inputs (defaults left out) and outputs that gives these values, whatever it gets."""
    made = stored(model, {})
    defaults = {value.name for value in model.graph.initializer}
    for value in [value for value in made.graph.input if value.name in defaults]:
        made.graph.input.remove(value)
    del made.graph.node[:]
    del made.graph.initializer[:]
    for name, array in outputs.items():
        made.graph.initializer.append(numpy_helper.from_array(np.asarray(array), f"{name}.expected"))
        made.graph.node.append(onnx.helper.make_node("Identity", [f"{name}.expected"], [name]))
    return made


def test_the_cases_are_there():
    """The package of ONNX brings its cases for the operator, in both modes, and files from PyTorch."""
    assert {"test_batchnorm_example", "test_batchnorm_epsilon_training_mode"} <= set(NODES)
    assert len(FILES) >= 5


@pytest.mark.parametrize("name", NODES)
@pytest.mark.parametrize("constant", [True, False], ids=["stored", "inputs"])
def test_verify_nodes(name, constant):
    """Each case gives what ONNX expects of it, and an expectation that is off by a thousandth fails."""
    inputs, outputs = given(NODES[name])
    model = stored(NODES[name].model, {place: inputs[place] for place in PLACES}) if constant else NODES[name].model
    check = bntools.verify(answering(model, outputs), model, [inputs])
    assert check.passed, check
    assert check.error < 1e-6
    assert [one.name for one in check.outputs] == list(outputs)
    wrong = {key: array * np.float32(1.001) for key, array in outputs.items()}
    assert not bntools.verify(answering(model, wrong), model, [inputs]).passed


@pytest.mark.parametrize("name", NODES)
def test_inspect_nodes(name):
    """Each case is one layer with the case's own epsilon and mode; what it stores is read, what is an input is said."""
    case = NODES[name]
    inputs, _ = given(case)
    [layer] = bntools.inspect(stored(case.model, {place: inputs[place] for place in PLACES}))
    for place, value in zip(PLACES, (layer.scale, layer.shift, layer.mean, layer.var), strict=True):
        assert np.array_equal(value, inputs[place])
    assert (layer.features, layer.eps) == (3, pytest.approx(1e-2 if "epsilon" in name else 1e-5))
    assert any("training mode" in remark for remark in layer.remarks) == ("training_mode" in name)
    [unstored] = bntools.inspect(case.model)
    assert unstored.mean is None
    assert any("an input of the graph" in remark for remark in unstored.remarks)


@pytest.mark.parametrize("name", FILES)
def test_files_from_pytorch(name):
    """Each file, of an opset older than the runtime serves, is inspected as it is and right once it is converted."""
    folder = FILES[name]
    model = onnx.load(folder / "model.onnx")
    stored_there = {value.name for value in model.graph.initializer}
    [source] = [value.name for value in model.graph.input if value.name not in stored_there]
    data = folder / "test_data_set_0"
    x, expected = (numpy_helper.to_array(onnx.load_tensor(data / f"{one}_0.pb")) for one in ("input", "output"))
    with pytest.raises(BntoolsError, match=r"operator as of opset 6.*convert the model"):
        bntools.verify(folder / "model.onnx", folder / "model.onnx", [{source: x}])
    newer = version_converter.convert_version(model, 9)
    truth = answering(newer, {model.graph.output[0].name: expected})
    check = bntools.verify(truth, newer, [{source: x}])
    assert check.passed, check
    for form in (folder / "model.onnx", newer):
        [layer] = bntools.inspect(form)
        assert layer.features == x.shape[1]
        assert not any("training" in remark for remark in layer.remarks)
