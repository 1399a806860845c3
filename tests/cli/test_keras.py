"""The commands on Keras models, as a team types them that trains with Keras."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import pytest
from PIL import Image

import bntools
from bntools import data
from bntools.cli import records


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder with ``model.keras`` and ``model.h5``."""
    folder = tmp_path_factory.mktemp("models")
    keras.utils.set_random_seed(0)
    model = keras.Sequential(
        [
            keras.Input((16, 12, 3)),
            keras.layers.Conv2D(4, 3, use_bias=False),
            keras.layers.BatchNormalization(name="bn"),
            keras.layers.ReLU(),
            keras.layers.GlobalAveragePooling2D(),
            keras.layers.Dense(2),
        ]
    )
    bntools.save(model, folder / "model.keras")
    bntools.save(model, folder / "model.h5")
    return folder


@pytest.fixture
def bench(models, tmp_path, monkeypatch) -> Path:
    """The current folder of a test, with the models, twelve images in ``data`` and six in ``images.npy``."""
    monkeypatch.chdir(tmp_path)
    for path in models.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    generator = np.random.default_rng(0)
    np.save("images.npy", generator.integers(0, 256, (6, 16, 12, 3), dtype=np.uint8))
    Path("data").mkdir()
    for index in range(12):
        Image.fromarray(generator.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(f"data/{index:02}.png")
    return tmp_path


def stored(path: str) -> list[float]:
    """The means that a file holds."""
    return bntools.inspect(bntools.load(path))[0].mean.tolist()


def test_the_story(run, bench):
    """inspect, recalibrate and fold follow one another; images go in with the size and layout of the model's input."""
    assert run("inspect model.keras").out.splitlines()[0] == "1 BN layer, 4 channels"
    outcome = run("recalibrate model.keras data/")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "data/: 12 images 3x16x12, resized and centre-cropped from 20x18; scaled to 0..1"
    assert lines[-1] == "wrote model.recalibrated.keras and model.recalibrated.json"
    record = json.loads(Path("model.recalibrated.json").read_text())
    assert record["residual"] < 1e-5
    assert {"keras", "tensorflow"} <= set(record["versions"])
    assert record["input"]["channel_axis"] == 3
    outcome = run("fold model.recalibrated.keras -o folded.keras")
    assert (outcome.status, outcome.err) == (0, "")
    assert "folded 1 of 1 BN layer" in outcome.out
    assert run("verify model.recalibrated.keras folded.keras data/").status == 0
    assert run("verify model.keras folded.keras data/").status == 3


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_reset_in_place(run, bench, name):
    """--in-place replaces the file, in its form."""
    assert run(f"recalibrate {name} data --in-place").status == 0
    assert max(map(abs, stored(name))) > 0.01
    outcome = run(f"reset {name} --in-place")
    assert outcome.out.splitlines() == ["reset 1 of 1 BN layer", f"wrote {name}"]
    assert stored(name) == [0, 0, 0, 0]
    assert json.loads(run(f"inspect {name} --json").out)["layers"][0]["updates"] == 0


def test_the_other_form(run, bench):
    """.keras and .h5 are written in place of each other, no other form is."""
    assert run("reset model.keras -o out.h5").status == 0
    assert run("reset model.h5 -o out.keras").status == 0
    assert stored("out.h5") == stored("out.keras")
    assert "expected the suffix '.keras', found '.pt'" in run("reset model.keras -o out.pt").err


def test_weights_with_arch(run, bench):
    """Weights alone go with --arch, and keep their double suffix."""
    bntools.load("model.keras").save_weights("only.weights.h5")
    Path("factory_of_keras.py").write_text("import bntools\n\n\ndef build():\n    return bntools.load('model.keras')\n")
    outcome = run("reset only.weights.h5 --arch factory_of_keras:build")
    assert outcome.out.splitlines()[-1] == "wrote only.reset.weights.h5"
    sys.modules.pop("factory_of_keras")


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "densenet"])
def test_preprocessing_by_name(run, bench, name):
    """--preprocess does what keras.applications does, and the record knows it for another time."""
    outcome = run(f"recalibrate model.keras images.npy --preprocess {name}")
    assert outcome.status == 0
    assert outcome.out.splitlines()[0] == f"images.npy: 6 samples: uint8 16x12x3 preprocessed for {name}"
    given = getattr(keras.applications, name).preprocess_input(np.load("images.npy").astype("float32"))
    kernel = bntools.load("model.keras").layers[0]
    expected = keras.ops.convert_to_numpy(kernel(given)).reshape(-1, 4).mean(axis=0)
    np.testing.assert_allclose(stored("model.recalibrated.keras"), expected, rtol=1e-4, atol=1e-4)
    spec = json.loads(Path("model.recalibrated.json").read_text())["input"]
    assert spec["scaled"] == f"keras.applications.{name}.preprocess_input"
    order = np.random.default_rng(0).permutation(6)
    again = np.concatenate(list(data.reopen(spec)))
    np.testing.assert_allclose(again, given[np.sort(order)], rtol=1e-5, atol=1e-3)


