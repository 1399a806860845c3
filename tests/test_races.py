"""Several writers, and files that change while they are read or written."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import numpy as np
import onnx
import onnx_files
import pytest
from torch import nn

import bntools
from bntools import BntoolsError, datafiles, files
from bntools.rows import Rows
from bntools.swapping import atomic_folder


@pytest.mark.parametrize("links", [True, False])
def test_what_appears_meanwhile_is_not_overwritten(tmp_path, monkeypatch, links):
    """A file that comes into being while another is written under its name stays, on any file system."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))
    path = tmp_path / "a.txt"
    with files.atomic_write(path, overwrite=False) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"
    path.unlink()
    with pytest.raises(BntoolsError, match="txt exists"), files.atomic_write(path, overwrite=False) as temporary:  # noqa: PT012
        temporary.write_text("new")
        path.write_text("another's")
    assert path.read_text() == "another's"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_folder_that_appears_meanwhile_is_not_overwritten(tmp_path):
    """The same of folders."""
    folder = tmp_path / "out"
    with pytest.raises(BntoolsError, match="out exists"), atomic_folder(folder, overwrite=False) as temporary:  # noqa: PT012
        (temporary / "a").write_text("new")
        folder.mkdir()
        (folder / "a").write_text("another's")
    assert (folder / "a").read_text() == "another's"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("exchanged", [True, False])
def test_a_folder_takes_the_place_of_another(tmp_path, monkeypatch, exchanged):
    """A folder is replaced whole, in one step where the system has one, and nothing is left of the old one."""
    if not exchanged:
        monkeypatch.setattr("bntools.swapping._exchanged", lambda *_: False)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "new").write_text("new")
    assert os.listdir(tmp_path) == ["out"]
    assert os.listdir(tmp_path / "out") == ["new"]


@pytest.mark.parametrize("verb", ["save", "save_stats", "export"])
def test_verbs_refuse_to_overwrite_when_told_so(tmp_path, verb):
    """With overwrite=False every verb that writes leaves what is there."""
    model, suffix = onnx_files.small(), ".safetensors" if verb == "save_stats" else ".onnx"
    path = tmp_path / f"a{suffix}"
    path.write_text("another's")
    example = {"export": [onnx_files.images(2)]}.get(verb, [])
    first = [model, path] if verb != "save_stats" else [bntools.statistics(model), path]
    with pytest.raises(BntoolsError, match="exists and was not to be overwritten"):
        getattr(bntools, verb)(*first, *example, overwrite=False)
    assert path.read_text() == "another's"
    assert os.listdir(tmp_path) == [path.name]


WRITER = """
import sys
import bntools
model, stats = bntools.load("first.onnx"), bntools.load_stats(sys.argv[1])
bntools.apply(model, stats)
for _ in range(20):
    bntools.save(model, "out.onnx")
"""


def test_processes_write_the_same_model_with_external_weights(tmp_path):
    """Of several processes that write one file each leaves a whole model, with its own weights, and no data behind."""
    onnx_files.keep(onnx_files.small(), tmp_path / "first.onnx", external=True)
    model, means = onnx_files.small(), []
    for seed in range(2):
        bntools.recalibrate(model, [onnx_files.images(seed=seed)])
        bntools.save_stats(model, tmp_path / f"{seed}.safetensors")
        means.append([layer.mean.tolist() for layer in bntools.inspect(model)])
    writers = [
        subprocess.Popen([sys.executable, "-c", WRITER, f"{seed}.safetensors"], cwd=tmp_path) for seed in range(2)
    ]
    assert [writer.wait() for writer in writers] == [0, 0]
    assert [layer.mean.tolist() for layer in bntools.inspect(str(tmp_path / "out.onnx"))] in means
    onnx.checker.check_model(onnx.load(tmp_path / "out.onnx"))
    assert len(list(tmp_path.glob("*.data"))) == 1


