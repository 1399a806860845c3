"""Descriptions of a Keras graph that are wrong on purpose: a fold that rests on one must not get through."""

from __future__ import annotations

import dataclasses

import keras
import pytest
from keras import layers as L
from keras_folding import batch, doubled, folds, outputs, randomized

import bntools
from bntools.backends.keras import describing, linear, operators, structure
from bntools.graph import Identity, Reshape


@pytest.fixture(autouse=True)
def _float64():
    with doubled():
        yield


def net() -> keras.Model:
    """BN layers of which none can be folded, each for another reason."""
    x = keras.Input((8, 8, 3))
    y = L.BatchNormalization(name="inside")(L.Conv2D(4, 3, activation="tanh")(x))
    y = L.BatchNormalization(name="behind")(L.ReLU()(y))
    y = L.ReLU()(L.Conv2D(4, 3, padding="same")(y))
    y = L.Conv2DTranspose(4, 2, strides=2)(L.BatchNormalization(name="before")(y))
    y = L.Activation("tanh")(y)
    y = L.Dense(3)(L.Flatten()(L.ZeroPadding2D(1)(L.BatchNormalization(name="padded")(y))))
    return randomized(keras.Model(x, y), positive=True)


@pytest.mark.parametrize(
    ("module", "name", "mutant"),
    [
        (linear, "_pads", lambda called, spatial: False),
        (linear, "activation_parts", lambda called: []),
        (linear, "_UNEVEN", ""),
        (operators, "_padding", lambda called: operators.chain(called, Identity())),
        (operators, "_KINDS", {**operators._KINDS, "ReLU": lambda called: operators.chain(called, Reshape())}),
    ],
)
def test_mutants_are_caught(monkeypatch, module, name, mutant):
    """A description that calls something legal which is not does not get past the comparison that ends every fold."""
    model, x = net(), batch(2, 8, 8, 3)
    assert sorted(folds(model, x).kept) == ["before", "behind", "inside", "padded"]
    monkeypatch.setattr(module, name, mutant)
    if name == "_padding":
        monkeypatch.setitem(operators._KINDS, "ZeroPadding2D", mutant)
    folded = bntools.fold(model, x)
    assert abs(outputs(folded.model, x)[0] - outputs(model, x)[0]).max() < 1e-4
    assert [name for name in folded.kept if "undone" in folded.kept[name]]


@pytest.mark.parametrize("kind", ["_transposed", "_depthwise", "_convolution"])
def test_a_wrong_axis_is_caught(monkeypatch, kind):
    """A kernel that is folded along the wrong one of its axes is undone, and reported."""
    make = {"_transposed": L.Conv2DTranspose(3, 2), "_convolution": L.Conv2D(3, 2), "_depthwise": L.DepthwiseConv2D(2)}
    name = next(name for name, describe in linear._KINDS.items() if describe is getattr(linear, kind) and "2D" in name)
    right = linear._KINDS[name]

    def wrong(called):
        parts = right(called)
        swapped = {"out_axis": parts[0].op.in_axis, "in_axis": parts[0].op.out_axis, "groups": 1}
        if kind == "_depthwise":
            swapped = {"out_axis": 0}
        return [dataclasses.replace(parts[0], op=dataclasses.replace(parts[0].op, **swapped)), *parts[1:]]

    x = keras.Input((4, 4, 3))
    model = randomized(keras.Model(x, L.BatchNormalization(name="bn")(make[kind](x))))
    assert folds(model, batch(2, 4, 4, 3)).folded == ["bn"]
    monkeypatch.setitem(linear._KINDS, name, wrong)
    try:
        kept = bntools.fold(model, batch(2, 4, 4, 3)).kept
    except ValueError:
        return  # the shapes do not even fit
    assert kept["bn"].startswith("undone")


def test_a_subclass_taken_for_its_parent_is_caught(monkeypatch):
    """A convolution with code of its own that is taken for a plain one does not get through."""

    class Doubled(L.Conv2D):
        def call(self, x):
            return keras.ops.tanh(super().call(x))

    x = keras.Input((6, 6, 3))
    model = randomized(keras.Model(x, L.BatchNormalization(name="bn")(Doubled(3, 2, name="odd")(x))))
    kept = folds(model, batch(2, 6, 6, 3)).kept
    assert kept["bn"].startswith("cannot go back: Doubled 'odd' stands between it and")
    real = structure.stock
    monkeypatch.setattr(describing, "stock", lambda layer: "Conv2D" if isinstance(layer, Doubled) else real(layer))
    assert bntools.fold(model, batch(2, 6, 6, 3)).kept["bn"].startswith("undone")
