"""ONNX files that are broken or hostile: one clear message, exit status 1, nothing written."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from onnx_files import images, keep, small

from bntools import BntoolsError
from bntools.backends.onnx import layers, opened

COMMANDS = (
    "inspect {}",
    "reset {}",
    "recalibrate {} images.npy",
    "fold {} -o out.onnx",
    "export {} out.onnx",
    "verify {0} {0} images.npy",
)


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    """The current folder of a test, with ``images.npy``."""
    (tmp_path / "bench").mkdir()
    monkeypatch.chdir(tmp_path / "bench")
    np.save("images.npy", images())
    return tmp_path / "bench"


def nested(depth: int) -> bytes:
    """A message whose graphs lie in attributes of nodes of graphs, many times."""
    inner = b""
    for _ in range(depth):
        for tag in (b"\x32", b"\x2a", b"\x0a"):  # attribute.g, node.attribute, graph.node
            length, size = len(inner), b""
            while length >= 128:
                size += bytes([length % 128 + 128])
                length //= 128
            inner = tag + size + bytes([length]) + inner
    return b"\x08\x08\x3a" + _varint(len(inner)) + inner


def _varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number % 128 + 128]) + _varint(number // 128)


FILES = {
    "missing": (None, "no such file"),
    "empty": (b"", "the file is empty"),
    "text": (b"this is no model\n", "found text where an ONNX model was expected"),
    "picture": (b"\x89PNG\r\n\x1a\n" + bytes(64), "found a PNG image"),
    "random": (random.Random(0).randbytes(5000), "not an ONNX model"),
    "truncated": (small().SerializeToString()[:2000], "not an ONNX model, or a truncated one"),
    "nested": (nested(2000), "not an ONNX model, or a truncated one"),
    "no graph": (onnx.ModelProto(ir_version=8).SerializeToString(), "it holds no graph"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", FILES)
def test_no_model(refused, bench, command, kind):
    """A missing, empty, foreign, truncated or deeply nested file is named with what is wrong about it."""
    content, words = FILES[kind]
    if content is not None:
        Path("bad.onnx").write_bytes(content)
    line = refused(command.format("bad.onnx"))
    assert line.startswith("bad.onnx: ")
    assert words in line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_folder(refused, bench, command):
    """A folder is named as one."""
    Path("folder.onnx").mkdir()
    assert "is a folder; expected a model file" in refused(command.format("folder.onnx")) or "verify" in command


def changed(change) -> None:
    """Write ``bad.onnx``: the small model after a change."""
    model = small()
    change(model)
    Path("bad.onnx").write_bytes(model.SerializeToString())


def _tensor(model: onnx.ModelProto, name: str) -> onnx.TensorProto:
    return next(one for one in model.graph.initializer if one.name == name)


def _dims(*sizes: int):
    def change(model: onnx.ModelProto) -> None:
        tensor = _tensor(model, "bn1.running_mean")
        del tensor.dims[:]
        tensor.dims.extend(sizes)

    return change


def _raw(model: onnx.ModelProto) -> None:
    _tensor(model, "bn1.running_var").raw_data = b"\x00" * 7


def _kind(model: onnx.ModelProto) -> None:
    _tensor(model, "bn1.running_var").data_type = 99


TENSORS = {
    "huge": (_dims(2**40, 2**40), "bn1.running_mean"),
    "negative": (_dims(-1), "has a negative size"),
    "too many": (_dims(41), "bn1.running_mean"),
    "raw": (_raw, "bn1.running_var"),
    "type": (_kind, "bn1.running_var"),
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("kind", TENSORS)
def test_damaged_tensors(refused, bench, command, kind):
    """A tensor whose shape, type or bytes contradict each other is named, or refused by the runtime with its reason."""
    change, words = TENSORS[kind]
    changed(change)
    line = refused(command.format("bad.onnx"))
    assert words in line or ("ONNX Runtime" in line and "bad.onnx" in line)


def outside(location: str) -> None:
    """Write ``bad.onnx``, whose first weight is said to lie at this place."""
    model = onnx.load(keep(small(), Path("bad.onnx"), external=True), load_external_data=False)
    next(entry for entry in model.graph.initializer[0].external_data if entry.key == "location").value = location
    Path("bad.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["../secret", "/etc/passwd", "link", "", "folder/../../secret"])
def test_weights_outside_the_folder(refused, bench, command, place):
    """External weights outside the model's folder, also by way of a link, are refused."""
    Path("../secret").write_bytes(bytes(10_000))
    Path("folder").mkdir()
    os.symlink("../secret", "link")
    outside(place)
    assert "outside its folder: refused" in refused(command.format("bad.onnx"))


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("place", ["gone.bin", "a" * 5000, "nul\0byte", "folder"])
def test_weights_that_are_missing(refused, bench, command, place):
    """External weights that are not there are named, whatever their name."""
    Path("folder").mkdir()
    outside(place)
    assert "which is not there" in refused(command.format("bad.onnx"))


