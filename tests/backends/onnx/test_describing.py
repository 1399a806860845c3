"""Which BN layers of an ONNX graph can be folded and why others cannot, case by case."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper
from onnx_nets import IMAGE, Builder, conv, example, folds, ops

import bntools
from bntools import BntoolsError
from bntools.backends.onnx import describing
from bntools.graph import Identity


def test_a_nonlinearity_is_named():
    """A BN behind Conv and ReLU and before a padded Conv is kept, with operator and node of what is in the way."""
    b = Builder()
    x = b.op("Relu", conv(b, name="conv1"), name="relu1")
    y = conv(b, b.bn(x, 4, "bn"), 4, name="conv2", pads=[1, 1, 1, 1])
    assert folds(b.model([y])).kept == {
        "bn": "cannot go back: Relu 'relu1' stands between it and Conv 'conv1'; "
        "cannot go forward: Conv 'conv2' pads with zeros, which a shift would change"
    }


@pytest.mark.parametrize(
    ("options", "folded"),
    [
        ({"auto_pad": "SAME_UPPER"}, 0),
        ({"auto_pad": "VALID"}, 1),
        ({"pads": [0, 1, 0, 0]}, 0),
        ({"dilations": [2, 2]}, 1),
    ],
)
def test_zero_padding_stops_a_shift_on_its_way_forward(options, folded):
    """BN goes into the convolution behind it exactly where that pads with nothing."""
    b = Builder()
    y = conv(b, b.bn(b.op("Relu", "x"), 3), **options)
    assert len(folds(b.model([y])).folded) == folded


@pytest.mark.parametrize("options", [{}, {"strides": [2, 2]}, {"pads": [1, 1, 1, 1]}, {"output_padding": [1, 0]}])
def test_a_transposed_convolution_with_taps_takes_no_shift_in(options):
    """BN before a ConvTranspose stays: its outputs sum different numbers of taps."""
    b = Builder()
    options = {"strides": [2, 2], **options} if "output_padding" in options else options
    y = b.op("ConvTranspose", b.bn(b.op("Relu", "x"), 3), b.const(b.draw(3, 4, 2, 2)), **options)
    (reason,) = folds(b.model([y])).kept.values()
    assert "gives its outputs from different numbers of inputs" in reason


def test_one_weight_with_two_layers():
    """A weight that two convolutions share, each with a BN of its own, is parted; the BNs' shared shift is too."""
    b = Builder()
    weight, shift = b.const(b.draw(3, 3, 1, 1), "w"), b.const(b.draw(3), "shift")
    first = b.bn(b.op("Conv", "x", weight), 3, "one")
    second = b.bn(b.op("Conv", b.op("Relu", first), weight), 3, "two")
    for node in b.nodes:
        if node.op_type == "BatchNormalization":
            node.input[2] = shift
    folded = folds(b.model([second]))
    assert ops(folded.model) == ["Conv", "Relu", "Conv"]
    names = [tensor.name for tensor in folded.model.graph.initializer]
    assert len(names) == 4
    assert shift not in names


def test_a_weight_that_keeps_another_use_stays_for_it():
    """Where one user of a weight changes, the other still reads the weight as it was, under its name."""
    b = Builder()
    weight = b.const(b.draw(3, 3, 1, 1), "w")
    plain = b.op("Conv", "x", weight, name="plain")
    model = b.model([b.bn(b.op("Conv", "x", weight, name="changed"), 3), plain])
    reads = {node.name: node.input[1] for node in folds(model).model.graph.node}
    assert reads == {"plain": "w", "changed": "w_folded"}


def test_equal_copies_of_a_weight_are_one():
    """Two convolutions that share their weight and read like BNs share the new weight as well."""
    b = Builder()
    weight = b.const(b.draw(3, 3, 1, 1), "w")
    outputs = [b.bn(b.op("Conv", x, weight), 3, f"bn{i}") for i, x in enumerate(["x", b.op("Relu", "x")])]
    for node in b.nodes[-1:]:
        node.input[1:] = b.nodes[-3 if b.nodes[-3].op_type == "BatchNormalization" else -4].input[1:]
    model = b.model(outputs)
    del model.graph.initializer[len(model.graph.initializer) - 4 :]
    folded = folds(model)
    assert len({node.input[1] for node in folded.model.graph.node if node.op_type == "Conv"}) == 1


