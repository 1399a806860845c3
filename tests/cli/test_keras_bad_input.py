"""Bad input to the commands on Keras models: one clear line, status 1, and nothing written."""

from __future__ import annotations

import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest

import bntools


@pytest.fixture(scope="module")
def content(tmp_path_factory) -> bytes:
    """A small model in a .keras archive."""
    model = keras.Sequential([keras.Input((4, 4, 3)), keras.layers.BatchNormalization(name="bn")])
    path = tmp_path_factory.mktemp("model") / "model.keras"
    bntools.save(model, path)
    return path.read_bytes()


@pytest.fixture
def bench(content, tmp_path, monkeypatch) -> Path:
    """The current folder of a test, with ``model.keras`` and arrays of several kinds."""
    monkeypatch.chdir(tmp_path)
    Path("model.keras").write_bytes(content)
    generator = np.random.default_rng(0)
    np.save("images.npy", generator.integers(0, 256, (6, 4, 4, 3), dtype=np.uint8))
    np.save("floats.npy", generator.random((6, 4, 4, 3), dtype=np.float32))
    np.save("grey.npy", generator.integers(0, 256, (6, 4, 4, 1), dtype=np.uint8))
    np.save("four.npy", generator.random((6, 4, 4, 4), dtype=np.float32))
    return tmp_path


def saved(model: keras.Model) -> None:
    """Put another model in place of ``model.keras``."""
    keras.saving.save_model(model, "model.keras")


def test_lambda(refused, bench):
    """A Lambda layer of a lambda is named, and --allow does not admit it."""
    saved(keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: x, name="same")]))
    for line in ("inspect model.keras", "recalibrate model.keras floats.npy --allow lambda"):
        assert "its layer 'same' holds Python bytecode (a Lambda of a lambda)" in refused(line)


def test_custom_object(refused, bench):
    """A class that nobody admitted is named, with the option that would admit it."""

    class Odd(keras.layers.Layer):
        def call(self, x):
            return x

    Odd.__module__ = "nowhere_of_keras.layers"
    saved(keras.Sequential([keras.Input((3,)), Odd(name="odd")]))
    message = refused("reset model.keras")
    assert "the class nowhere_of_keras.layers.Odd (in 'odd'), not admitted" in message
    assert "--allow nowhere_of_keras" in message
    message = refused("reset model.keras --allow nowhere_of_keras")
    assert "there is no module 'nowhere_of_keras' on the import path" in message


@pytest.mark.parametrize("line", ["inspect", "reset", "recalibrate {} floats.npy", "fold {} -o out.keras"])
def test_corrupt_archive(refused, bench, line):
    """A file that was cut off is named as damaged by every command."""
    Path("model.keras").write_bytes(Path("model.keras").read_bytes()[:-100])
    line = line.format("model.keras") if "{}" in line else f"{line} model.keras"
    assert refused(line) == (
        "model.keras: found a damaged or truncated zip archive where a .keras archive was expected"
    )


def test_never_built(refused, bench):
    """A model that was never built has no statistics yet, and says what to do."""
    with pytest.warns(UserWarning, match="not yet been built"):
        saved(keras.Sequential([keras.layers.Dense(2), keras.layers.BatchNormalization(name="bn")]))
    assert "was never built" in refused("recalibrate model.keras floats.npy")


def test_data_of_another_shape(refused, bench):
    """Data that does not fit the model's input is refused."""
    assert "(6, 4, 4, 4)" in refused("recalibrate model.keras four.npy")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("images.npy --preprocess resnet51", "keras.applications has no such module; it has convnext, densenet"),
        ("floats.npy --preprocess resnet50", "preprocess= is for images of 8 bits"),
        ("grey.npy --preprocess resnet50", "is for 3 channels (RGB), not 1"),
        ("json:JSONDecoder --preprocess resnet50", "a factory does its own"),
    ],
)
def test_preprocessing(refused, bench, options, message):
    """A name or data that --preprocess cannot take is refused in words."""
    assert message in refused(f"recalibrate model.keras {options}")


def test_preprocessing_and_mean(run, bench):
    """--preprocess and --mean exclude each other, which costs no start of a framework."""
    outcome = run("recalibrate nothing.keras images.npy --preprocess resnet50 --mean imagenet")
    assert outcome.status == 2
    assert "--preprocess does its own scaling" in outcome.err


def test_generator_that_never_ends(refused, bench):
    """Endless data asks for a limit."""
    Path("endless_of_keras.py").write_text(
        "from itertools import repeat\n\nimport numpy as np\n\n\ndef batches():\n"
        "    return repeat(np.ones((100_000, 4, 4, 3), 'float32'))\n"
    )
    assert "--max-samples" in refused("recalibrate model.keras endless_of_keras:batches --no-check")


def test_generator_that_ends_early(refused, bench):
    """Data with fewer batches than it announces is refused, and so is data without any."""
    Path("early_of_keras.py").write_text(
        "import numpy as np\n\n\nclass Early:\n"
        "    def __len__(self):\n        return 3\n\n"
        "    def __iter__(self):\n        return iter([np.ones((70, 4, 4, 3), 'float32')] * 2)\n\n\n"
        "def batches():\n    return Early()\n\n\ndef none():\n    return iter(())\n"
    )
    assert "ended after 2 batches, although it has 3" in refused("recalibrate model.keras early_of_keras:batches")
    assert "yields no batches" in refused("recalibrate model.keras early_of_keras:none")


def test_folders(refused, bench):
    """A folder is a model only if it is a SavedModel, and one without a Keras model says what to do."""
    Path("empty").mkdir()
    assert refused("inspect empty") == "empty: is a folder; expected a model file, or a folder with saved_model.pb"
    Path("functions").mkdir()
    Path("functions/saved_model.pb").write_bytes(b"x")
    for line in ("inspect functions", "reset functions", "recalibrate functions floats.npy"):
        assert "functions: a SavedModel without a Keras model" in refused(line)
    assert "write a .keras, or --export ONNX" in refused("fold functions -o out")
    assert "functions: a model is written back in the form it came in" in refused("reset model.keras -o functions")


def test_existing_files(refused, bench):
    """Nothing that exists is overwritten."""
    Path("model.reset.keras").write_bytes(b"mine")
    assert refused("reset model.keras") == (
        "model.reset.keras exists: choose another name with -o, or overwrite it with --force"
    )