@pytest.mark.parametrize("command", ["reset {}", "recalibrate {} images.npy", "fold {} -o out.onnx"])
def test_weights_that_are_cut_off(refused, bench, command):
    """A file of weights that ends too early is named when they are read."""
    keep(small(), Path("bad.onnx"), external=True)
    os.truncate("weights.bin", 500)
    assert refused(command.format("bad.onnx"))


def test_nan_in_the_statistics(run, bench):
    """NaN in stored statistics is flagged by inspect; the layer is kept by fold, and mended by recalibrate."""

    def change(model: onnx.ModelProto) -> None:
        values = numpy_helper.to_array(_tensor(model, "bn1.running_var")).copy()
        values[3] = np.nan
        _tensor(model, "bn1.running_var").CopyFrom(numpy_helper.from_array(values, "bn1.running_var"))

    changed(change)
    assert "bn1: NaN or Inf in the statistics in 1 of 40 channels (first: 3)" in run("inspect bad.onnx").out
    assert run("recalibrate bad.onnx images.npy").status == 0
    assert "no problems found" in run("inspect bad.recalibrated.onnx").out


def test_nan_in_the_weights(refused, bench):
    """NaN in a weight in front of a layer is refused by recalibrate, which names the layer."""

    def change(model: onnx.ModelProto) -> None:
        _tensor(model, "w1").CopyFrom(numpy_helper.from_array(np.full((40, 3, 3, 3), np.nan, np.float32), "w1"))

    changed(change)
    assert "'bn1'" in refused("recalibrate bad.onnx images.npy")


def _dangling(model: onnx.ModelProto) -> None:
    model.graph.node[3].input[0] = "nowhere"


def _twice(model: onnx.ModelProto) -> None:
    model.graph.node[2].output[0] = "c1"


@pytest.mark.parametrize("change", [_dangling, _twice])
def test_graphs_that_the_checker_rejects(run, refused, bench, change):
    """inspect describes the layers of a graph that cannot run; the verbs that run it refuse it."""
    changed(change)
    assert run("inspect bad.onnx").out.startswith("2 BN layers")
    for line in ("recalibrate bad.onnx images.npy", "fold bad.onnx -o out.onnx", "export bad.onnx out.onnx"):
        assert refused(line)


def _few_inputs(model: onnx.ModelProto) -> None:
    del model.graph.node[1].input[2:]


def _other_shapes(model: onnx.ModelProto) -> None:
    _tensor(model, "bn1.running_mean").CopyFrom(
        numpy_helper.from_array(np.ones((2, 20), np.float32), "bn1.running_mean")
    )


@pytest.mark.parametrize(
    ("change", "words"), [(_few_inputs, "it is damaged: it has 2 inputs"), (_other_shapes, "(2, 20)")]
)
def test_damaged_layers(run, bench, change, words):
    """A layer without all its constants, or with constants of odd shapes, is described as such and left alone."""
    changed(change)
    assert words in run("inspect bad.onnx").out
    untouched, reset, _ = run("reset bad.onnx").out.splitlines()
    assert words in untouched
    assert reset == "reset 1 of 2 BN layers"


def test_data_that_does_not_fit(refused, bench):
    """Data of another shape or dtype than the input's is refused with both."""
    keep(small(), Path("model.onnx"))
    np.save("wrong.npy", np.ones((4, 3, 9, 9), np.float32))
    line = refused("recalibrate model.onnx wrong.npy")
    assert "(N, 3, 8, 8)" in line
    assert "(4, 3, 9, 9)" in line
    np.save("wrong.npy", np.ones((4, 3, 8, 8), np.complex64))
    assert "complex64" in refused("recalibrate model.onnx wrong.npy")


def test_a_random_byte_here_and_there(bench):
    """Whatever a few damaged bytes make of a file, it is read or refused by an error of bntools."""
    generator, whole = random.Random(0), small().SerializeToString()
    refusals = 0
    for _ in range(300):
        content = bytearray(whole)
        for _ in range(generator.choice((1, 2, 8))):
            place = generator.choice((generator.randrange(len(content)), len(content) - generator.randrange(1, 900)))
            content[place] = generator.randrange(256)
        Path("bad.onnx").write_bytes(content)
        try:
            [layer.problems for layer in layers(opened("bad.onnx"))]
        except BntoolsError:
            refusals += 1
    assert 30 < refusals < 300


def test_names_that_are_no_text(refused, bench):
    """A name that is not UTF-8 is refused."""
    changed(lambda model: helper.set_model_props(model, {"team": "QQQQ"}))
    Path("bad.onnx").write_bytes(Path("bad.onnx").read_bytes().replace(b"QQQQ", b"\xff\xfe\xff\xfe"))
    assert "a name in its graph is no text" in refused("inspect bad.onnx")
