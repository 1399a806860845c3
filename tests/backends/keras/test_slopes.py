"""Leaky activations whose slope TensorFlow loses when it compiles."""

from __future__ import annotations

import keras
import numpy as np
import pytest
from keras import layers as L

import bntools


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="nothing is compiled elsewhere")
@pytest.mark.parametrize(("slope", "folded"), [(0.3, 0), (0.2, 1)])
def test_a_fold_that_predict_would_compile_wrongly_is_undone(slope, folded):
    """TensorFlow fuses convolution, sum and LeakyReLU with a slope of 0.2, once no BN stands between them."""
    keras.utils.set_random_seed(0)
    inputs = L.Input((6, 6, 4))
    y = L.BatchNormalization(name="bn")(L.Conv2D(4, 1)(inputs))
    model = keras.Model(inputs, L.LeakyReLU(slope)(L.Add()([y, inputs])))
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype(np.float32)
    result = bntools.fold(model, images)
    assert len(result.folded) == folded
    assert all("when compiled, as predict does" in reason for reason in result.kept.values())
    expected = keras.ops.convert_to_numpy(model(images, training=False))
    np.testing.assert_allclose(result.model.predict(images, verbose=0), expected, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="nothing is compiled elsewhere")
def test_what_predict_makes_of_the_model_itself_is_not_held_against_a_fold():
    """Where the model has such a sum itself, its folds stay, and a note says what was not compared."""
    keras.utils.set_random_seed(0)
    inputs = L.Input((6, 6, 4))
    y = L.BatchNormalization(name="bn")(L.Conv2D(4, 1)(inputs))
    y = L.LeakyReLU(0.3)(L.Add()([L.Conv2D(4, 1)(y), inputs]))
    images = np.random.default_rng(0).standard_normal((2, 6, 6, 4)).astype(np.float32)
    result = bntools.fold(keras.Model(inputs, y), images)
    assert result.folded == ["bn"]
    assert result.check.notes[0].startswith("the reference itself gives something else when compiled")
