"""SavedModel folders: read where Keras 2 saved a model in them, rewritten in kind, else refused."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from runner import invoked

import bntools
from bntools.backends.keras.found import write

tf = pytest.importorskip("tensorflow")
X = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype("float32")

# In a process of its own: tf_keras and Keras 3 each keep names of their own in TensorFlow.
MAKE = """
import os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np, tensorflow as tf, tf_keras
L = tf_keras.layers
tf_keras.utils.set_random_seed(0)
inner = tf_keras.Sequential([tf_keras.Input((4, 4, 3)), L.Conv2D(3, 1), L.BatchNormalization(name="bn")], name="inner")
i = tf_keras.Input((4, 4, 3))
x = L.TimeDistributed(L.BatchNormalization(name="each"), name="rows")(inner(L.BatchNormalization(name="first")(i)))
model = tf_keras.Model(i, L.Dense(2)(L.Flatten()(x)))
model.compile("adam", "mse", metrics=["mae"])
x = np.random.default_rng(0).normal(size=(4, 4, 4, 3)).astype("float32")
model.optimizer.build(model.trainable_variables)
model.optimizer.iterations.assign(1)
model.save("model", save_format="tf")
model.save("model.h5")
np.save("expected.npy", model(x, training=False).numpy())

class Own(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.bn = L.BatchNormalization()
    def call(self, x):
        return self.bn(x)

own = Own()
own(x)
own.save("own", save_format="tf")
tf.saved_model.save(tf.Module(), "functions")
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with ``model``, ``model.h5``, ``own`` (a model written in Python) and ``functions`` (no model)."""
    folder = tmp_path_factory.mktemp("saved")
    subprocess.run([sys.executable, "-c", MAKE], cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def place(made, tmp_path) -> Path:
    """A copy of the SavedModel."""
    return Path(shutil.copytree(made / "model", tmp_path / "model"))


def computed(model) -> np.ndarray:
    """What a model gives for X."""
    return keras.ops.convert_to_numpy(model(X, training=False))


@pytest.mark.parametrize("name", ["model", "model.h5"])
def test_rebuilt_by_keras_3(made, name):
    """The model computes what it computed in Keras 2, and the steps of its optimizer count as updates."""
    model = bntools.load(made / name)
    assert isinstance(model, keras.Model)
    np.testing.assert_allclose(computed(model), np.load(made / "expected.npy"), atol=1e-6)
    assert {layer.name: layer.updates for layer in bntools.inspect(model)} == {
        "first": 1,
        "inner.bn": 1,
        "rows.each": 1,
    }


def test_written_back_in_kind(place):
    """New statistics are in the checkpoint, under the same keys, and in what TensorFlow serves; the rest stays."""
    before = dict(tf.train.list_variables(str(place / "variables" / "variables")))
    graph = (place / "saved_model.pb").read_bytes()
    model = bntools.load(place)
    write(model, {layer.name: (layer.mean + 0.5, layer.var, 9) for layer in bntools.inspect(model)})
    bntools.save(model, place)
    assert dict(tf.train.list_variables(str(place / "variables" / "variables"))) == before
    assert len(before) > 20
    assert (place / "saved_model.pb").read_bytes() == graph
    again = bntools.load(place)
    assert [layer.updates for layer in bntools.inspect(again)] == [9, 9, 9]
    expected = computed(model)
    np.testing.assert_array_equal(computed(again), expected)
    served = tf.saved_model.load(str(place)).signatures["serving_default"]
    np.testing.assert_allclose(next(iter(served(tf.constant(X)).values())), expected, atol=1e-6)
    assert sorted(each.name for each in place.parent.iterdir()) == ["model"]


def test_saved_under_another_name(place):
    """A new folder, or a .keras file, beside the old one, which stays."""
    model = bntools.load(place)
    bntools.save(model, place.with_name("new"))
    bntools.save(model, place.with_name("new.keras"))
    for name in ("model", "new", "new.keras"):
        np.testing.assert_array_equal(computed(bntools.load(place.with_name(name))), computed(model))


def test_failed_write_leaves_the_folder(place, monkeypatch):
    """When writing fails half way, the folder is as before and nothing lies beside it."""
    model = bntools.load(place)
    before = {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()}

    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(tf.raw_ops, "MergeV2Checkpoints", fail)
    with pytest.raises(bntools.BntoolsError, match=r"written: disk full \(the folder there is as before\)"):
        bntools.save(model, place)
    assert {path.relative_to(place): path.read_bytes() for path in place.rglob("*") if path.is_file()} == before
    assert sorted(each.name for each in place.parent.iterdir()) == ["model"]


def test_commands_take_the_folder(place, monkeypatch):
    """The folder goes through inspect, recalibrate, fold and verify by its name, also where BN stays."""
    monkeypatch.chdir(place.parent)
    np.save("x.npy", X)
    lines = (
        ("inspect model", "3 BN layers"),
        ("recalibrate model x.npy", "wrote model.recalibrated and model.recalibrated.json"),
        ("fold --export model.onnx", "folded 2 of 3 BN layers"),
        ("verify model.recalibrated model.onnx x.npy", "verified on 4 samples"),
    )
    for line, said in lines:
        outcome = invoked(line)
        assert (outcome.exit_code, said in outcome.stdout) == (0, True), (line, outcome.output)


def test_other_weights_are_refused(place):
    """A folder takes back only the weights that it had."""
    from bntools import files

    model = bntools.load(place)
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    files._origins[other] = files.origin(model)
    with pytest.raises(bntools.BntoolsError, match=r"only with the same weights.*save it as \.keras"):
        bntools.save(other, place.with_name("new"))
    assert not place.with_name("new").exists()


def test_without_a_keras_model(made):
    """A folder of functions is refused with what to do, and so is a model without a config."""
    with pytest.raises(bntools.BntoolsError, match=r"functions: a SavedModel without a Keras model.*model\.keras"):
        bntools.load(made / "functions")
    with pytest.raises(bntools.BntoolsError, match=r"own: a SavedModel whose Keras model is written in Python"):
        bntools.load(made / "own")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's format")
def test_exported_by_keras_3(tmp_path):
    """What model.export writes is a SavedModel without a Keras model."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    model.export(tmp_path / "exported", verbose=False)
    with pytest.raises(bntools.BntoolsError, match="a SavedModel without a Keras model"):
        bntools.load(tmp_path / "exported")


@pytest.mark.parametrize(
    "name", ["variables/variables.index", "variables/variables.data-00000-of-00001", "keras_metadata.pb"]
)
def test_damaged(place, name):
    """A folder of which a part is missing or cut off is refused in a line."""
    data = (place / name).read_bytes()
    (place / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(bntools.BntoolsError, match="model: "):
        bntools.load(place)
    (place / name).unlink()
    with pytest.raises(bntools.BntoolsError, match="model: "):
        bntools.load(place)
