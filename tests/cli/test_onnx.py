"""The commands on ONNX files, as a team types them that has no training code."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_files import constants, images, keep, norm, small
from PIL import Image

import bntools
from bntools import backends
from bntools.cli import records


@pytest.fixture
def bench(tmp_path, monkeypatch) -> Path:
    """The current folder of a test, with ``model.onnx``, twelve images in ``data`` and six in ``images.npy``."""
    monkeypatch.chdir(tmp_path)
    keep(small(), tmp_path / "model.onnx")
    np.save("images.npy", images())
    Path("data").mkdir()
    generator = np.random.default_rng(3)
    for index in range(12):
        pixels = generator.integers(0, 256, (10 + index % 3, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(f"data/{index:02}.png")
    return tmp_path


def external(path: str) -> set[str]:
    """The files in which a model keeps its weights."""
    return set(backends.backend("onnx").external_files(Path(path)))


def test_the_story(run, bench):
    """inspect, recalibrate, fold and verify follow one another with nothing said but the file names."""
    assert run("inspect model.onnx").out.splitlines()[0] == "2 BN layers, 45 channels"
    outcome = run("recalibrate model.onnx data/")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "data/: 12 images 3x8x8, resized and centre-cropped from 3 sizes; scaled to 0..1"
    assert lines[-2].startswith("recalibrated 2 BN layers on 12 samples, residual ")
    assert lines[-1] == "wrote model.recalibrated.onnx and model.recalibrated.json"
    assert json.loads(Path("model.recalibrated.json").read_text())["residual"] < 1e-5
    outcome = run("fold model.recalibrated.onnx -o folded.onnx")
    assert (outcome.status, outcome.err) == (0, "")
    assert "folded 2 of 2 BN layers" in outcome.out
    assert run("verify model.recalibrated.onnx folded.onnx data/").status == 0
    assert run("verify model.onnx folded.onnx data/").status == 3


def test_recalibrated_statistics(run, bench):
    """The file holds the statistics that the library measures on the same data, and the source is as it was."""
    before = Path("model.onnx").read_bytes()
    assert run("recalibrate model.onnx images.npy --batch-size 4").status == 0
    assert Path("model.onnx").read_bytes() == before
    expected = small()
    bntools.recalibrate(expected, [images()])
    for a, b in zip(bntools.inspect("model.recalibrated.onnx"), bntools.inspect(expected), strict=True):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(a.var, b.var, rtol=1e-5)
    versions = json.loads(Path("model.recalibrated.json").read_text())["versions"]
    assert {"onnx", "onnxruntime", "numpy"} <= set(versions)


def test_fold_takes_the_recalibrated_file(run, bench):
    """fold --export with no MODEL takes the newest of the recalibrated file and others, and says so."""
    run("recalibrate model.onnx images.npy")
    outcome = run("fold --export model.onnx --force")
    assert outcome.status == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[:3] == [
        "folding model.recalibrated.onnx",
        "trying it on random input like the data that model.recalibrated.json describes",
        "folded 2 of 2 BN layers",
    ]
    assert run("verify model.recalibrated.onnx model.onnx images.npy").status == 0


def test_without_data_the_file_says_what_it_takes(run, refused, bench):
    """fold and export try the model on random input of the file's own shape; a free size asks for --shape."""
    assert "random input of the shape that model.onnx takes" in run("fold model.onnx -o a.onnx").out
    assert run("export model.onnx b.onnx --opset 19").status == 0
    assert onnx.load("b.onnx").opset_import[0].version == 19
    keep(small(height="H"), Path("free.onnx"))
    assert "takes any size at its input 'image' (?, 3, ?, 8): give DATA, or --shape" in refused(
        "fold free.onnx -o c.onnx"
    )
    assert run("fold free.onnx -o c.onnx --shape 3,12,8").status == 0


