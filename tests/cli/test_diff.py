"""``bntools diff``."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import torch

import bntools


def test_says_what_differs(run, desk):
    """The layers that differ, worst first, with a status of 0."""
    model = bntools.load("model.pt")
    model[4].running_mean += 1
    model[1].eps = 1e-3
    torch.save(model, "other.pt")
    outcome = run("diff model.pt other.pt")
    assert outcome.status == 0
    lines = outcome.out.splitlines()
    assert lines[0].split() == ["layer", "drift", "mean", "std", "scale", "shift"]
    assert lines[1].split()[0] == "4"
    assert "1: eps 1e-05 against 0.001" in lines
    assert lines[-1].startswith("2 of 3 BN layers differ, drift up to ")
    found = json.loads(run("diff model.pt other.pt --json").out)
    assert (found["same"], found["matched"], len(found["layers"])) == (False, "by name", 3)
    assert found["layers"][0]["eps"] == [1e-5, 1e-3]
    assert len(found["layers"][1]["mean_shift"]) == 64


def test_statistics_lost_in_an_average(run, desk):
    """A checkpoint of averaged weights, whose statistics nobody averaged, is told without --arch."""
    model = bntools.load("model.pt")
    average = copy.deepcopy(model)
    bntools.reset(average)
    torch.save({"ema": {f"module.{key}": value for key, value in average.state_dict().items()}}, "ema.pt")
    out = run("diff model.pt ema.pt").out
    assert "in 3 of 3 layers the second has mean 0 and variance 1, as if never trained" in out
    run("stats save model.pt -o site.safetensors")
    factory = "--arch bntools.backends.torch.digits:network"
    run(f"stats apply ema.pt site.safetensors {factory} -o whole.pt")
    assert "3 BN layers: no difference\n" in run("diff model.pt whole.pt").out
    assert run(f"diff model.pt whole.pt {factory}").out == "3 BN layers: no difference\n"


def test_mappings(run, refused, desk):
    """--map takes pairs, globs and files of them."""
    model = bntools.load("model.pt")
    torch.save({f"net.{key}": value for key, value in model.state_dict().items()}, "net.pt")
    assert "matched by name, but for the prefix 'net.'" in run("diff model.pt net.pt").out
    assert "matched by --map" in run("diff model.pt net.pt --map '*=net.*'").out
    Path("map.txt").write_text("# old=new\n1=net.1\n4 = net.4\n")
    assert json.loads(run("diff model.pt net.pt --map map.txt --json").out)["only_in_a"] == ["8"]
    Path("map.json").write_text('{"8": "net.8"}')
    outcome = run("diff model.pt net.pt --map map.txt --map map.json --json")
    assert json.loads(outcome.out)["same"]
    Path("map.json").write_text('{"8": 3}')
    assert "expected lines OLD=NEW" in refused("diff model.pt net.pt --map map.json")
    assert "did you mean" in refused("diff model.pt net.pt --map 9=net.9")
    assert run("diff model.pt net.pt --map nonsense").status == 2


def test_refusals(refused, desk):
    """Files that are missing, no models, or have nothing in common are refused."""
    assert "none.pt: no such file" in refused("diff model.pt none.pt")
    assert "images.npy" in refused("diff model.pt images.npy")
    torch.save(torch.nn.BatchNorm1d(3), "one.pt")
    assert "give --map OLD=NEW" in refused("diff model.pt one.pt")


def test_a_model_without_bn_is_no_model_without_differences(run, desk):
    """Where one has no BN layers, nothing was compared, and that is said."""
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 3)), "none.pt")
    out = run("diff model.pt none.pt").out
    assert "only in model.pt: 1, 4, 8" in out
    assert "nothing was compared" in out
    assert "no difference" not in out
