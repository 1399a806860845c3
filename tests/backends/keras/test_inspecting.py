"""What inspect says about the BN layers of Keras models."""

from __future__ import annotations

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import layers as L

import bntools
from bntools import BntoolsError
from bntools.backends import backend


def test_names_in_nested_models_and_wrappers():
    """Names are the paths of layer names: nested models, wrappers, shared layers under their first name."""
    shared = L.BatchNormalization(name="shared")
    inner = keras.Sequential([L.Input((4,)), shared, L.Dense(4)], name="inner")
    inputs = L.Input((3, 4))
    y = L.TimeDistributed(inner, name="steps")(inputs)
    y = L.Bidirectional(L.LSTM(2, return_sequences=True))(y)
    model = keras.Model(inputs, L.BatchNormalization(name="last")(y))
    assert [layer.name for layer in bntools.inspect(model)] == ["steps.inner.shared", "last"]


def test_equal_names_are_told_apart():
    """A model written in Python may give two layers one name: the second is called "bn (2)"."""

    class Twins(keras.Model):
        def __init__(self):
            super().__init__()
            self.parts = [L.BatchNormalization(name="bn"), L.BatchNormalization(name="bn")]

        def call(self, x):
            return self.parts[1](self.parts[0](x))

    model = Twins()
    model(np.zeros((2, 3)))
    names = [layer.name for layer in bntools.inspect(model)]
    assert names == ["bn", "bn (2)"]
    assert bntools.reset(model, layers="bn (2)") == ["bn (2)"]


def test_the_record():
    """A record has Keras's own numbers: axis, epsilon, momentum; no scale or shift where the layer has none."""
    model = keras.Sequential(
        [
            L.Input((4, 5)),
            L.BatchNormalization(axis=1, momentum=0.8, epsilon=0.01, name="a"),
            L.BatchNormalization(scale=False, name="b"),
            L.BatchNormalization(center=False, name="c"),
        ]
    )
    a, b, c = bntools.inspect(model)
    assert (a.axis, a.momentum, a.eps, a.features, a.kind) == (1, 0.8, 0.01, 4, "BatchNormalization")
    assert (b.scale is None, b.shift is None, c.scale is None, c.shift is None) == (True, False, False, True)
    a.mean[:] = 7
    assert not bntools.inspect(model)[0].mean.any()


def test_share_of_the_initial_value():
    """After five steps at momentum 0.9, 59 % of 0 and 1 are inside; after a recalibration nothing is."""
    model = keras.Sequential([L.Input((3,)), L.BatchNormalization(momentum=0.9, name="bn"), L.Dense(1)])
    model.compile(optimizer="sgd", loss="mse")
    assert bntools.inspect(model)[0].problems == [
        "never updated: the statistics still have their initial values 0 and 1"
    ]
    data = np.random.default_rng(0).standard_normal((50, 3)) * 2
    model.fit(data, np.zeros((50, 1)), batch_size=10, verbose=0)
    (layer,) = bntools.inspect(model)
    assert layer.updates == 5
    assert layer.initial_share == pytest.approx(0.9**5)
    assert layer.problems[0].startswith("59% of the initial value is still inside after 5 updates at momentum 0.9")
    assert "unless it was frozen" in layer.problems[0]  # the optimizer's counter cannot tell
    result = bntools.recalibrate(model, [data])
    assert not bntools.inspect(model)[0].problems
    result.undo()
    assert bntools.inspect(model)[0].updates == 5


def test_statistics_that_started_at_one_half():
    """Statistics with initializers of their own are recognized before and after a few steps."""
    half = keras.initializers.Constant(0.5)
    bn = L.BatchNormalization(moving_mean_initializer=half, moving_variance_initializer=half, name="bn")
    model = keras.Sequential([L.Input((3,)), bn, L.Dense(1)])
    assert "initial values 0.5 and 0.5" in bntools.inspect(model)[0].problems[0]
    model.compile(optimizer="sgd", loss="mse")
    model.fit(np.random.default_rng(0).standard_normal((30, 3)), np.zeros((30, 1)), batch_size=10, verbose=0)
    expected = "97% of the initial values 0.5 and 0.5 are still inside after 3 updates at momentum 0.99"
    assert bntools.inspect(model)[0].problems[0].startswith(expected)


@pytest.mark.parametrize("initializer", [None, lambda shape, dtype=None: keras.ops.ones(shape, dtype)])
def test_initializers_that_say_nothing_of_their_value(initializer):
    """Nothing and a function: the usual start is assumed; reset goes there."""
    model = keras.Sequential([keras.Input((3,)), L.BatchNormalization(moving_variance_initializer=initializer)])
    assert bntools.inspect(model)[0].initial == (0.0, 1.0)
    bntools.reset(model)
    np.testing.assert_array_equal(bntools.inspect(model)[0].var, 1)