def test_reset(run, bench):
    """reset writes a copy with statistics 0 and 1, or changes the file itself."""
    assert run("reset model.onnx --layers bn2").out == "reset 1 of 2 BN layers\nwrote model.reset.onnx\n"
    assert [bool((layer.mean == 0).all()) for layer in bntools.inspect("model.reset.onnx")] == [False, True]
    assert run("reset model.onnx --in-place").status == 0
    assert all((layer.var == 1).all() for layer in bntools.inspect("model.onnx"))


def test_a_layer_in_a_branch_is_left_alone_and_reported(run, refused, bench):
    """BN in a branch of an If is not reset, with the reason; where there is no other, nothing is written."""
    model = small()
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, None)
    branch = helper.make_graph([norm("bn2", "c2", "out")], "branch", [], [out])
    choose = helper.make_node("If", ["yes"], ["chosen"], name="choose", then_branch=branch, else_branch=branch)
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "yes"))
    model.graph.node.append(choose)
    model.graph.output.append(helper.make_tensor_value_info("chosen", TensorProto.FLOAT, None))
    keep(model, Path("model.onnx"))
    lines = run("reset model.onnx").out.splitlines()
    assert [line.split(": ", 2)[2] for line in lines[:2]] == ["it lies in a subgraph of If 'choose'"] * 2
    assert lines[2:] == ["reset 2 of 4 BN layers", "wrote model.reset.onnx"]
    assert len(json.loads(run("reset model.onnx --force --json").out)["untouched"]) == 2
    for node in model.graph.node[:-1]:
        node.CopyFrom(helper.make_node("Identity", node.input[:1], node.output[:1]))
    keep(model, Path("model.onnx"))
    os.unlink("model.reset.onnx")
    assert "none of the 2 BN layers can be reset" in refused("reset model.onnx")


def test_external_weights(run, bench):
    """Every command works on a file with external weights; results have data files of their own."""
    Path("model.onnx").unlink()
    keep(small(), Path("model.onnx"), external=True)
    weights = Path("weights.bin").read_bytes()
    for line in ("recalibrate model.onnx images.npy", "fold model.onnx -o folded.onnx", "export model.onnx out.onnx"):
        assert run(line).status == 0
    written = ("model.recalibrated.onnx", "folded.onnx", "out.onnx")
    owned = [external(name) for name in written]
    assert all(len(one) == 1 and Path(name).stem in next(iter(one)) for name, one in zip(written, owned, strict=True))
    assert run("reset model.onnx --in-place").status == 0
    assert external("model.onnx") == {"weights.bin"}
    assert Path("weights.bin").read_bytes() == weights
    assert {name for name in os.listdir() if name.endswith(".data")} == set().union(*owned)


def test_a_record_that_cannot_be_written_leaves_model_and_data(run, bench, monkeypatch):
    """When the record fails at the last moment, the old model and its data file are there, and no new ones."""
    keep(small(), Path("model.onnx"), external=True)
    run("recalibrate model.onnx images.npy")
    before = {name: Path(name).read_bytes() for name in os.listdir() if Path(name).is_file()}

    replace, failures = os.replace, iter([True])

    def last_fails(a, b):
        if str(b).endswith(".json") and next(failures, False):
            raise OSError(28, "No space left on device")
        replace(a, b)

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", last_fails)
        assert run("recalibrate model.onnx images.npy --force --max-samples 3").status == 1
    assert {name: Path(name).read_bytes() for name in os.listdir() if Path(name).is_file()} == before
    assert records.read(Path("model.recalibrated.json")) is not None


def test_a_fixed_batch_size(run, refused, bench):
    """A file bound to batches of four gets batches of four; what fills none is left out, and said."""
    keep(small(batch=4), Path("fixed.onnx"))
    outcome = run("recalibrate fixed.onnx images.npy")
    assert outcome.status == 0, outcome.err
    first = outcome.out.splitlines()[0]
    assert first.endswith("in batches of 4, the size that the model's input is bound to; 2 left out")
    record = json.loads(Path("fixed.recalibrated.json").read_text())
    assert record["samples"] == 4
    assert "2 left out" in record["input"]["note"]
    assert run("fold fixed.recalibrated.onnx -o folded.onnx").status == 0
    assert run("verify fixed.recalibrated.onnx folded.onnx data/").status == 0
    np.save("three.npy", images(3))
    assert "3 samples, and the model takes batches of 4 only" in refused("recalibrate fixed.onnx three.npy -o x.onnx")


