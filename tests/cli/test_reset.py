"""``bntools reset``."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import bntools


def test_resets_a_copy(run, desk):
    """All statistics are 0 and 1 in the new file, and the model is as it was."""
    before = Path("model.pt").read_bytes()
    outcome = run("reset model.pt")
    assert outcome.out == "reset 3 of 3 BN layers\nwrote model.reset.pt\n"
    assert Path("model.pt").read_bytes() == before
    for layer in bntools.inspect(bntools.load("model.reset.pt")):
        assert (layer.updates, abs(layer.mean).max(), layer.var.min(), layer.var.max()) == (0, 0, 1, 1)


def test_resets_only_what_is_named(run, desk):
    """--layers selects, and --json says which layers it were."""
    outcome = run("reset model.pt --layers 4 --in-place --json")
    assert json.loads(outcome.out) == {"model": "model.pt", "output": "model.pt", "reset": ["4"], "untouched": {}}
    assert [layer.updates for layer in bntools.inspect(bntools.load("model.pt"))] == [1, 0, 1]


def test_a_state_dict_stays_one(run, desk):
    """A checkpoint comes back as a checkpoint, its other entries as they were."""
    model = torch.load("model.pt", weights_only=False)
    torch.save({"epoch": 7, "model": model.state_dict()}, "checkpoint.pt")
    assert run("reset checkpoint.pt --arch bntools.backends.torch.digits:network").status == 0
    written = torch.load("checkpoint.reset.pt", weights_only=True)
    assert written["epoch"] == 7
    assert written["model"]["1.running_var"].eq(1).all()


def test_refusals(run, refused, desk):
    """An output that exists, and a name that no layer has, are refused."""
    run("reset model.pt -o done.pt")
    assert "done.pt exists" in refused("reset model.pt -o done.pt")
    assert "did you mean" in refused("reset model.pt --layers 44")
