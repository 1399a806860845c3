"""Sessions: on the provider that was asked for, or an error with the runtime's reason."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from bntools import BntoolsError
from bntools.backends.onnx import session
from bntools.backends.onnx.session import open_session, placement, require, require_placed

CUDA = "CUDAExecutionProvider"


def model(op="Identity", dtype=TensorProto.FLOAT, domain=""):
    """A serialized model of one node."""
    values = [helper.make_tensor_value_info(name, dtype, [1, 2, 3]) for name in "xy"]
    graph = helper.make_graph([helper.make_node(op, ["x"], ["y"], domain=domain)], "tiny", values[:1], values[1:])
    made = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 13), helper.make_opsetid("com.acme", 1)], ir_version=8
    )
    return made.SerializeToString()


def test_provider_that_fails_to_load(monkeypatch):
    """A runtime that only complains on stderr and goes on without the provider is an error with that reason."""
    create = session._create

    def without_cuda(source, name, options, wanted):
        os.write(2, b"Failed to load library libonnxruntime_providers_cuda.so: libcublas.so.12: cannot open")
        return create(source, name, options, ["CPUExecutionProvider"])

    monkeypatch.setattr(session.ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(session, "_create", without_cuda)
    with pytest.raises(BntoolsError) as caught:
        require(["cuda"])
    assert "libcublas.so.12: cannot open" in str(caught.value)


def test_cpu_is_there():
    """The CPU needs nothing, and its sessions fall back to nothing."""
    require(["cpu"])
    opened = open_session(model(), "tiny", ["cpu"], optimize=False)
    assert opened.get_providers() == ["CPUExecutionProvider"]
    assert not opened._enable_fallback


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (b"not a model", "cannot load tiny"),
        (model("NoSuchOperator"), "tiny uses the operator 'NoSuchOperator' of the domain 'ai.onnx'"),
        (
            model("Magic", domain="com.acme"),
            "tiny uses the operator 'Magic' of the domain 'com.acme', which ONNX Runtime",
        ),
        (model("Relu", TensorProto.BFLOAT16), "cannot load tiny.*try float32, or another provider"),
    ],
    ids=["no model", "unknown operator", "custom operator", "dtype the provider lacks"],
)
def test_models_that_the_runtime_refuses(source, words, capfd):
    """What the runtime refuses is one error in one line, and nothing on stderr."""
    with pytest.raises(BntoolsError, match=words) as caught:
        open_session(source, "tiny", ["cpu"], optimize=True)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is not None
    assert capfd.readouterr().err == ""


def test_smallest_model():
    """The model that tries a provider out is one that the checker accepts."""
    onnx.checker.check_model(onnx.load_from_string(session._smallest_model()), full_check=True)


def test_placement():
    """Every node is said to run on the provider that runs it."""
    opened = open_session(model("Relu"), "tiny", ["cpu"], optimize=False)
    assert placement(opened) == {"CPUExecutionProvider": 1}
    require_placed(placement(opened), ["cpu"], "tiny")


@dataclass
class Part:
    """Nodes that ONNX Runtime has given to a provider, as its own records are."""

    ep_name: str
    nodes: list = field(default_factory=list)

    def get_nodes(self):
        return self.nodes


class Placing:
    """A session that tells where its nodes run."""

    def __init__(self, *parts):
        self.get_provider_graph_assignment_info = lambda: parts


def test_placement_is_pooled():
    """Nodes of a provider are counted over all its parts of the graph; a runtime that does not tell counts none."""
    parts = (Part(CUDA, [1, 2]), Part("CPUExecutionProvider", [3]), Part(CUDA, [4]))
    assert placement(Placing(*parts)) == {CUDA: 3, "CPUExecutionProvider": 1}
    assert placement(object()) == {}


@pytest.mark.parametrize(
    ("placed", "providers", "refused"),
    [
        ({"CPUExecutionProvider": 3}, ["cuda"], True),
        ({"CPUExecutionProvider": 3}, ["cuda", "cpu"], True),
        ({"CPUExecutionProvider": 3, CUDA: 1}, ["cuda"], False),
        ({"CPUExecutionProvider": 3}, ["cpu"], False),
        ({}, ["cuda"], False),
    ],
)
def test_a_provider_that_runs_no_node(placed, providers, refused):
    """A provider that is active and runs none of the nodes is an error that says where they ran."""
    if not refused:
        require_placed(placed, providers, "tiny")
        return
    with pytest.raises(BntoolsError, match=r"runs no node of tiny on it \(3 on CPUExecutionProvider\)"):
        require_placed(placed, providers, "tiny")


def test_options_are_in_the_error(monkeypatch):
    """Where a session with options is refused, the options are in the message; our own default is not."""
    monkeypatch.setattr(session.ort, "get_available_providers", lambda: [CUDA, "CPUExecutionProvider"])

    def refuse(*args, **kwargs):
        raise RuntimeError("Unknown provider option")

    monkeypatch.setattr(session.ort, "InferenceSession", refuse)
    with pytest.raises(BntoolsError, match=r"asked for with options: CUDAExecutionProvider .*'colour': 'red'"):
        require([("cuda", {"colour": "red"})])
    with pytest.raises(BntoolsError) as caught:
        require(["cuda"])
    assert "options" not in str(caught.value).replace("Unknown provider option", "")


def test_lean_sessions_copy_no_weights():
    """A lean session leaves alone what would be a copy of a weight: a BN is not fused into its convolution."""
    constants = [onnx.numpy_helper.from_array(np.ones(4, np.float32), name) for name in ("s", "b", "m", "v")]
    constants.append(onnx.numpy_helper.from_array(np.ones((4, 3, 1, 1), np.float32), "w"))
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"]),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"]),
    ]
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    graph = helper.make_graph(nodes, "g", values[:1], values[1:], constants)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)

    def operators(lean):
        opened = open_session(made.SerializeToString(), "g", ["cpu"], optimize=True, lean=lean)
        parts = opened.get_provider_graph_assignment_info()
        return {node.op_type for part in parts for node in part.get_nodes()}

    assert operators(lean=True) == {"Conv", "BatchNormalization"}
    assert "BatchNormalization" not in operators(lean=False)
