"""What an ONNX file says about its inputs."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import constants, norm, small

from bntools import BntoolsError
from bntools.backends.onnx import input_channels, takes
from bntools.inputs import random


def test_sizes_that_are_free_or_fixed():
    """A fixed axis has its size, a symbolic one None; channels and layout come with them."""
    (one,) = takes(small(batch=4))
    assert (one.name, one.dtype, one.shape) == ("image", "float32", (4, 3, 8, 8))
    assert (one.batch, one.size, one.channel_axis, one.channels) == (4, (8, 8), 1, 3)
    (one,) = takes(small(height="H"))
    assert (one.batch, one.size, one.channels) == (None, None, 3)
    assert input_channels(small()) == 3


def channels_last(shape=("N", 8, 8, 2), dtype=TensorProto.UINT8):
    """Takes NHWC images of 8 bits, as files from TensorFlow do: Cast, Transpose, then Conv."""
    weight = numpy_helper.from_array(np.ones((4, 2, 3, 3), np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["image"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        norm("bn", "c", "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "last",
        [helper.make_tensor_value_info("image", dtype, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [weight, *constants("bn", 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_channels_are_found_behind_a_transpose():
    """The axis along which the first convolution sees its channels is the axis of the input's channels."""
    (one,) = takes(channels_last())
    assert (one.dtype, one.integer, one.channel_axis, one.channels, one.size) == ("uint8", True, 3, 2, (8, 8))


def test_channels_come_from_the_weight_where_the_input_is_free():
    """A free channel axis takes its size from the convolution."""
    (one,) = takes(channels_last(shape=("N", "H", "W", "C")))
    assert (one.channel_axis, one.channels, one.size) == (3, 2, None)


def test_defaults_are_no_inputs():
    """An initializer that is listed as an input has a value: callers need not give it."""
    model = small()
    model.graph.input.append(helper.make_tensor_value_info("w1", TensorProto.FLOAT, [40, 3, 3, 3]))
    assert [one.name for one in takes(model)] == ["image"]


def test_random_input():
    """Random input has the input's dtype and sizes, two samples where their number is free, and depends on the seed."""
    array = random(takes(small()), seed=1)
    assert (array.shape, array.dtype) == ((2, 3, 8, 8), np.float32)
    assert (array != random(takes(small()), seed=2)).any()
    pixels = random(takes(channels_last()), seed=1)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 200
    assert random(takes(small(batch=5)), 0, shape=(3, 9, 9)).shape == (5, 3, 9, 9)
    with pytest.raises(BntoolsError, match=r"takes any size at its input 'image' \(\?, 3, \?, 8\)"):
        random(takes(small(height="H")), seed=1)
