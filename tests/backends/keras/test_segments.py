"""Segments that were compiled for one verb serve the next, as long as the model is what it was."""

from __future__ import annotations

import gc
import weakref

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import layers as L

import bntools
from bntools.backends.keras import feeding, segments

COMPILED = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="nothing is compiled elsewhere")


@pytest.fixture(autouse=True)
def traced_at_once(monkeypatch):
    """Each batch is a replica of its own, and compiled from the first on."""
    monkeypatch.setattr(segments, "TRACE_AFTER", 0)
    monkeypatch.setattr(feeding, "TOGETHER", 1)


@pytest.fixture
def tracings(monkeypatch):
    """How many segments were traced so far."""
    count = []
    trace = segments._function
    monkeypatch.setattr(segments, "_function", lambda *given: count.append(1) or trace(*given))
    return count


@COMPILED
def test_a_second_recalibration_traces_nothing_and_gives_the_same(tracings):
    """Between epochs of a fit nothing is compiled again; the weights and statistics are read as they are then."""
    model, batches = nets.residual_net(), nets.cut(nets.images(24), 8)
    bntools.recalibrate(model, batches)
    first, traced = nets.stats(model), len(tracings)
    bntools.reset(model)
    bntools.recalibrate(model, batches)
    assert traced
    assert len(tracings) == traced
    np.testing.assert_array_equal(nets.stats(model), first)
    kernel = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D)).kernel
    kernel.assign(kernel * 2)
    assert bntools.recalibrate(model, batches).residual < 1e-5
    assert len(tracings) == traced
    assert np.max(np.abs(nets.stats(model) - first)) > 0.1


def test_fit_and_predict_leave_what_was_compiled(tracings):
    """They set nothing in the layers that a forward pass reads."""
    model, images = nets.residual_net(), nets.images(24)
    bntools.recalibrate(model, nets.cut(images, 8))
    traced = len(tracings)
    model.predict(images, verbose=0)
    model.compile("sgd", "mse")
    model.fit(images, np.zeros((24, *model.output_shape[1:])), verbose=0)
    bntools.recalibrate(model, nets.cut(images, 8))
    assert len(tracings) == traced


@pytest.mark.parametrize("change", ["epsilon", "activation"])
def test_what_was_compiled_is_dropped_with_a_layers_attributes(change):
    """A stale function would give the old network's statistics, and the residual, measured with it, would not tell."""
    model, batches = nets.residual_net(), nets.cut(nets.images(24), 8)
    bntools.recalibrate(model, batches)
    conv = next(layer for layer in model.layers if isinstance(layer, keras.layers.Conv2D))
    if change == "epsilon":
        next(layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)).epsilon = 0.5
    else:
        conv.activation = keras.activations.tanh
    bntools.recalibrate(model, batches)
    found = nets.stats(model)
    segments._traced.clear()
    bntools.recalibrate(model, batches)
    np.testing.assert_allclose(found, nets.stats(model), rtol=1e-5, atol=1e-6)


@COMPILED
def test_no_more_shapes_are_compiled_than_a_few(tracings):
    """Data of ever new sizes runs eagerly instead of filling memory with functions."""
    model = nets.residual_net()
    images = nets.images(66)
    batches = [images[i * (i - 1) // 2 : i * (i + 1) // 2] for i in range(1, 12)]
    bntools.recalibrate(model, batches, memory=1)
    count = max(len(one.functions) for kept in segments._traced.values() for s in kept.segments.values() for one in s)
    assert count <= segments.SHAPES
    assert tracings


def test_a_model_that_is_gone_takes_its_segments_along():
    """What is kept of a model does not keep the model."""
    model = nets.residual_net()
    bntools.recalibrate(model, nets.cut(nets.images(24), 8))
    gone, number = weakref.ref(model), len(segments._traced)
    del model
    gc.collect()
    assert gone() is None
    assert len(segments._traced) < number


@COMPILED
@pytest.mark.parametrize("slope", [0.0, 0.2, 0.3])
def test_a_slope_that_a_compiled_sum_would_lose_is_kept(slope):
    """TensorFlow's oneDNN fusion of convolution, sum and LeakyReLU takes a slope of 0.2; Keras run eagerly does not."""
    keras.utils.set_random_seed(0)
    inputs = L.Input((6, 6, 4))
    y = L.BatchNormalization()(inputs)
    y = L.LeakyReLU(slope)(L.Add()([L.Conv2D(4, 1)(y), y]))
    model = keras.Model(inputs, L.BatchNormalization(name="last")(y))
    images = nets.images(8, 6, 4)
    bntools.recalibrate(model, nets.cut(images, 4))
    seen = keras.ops.convert_to_numpy(keras.Model(inputs, y)(images, training=False))
    np.testing.assert_allclose(bntools.inspect(model)[1].mean, seen.mean((0, 1, 2)), atol=1e-5)
