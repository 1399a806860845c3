"""Bad input: one clear message, exit status 1, nothing written, nothing changed.

``refused`` compares every file below the current folder, hidden ones too, before and after.
"""

from __future__ import annotations

import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from listing import contents
from PIL import Image
from torch import nn


class Hostile:
    """Unpickled by a careless reader, it creates a file."""

    def __reduce__(self):
        return os.system, ("touch was-executed",)


class Own(nn.Module):
    """A module class of a package that nobody admitted."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(2)


COMMANDS = (
    "inspect {}",
    "reset {}",
    "recalibrate {} data/",
    "fold {} -o out.pt --shape 1,8,8",
    "export {} out.onnx data",
)


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("missing.pt", None, "missing.pt: no such file"),
        ("empty.pt", b"", "empty"),
        ("text.pt", b"this is no model\n", "text.pt"),
        ("picture.pt", b"\x89PNG\r\n\x1a\n" + bytes(64), "picture.pt"),
        ("notes.txt", b"this is no model\n", "notes.txt: unknown kind of model file '.txt'"),
        ("broken.safetensors", b"\xff" * 40, "broken.safetensors"),
    ],
)
def test_no_model_file(refused, desk, command, name, content, words):
    """A missing, empty or foreign file is named with what is wrong about it."""
    if content is not None:
        Path(name).write_bytes(content)
    assert words in refused(command.format(name))


@pytest.mark.parametrize("command", COMMANDS)
def test_truncated_model(refused, desk, command):
    """A model file that was cut off is refused."""
    whole = Path("model.pt").read_bytes()
    Path("cut.pt").write_bytes(whole[: len(whole) // 2])
    assert "cut.pt" in refused(command.format("cut.pt"))


@pytest.mark.parametrize("legacy", [False, True])
def test_hostile_pickle(refused, desk, legacy):
    """A pickle with a payload is refused and never executed, in both of PyTorch's file formats."""
    torch.save(Hostile(), "hostile.pt", _use_new_zipfile_serialization=not legacy)
    assert "hostile.pt" in refused("inspect hostile.pt")
    assert not Path("was-executed").exists()


def test_a_payload_is_named(refused, desk):
    """The function that a pickle would have called is named."""
    torch.save(Hostile(), "hostile.pt")
    assert "system" in refused("inspect hostile.pt")


def test_the_hostile_pickle_is_hostile(desk):
    """A careless reader would execute the payload: the test above can fail."""
    pickle.loads(pickle.dumps(Hostile()))
    assert Path("was-executed").exists()


def test_classes_that_are_not_admitted(refused, desk):
    """A class of another package is named, with the options that would help."""
    torch.save(Own(), "own.pt")
    line = refused("inspect own.pt")
    assert "Own" in line
    assert "--allow" in line or "allow" in line


def test_state_dict_without_arch(refused, desk):
    """A state dict without --arch says what to pass."""
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "weights.pt")
    assert "arch" in refused("inspect weights.pt")


def test_state_dict_that_does_not_fit(refused, desk):
    """A state dict that does not fit its architecture says which keys."""
    torch.save({"0.weight": torch.zeros(2, 2), "nonsense": torch.zeros(1)}, "weights.pt")
    line = refused("inspect weights.pt --arch bntools.backends.torch.digits:network")
    assert "nonsense" in line or "1.running_mean" in line


@pytest.mark.parametrize(
    "arch", ["nonsense", "bntools:nonsense", "no_such_module:no_such_module", "bntools.errors:BntoolsError"]
)
def test_arch_that_gives_no_model(refused, desk, arch):
    """An --arch that cannot be imported, or gives no model, is named."""
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "weights.pt")
    assert arch.split(":")[-1] in refused(f"inspect weights.pt --arch {arch}")


@pytest.mark.parametrize("command", [each for each in COMMANDS if each.split()[0] in ("reset", "recalibrate", "fold")])
def test_model_without_bn(refused, desk, command):
    """A model without BN is refused, and asked whether it was folded already."""
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3)).eval(), "plain.pt")
    assert "folded already" in refused(command.format("plain.pt"))


def test_missing_and_empty_data(refused, desk):
    """A folder that is missing or has no images is named."""
    assert "nowhere" in refused("recalibrate model.pt nowhere/")
    Path("empty").mkdir()
    assert "empty" in refused("recalibrate model.pt empty")
    Path("empty/notes.txt").write_text("no image")
    assert "empty" in refused("recalibrate model.pt empty")


