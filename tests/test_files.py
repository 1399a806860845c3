"""Files: atomic writing, and what load and save refuse before any back end looks."""

from __future__ import annotations

import copy
import errno
import os
import resource
import signal
import stat
import subprocess
import sys

import pytest
import torch
from torch import nn

import bntools
from bntools import BntoolsError, files


def left_overs(path) -> list[str]:
    """Everything in the folder but the file itself."""
    return sorted(name for name in os.listdir(path.parent) if name != path.name)


def test_atomic_write_replaces_in_one_step(tmp_path):
    """Until the block ends the old file is there; then the new one is, and nothing else."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    with files.atomic_write(path) as temporary:
        temporary.write_text("new")
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".txt"
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert not left_overs(path)


def test_permissions_are_those_of_the_replaced_file(tmp_path):
    """A replaced file keeps its permissions, a new one has those of any new file, also if the writer recreates it."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    path.chmod(0o640)
    with files.atomic_write(path) as temporary:
        temporary.unlink()
        temporary.write_text("new")
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    before = os.umask(0o027)
    try:
        with files.atomic_write(tmp_path / "b.txt") as temporary:
            temporary.write_text("new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "b.txt").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    """Writing to a symbolic link replaces the file that it leads to."""
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.txt").write_text("old")
    link = tmp_path / "link.txt"
    link.symlink_to(tmp_path / "real" / "a.txt")
    with files.atomic_write(link) as temporary:
        temporary.write_text("new")
    assert link.is_symlink()
    assert (tmp_path / "real" / "a.txt").read_text() == "new"


@pytest.mark.parametrize("raised", [ValueError("x"), KeyboardInterrupt(), SystemExit(3), BntoolsError("y")])
@pytest.mark.parametrize("exists", [True, False])
def test_a_failing_block_changes_nothing(tmp_path, raised, exists):
    """Whatever the block raises goes on, the file is as before and nothing is left beside it."""
    path = tmp_path / "a.txt"
    if exists:
        path.write_text("old")
    with pytest.raises(type(raised)), files.atomic_write(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise raised
    assert (path.read_text() == "old") if exists else not path.exists()
    assert not left_overs(path)


@pytest.mark.parametrize("step", ["open", "fsync", "replace"])
def test_a_failing_system_call_changes_nothing(tmp_path, monkeypatch, step):
    """A read-only folder, a full disk and a refused rename are one clear error, with the file as before."""
    path = tmp_path / "a.txt"
    path.write_text("old")

    def fails(*arguments, **named):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(BntoolsError, match=r"Read-only file system .*as before"), files.atomic_write(path) as temporary:
        temporary.write_text("new")
    monkeypatch.undo()
    assert path.read_text() == "old"
    assert not left_overs(path)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_full_disk_changes_nothing(tmp_path, suffix):
    """When the disk takes no more bytes while a model is written, the old file is as before."""
    path = tmp_path / f"model{suffix}"
    bntools.save(nn.Linear(2, 2), path)
    old = path.read_bytes()
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limit[1]))
    try:
        with pytest.raises(BntoolsError, match=r"cannot be written.*: .*File too large"):
            bntools.save(nn.Linear(300, 300), path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == old
    assert not left_overs(path)


FULL = """
import resource, signal, sys, warnings
import torch, bntools
warnings.filterwarnings("ignore", r"`isinstance.treespec, LeafSpec.` is deprecated", FutureWarning)  # PyTorch's own
program = torch.export.export(torch.nn.Linear(100, 100).eval(), (torch.ones(2, 100),))
torch.export.save(program, "model.pt2")
model = bntools.load("model.pt2")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
for room in sys.argv[1:]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(room), resource.RLIM_INFINITY))
    try:
        bntools.save(model, "model.pt2")
    except bntools.BntoolsError as error:
        print(room, error, sep=": ")
