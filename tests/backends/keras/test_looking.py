"""HDF5 files on which HDF5's own library hangs or takes gigabytes: a child looks first, and dies in its place."""

from __future__ import annotations

import os
import sys
import zipfile

import h5py
import keras
import memory_bound
import numpy as np
import pytest

import bntools
from bntools import BntoolsError
from bntools.backends import backend
from bntools.backends.keras import looking

COLLECTION = b"GCOL"  # the global heap, where texts of any length lie
CONTINUATION = bytes.fromhex("10 00 10 00 00 00 00 00")  # an object header goes on at an address, for so many bytes


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A small model as .keras, .h5 and .weights.h5."""
    folder = tmp_path_factory.mktemp("saved")
    net = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2), keras.layers.BatchNormalization()])
    net.save(folder / "model.keras")
    net.save(folder / "model.h5")
    net.save_weights(folder / "model.weights.h5")
    return folder


def endless(content: bytes) -> bytes:
    """A free space of no bytes in the heap, behind which the library looks for the next object for ever."""
    at = content.index(COLLECTION) + 16
    while content[at : at + 2] != bytes(2):  # an object: its number, 0 for free space, and from byte 8 on its size
        at += 16 + -(-int.from_bytes(content[at + 8 : at + 16], "little") // 8) * 8
    return content[: at + 8] + bytes(8) + content[at + 16 :]


def greedy(content: bytes) -> bytes:
    """An object header that goes on for 2 GiB."""
    at = content.index(CONTINUATION) + 16
    return content[:at] + (2 << 30).to_bytes(8, "little") + content[at + 8 :]


def bent(source, target, change):
    """The file, or the HDF5 inside of it, changed."""
    if source.suffix == ".h5":
        target.write_bytes(change(source.read_bytes()))
        return target
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for name in old.namelist():
            new.writestr(name, change(old.read(name)) if name == "model.weights.h5" else old.read(name))
    return target


@pytest.mark.parametrize("change", [endless, greedy])
@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.weights.h5"])
def test_what_its_library_cannot_read_is_refused(saved, tmp_path, monkeypatch, name, change):
    """In words, soon, and without the memory that it would take."""
    monkeypatch.setattr(looking, "SECONDS", 1)
    path = bent(saved / name, tmp_path / name, change)
    words = "does not come to an end" if change is endless else "asks for more memory"
    with memory_bound.at_most(256 << 20):
        for reading in (backend("keras").peek, bntools.load):
            with pytest.raises(BntoolsError, match=f"{name}: a damaged or truncated .*{words}"):
                reading(str(path))


def test_a_child_that_is_never_done_is_left(saved, monkeypatch, tmp_path):
    """Also where it does not compute but wait."""
    script = tmp_path / "waits.py"
    script.write_text("import time; print('begun', flush=True); time.sleep(60)")
    monkeypatch.setattr(looking, "__file__", str(script))
    monkeypatch.setattr(looking, "WAITING", 0.1)
    with pytest.raises(BntoolsError, match=r"does not come to an end in 0\.3 s"):
        backend("keras").peek(str(saved / "model.h5"))


def test_whole_files_pass(saved, tmp_path, monkeypatch):
    """Whatever lies in the folder in which it runs, and however the arrays are stored."""
    for name in ("h5py.py", "io.py", "numpy.py"):
        tmp_path.joinpath(name).write_text(f"open('canary', 'w'); raise RuntimeError({name!r})")
    with h5py.File(tmp_path / "chunked.h5", "w") as file:
        file.create_dataset("packed", data=np.zeros((40, 40)), chunks=(8, 8), compression="gzip")
        file["text"] = "words"
        file["away"] = h5py.ExternalLink("nowhere.h5", "x")
        file["loop"] = file["/"]
    with zipfile.ZipFile(saved / "model.keras") as old, zipfile.ZipFile(tmp_path / "packed.keras", "w") as new:
        for name in old.namelist():
            new.writestr(name, old.read(name), zipfile.ZIP_DEFLATED)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(sys, "path", ["", ".", tmp_path, *sys.path])
    for path in [*saved.iterdir(), tmp_path / "chunked.h5", tmp_path / "packed.keras"]:
        assert looking.child(str(path), 5) == [looking.BEGUN, looking.WHOLE]
    assert not os.path.exists("canary")


@pytest.mark.parametrize("interpreter", [None, "", "/nowhere/python", "/bin/false"])
def test_without_a_child_files_are_read_all_the_same(saved, monkeypatch, interpreter):
    """A program that embeds Python has no interpreter to start."""
    monkeypatch.setattr(sys, "executable", interpreter)
    assert len(backend("keras").peek(str(saved / "model.keras")).records) == 1