def test_unreadable_images_are_skipped_and_counted(run, desk):
    """Images that cannot be read are counted in what is printed, and the others used."""
    whole = Path("data/roll-1/0001.png").read_bytes()
    Path("data/roll-1/0001.png").write_bytes(whole[: len(whole) // 2])
    Path("data/roll-1/0002.png").write_bytes(b"")
    outcome = run("recalibrate model.pt data/")
    assert outcome.status == 0
    first = outcome.out.splitlines()[0]
    assert "38 images" in first
    assert "2 skipped" in first


def test_only_unreadable_images(refused, desk):
    """A folder in which no image can be read is an error."""
    for path in Path("data").rglob("*.png"):
        path.write_bytes(b"\x89PNG")
    assert "data" in refused("recalibrate model.pt data/")


@pytest.mark.parametrize("shape", [(8, 3, 8, 8), (8, 8), (8,), (0, 1, 8, 8)])
def test_wrong_shapes(refused, desk, shape):
    """Arrays whose shape the model cannot take, or without samples, are refused."""
    np.save("wrong.npy", np.zeros(shape, np.float32))
    assert refused("recalibrate model.pt wrong.npy")


def test_nan_in_the_data(refused, desk):
    """NaN in the data names the layer that saw it."""
    images = np.random.default_rng(0).normal(size=(64, 1, 8, 8)).astype(np.float32)
    images[40, 0, 3, 3] = np.nan
    np.save("nan.npy", images)
    line = refused("recalibrate model.pt nan.npy")
    assert "'1'" in line
    assert "batch" in line


def test_read_only_folder(refused, desk, monkeypatch):
    """A folder that nothing can be created in is named before files are changed."""
    opened = os.open

    def read_only(path, flags, *rest, **more):
        if flags & os.O_CREAT:
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", read_only)
    for command in ("recalibrate model.pt data/", "reset model.pt", "reset model.pt --in-place"):
        assert "Permission denied" in refused(command)


def test_output_folder_that_is_missing(refused, desk):
    """An output in a folder that does not exist is refused before any work."""
    assert "no folder nowhere" in refused("recalibrate model.pt data/ -o nowhere/out.pt")
    assert "no folder nowhere" in refused("export model.pt nowhere/out.onnx data")


INTERRUPTED = """
import numpy, os, time
def batches():
    yield numpy.ones((4, 1, 8, 8), 'float32')
    {then}
"""


def test_interrupt_while_reading(refused, desk):
    """Ctrl-C in the middle of the data ends with 130 and one line, and leaves everything as it was."""
    Path("reader_interrupted.py").write_text(INTERRUPTED.format(then="raise KeyboardInterrupt"))
    sys.dont_write_bytecode, before = True, sys.dont_write_bytecode
    try:
        assert refused("recalibrate model.pt reader_interrupted:batches --in-place", status=130) == "interrupted"
    finally:
        sys.dont_write_bytecode = before


def started(line: str, **more) -> subprocess.Popen:
    """A real bntools process in the current folder."""
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "bntools.cli", *line.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **more,
    )


def test_interrupt_of_a_process(desk):
    """SIGINT sent to a running recalibration ends it with 130 and one line, nothing written."""
    Path("reader_waiting.py").write_text(INTERRUPTED.format(then="os.mkdir('reached'); time.sleep(60)"))
    before = contents(desk)
    process = started("recalibrate model.pt reader_waiting:batches")
    for _ in range(600):
        if Path("reached").exists():
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    Path("reached").rmdir()
    assert (process.returncode, err) == (130, "bntools: interrupted\n")
    assert contents(desk) == before


def test_disk_full(desk):
    """A disk that is full while the model is written ends with 1 and one line, nothing left behind."""
    before = contents(desk)

    def small_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = started("recalibrate model.pt data/ --in-place", preexec_fn=small_files)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 1, err
    assert err.count("\n") == 1, err
    assert "model.pt" in err
    assert contents(desk) == before


def test_missing_framework(desk):
    """Without PyTorch a command says what to install."""
    code = "import sys; sys.modules['torch'] = None; from bntools.cli import main; main(['inspect', 'model.pt'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1), done.stderr
    assert "pip install 'bntools[torch]'" in done.stderr


def test_images_of_many_kinds(run, desk):
    """Grey, RGBA, palette, 16-bit and animated images are read, or skipped by name: never an error."""
    folder = desk / "kinds"
    folder.mkdir()
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for mode in ("L", "RGB", "RGBA", "P", "1", "LA"):
        Image.fromarray(pixels).convert(mode).save(folder / f"{mode}.png")
    Image.fromarray(pixels.astype(np.uint16) * 257).save(folder / "I16.png")
    frames = [Image.fromarray(pixels), Image.fromarray(255 - pixels)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    outcome = run("recalibrate model.pt kinds")
    assert outcome.status == 0, outcome.err
    assert "8 images" in outcome.out.splitlines()[0]


@pytest.mark.parametrize("line", ["recalibrate . data", "reset .", "reset /", "recalibrate / data", "inspect ."])
def test_folder_instead_of_a_model(refused, desk, line):
    """A folder where a model file is expected is named as one."""
    assert "is a folder; expected a model file" in refused(line)


def test_absurd_sizes(refused, desk):
    """Images or samples larger than any memory are refused by the option's name."""
    assert "size=(20000, 20000)" in refused("recalibrate model.pt data --size 20000")
    assert "--shape" in refused("fold model.pt -o out.pt --shape 2147483647,2147483647,2147483647")


@pytest.mark.parametrize("line", ["recalibrate model.pt data", "verify model.pt model.pt data"])
def test_late_damage_is_printed(run, desk, line):
    """Images that only reading finds damaged, after the first ones were described, are counted and named."""
    for path in sorted(Path("data/roll-1").glob("*.png")):
        whole = bytearray(path.read_bytes())
        whole[50:70] = bytes(20)
        path.write_bytes(whole)
    for index in range(70):
        Image.new("L", (8, 8), index).save(f"data/more-{index}.png")
    out = run(line).out
    assert "data: 110 found, " in out
    assert " could not be decoded: 00" in out
