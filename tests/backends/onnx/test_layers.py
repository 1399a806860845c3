"""Records of BatchNormalization as files of every opset and dtype write it, and the names of their layers."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

import bntools
from bntools import BntoolsError
from bntools.backends.onnx.document import opened
from bntools.backends.onnx.tracing import SCOPES

NAMES = ("bn.weight", "bn.bias", "bn.running_mean", "bn.running_var")


def model(opset=17, dtype=np.float32, names=NAMES, node="node", before=(), **attributes):
    """A BatchNormalization of four channels whose constants are 1..4, 2..5, 3..6 and 4..7."""
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made = {output for one in before for output in one.output}
    graph = helper.make_graph(
        [*before, helper.make_node("BatchNormalization", ["x", *names], ["y"], name=node, **attributes)],
        "one layer",
        [helper.make_tensor_value_info("x", kind, ["N", 4, 8, 8])],
        [helper.make_tensor_value_info("y", kind, ["N", 4, 8, 8])],
        [
            numpy_helper.from_array(np.arange(first, first + 4).astype(dtype), name)
            for first, name in enumerate(names, 1)
            if name not in made
        ],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize(
    "dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64], ids=lambda one: one.__name__
)
def test_dtypes(dtype):
    """What is stored in any floating dtype is read as it is, and the record says which dtype that was."""
    (layer,) = bntools.inspect(model(dtype=dtype, epsilon=0.5, momentum=0.75))
    assert (layer.name, layer.features, layer.axis, layer.dtype) == ("bn", 4, 1, np.dtype(dtype).name)
    assert (layer.eps, layer.momentum) == (0.5, 0.75)
    for first, values in enumerate((layer.scale, layer.shift, layer.mean, layer.var), 1):
        assert np.array_equal(values, np.arange(first, first + 4))


@pytest.mark.parametrize(
    ("opset", "attributes", "problem"),
    [
        (1, {"consumed_inputs": [0, 0, 0, 1, 1], "is_test": 1}, ""),
        (1, {"consumed_inputs": [0, 0, 0, 1, 1]}, "training mode"),
        (6, {"is_test": 1, "spatial": 1}, ""),
        (6, {}, "training mode"),
        (7, {"spatial": 0}, "statistics per element (spatial=0)"),
        (7, {"spatial": 1}, ""),
        (9, {}, ""),
        (14, {"training_mode": 0}, ""),
        (15, {"training_mode": 1}, "training mode"),
    ],
)
def test_attributes_of_every_opset(opset, attributes, problem):
    """What an opset calls training, and statistics per element, are problems of the layer; nothing else is."""
    (layer,) = bntools.inspect(model(opset, **attributes))
    assert [problem in one for one in layer.problems] == [True] * bool(problem)
    assert np.array_equal(layer.mean, [3, 4, 5, 6])


@pytest.mark.parametrize(
    ("names", "node", "scope", "expected"),
    [
        (NAMES, "node", "['', 'stem', 'stem.norm', 'batch_norm']", "bn"),
        (("a/gamma", "a/beta", "a/mean", "a/var"), "node", "", "a"),
        (("w", "b", "m", "v"), "node", "['', 'stem', 'stem.norm', 'batch_norm']", "stem.norm"),
        (("w", "b", "m", "v"), "/stem/stem.norm/BatchNormalization", "", "stem.norm"),
        (("w", "b", "m", "v"), "node", "", "node"),
        (("w", "b", "m", "v"), "", "", "y"),
    ],
)
def test_names(names, node, scope, expected):
    """A layer is called by its constants, else by its module, else by its node, else by its output."""
    made = model(names=names, node=node)
    if scope:
        made.graph.node[0].metadata_props.add(key=SCOPES, value=scope)
    assert [layer.name for layer in bntools.inspect(made)] == [expected]


GROWING = {
    "ConstantOfShape": [[1 << 28]],
    "Expand": [[1.0], [1 << 28]],
    "Tile": [[1.0], [1 << 28]],
    "Range": [0, 1 << 28, 1],
    "Mul": [[[1.0]] * (1 << 13), [[1.0] * (1 << 13)]],
    "Gather": [[[1.0] * (1 << 13)], [0] * (1 << 13)],
    "Concat": [np.zeros(1 << 23), np.zeros(1 << 23), [0.0]],
}


@pytest.mark.parametrize("op", GROWING)
def test_constants_that_ask_for_all_of_memory(op):
    """A constant that a few bytes blow up is refused before it is computed, with the operator and the number."""
    attributes = {"axis": 0} if op == "Concat" else {}
    sources = [
        helper.make_node("Constant", [], [f"c{i}"], value=numpy_helper.from_array(np.asarray(value)))
        for i, value in enumerate(GROWING[op])
    ]
    grown = helper.make_node(op, [one.output[0] for one in sources], ["bn.running_mean"], **attributes)
    with pytest.raises(
        BntoolsError, match=rf"'bn.running_mean' cannot be computed: .*{op} would make \d+,\d+,\d+ values"
    ):
        bntools.inspect(model(before=(*sources, grown)))


def test_constants_that_only_change_their_form():
    """A large stored weight may be transposed or cast on its way to where it is read."""
    made = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[1] x) => (float[1] y) {y = Cast<to=1>(w)}'
    )
    made.graph.initializer.append(numpy_helper.from_array(np.zeros((1 << 24) + 1, np.float16), "w"))
    assert opened(made).constant("y").shape == ((1 << 24) + 1,)