def test_preprocessing_for_pytorch(bench):
    """Images for a model with the channels first are preprocessed the same, in its layout."""
    first, last = (
        np.concatenate(list(data.open("data", preprocess="resnet50", size=(8, 8), layout=layout)))
        for layout in ("NCHW", "NHWC")
    )
    np.testing.assert_array_equal(first, np.moveaxis(last, -1, 1))
    assert first.shape == (12, 3, 8, 8)
    assert first.min() < -50


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="what Keras itself imports is said there")
@pytest.mark.skipif(version("tensorflow").startswith("2.19"), reason="logs a machine without a GPU as errors")
def test_nothing_of_tensorflow_is_said(bench):
    """In a process of its own, with nothing set, what TensorFlow logs does not reach the terminal."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TF_")}
    done = subprocess.run(
        [sys.executable, "-m", "bntools.cli", "reset", "model.keras"],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == "wrote model.reset.keras"


def test_other_output_of_compiled_code_stays(capfd):
    """What is no log line of TensorFlow's reaches stderr, and Python's stderr goes there at once."""
    from bntools.cli import stderr

    with stderr.without_logs():
        os.write(2, b"I0000 00:00:1795263246.181173 5352 port.cc:153] noise\nsomething else\n")
    assert capfd.readouterr().err == "something else\n"


def saved_model(folder: Path) -> None:
    """What makes a folder a SavedModel, for what only looks at names."""
    folder.mkdir()
    (folder / "saved_model.pb").write_bytes(b"x")


def test_names_of_folders(bench):
    """A SavedModel folder has no suffix: its names and its record's are built without one."""
    from bntools.cli import paths

    saved_model(Path("net.v2"))
    assert paths.destination(Path("net.v2"), "recalibrated", None, False) == Path("net.v2.recalibrated")
    assert paths.record_of(Path("net.v2.recalibrated")) == Path("net.v2.recalibrated.json")
    assert paths.destination(Path("net.v2"), "reset", Path("out.keras"), False) == Path("out.keras")
    saved_model(Path("net"))
    assert paths.newest_model(Path("net.onnx"))[0] == Path("net")


def test_failed_record_restores_a_folder(bench, monkeypatch):
    """If the record cannot be written after all, the folder that was there is there again."""
    saved_model(Path("net"))

    def save(model, path, overwrite=True):
        (Path(path) / "saved_model.pb").unlink()
        (Path(path) / "other").write_bytes(b"y")

    monkeypatch.setattr(bntools, "save", save)
    monkeypatch.setattr("bntools.files._settle", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(bntools.BntoolsError, match="disk full"):
        records.write_both(None, Path("net"), {}, Path("net.json"))
    assert [path.name for path in Path("net").iterdir()] == ["saved_model.pb"]
    assert not [path for path in Path().iterdir() if path.name.startswith(".net")]
