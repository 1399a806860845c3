"""``--device`` and ``--autocast``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import bntools


def statistics(path):
    """The running statistics in a model file."""
    return {k: v for k, v in torch.load(path, weights_only=False).state_dict().items() if "running" in k}


def test_autocast_measures_what_the_deployment_computes(run, desk):
    """The statistics are those of the library under autocast; the record says where and how they were measured."""
    assert run("recalibrate model.pt data --autocast bfloat16 --device cpu").status == 0
    record = json.loads(Path("model.recalibrated.json").read_text())
    assert (record["device"], record["autocast"]) == ("cpu", "bfloat16")
    model = bntools.load("model.pt")
    with torch.autocast("cpu", torch.bfloat16):
        bntools.recalibrate(model, bntools.data.open("data", batch_size=32))
    torch.testing.assert_close(
        statistics("model.recalibrated.pt"), {k: v for k, v in model.state_dict().items() if "running" in k}
    )


def test_a_gpu_is_taken_and_named(run, desk, gpu):
    """Without --device a GPU is used where there is one: one line on stderr says so, and how to do without."""
    found = run("recalibrate model.pt data")
    assert (found.status, found.err) == (0, "computing on cuda:1 (--device cpu for the CPU)\n")
    assert json.loads(Path("model.recalibrated.json").read_text())["device"] == "cuda:1"
    assert run("recalibrate model.pt data --force --device cpu").err == ""
    assert run("inspect model.pt data").err == "computing on cuda:1 (--device cpu for the CPU)\n"
    assert run("recalibrate --per-domain model.pt data").status == 0
    assert json.loads(Path("model.sites/record.json").read_text())["device"] == "cuda:1"


def test_what_fails_on_a_gpu_that_nobody_asked_for_says_so(run, desk, gpu, monkeypatch):
    """The cure for a model that runs on the CPU alone stands in the message."""

    def fails(*_, **__):
        raise bntools.BntoolsError("the model failed on batch 0: RuntimeError: two devices")

    monkeypatch.setattr(bntools, "recalibrate", fails)
    found = run("recalibrate model.pt data")
    assert found.status == 1
    assert found.err.endswith("two devices (on cuda:1; --device cpu computes on the CPU)\n")


@pytest.mark.parametrize(
    ("line", "status", "message"),
    [
        ("recalibrate model.pt data --device cuda:99", 1, "found device 'cuda:99', on which this PyTorch"),
        ("recalibrate model.pt data --device 'GPU 1'", 2, "expected a device such as cpu, cuda, cuda:1 or mps"),
        ("recalibrate model.pt data --autocast float8", 2, "'float8' is not one of 'float16', 'bfloat16'"),
        ("recalibrate model.onnx data --device cpu", 2, "model.onnx runs in ONNX Runtime"),
        ("inspect model.keras data --autocast float16", 2, "model.keras runs in Keras"),
        ("inspect model.pt --autocast float16", 2, "--autocast is for a diagnosis: give DATA"),
    ],
)
def test_what_cannot_be_is_refused(run, desk, line, status, message):
    """Before anything is computed, and without a trace."""
    before = sorted(Path.cwd().iterdir())
    found = run(line)
    assert found.status == status
    assert message in " ".join(found.err.split())
    assert sorted(Path.cwd().iterdir()) == before
