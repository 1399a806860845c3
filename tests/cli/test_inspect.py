"""``bntools inspect``."""

from __future__ import annotations

import json
import sys

import click
import pytest
import torch
from listing import contents
from torch import nn

import bntools
from bntools.cli import diagnosis


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


def test_with_data(run, desk):
    """The data is described, layers come worst first, then modes, parts and advice; no file changes."""
    before = contents(desk)
    outcome = run("inspect model.pt data")
    assert (outcome.status, outcome.err) == (0, "")
    assert "no problems found" not in outcome.out
    described, measured, header, *rows = outcome.out.splitlines()
    assert described.startswith("data: 40 images 1x8x8; scaled to 0..1")
    assert measured.startswith("3 BN layers measured on 40 samples")
    assert header.split() == ["layer", "drift", "+-", "ch", "mean", "std", "KL", "fixes"]
    drifts = [float(row.split()[1].replace(",", "")) for row in rows[:3]]
    assert drifts == sorted(drifts, reverse=True)
    assert "outputs in eval mode against train mode, on the same samples, by batch size:" in rows
    assert [row.split()[:2] for row in rows if row.startswith("roll-")] == [["roll-1", "25"], ["roll-2", "15"]]
    assert any(row.startswith("1. ") for row in rows)
    assert any("problems in 3 of 3 layers" in row for row in rows)
    assert contents(desk) == before


def test_with_data_as_json(run, desk):
    """--json has all figures: those of the layers' records, and those that were measured, per channel too."""
    found = json.loads(run("inspect model.pt data --json --max-samples 30 --layers 1 --histogram 1").out)
    assert found["samples"] == 30
    (layer,) = found["layers"]
    assert layer["problems"]
    assert len(layer["mean_shift"]) == len(layer["measured"]["var"]) == layer["features"] == 32
    assert sum(layer["histogram"]["counts"]) == 30 * 8 * 8 * 32
    assert found["untouched"].keys() == {"4", "8"}
    assert [mode["batch_size"] for mode in found["modes"]] == [1, 2, 8, None]
    assert [domain["name"] for domain in found["domains"]] == ["roll-1", "roll-2"]
    assert found["input"]["samples"] == 30
    assert found["advice"][0]["action"]


def test_the_lines_of_an_advice_can_be_typed(run, desk):
    """An advice names the command with model, data and options as given, in text and JSON, and it runs."""
    model = torch.load("model.pt", weights_only=False)
    model[1].running_mean[0] = torch.nan
    save(model, "my model.pt")
    outcome = run("inspect 'my model.pt' data --size 8 --batch-size 20 --max-samples 30 --layers 1 --layers 4")
    line = "bntools recalibrate 'my model.pt' data --layers 1 --layers 4 --size 8 --batch-size 20"
    assert f"       {line}" in outcome.out.splitlines()
    assert run(line.removeprefix("bntools ")).status == 0
    assert torch.isfinite(torch.load("my model.recalibrated.pt", weights_only=False)[1].running_mean).all()
    found = json.loads(run("inspect 'my model.pt' data --json").out)
    assert found["advice"][0]["how"] == "bntools recalibrate 'my model.pt' data"


@pytest.mark.parametrize("option", ["--histogram 1", "--training-batch 8", "--to-inference"])
def test_options_that_need_data(run, desk, option):
    """What only a diagnosis has a use for is a usage error without data."""
    outcome = run(f"inspect model.pt {option}")
    assert outcome.status == 2
    assert "give DATA" in outcome.err


@pytest.fixture(scope="module")
def diagnosed():
    """A diagnosis of two layers with long names, one of which has drifted far."""
    parts = {f"a_long_name_of_a_module_{i}": nn.ModuleDict({"normalization": nn.BatchNorm1d(2)}) for i in range(2)}
    model = nn.ModuleDict(parts)

    def forward(model, batch):
        for part in model.values():
            batch = part["normalization"](batch)
        return batch

    x = torch.randn(20, 2, generator=torch.Generator().manual_seed(0)) * 30 + 100
    return bntools.inspect(model, [x], forward=forward)


@pytest.mark.parametrize("colourless", [False, True])
def test_on_a_terminal(diagnosed, capsys, monkeypatch, colourless):
    """80 columns are enough, long names keep their ends, severity has a colour, and NO_COLOR is respected."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.delenv("NO_COLOR", raising=False)
    if colourless:
        monkeypatch.setenv("NO_COLOR", "1")
    diagnosis.show(diagnosed)
    out = capsys.readouterr().out
    assert ("[1;31m" in out) is not colourless
    plain = [line for line in click.unstyle(out).splitlines() if not line.startswith("       ")]
    assert max(map(len, plain)) <= 80
    assert sum("…" in line and "malization " in line for line in plain) == 2