def test_dense_along_the_length_is_no_dense_along_the_channels():
    """A BN over the channels of (N, C, L) is not folded into a MatMul over L, although C and L are equal."""
    b = Builder()
    y = b.bn(b.op("MatMul", "x", b.const(b.draw(4, 4))), 4, "bn")
    kept = folds(b.model([y], (2, 4, 4)), example(2, 4, 4)).kept
    assert "has its channels on axis 2, the layer on axis 1" in kept["bn"]


def test_outputs_of_the_graph_keep_their_names():
    """An output that a folded BN gave is there under its name; a BN that reads an output of the graph is kept."""
    b = Builder()
    first = b.bn(conv(b), 4, "one")
    left, right = b.bn(conv(b, name="both"), 4, "two"), conv(b, name="seen")
    kept = b.bn(right, 4, "three")
    folded = folds(b.model([first, left, right, kept]))
    assert folded.folded == ["one", "two"]
    assert folded.kept["three"].startswith("cannot go back: the output of Conv 'seen' is an output of the model")


def two_on_one(alike: bool) -> onnx.ModelProto:
    """A convolution whose output two BNs read; ``alike``, with one set of constants. Both give outputs of the model."""
    b = Builder()
    y = conv(b)
    first, second = b.bn(y, 4, "one"), b.bn(y, 4, "two")
    if alike:
        b.nodes[-1].input[1:] = b.nodes[-2].input[1:]
    model = b.model([first, second])
    if alike:
        del model.graph.initializer[5:]
    return model


def test_two_layers_on_one_convolution():
    """Two BNs that read one convolution are kept, each naming the other; where they are alike they fold together."""
    kept = folds(two_on_one(alike=False)).kept
    assert "BatchNormalization 'one_out' and BatchNormalization 'two_out'" in kept["one"]
    assert "BatchNormalization 'one_out' and BatchNormalization 'two_out'" in kept["two"]
    assert folds(two_on_one(alike=True)).folded == ["one_out", "two_out"]


@pytest.mark.parametrize("extra", [1, 3])
def test_training_mode_is_refused(extra):
    """A BN with training_mode=1, its extra outputs there or not, is nothing to fold: the graph says why."""
    b = Builder()
    b.bn(conv(b), 4, "bn")
    b.nodes[-1].attribute.append(helper.make_attribute("training_mode", 1))
    b.nodes[-1].output.extend(["mean", "var"][: extra - 1])
    model = b.model(["bn_out"], strict=False)
    if extra == 3:  # with fewer outputs ONNX Runtime does not run it
        assert describing.graph(model, IMAGE).fixed["bn"].startswith("it is in training mode")
    with pytest.raises(BntoolsError, match="training mode"):
        bntools.fold(model, IMAGE)


@pytest.mark.parametrize("place", [1, 3])
def test_statistics_that_are_no_constants(place):
    """A BN one of whose arrays is an input of the graph, or computed from one, is kept with that reason."""
    for computed in (False, True):
        b = Builder()
        b.bn(conv(b), 4, "bn")
        b.nodes[-1].input[place] = "given"
        if computed:
            b.nodes.insert(0, helper.make_node("Relu", ["given"], ["positive"]))
            b.nodes[-1].input[place] = "positive"
        model = b.model(["bn_out"], given=(4,))
        batch = {"x": IMAGE, "given": np.arange(1, 5, dtype=np.float32)}
        (kept,) = bntools.fold(model, batch).kept.values()
        assert ("computed in the graph" if computed else "an input of the graph") in kept


def test_an_initializer_that_callers_may_replace_is_no_constant():
    """A weight that is an input of the graph as well is not rewritten: whoever runs the model may give another."""
    b = Builder()
    y = b.bn(b.op("Conv", "x", b.const(b.draw(4, 3, 3, 3), "w")), 4, "bn")
    model = b.model([y])
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, (4, 3, 3, 3)))
    assert "its weight is an input of the graph" in bntools.fold(model, IMAGE).kept["bn"]


def test_a_computed_weight_or_bias_is_named():
    """A convolution whose weight or bias the graph computes from its input is named with what computes it."""
    for place in (1, 2):
        b = Builder()
        arrays = [b.const(b.draw(4, 3, 3, 3)), b.const(b.draw(4))]
        arrays[place - 1] = b.op("Add", arrays[place - 1], b.axes("ReduceMean", "x", [0, 1, 2, 3], keepdims=0))
        y = b.bn(b.op("Conv", "x", *arrays), 4, "bn")
        what = ("weight", "bias")[place - 1]
        assert f"its {what} is computed in the graph by Add" in folds(b.model([y])).kept["bn"]


