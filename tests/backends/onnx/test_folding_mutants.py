"""Descriptions of a graph that are wrong on purpose: a fold that rests on one must not get through."""

from __future__ import annotations

import dataclasses

import pytest
from onnx import TensorProto
from onnx_nets import IMAGE, Builder, conv, gap, run

import bntools
from bntools.backends.onnx import linear, operators


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (linear, "_padding_leak", lambda node, view: ""),
        (linear, "_transposed_leak", lambda node, view: ""),
        (operators, "_is_copy", lambda node, view: True),
        (operators, "RESHAPES", (*operators.RESHAPES, "Relu")),
    ],
)
def test_mutants_are_caught(monkeypatch, module, name, mutant):
    """A description that calls something legal which is not does not get past the comparison that ends every fold."""
    b = Builder()
    y = b.bn(b.op("Relu", conv(b)), 4, "relu")
    y = b.op("Relu", b.bn(b.op("Relu", conv(b, y, 4)), 4, "before"))
    y = b.bn(y, 4, "padded")
    y = b.bn(b.op("Relu", conv(b, y, 4, pads=[1, 1, 1, 1])), 4, "transposed")
    y = b.op("ConvTranspose", y, b.const(b.draw(4, 3, 2, 2)), strides=[1, 2])
    y = b.bn(b.op("Cast", b.op("Cast", y, to=TensorProto.INT32), to=TensorProto.FLOAT), 3, "rounded")
    y = b.bn(b.op("Add", y, b.const(b.draw(3, 1, 1))), 3, "biased")
    model = b.model([y])
    before = bntools.fold(model, IMAGE)
    monkeypatch.setattr(module, name, mutant)
    folded = bntools.fold(model, IMAGE)
    assert gap(run(model, IMAGE), run(folded.model, IMAGE)) < 1e-4
    assert [name for name in folded.kept if "undone" in folded.kept[name]], before.kept


def test_a_wrong_axis_is_caught(monkeypatch):
    """A transposed convolution folded along the wrong axis of its weight is undone, and reported."""
    right = linear._convolution

    def wrong(node, view):
        found = right(node, view)
        return dataclasses.replace(found, op=dataclasses.replace(found.op, out_axis=0, in_axis=1))

    b = Builder()
    model = b.model([b.bn(b.op("ConvTranspose", "x", b.const(b.draw(3, 3, 2, 2))), 3, "bn")])
    assert bntools.fold(model, IMAGE).folded == ["bn"]
    monkeypatch.setattr(linear, "_convolution", wrong)
    assert bntools.fold(model, IMAGE).kept["bn"].startswith("undone")