def test_a_turn_waits_for_another_and_nests(tmp_path):
    """Another thread waits for its turn in a folder; the same one has it already."""
    done = []

    def other() -> None:
        with datafiles.turn(tmp_path):
            done.append("other")

    with datafiles.turn(tmp_path), datafiles.turn(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.05)
        done.append("first")
    thread.join()
    assert done == ["first", "other"]
    assert not list(tmp_path.iterdir())


def test_a_model_that_changes_while_it_is_read(tmp_path, monkeypatch):
    """A file that somebody writes to while it is read is refused, whatever came of reading it."""
    path = tmp_path / "a.pt"
    bntools.save(nn.Linear(2, 2), path)
    from bntools.backends import torch as backend

    load = backend.load

    def slow(*arguments, **named):
        found = load(*arguments, **named)
        bntools.save(nn.Linear(2, 2), path)
        return found

    monkeypatch.setattr(backend, "load", slow)
    with pytest.raises(BntoolsError, match=r"a\.pt: was changed while it was read"):
        bntools.load(path)


def test_files_with_two_names_and_through_links(tmp_path):
    """Writing to one of two names of a file leaves the other as it was."""
    one, two = tmp_path / "one.pt", tmp_path / "two.pt"
    bntools.save(nn.Linear(2, 2), one)
    os.link(one, two)
    before = two.read_bytes()
    bntools.save(nn.Linear(3, 3), one)
    assert two.read_bytes() == before
    assert bntools.load(one).in_features == 3


def test_a_folder_that_vanishes(tmp_path):
    """Where the folder is removed while a file is written, the error says so."""
    folder = tmp_path / "gone"
    folder.mkdir()
    with pytest.raises(BntoolsError, match="be written: No such file"), files.atomic_write(folder / "a.pt") as one:  # noqa: PT012
        one.unlink()
        folder.rmdir()


def test_numbers_that_change_while_they_are_read(tmp_path):
    """An array on the disk that is cut short or written to while batches of it are read is refused by name."""
    for change in ("cut", "written"):
        path = tmp_path / f"{change}.npy"
        np.save(path, np.ones((64, 1000), np.float32))
        batches = iter(bntools.data.open(path, batch_size=4))
        next(batches)
        if change == "cut":
            os.truncate(path, 5000)
        else:
            with open(path, "r+b") as file:
                file.seek(50_000)
                file.write(b"another")
        with pytest.raises(BntoolsError, match=rf"{change}\.npy: was changed while it was read"):
            list(batches)


def test_an_array_that_is_cut_between_a_look_and_a_read(tmp_path):
    """Rows that are gone when they are read are a refusal: mapped into memory they would end the process."""
    path = tmp_path / "a.npy"
    np.save(path, np.ones((64, 1000), np.float32))
    rows = Rows(path, np.load(path, mmap_mode="r"))
    os.truncate(path, 5000)
    assert rows[np.arange(1)].sum() == 1000
    with pytest.raises(BntoolsError, match=r"a\.npy: was changed while it was read"):
        rows[np.arange(4)]


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("shape", [(7,), (7, 3), (7, 2, 1, 3)])
def test_rows_of_an_array_on_the_disk(tmp_path, shape, order):
    """Are those of the array, in whatever order it lies there."""
    path, array = tmp_path / "a.npy", np.random.default_rng(0).normal(size=shape).astype(">f4", order=order)
    np.save(path, array)
    given = np.concatenate([np.asarray(batch) for batch in bntools.data.open(path, batch_size=3)])
    assert sorted(map(bytes, given)) == sorted(map(bytes, array.astype(given.dtype)))


def test_an_array_that_is_replaced_is_read_to_its_end(tmp_path):
    """Where another file takes the place of an array, batches of the old one go on."""
    path = tmp_path / "a.npy"
    np.save(path, np.ones((8, 3), np.float32))
    batches = iter(bntools.data.open(path, batch_size=4))
    next(batches)
    np.save(tmp_path / "b.npy", np.zeros((2, 3), np.float32))
    os.replace(tmp_path / "b.npy", path)
    assert float(np.min(next(batches))) == 1