def test_what_an_exporter_left_to_be_computed_from_constants():
    """A bias that is expanded from a zero of the input's type to the weight's first axis is a constant."""
    b = Builder(18)
    weight, one = b.const(b.draw(4, 3, 3, 3)), b.const(np.array([1], np.int64))
    zero = b.op("CastLike", b.const(np.zeros(1)), "x")
    size = b.op("Expand", b.op("Shape", weight, start=0, end=1), one)
    y = b.bn(b.op("Conv", "x", weight, b.op("Expand", zero, size)), 4)
    folded = folds(b.model([y]))
    assert ops(folded.model) == ["Conv"]


def test_reading_a_shape_is_not_reading_a_value():
    """A Shape node beside the BN does not keep it: a view to a computed shape is no obstacle."""
    b = Builder()
    y = conv(b)
    rows = b.op("Slice", b.op("Shape", y), *(b.const(np.array([i], np.int64)) for i in (0, 1)))
    shape = b.op("Concat", rows, b.const(np.array([-1], np.int64)), axis=0)
    y = b.bn(y, 4)
    z = b.op("Gemm", b.op("Reshape", y, shape), b.const(b.draw(100, 5)))
    folded = folds(b.model([b.bn(z, 5)]))
    assert len(folded.folded) == 2


def test_a_negative_scale_before_max_pooling():
    """Max-pooling lets only scales pass that are not negative, and says which channel has one."""
    b = Builder()
    y = b.op("MaxPool", conv(b), kernel_shape=[2, 2], name="pool1")
    y = b.op("Add", y, b.const(b.draw(4, 1, 1)))
    folded = folds(b.model([b.bn(y, 4, "bn", positive=False)]))
    assert "MaxPool 'pool1' needs a scale that is not negative, and channel " in folded.kept["bn"]


def test_a_factor_of_zero():
    """A shift has no counterpart before a multiplication with 0, and the reason says so; without a shift it has."""
    b = Builder()
    y = b.bn(b.op("Mul", conv(b), b.const(np.array([[[1.0]], [[0]], [[2]], [[3]]], np.float32)), name="mul1"), 4, "bn")
    assert "Mul 'mul1' multiplies with 0" in folds(b.model([y])).kept["bn"]
    b.initializers = [one for one in b.initializers if one.name not in ("bn.bias", "bn.running_mean")]
    for part in ("bias", "running_mean"):
        b.const(np.zeros(4, np.float32), f"bn.{part}")
    assert folds(b.model([y])).folded == ["bn"]


def test_padding_between_that_the_layer_would_change():
    """A Pad with zeros between Conv and BN keeps it, also where an exporter left the pads to be computed."""
    for computed in (False, True):
        b = Builder()
        pads = b.const(np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64))
        if computed:
            one = b.op(
                "Cast", b.op("Sign", b.op("Cast", b.op("Size", "x"), to=TensorProto.FLOAT)), to=TensorProto.INT64
            )
            pads = b.op("Mul", pads, one)
        y = b.bn(b.op("Pad", conv(b), pads, name="pad1"), 4, "bn")
        assert "Pad 'pad1' pads with 0, which the layer would change" in folds(b.model([y])).kept["bn"]


def test_an_example_that_does_not_fit():
    """A batch of another shape than the input's is refused with both shapes, and the model stays as it was."""
    b = Builder()
    model = b.model([b.bn(conv(b), 4)])
    before = model.SerializeToString()
    with pytest.raises(BntoolsError, match=r"takes the shape \(n, 3, 7, 7\), but the batch has \(2, 4, 7, 7\)"):
        bntools.fold(model, example(2, 4, 7, 7))
    assert model.SerializeToString() == before


def test_identity_is_an_operation():
    """The neutral graph of a chain holds one node for each operator, with the shapes of the run."""
    b = Builder()
    model = b.model([b.op("Identity", b.bn(conv(b), 4, "bn"))])
    graph = describing.graph(model, IMAGE)
    assert [type(node.op).__name__ for node in graph.nodes] == ["Linear", "Norm", "Identity"]
    assert isinstance(graph.nodes[-1].op, Identity)
    assert [graph.shapes[node.outputs[0]] for node in graph.nodes] == [(2, 4, 5, 5)] * 3
