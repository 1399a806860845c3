"""``bntools inspect``."""

from __future__ import annotations

import json

import torch
from torch import nn


def save(model: nn.Module, path) -> None:
    """Pickle a model whole."""
    torch.save(model, path)


def test_what_all_layers_share_is_said_once(run, desk):
    """Kind, eps, momentum and updates stand above the table when all layers agree, ranges in it."""
    outcome = run("inspect model.pt")
    assert outcome.status == 0
    assert outcome.err == ""
    count, shared, header, *rows = outcome.out.splitlines()
    assert count == "3 BN layers, 160 channels"
    assert shared == "all: BatchNorm2d, eps 1e-05, momentum 0.1, updates 1, frozen no"
    assert header.split() == ["layer", "channels", "mean", "variance", "problems"]
    assert [row.split()[:2] for row in rows[:3]] == [["1", "32"], ["4", "64"], ["8", "64"]]


def test_problems_are_listed_by_layer(run, desk):
    """Each problem stands on a line of its own after the names of its layers."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.BatchNorm2d(2, eps=1e-3, momentum=0.5))
    model[1].running_var[1] = -1
    save(model, "ill.pt")
    lines = run("inspect ill.pt").out.splitlines()
    assert "eps" in lines[2]
    assert "problems in 2 of 2 layers:" in lines
    assert any(line.startswith("  1: negative variance in 1 of 2 channels") for line in lines)
    assert any(line.startswith("  2: never updated") for line in lines)


def test_a_problem_of_many_layers_is_one_line(run, desk):
    """What many layers suffer from is said once, with the first names and the count of the others."""
    save(nn.Sequential(*(nn.BatchNorm2d(2) for _ in range(5))), "fresh.pt")
    *_, last = run("inspect fresh.pt").out.splitlines()
    assert last.startswith("  0, 1, 2 and 2 more: never updated")


def test_a_healthy_model(run, desk):
    """A model without problems is told so."""
    model = torch.load("model.pt", weights_only=False)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            module.num_batches_tracked.fill_(1000)
    save(model, "healthy.pt")
    assert run("inspect healthy.pt").out.splitlines()[-1] == "no problems found"


def test_json_is_all_there_is(run, desk):
    """--json prints one JSON document that holds every layer, with null where a number is none."""
    model = torch.load("model.pt", weights_only=False)
    model[1].running_mean[0] = torch.nan
    save(model, "nan.pt")
    found = json.loads(run("inspect nan.pt --json").out)
    assert [layer["name"] for layer in found["layers"]] == ["1", "4", "8"]
    first = found["layers"][0]
    assert first["features"] == 32
    assert first["momentum"] == 0.1
    assert first["training"] == "normalizes with each batch's statistics and moves the stored ones"
    assert first["ranges"]["mean"] == {"min": None, "max": None}
    assert any("NaN" in problem for problem in first["problems"])


def test_layers_choose(run, desk):
    """--layers takes names and globs, several times."""
    found = json.loads(run("inspect model.pt --json --layers 8 --layers '[1-3]'").out)
    assert [layer["name"] for layer in found["layers"]] == ["1", "8"]


def test_a_state_dict_with_arch(run, desk):
    """A state dict is inspected with the factory of its architecture."""
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "weights.pt")
    outcome = run("inspect weights.pt --arch bntools.backends.torch.digits:network")
    assert outcome.out.startswith("3 BN layers")


def test_a_model_without_bn(run, refused, desk):
    """A model without BN is refused with the question whether it was folded."""
    save(nn.Sequential(nn.Linear(2, 2)), "plain.pt")
    assert "folded already" in refused("inspect plain.pt")
    assert json.loads(run("inspect model.pt --json").out)["model"] == "model.pt"