def two_inputs() -> onnx.ModelProto:
    """left (N, 3) and right (N, 3), added and normalized."""
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", 3]) for name in ("left", "right", "out")]
    nodes = [helper.make_node("Add", ["left", "right"], ["sum"]), norm("bn", "sum", "out")]
    graph = helper.make_graph(nodes, "two", values[:2], values[2:], constants("bn", 3))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_several_inputs_by_name(run, refused, bench):
    """An .npz whose names are those of the inputs feeds a model of several."""
    keep(two_inputs(), Path("two.onnx"))
    left, right = np.random.default_rng(0).normal(size=(2, 9, 3)).astype(np.float32)
    np.savez("both.npz", right=right, left=left)
    assert run("recalibrate two.onnx both.npz --batch-size 2").status == 0
    (layer,) = bntools.inspect("two.recalibrated.onnx")
    np.testing.assert_allclose(layer.mean, (left + right).mean(axis=0), rtol=1e-5, atol=1e-6)
    np.savez("wrong.npz", left=left, up=right)
    line = refused("verify two.onnx two.onnx wrong.npz")
    assert "'right'" in line
    assert "--shape is for a model of one input" in refused("export two.onnx out.onnx --shape 3")


def eight_bits() -> onnx.ModelProto:
    """Takes uint8 images with channels last, as cameras give them."""
    weight = numpy_helper.from_array(np.random.default_rng(0).normal(size=(4, 3, 1, 1)).astype(np.float32), "w")
    nodes = [
        helper.make_node("Cast", ["pixels"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Transpose", ["f"], ["t"], perm=[0, 3, 1, 2]),
        helper.make_node("Conv", ["t", "w"], ["c"]),
        norm("bn", "c", "y"),
    ]
    graph = helper.make_graph(
        nodes,
        "eight",
        [helper.make_tensor_value_info("pixels", TensorProto.UINT8, ["N", 9, 9, 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 9, 9])],
        [weight, *constants("bn", 4)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_images_of_eight_bits_with_channels_last(run, bench):
    """A uint8 NHWC input gets the pixels as they are, from a folder as from an array."""
    keep(eight_bits(), Path("eight.onnx"))
    outcome = run("recalibrate eight.onnx data/")
    assert outcome.status == 0, outcome.err
    record = json.loads(Path("eight.recalibrated.json").read_text())["input"]
    assert (record["measured"]["shape"], record["measured"]["dtype"]) == ([9, 9, 3], "uint8")
    assert max(record["measured"]["max"]) > 200
    pixels = np.random.default_rng(1).integers(0, 256, (5, 9, 9, 3), dtype=np.uint8)
    np.save("pixels.npy", pixels)
    assert "scaled" not in run("recalibrate eight.onnx pixels.npy -o b.onnx").out.splitlines()[0]
    expected = eight_bits()
    bntools.recalibrate(expected, [pixels])
    for a, b in zip(bntools.inspect("b.onnx"), bntools.inspect(expected), strict=True):
        np.testing.assert_allclose(a.mean, b.mean, rtol=1e-5)
    assert run("fold b.onnx -o c.onnx").status == 0


def test_to_inference(run, refused, bench):
    """A file in training mode is refused by each command with the option that converts it, and converted by it."""
    model = small()
    node = model.graph.node[1]
    node.attribute.append(helper.make_attribute("training_mode", 1))
    node.output.extend(["new mean", "new variance"])
    keep(model, Path("training.onnx"))
    before = Path("training.onnx").read_bytes()
    for line in (
        "recalibrate training.onnx images.npy",
        "reset training.onnx",
        "fold training.onnx -o folded.onnx",
        "export training.onnx out.onnx",
    ):
        assert "--to-inference" in refused(line)
        outcome = run(f"{line} --to-inference")
        assert outcome.status == 0, outcome.err
        assert outcome.out.splitlines()[0] == "training.onnx: 1 node brought into inference form"
    assert Path("training.onnx").read_bytes() == before


def test_a_folded_file_says_so(refused, run, bench):
    """inspect of a file whose BN was folded says so, with the convolutions that carry a bias."""
    run("fold model.onnx -o folded.onnx")
    line = refused("inspect folded.onnx")
    assert line.endswith("2 of 2 convolutions carry a bias, so they were folded already, it seems")


def test_formats_do_not_mix(run, bench):
    """An ONNX file is not written as .pt, and -o of a folded ONNX file is ONNX."""
    assert "an ONNX file stays one" in run("fold model.onnx -o folded.pt").err
    assert "expected the suffix '.onnx'" in run("reset model.onnx -o reset.pt").err
    assert "needs no arch=" in run("inspect model.onnx --arch a:b").err


def test_unknown_operators(run, refused, bench):
    """Commands that run nothing work on a model with operators of nobody's; the others name what is missing."""
    model = small()
    model.graph.node[2].domain = "com.example"
    model.graph.node[2].op_type = "Secret"
    model.opset_import.append(helper.make_opsetid("com.example", 1))
    keep(model, Path("custom.onnx"))
    assert run("inspect custom.onnx").status == 0
    assert run("reset custom.onnx").status == 0
    for line in ("recalibrate custom.onnx images.npy", "fold custom.onnx -o out.onnx", "export custom.onnx out.onnx"):
        assert "Secret" in refused(line)


WITHOUT_TORCH = """
import shlex, sys
sys.modules["torch"] = sys.modules["tensorflow"] = None
from bntools.cli import main
for line in sys.stdin:
    status = main.main(shlex.split(line, comments=True)[1:], prog_name="bntools", standalone_mode=False)
    assert not status, line
"""


def told(start: str) -> str:
    """The first block of code in the README's section on ONNX files that begins so."""
    text = (Path(__file__).parent.parent.parent / "README.md").read_text(encoding="utf-8")
    section = text.split("## With nothing but model.onnx")[1].split("\n## ")[0]
    return next(block for block in section.split("```")[1::2] if block.startswith(start))


def test_the_commands_of_the_readme_without_pytorch(bench):
    """What the README types for ONNX files works as it stands there, and where PyTorch is not installed."""
    lines = [line for line in told("\npip").splitlines() if line.startswith("bntools ")]
    assert len(lines) == 5
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH], input="\n".join(lines), capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert {"model.recalibrated.onnx", "folded.onnx", "shipped.onnx"} <= set(os.listdir())


def test_the_python_of_the_readme(bench, capsys):
    """The README's lines of Python for ONNX files run as they stand there."""
    batches, names = [images(), images(seed=1)], {"bntools": bntools}
    exec(told("python").removeprefix("python"), names | {"batches": batches, "images": images()})
    assert capsys.readouterr().out.startswith("verified on 6 samples")


def test_a_killed_run_leaves_data_files_with_one_name(run, bench, monkeypatch):
    """onnx refuses to read weights from a file with two names, so the one that stays never gets a second."""
    keep(small(), Path("first.onnx"), external=True)
    bntools.save(bntools.load("first.onnx"), "model.onnx")
    save, names = bntools.save, []

    def watching(model, path, overwrite):
        save(model, path, overwrite=overwrite)
        names.extend(os.stat(name).st_nlink for name in os.listdir() if name.endswith(".data"))

    monkeypatch.setattr(bntools, "save", watching)
    assert run("recalibrate model.onnx images.npy --in-place").status == 0
    assert set(names) == {1}
