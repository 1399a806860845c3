"""What every test of the Keras back end needs: a quiet TensorFlow, and the same random weights each time."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import pytest


@pytest.fixture(autouse=True, scope="session")
def _frozen_heap():
    """TensorFlow's million objects stay, and are not looked through by every collection of the tests to come."""
    import keras  # noqa: F401 - what it imports is what is frozen

    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed():
    import keras

    keras.utils.set_random_seed(0)