"""


def test_a_full_disk_does_not_end_the_process(tmp_path):
    """Where the disk fills up while a .pt2 is written, the error says so: PyTorch alone would abort the process."""
    rooms = ["0", "1000", "42000"]  # bytes
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FULL, *rooms], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = done.stdout.splitlines()
    assert len(said) == len(rooms)
    for room, line in zip(rooms, said, strict=True):
        assert line.startswith(f"{room}: model.pt2: cannot be written: File too large")
    assert os.listdir(tmp_path) == ["model.pt2"]
    torch.export.load(tmp_path / "model.pt2")


def test_targets_that_cannot_be_files(tmp_path):
    """A folder, a device and a missing parent folder are refused in words; the device stays what it is."""
    for target, message in ((tmp_path, "is a folder"), (tmp_path / "no" / "a.pt", "does not exist")):
        with pytest.raises(BntoolsError, match=message), files.atomic_write(target):
            pytest.fail("the block must not run")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BntoolsError, match="no regular file"), files.atomic_write(pipe):
        pytest.fail("the block must not run")
    assert stat.S_ISFIFO(pipe.stat().st_mode)


def test_text_named_onnx(tmp_path):
    """A file that is no ONNX model is refused with what it is."""
    (tmp_path / "a.onnx").write_bytes(b"x")
    with pytest.raises(BntoolsError, match=r"a\.onnx: found text where an ONNX model was expected"):
        bntools.load(tmp_path / "a.onnx")


def test_load_refuses_what_is_no_file(tmp_path):
    """A missing file, a folder, an empty file and an unknown suffix are each said in words."""
    (tmp_path / "empty.pt").touch()
    (tmp_path / "a.docx").write_text("x")
    os.mkfifo(tmp_path / "pipe.pt")
    for name, message in {
        "no.pt": "no such file", ".": "is a folder", "empty.pt": "the file is empty", "a.docx": "unknown kind",
        "pipe.pt": "is no regular file",
    }.items():  # fmt: skip
        with pytest.raises(BntoolsError, match=message):
            bntools.load(tmp_path / name)


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("resnet18", "expected package.module:name"),
        ("no_such_package_x.models:net", "no module 'no_such_package_x'"),
        ("torch.nn:NoSuchLayer", "torch.nn has no 'NoSuchLayer'"),
        ("arch_of_files:broken", "ZeroDivisionError"),
        ("arch_of_files:number", "returned a int; expected an nn.Module"),
        ("arch_of_files:needy", "missing 1 required positional argument"),
        ("arch_broken_import:x", "importing arch_broken_import failed: ValueError: at import"),
        ("arch_needs_other:x", "importing arch_needs_other failed: No module named 'no_such_package_y'"),
    ],
)
def test_arch_that_does_not_work(tmp_path, monkeypatch, arch, message):
    """An arch that cannot be imported, is not there, raises, or builds no module is named with the reason."""
    (tmp_path / "arch_of_files.py").write_text(
        "def broken(): return 1 / 0\ndef number(): return 3\ndef needy(width): return width\n"
    )
    (tmp_path / "arch_broken_import.py").write_text("raise ValueError('at import')")
    (tmp_path / "arch_needs_other.py").write_text("import no_such_package_y")
    monkeypatch.syspath_prepend(tmp_path)
    torch.save(nn.Linear(2, 2).state_dict(), tmp_path / "a.pt")
    with pytest.raises(BntoolsError, match=message) as caught:
        bntools.load(tmp_path / "a.pt", arch=arch)
    assert caught.value.__cause__ is not None or "expected" in message or "no 'NoSuch" in message


def test_arch_is_found_in_the_working_folder(tmp_path, monkeypatch):
    """--arch names a module in the folder one works in, which a console script does not import from by itself."""
    (tmp_path / "mynet_in_cwd.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", os.getcwd())])
    model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    loaded = bntools.load("a.pt", arch="mynet_in_cwd:make")
    assert torch.equal(loaded.weight, model.weight)
    assert os.getcwd() not in sys.path


def test_save_refuses_the_wrong_kind(tmp_path):
    """A module is not saved under a suffix that is not PyTorch's, and what is no model is not saved at all."""
    with pytest.raises(BntoolsError, match=r"use bntools\.export"):
        bntools.save(nn.Linear(2, 2), tmp_path / "a.onnx")
    with pytest.raises(BntoolsError, match="unknown kind of model file"):
        bntools.save(nn.Linear(2, 2), tmp_path / "a.txt")
    with pytest.raises(BntoolsError, match="where a model was expected"):
        bntools.save({"a": 1}, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_origins_are_of_loaded_models_alone(tmp_path):
    """A checkpoint is written around the model that came from it; a copy, and a model that is gone, have no origin."""
    torch.save({"state_dict": nn.Linear(2, 2).state_dict(), "epoch": 7}, tmp_path / "a.pt")
    model = bntools.load(tmp_path / "a.pt", arch=lambda: nn.Linear(2, 2))
    assert files.origin(copy.deepcopy(model)) is None
    bntools.save(model, tmp_path / "b.pt")
    saved = torch.load(tmp_path / "b.pt")
    assert saved["epoch"] == 7
    assert torch.equal(saved["state_dict"]["weight"], model.weight)
    known = len(files._origins)
    del model
    assert len(files._origins) == known - 1


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    """A process that is interrupted while it writes leaves the file as it was and nothing beside it."""
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import sys, os, signal\nfrom bntools import files\n"
        "with files.atomic_write(sys.argv[1]) as temporary:\n"
        "    temporary.write_text('half')\n    os.kill(os.getpid(), signal.SIGINT)\n    import time; time.sleep(5)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60, check=False
    )
    assert "KeyboardInterrupt" in done.stderr
    assert path.read_text() == "old"
    assert not left_overs(path)
