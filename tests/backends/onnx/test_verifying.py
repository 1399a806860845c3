"""verify between ONNX models in all their forms: what they give, where they part, and what they take to run."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from two_branches import N, X, network

import bntools
from bntools import BntoolsError, divergence
from bntools.backends.onnx import edit, opened, predict, runners, running, subject


@pytest.fixture
def forms(tmp_path):
    """One model in every form, with its weights inside and in external files."""
    onnx.save(network(), tmp_path / "whole.onnx")
    onnx.save(network(), tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    return {
        "proto": network(),
        "path": tmp_path / "whole.onnx",
        "name": str(tmp_path / "whole.onnx"),
        "external path": tmp_path / "m.onnx",
        "ir": onnx_ir.from_proto(network()),
        "external ir": onnx_ir.load(tmp_path / "m.onnx"),
        "document": opened(network()),
        "document of a path": edit(tmp_path / "m.onnx"),
    }


FORMS = ["proto", "path", "name", "external path", "ir", "external ir", "document", "document of a path"]


@pytest.mark.parametrize("form", FORMS)
def test_forms(forms, form):
    """A model runs, agrees with itself and is told from another, in whatever form it is given, on either side."""
    assert np.array_equal(predict(forms[form], X)["y"], predict(network(), X)["y"])
    assert bntools.verify(network(), forms[form], X).error < 1e-6
    wrong = network(right=0.1)
    for check in (bntools.verify(forms[form], wrong, X), bntools.verify(wrong, forms[form], X)):
        assert not check.passed
        assert check.first_divergence == "right_out"


def test_a_document_runs_as_its_message_is():
    """A document runs what its message says now, not what lies in the file that it was read from."""
    document = opened(network())
    document.proto.CopyFrom(network(mean=1.0))
    assert bntools.verify(network(mean=1.0), document, X).error < 1e-6
    assert not bntools.verify(network(), document, X).passed


@pytest.mark.parametrize(
    ("initializer", "value", "op", "node"),
    [
        ("fc", "fc_out", "MatMul", "fc_node"),
        ("mean", "bn_out", "BatchNormalization", "bn_node"),
        ("left", "left_out", "MatMul", "left_node"),
        ("right", "right_out", "MatMul", "right_node"),
    ],
)
def test_first_node_that_differs(initializer, value, op, node):
    """A planted difference is found at exactly its node, in either branch, with the operator and the error."""
    check = bntools.verify(network(), network(**{initializer: 0.3}), X)
    assert not check.passed
    assert (check.divergence.name, check.divergence.op, check.divergence.node) == (value, op, node)
    reads = [
        runners(model)[0].trace(X[:1]).read([value])[value] for model in (network(), network(**{initializer: 0.3}))
    ]
    assert check.divergence.error == pytest.approx(np.abs(reads[0] - reads[1]).max() / np.abs(reads[0]).max())
    assert f"first difference at {value!r} ({op} {node!r}, error" in str(check)


def deep(layers, wrong=None):
    """x -> Add -> LeakyRelu -> Mean -> ... with a branch around each layer, one of whose weights may be wrong."""
    rng = np.random.default_rng(2)
    nodes, arrays, value = [], [], "x"
    for i in range(layers):
        shift = rng.normal(size=N).astype(np.float32)
        arrays.append(numpy_helper.from_array(shift + np.float32(0.5 * (i == wrong)), f"w{i}"))
        nodes += [
            helper.make_node("Add", [value, f"w{i}"], [f"sum{i}"], name=f"add{i}"),
            helper.make_node("LeakyRelu", [f"sum{i}"], [f"act{i}"], alpha=0.9),
            helper.make_node("Mean", [f"act{i}", value], [f"out{i}"]),
        ]
        value = f"out{i}"
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", N]) for name in ("x", value)]
    graph = helper.make_graph(nodes, "deep", ends[:1], ends[1:], arrays)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


@pytest.mark.parametrize("wrong", [0, 37, 99])
@pytest.mark.parametrize("values", [1, 20, 1000])
def test_bisection_over_few_sessions(monkeypatch, wrong, values):
    """A deep graph whose values do not fit in memory at once is searched exactly, in a few sessions."""
    count = []
    real = running.open_session
    monkeypatch.setattr(divergence, "BUDGET", values * N * 4)
    monkeypatch.setattr(running, "open_session", lambda *a, **k: count.append(1) or real(*a, **k))
    pair = [runners(model)[0] for model in (deep(100), deep(100, wrong))]
    found = divergence.first_divergence(*pair, X[:1], 1e-4)
    assert (found.name, found.op, found.node) == (f"sum{wrong}", "Add", f"add{wrong}")
    assert len(count) <= 2 * {1: 12, 20: 5, 1000: 4}[values]


def test_a_thousandth_is_found():
    """A file whose output is off by a thousandth of its scale fails."""
    other = network()
    for tensor in other.graph.initializer:
        if tensor.name in ("left", "right"):
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.001), tensor.name))
    check = bntools.verify(network(), other, X)
    assert not check.passed
    assert check.error == pytest.approx(1e-3, rel=0.01)


def test_second_output_alone():
    """A difference in the second output alone, an integer one, is found and named, with the node that makes it."""
    other = network()
    other.graph.node[-1].op_type = "ArgMin"
    check = bntools.verify(network(), other, X)
    assert "output 'best'" in check.reason
    assert "of an exact output (int64) differ" in check.reason
    assert (check.divergence.name, check.divergence.op) == ("best", "ArgMin")


def test_outputs_in_another_order():
    """Outputs are compared by name, whatever their order."""
    other = network()
    outputs = list(other.graph.output)
    del other.graph.output[:]
    other.graph.output.extend(reversed(outputs))
    assert bntools.verify(network(), other, X).passed


def test_folded_by_hand():
    """A BN folded into the layer before it is no divergence; a wrong weight behind it is, in the folded model."""

    def folded(**changes):
        model = network(**changes)
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        factor = stored["scale"] / np.sqrt(stored["var"] + 1e-5)
        for name, value in (("fc", stored["fc"] * factor), ("shift", stored["shift"] - stored["mean"] * factor)):
            next(one for one in model.graph.initializer if one.name == name).CopyFrom(
                numpy_helper.from_array(value, name)
            )
        model.graph.node[1].CopyFrom(helper.make_node("Add", ["fc_out", "shift"], ["bn_out"], name="bn_node"))
        return model

    assert bntools.verify(network(), folded(), X).passed
    assert bntools.verify(folded(), network(), X).passed
    for pair in ((network(), folded(left=0.3)), (folded(left=0.3), network())):
        assert bntools.verify(*pair, X).first_divergence == "left_out"


def test_sessions_are_opened_when_needed(monkeypatch):
    """Three sessions serve any number of batches; those that look inside are opened only where models differ.

    A file that is wrong is looked into without optimizations, which would hide values.
    """
    opened_ones = []
    real = running.open_session

    def counting(*args, **kwargs):
        opened_ones.append(kwargs["optimize"])
        return real(*args, **kwargs)

    monkeypatch.setattr(running, "open_session", counting)
    assert bntools.verify(network(), network(), [X, X[:2], X]).passed
    assert opened_ones == [False, False, True]
    opened_ones.clear()
    assert not bntools.verify(network(), network(fc=0.3), X).passed
    assert opened_ones[3:] == [False, False]


def test_large_models_one_at_a_time(forms, monkeypatch):
    """Of large models one is in memory at a time, without copies of its weights; results and notes say the same."""
    alive, most, lean = [], [], []
    real = running.open_session

    class Session:
        def __init__(self, inner):
            self._inner = inner
            alive.append(self._inner)
            most.append(len(alive))

        def __getattr__(self, name):
            return getattr(self._inner, name)

        def __del__(self):
            alive.remove(self._inner)

    def counting(*args, **kwargs):
        lean.append(kwargs["lean"])
        return Session(real(*args, **kwargs))

    monkeypatch.setattr(running, "open_session", counting)
    monkeypatch.setattr(subject, "LARGE", 10)
    check = bntools.verify(forms["external path"], forms["path"], [X, X])
    assert check.passed
    assert max(most) == 1
    assert all(lean)
    assert any("left out the optimizations that copy weights" in note for note in check.notes)
    check = bntools.verify(forms["external path"], network(left=0.3), X)
    assert check.first_divergence == "left_out"
    assert max(most) == 1


def test_small_models_have_no_such_note():
    """Nothing is left out for a model that is not large."""
    assert bntools.verify(network(), network(), X).notes == ()


def test_weights_are_counted_wherever_they_lie(forms):
    """The size of the weights is known without reading them, inside the file and beside it."""
    expected = sum(numpy_helper.to_array(tensor).nbytes for tensor in network().graph.initializer)
    for form in ("proto", "external path", "external ir"):
        assert subject.weight_bytes(opened(forms[form]).proto) == expected


def test_placement():
    """A verification says how many nodes ran on which provider."""
    check = bntools.verify(network(), network(), X)
    assert set(check.placement) == {"CPUExecutionProvider"}
    assert check.placement["CPUExecutionProvider"] >= 6


@pytest.mark.parametrize(
    ("placed", "words"),
    [
        ({"CUDAExecutionProvider": 5, "CPUExecutionProvider": 3}, "of 8 nodes only 5 ran on CUDAExecutionProvider"),
        ({"CUDAExecutionProvider": 8}, None),
        ({"CPUExecutionProvider": 8}, "runs no node"),
    ],
)
def test_nodes_on_another_provider(monkeypatch, placed, words):
    """Nodes that fell to another provider are said in a note; if all did, that is an error."""
    real = running.open_session
    monkeypatch.setattr(running, "available", lambda providers: ["CUDAExecutionProvider"])
    monkeypatch.setattr(running, "open_session", lambda s, n, p, **kwargs: real(s, n, ["cpu"], **kwargs))
    told = iter([{"CPUExecutionProvider": 8}, placed, placed])
    monkeypatch.setattr(running, "placement", lambda session: next(told))
    if words == "runs no node":
        with pytest.raises(BntoolsError, match=words):
            bntools.verify(network(), network(), X, providers=["cuda"])
        return
    check = bntools.verify(network(), network(), X, providers=["cuda"])
    assert check.provider == "CUDAExecutionProvider"
    assert check.placement == placed
    assert [words in note for note in check.notes] == [True] * (words is not None)


def test_tf32_is_said(monkeypatch):
    """TF32, where it was asked for, is in the notes."""
    monkeypatch.setattr(running, "available", lambda providers: ["CUDAExecutionProvider"])
    asked, unasked = (runners(network(), [("cuda", {"use_tf32": value})])[1].notes for value in (1, 0))
    assert "TF32 is on, as asked for" in asked[0]
    assert unasked == ()
