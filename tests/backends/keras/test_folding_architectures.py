"""Architectures of keras.applications: every BN layer that algebra allows to fold does."""

from __future__ import annotations

import keras
import numpy as np
import pytest

import bntools
from bntools.backends.keras.naming import norms

ALL = {"MobileNet": 40, "MobileNetV3Small": 32, "ResNet50V2": 32}


@pytest.mark.parametrize("name", ALL)
def test_architectures(name):
    """Fresh from Keras with random statistics, each agrees with its fold; where a layer stays, it has to."""
    size = ALL[name]
    model = getattr(keras.applications, name)(
        weights=None, input_shape=(size, size, 3), classes=5, classifier_activation=None
    )
    rng = np.random.default_rng(0)
    for layer in norms(model).values():
        layer.moving_mean.assign(rng.normal(size=layer.moving_mean.shape) * 0.1)
        layer.moving_variance.assign(rng.uniform(0.5, 1.5, layer.moving_mean.shape))
    folded = bntools.fold(model, rng.normal(size=(2, size, size, 3)).astype(np.float32))
    assert folded.check.error < 1e-5
    if name == "ResNet50V2":
        # Pre-activation: relu reads these layers, and they read what the shortcuts read too, or zeros of a padding.
        assert all("is read by" in why or "pads with 0" in why for why in folded.kept.values())
        assert len(folded.folded) == 2 * 16
    else:
        assert not folded.kept
