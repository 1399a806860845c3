"""``--html FILE``: reports of the commands."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from onnx_files import keep, small

from bntools.cli import records


def title(path: str) -> str:
    """What a report is called."""
    return Path(path).read_text().partition("<title>")[2].partition("</title>")[0]


def test_each_command_writes_its_report(run, desk):
    """recalibrate, fold, export and verify say what they wrote; the report names files and the command."""
    lines = {
        "recalibrate model.pt data --html a.html": "BN recalibration",
        "fold model.pt -o folded.pt --shape 1,8,8 --html b.html": "BN fold",
        "export small.onnx out.onnx --html c.html": "BN export",
        "verify model.pt folded.pt --shape 1,8,8 --html d.html": "Verification",
        "inspect model.pt data --max-samples 12 --html e.html": "BN diagnosis",
    }
    keep(small(), desk / "small.onnx")
    for line, kind in lines.items():
        outcome = run(line)
        assert outcome.status == 0, outcome.err
        assert f"wrote {line.split()[-1]}" in outcome.out.splitlines()
        assert title(line.split()[-1]) == kind
        assert f"bntools {line}" in Path(line.split()[-1]).read_text()


def test_a_report_of_layers_that_cannot_all_be_measured(run, desk):
    """Without --histogram a report shows what arrives at layers that are measured, whatever others there are."""
    model = torch.nn.Sequential(torch.nn.InstanceNorm2d(1, track_running_stats=True), torch.nn.BatchNorm2d(1))
    torch.save(model, "mixed.pt")
    outcome = run("inspect mixed.pt data --max-samples 12 --html mixed.html")
    assert outcome.status == 0, outcome.err
    assert "Histogram of what 1 receives" in Path("mixed.html").read_text()


def test_json_stays_one_document(run, desk):
    """With --json the report is written too, and stdout holds nothing else than JSON."""
    assert json.loads(run("verify model.pt model.pt --shape 1,8,8 --html d.html --json").out)["passed"]
    assert title("d.html") == "Verification"


@pytest.mark.parametrize(
    "line", ["inspect model.pt data", "recalibrate model.pt data", "verify model.pt model.pt data"]
)
def test_an_existing_report_is_refused(refused, run, desk, line):
    """A report is not overwritten unless --force says so, and nothing is written or computed before that is known."""
    Path("a.html").write_text("mine")
    assert "a.html exists" in refused(f"{line} --html a.html")
    assert "no folder" in refused(f"{line} --html nowhere/a.html")


def test_force_overwrites_a_report(run, desk):
    """--force replaces a report."""
    Path("a.html").write_text("mine")
    assert run("verify model.pt model.pt --shape 1,8,8 --html a.html --force").status == 0
    assert title("a.html") == "Verification"


def test_only_html(run, desk):
    """A report never lands on a model: another suffix is a usage error, as is a report on nothing."""
    assert run("recalibrate model.pt data --force --html model.pt").status == 2
    assert "give DATA" in run("inspect model.pt --html a.html").err
    assert "a.html" not in os.listdir()


def test_models_that_differ_have_a_report(run, desk):
    """verify and export end with status 3 where outputs differ, and the report says where; no model is written."""
    keep(small(), desk / "small.onnx")
    model = torch.load("model.pt", weights_only=False)
    with torch.no_grad():
        next(model.parameters()).mul_(2)
    torch.save(model, "other.pt")
    assert run("verify model.pt other.pt --shape 1,8,8 --html a.html").status == 3
    assert "The models do not agree" in Path("a.html").read_text()
    outcome = run("export small.onnx out.onnx --tolerance 1e-12 --html b.html")
    assert outcome.status == 3
    assert "out.onnx, which was not written" in Path("b.html").read_text()
    assert "out.onnx" not in os.listdir()


def test_model_and_report_are_written_together(refused, desk, monkeypatch):
    """Where the model cannot be written there is no report either."""

    def fails(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(records, "write_both", fails)
    assert "No space left" in refused("recalibrate model.pt data --max-samples 4 --html a.html")
