"""Small Keras networks as people write them, and data for them."""

from __future__ import annotations

import keras
import numpy as np
from keras import layers as L


def images(samples: int = 64, size: int = 12, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random images of shape (samples, size, size, channels), far from mean 0 and variance 1."""
    return (np.random.default_rng(seed).standard_normal((samples, size, size, channels)) * 3 + 2).astype(np.float32)


def cut(array: np.ndarray, size: int) -> list[np.ndarray]:
    """The array in batches of this size, the last one smaller."""
    return [array[i : i + size] for i in range(0, len(array), size)]


def residual_net() -> keras.Model:
    """Convolutions with a shortcut, and a dense head, each with BN."""
    inputs = L.Input((12, 12, 3))
    y = L.ReLU()(L.BatchNormalization(name="bn1")(L.Conv2D(6, 3, use_bias=False)(inputs)))
    z = L.BatchNormalization(name="bn2", momentum=0.9)(L.Conv2D(6, 3, padding="same")(y))
    y = L.GlobalAveragePooling2D()(L.Add()([y, z]))
    y = L.BatchNormalization(name="bn3", scale=False)(L.Dense(5)(y))
    return keras.Model(inputs, L.Dense(3)(y), name="residual_net")


def nested_net() -> keras.Model:
    """A backbone called with training=False, as transfer learning is taught, under a head of its own."""
    backbone = keras.Sequential(
        [L.Input((12, 12, 3)), L.Conv2D(4, 3), L.BatchNormalization(name="bn"), L.ReLU()], name="backbone"
    )
    inputs = L.Input((12, 12, 3))
    y = L.GlobalAveragePooling2D()(backbone(inputs, training=False))
    return keras.Model(inputs, L.BatchNormalization(name="head_bn", center=False)(L.Dense(5)(y)), name="nested_net")


class Written(keras.Model):
    """A model written in Python, which keeps a value on itself and drops out."""

    def __init__(self):
        super().__init__(name="written")
        self.conv, self.bn1 = L.Conv2D(4, 3), L.BatchNormalization(name="bn1")
        self.dense, self.bn2 = L.Dense(3), L.BatchNormalization(name="bn2")
        self.dropout = L.Dropout(0.5)

    def call(self, x, training=None):
        self.kept = self.bn1(self.conv(x), training=training)
        y = self.dense(keras.ops.mean(self.kept, (1, 2)))
        return self.bn2(self.dropout(y, training=training), training=training) + keras.ops.mean(self.kept)


def written() -> keras.Model:
    """Such a model, built."""
    model = Written()
    model(images(2))
    return model


def stats(model: keras.Model) -> np.ndarray:
    """All statistics of a model in one array."""
    norms = [layer for layer in model._flatten_layers() if isinstance(layer, L.BatchNormalization)]
    return np.concatenate([np.concatenate([n.moving_mean.numpy(), n.moving_variance.numpy()]) for n in norms])
