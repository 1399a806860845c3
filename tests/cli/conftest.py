"""A model file, images of another camera, and a way to type commands beside them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from listing import contents
from runner import invoked

from bntools.backends.torch.digits import network
from bntools.cli import digits


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status and what it printed."""

    status: int
    out: str
    err: str


@pytest.fixture(scope="session")
def prepared(tmp_path_factory) -> Path:
    """A folder with ``model.pt``, 40 PNGs in ``data`` and the same images in ``images.npy``."""
    folder = tmp_path_factory.mktemp("prepared")
    found = digits.load()
    torch.manual_seed(0)
    model = network()
    model(torch.from_numpy(digits.inputs(digits.seen(found.ink[:200]))))
    torch.save(model.eval(), folder / "model.pt")
    digits.write_folder(digits.seen(found.ink[:40], "contrast"), folder / "data", a_roll=25)
    return folder


@pytest.fixture
def desk(prepared, tmp_path, monkeypatch) -> Path:
    """The current folder of a test, with its own copies of the model and the images."""
    shutil.copytree(prepared, tmp_path / "desk")
    monkeypatch.chdir(tmp_path / "desk")
    return tmp_path / "desk"


def bntools(line: str) -> Outcome:
    """Run ``bntools LINE`` in this process; an exception that is not an exit is a failure of the test."""
    result = invoked(line)
    return Outcome(result.exit_code, result.stdout, result.stderr)


@pytest.fixture
def run():
    """Runs a command line and returns how it ended."""
    return bntools


@pytest.fixture
def refused(run):
    """Runs a command line that must be refused with one line on stderr, changing no file; returns the line."""

    def check(line: str, status: int = 1) -> str:
        before = contents(Path.cwd())
        outcome = run(line)
        assert outcome.status == status, (outcome.status, outcome.out, outcome.err)
        assert contents(Path.cwd()) == before
        assert outcome.err.startswith("bntools: ")
        assert outcome.err.count("\n") == 1, outcome.err
        return outcome.err.removeprefix("bntools: ").rstrip("\n")

    return check
