"""Model files looked into without Keras: the same records as from the loaded model."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import keras
import numpy as np
import pytest

import bntools
from bntools import files
from bntools.backends.keras.archive import Archive, peek
from bntools.backends.keras.found import write
from bntools.layer import BatchNorm

BN = keras.layers.BatchNormalization
ON_TENSORFLOW = keras.backend.backend() == "tensorflow"  # elsewhere Keras refuses synchronized=True


def nested() -> keras.Model:
    """BN in models in models, called twice, with training=False, and frozen."""
    inner = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.Conv2D(3, 1), BN(name="bn")], name="inner")
    inputs = keras.Input((4, 4, 3))
    middle = keras.Model(inputs, BN(name="after", trainable=False)(inner(inputs, training=False)), name="middle")
    x = keras.Input((4, 4, 3))
    shared = BN(name="shared", momentum=0.5, epsilon=1e-4, gamma_initializer="zeros")
    y = middle(shared(x)) + shared(BN(name="bn", axis=1)(x), training=False)
    return keras.Model(x, keras.layers.Add()([y * 2.0, x]))


def wrapped() -> keras.Model:
    """BN in a wrapper, beside a Bidirectional without any, and several of one class."""
    x = inputs = keras.Input((5, 6))
    x = keras.layers.Bidirectional(keras.layers.LSTM(3, return_sequences=True))(x)
    x = keras.layers.TimeDistributed(BN(name="each", scale=False, center=False), name="rows")(x)
    x = BN(center=False, moving_mean_initializer=keras.initializers.Constant(0.5))(x)
    return keras.Model(inputs, BN(renorm=True, momentum=1.0)(BN(scale=False, synchronized=ON_TENSORFLOW)(x)))


def sequential() -> keras.Model:
    """A Sequential that was frozen as a whole, in half precision."""
    policy = keras.DTypePolicy("mixed_float16")
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3, dtype=policy), BN(dtype=policy), BN()])
    model.trainable = False
    return model


def same(one: BatchNorm, other: BatchNorm) -> list[str]:
    """The fields in which two records differ."""
    pairs = ((field.name, getattr(one, field.name), getattr(other, field.name)) for field in fields(one))
    return [name for name, a, b in pairs if not (np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b)]


def varied(model: keras.Model) -> keras.Model:
    """The model with other statistics in every layer, half of them noted by bntools."""
    generator = np.random.default_rng(0)
    records = bntools.inspect(model)
    for index, layer in enumerate(records):
        values = generator.random((2, layer.features)).astype("float32")
        write(model, {layer.name: (*values, 5 if index % 2 else None)})
    return model


def by_hand(path) -> list[BatchNorm]:
    """The records of a file, from which a short cut was possible."""
    found = peek(str(path))
    assert isinstance(found, Archive)
    assert isinstance(files.peek(path), Archive)
    return bntools.inspect(found)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    ("build", "suffix"),
    [(nested, "keras"), (wrapped, "keras"), (wrapped, "h5"), (sequential, "keras"), (sequential, "h5")],
)
def test_same_records(tmp_path, build, suffix, compiled):
    """Names, order, arrays, flags, counters and remarks are those of the loaded model."""
    model = varied(build())
    if compiled:
        model.compile(keras.optimizers.SGD(), keras.losses.MeanSquaredError())
        model.optimizer.build(model.trainable_variables)
        model.optimizer.iterations.assign(3)
    path = tmp_path / f"model.{suffix}"
    bntools.save(model, path)
    found, expected = by_hand(path), bntools.inspect(bntools.load(path))
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    assert [same(one, other) for one, other in zip(found, expected, strict=True)] == [[]] * len(expected)
    assert len(expected) > 1
    assert ({layer.updates for layer in found} - {5}) <= ({3, 5 + 3, None} if compiled else {None})


def test_application(tmp_path):
    """A model of keras.applications, with layers of Keras's own that are not in keras.layers."""
    model = varied(keras.applications.MobileNetV3Small(weights=None, input_shape=(32, 32, 3), classes=2))
    bntools.save(model, tmp_path / "model.keras")
    found, expected = by_hand(tmp_path / "model.keras"), bntools.inspect(model)
    assert [layer.name for layer in found] == [layer.name for layer in expected]
    assert not any(set(same(one, other)) for one, other in zip(found, expected, strict=True))


@keras.saving.register_keras_serializable(package="tests_of_archive")
class Block(keras.layers.Layer):
    """A layer with BN inside that its config does not show."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.bn = BN(name="inside")

    def build(self, shape):
        self.bn.build(shape)
        self.built = True

    def call(self, x):
        return self.bn(x)


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_unknown_layers_take_keras(tmp_path, suffix):
    """Where a class may have BN inside, the model is loaded, and all of its BN found."""
    model = keras.Sequential([keras.Input((3,)), BN(name="bn"), Block(name="block")])
    bntools.save(model, tmp_path / f"model.{suffix}")
    assert peek(str(tmp_path / f"model.{suffix}")) is None
    names = [layer.name for layer in bntools.inspect(files.peek(tmp_path / f"model.{suffix}"))]
    assert names[0] == "bn"
    assert [name.partition(".")[2] for name in names[1:]] == ["inside"]


def test_no_short_cut_without_bn(tmp_path):
    """A model without BN is loaded: what it has instead, only a model can say."""
    bntools.save(keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)]), tmp_path / "model.keras")
    assert peek(str(tmp_path / "model.keras")) is None


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_imports_neither_keras_nor_tensorflow(tmp_path, suffix):
    """bntools inspect on a file starts no framework."""
    bntools.save(keras.Sequential([keras.Input((3,)), BN(name="bn")]), tmp_path / f"model.{suffix}")
    code = (
        "import sys\n"
        "from bntools.cli import main\n"
        f"main(['inspect', 'model.{suffix}'], standalone_mode=False)\n"
        "print(sorted({'keras', 'tensorflow', 'torch', 'onnx'} & sys.modules.keys()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[0] == "1 BN layer, 3 channels"
    assert done.stdout.splitlines()[-1] == "[]"
