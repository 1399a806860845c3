"""Recalibration of a Keras model against ``predict`` and against one epoch of statistics-only training."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measure import Row, at_most, medians

import bntools

SAMPLES = 256
RATIO = "{:.2f} x"


def rows() -> Iterator[Row]:
    """ResNet-50 of keras.applications, images of 128 pixels, micro-batches of 16 and 64."""
    keras.utils.set_random_seed(0)
    model = keras.applications.ResNet50(weights=None, input_shape=(128, 128, 3))
    images = np.random.default_rng(0).standard_normal((SAMPLES, 128, 128, 3)).astype(np.float32)
    for size in (16, 64):
        yield from _at(model, images, size)


def _at(model: keras.Model, images: np.ndarray, size: int) -> Iterator[Row]:
    batches = np.split(images, len(images) // size)
    tensors = [tf.constant(batch) for batch in batches]

    @tf.function
    def step(batch):
        """What recipes for BN statistics in Keras do: forward passes with training=True."""
        model(batch, training=True)

    times = medians(
        {
            "exact": lambda: bntools.recalibrate(model, batches, check=False),
            "predict": lambda: model.predict(images, batch_size=size, verbose=0),
            "epoch": lambda: [step(batch) for batch in tensors],
        },
        rounds=7,
    )
    what = f"Keras, ResNet-50, {SAMPLES} images of 128 px, micro-batch {size}: exact recalibration"
    rate = f"{SAMPLES / times['predict']:.0f}/s"
    yield at_most(f"{what} / model.predict ({rate})", times["exact"] / times["predict"], 1.25, RATIO)
    yield at_most(f"{what} / an epoch of training the statistics alone", times["exact"] / times["epoch"], 1.0, RATIO)
