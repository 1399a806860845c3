"""ONNX files that ask for what no file should: memory by constants, and other files by the places of weights."""

from __future__ import annotations

import os

import memory_bound
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import small

import bntools
from bntools import BntoolsError

LIMIT_BYTES = 512 << 20


@pytest.fixture(autouse=True)
def _bounded():
    """No file here takes memory that it does not hold."""
    with memory_bound.at_most(LIMIT_BYTES):
        yield


def computed(nodes, count: int, *constants) -> onnx.ModelProto:
    """A graph of so many BN layers, whose constants are all the value ``c``."""
    norms = [helper.make_node("BatchNormalization", ["x", *"cccc"], [f"y{n}"], name=f"bn{n}") for n in range(count)]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", "C"]) for name in ("x", "y0")]
    return helper.make_model(helper.make_graph([*nodes, *norms], "g", value[:1], value[1:], list(constants)))


def read(path, model) -> None:
    """Write a model without any check, and look at its layers as inspect does, and as a caller of load."""
    path.write_bytes(model.SerializeToString())
    bntools.inspect(path)
    bntools.inspect(bntools.load(path))


def number(value: int) -> onnx.TensorProto:
    """The initializer n: one whole number."""
    return numpy_helper.from_array(np.array([value], np.int64), "n")


def test_many_layers_of_one_constant(tmp_path):
    """Hundreds of layers that share a constant of millions, which a few bytes make, are refused, not written out."""
    for shape in (1 << 22, 1 << 18):
        made = helper.make_node("ConstantOfShape", ["n"], ["c"])
        with pytest.raises(BntoolsError, match="channels in all"):
            read(tmp_path / "model.onnx", computed([made], 300, number(shape)))


MADE = {
    "a constant of a terabyte": [helper.make_node("ConstantOfShape", ["n"], ["c"])],
    "an expansion": [helper.make_node("Cast", ["n"], ["f"], to=1), helper.make_node("Expand", ["f", "n"], ["c"])],
    "a tiling": [helper.make_node("Cast", ["n"], ["f"], to=1), helper.make_node("Tile", ["f", "n"], ["c"])],
}


@pytest.mark.parametrize("kind", MADE)
def test_constants_that_a_few_bytes_make(tmp_path, kind):
    """A constant far larger than what it is made of is not computed."""
    with pytest.raises(BntoolsError, match="are the most"):
        read(tmp_path / "model.onnx", computed(MADE[kind], 1, number(1 << 40)))


def test_a_tensor_of_a_terabyte(tmp_path):
    """A shape is checked against the bytes that are there, in each field that can hold them."""
    for fields in ({"raw_data": b"abcd"}, {"float_data": [1.0]}, {}):
        model = small()
        changed = next(one for one in model.graph.initializer if one.name == "bn1.running_mean")
        changed.CopyFrom(TensorProto(name=changed.name, data_type=1, dims=[1 << 40], **fields))
        with pytest.raises(BntoolsError, match="running_mean"):
            read(tmp_path / "model.onnx", model)


@pytest.mark.parametrize("place", ["/dev/zero", "pipe", "link", "folder", "../outside.bin", "a/../../outside.bin"])
def test_weights_in_places_that_are_no_files(tmp_path, place):
    """Devices, pipes, folders, and what leads to them or out of the folder hold no weights."""
    (tmp_path / "in" / "folder").mkdir(parents=True)
    (tmp_path / "outside.bin").write_bytes(bytes(1024))
    os.mkfifo(tmp_path / "in" / "pipe")
    (tmp_path / "in" / "link").symlink_to("/dev/zero")
    model = small()
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=place)
    with pytest.raises(BntoolsError, match="weights of 'w1'"):
        read(tmp_path / "in" / "model.onnx", model)