def test_a_file_whose_initializer_is_none(tmp_path):
    """Is looked into like any other."""
    model = keras.Sequential([keras.Input((3,)), L.BatchNormalization(moving_variance_initializer=None)])
    model.save(tmp_path / "model.keras")
    (found,) = backend("keras").peek(str(tmp_path / "model.keras")).records
    assert found.initial == bntools.inspect(bntools.load(tmp_path / "model.keras"))[0].initial == (0.0, 1.0)


def test_training_false_does_not_hold_in_fit():
    """backbone(x, training=False) is overridden by fit: inspect says so, and freeze does what was meant."""
    model = nets.nested_net()
    (inner, head) = bntools.inspect(model)
    assert "called with training=False" not in "".join(head.problems)
    assert "the model calls it with training=False, which fit overrides" in inner.problems[0]
    model.compile(optimizer="sgd", loss="mse")
    data, labels = nets.images(16), np.zeros((16, 5))
    model.fit(data, labels, verbose=0)
    moved = bntools.inspect(model)[0].mean
    assert moved.any()
    bntools.freeze(model, layers="backbone.*")
    model.fit(data, labels, verbose=0)
    assert np.array_equal(bntools.inspect(model)[0].mean, moved)
    assert not any("training=False" in problem for problem in bntools.inspect(model)[0].problems)


def test_what_layers_do_in_training():
    """trainable decides what a layer does in fit; renorm is told; in predict all use their stored statistics."""
    model = keras.Sequential(
        [L.Input((3,)), *(L.BatchNormalization(name=name, renorm=name == "c") for name in ("a", "b", "c"))]
    )
    model.layers[0].trainable = False
    a, b, c = bntools.inspect(model)
    assert a.training == "normalizes with its stored statistics, which stay"
    assert b.training == "normalizes with each batch's statistics and moves the stored ones"
    assert "renorm" in c.training
    assert (a.stats_frozen, a.affine_frozen, b.stats_frozen, b.affine_frozen) == (True, True, False, False)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="Keras refuses the option elsewhere")
def test_synchronized_layers_are_told():
    """A layer that takes its batch statistics over all devices says so, until it is frozen."""
    model = keras.Sequential([L.Input((3,)), L.BatchNormalization(synchronized=True)])
    assert "each batch's statistics over all devices of a strategy (synchronized)" in bntools.inspect(model)[0].training
    model.layers[0].trainable = False
    assert "synchronized" not in bntools.inspect(model)[0].training


@pytest.mark.parametrize(("momentum", "said"), [(1.0, "never moves"), (0.0, "the last batch alone")])
def test_momentum_at_its_ends(momentum, said):
    """Keras's momentum is the weight of the old value: 1 never moves, 0 forgets everything."""
    model = keras.Sequential([L.Input((3,)), L.BatchNormalization(momentum=momentum)])
    assert said in bntools.inspect(model)[0].problems[0]


def test_reset():
    """Reset gives 0 and 1, agreeing renorm variables, and a counter that starts anew; frozen layers stay."""
    model = keras.Sequential(
        [L.Input((3,)), L.BatchNormalization(renorm=True, name="a"), L.BatchNormalization(name="b")]
    )
    data = np.random.default_rng(0).standard_normal((64, 3)) * 3 + 1
    bntools.recalibrate(model, [data])
    model.layers[1].trainable = False
    assert bntools.reset(model) == ["a"]
    a, b = bntools.inspect(model)
    assert (a.mean == 0).all()
    assert (a.var == 1).all()
    assert a.updates == 0
    np.testing.assert_allclose(model.layers[0].moving_stddev, 1, rtol=1e-3)  # as Keras itself starts it
    assert b.mean.any() or (b.var != 1).any()


def test_not_built():
    """A layer without variables is said to be not built; verbs that need them refuse."""
    model = keras.Sequential([L.BatchNormalization(name="bn")])
    assert bntools.inspect(model)[0].problems == ["not built yet: call the model on a batch first"]
    with pytest.raises(BntoolsError, match="never built, its layer 'bn' has no variables yet"):
        bntools.reset(model)


def test_no_bn():
    """A model without BN gives an empty list, and verbs say so."""
    model = keras.Sequential([L.Input((3,)), L.Dense(2)])
    assert bntools.inspect(model) == []
    with pytest.raises(BntoolsError, match="no BN layers"):
        bntools.recalibrate(model, [np.zeros((4, 3))])


def test_statistics_that_are_not_finite():
    """NaN in a moving variance, which Keras itself only shows as a bad validation, is a problem of the layer.

    https://github.com/keras-team/keras/issues/17204
    """
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    assert not any("NaN" in problem for problem in bntools.inspect(model)[0].problems)
    model.layers[0].moving_variance.assign([1.0, np.nan, 1.0])
    (layer,) = bntools.inspect(model)
    assert any("NaN" in problem for problem in layer.problems), layer.problems
