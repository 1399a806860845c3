"""``bntools stats`` and ``bntools recalibrate --per-domain``."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx_files
import pytest
import torch
from keras_nets import residual_net
from listing import contents

import bntools


def test_save_show_apply(run, desk):
    """A file of kilobytes that tells what it is, and brings its statistics into the model they were taken from."""
    outcome = run("stats save model.pt --samples 200 --note 'hall 2'")
    size = Path("model.stats.safetensors").stat().st_size
    assert outcome.out.splitlines() == [
        "statistics of 3 BN layers of a torch model, measured on 200 samples",
        f"wrote model.stats.safetensors, {size:,} bytes",
    ]
    assert size < 4000
    shown = run("stats show model.stats.safetensors").out
    assert "hall 2" in shown
    assert "fingerprint " in shown
    assert json.loads(run("stats show model.stats.safetensors --json").out)["samples"] == 200
    model = bntools.load("model.pt")
    run("reset model.pt")
    outcome = run("stats apply model.reset.pt model.stats.safetensors -o back.pt")
    assert outcome.out == "applied model.stats.safetensors to 3 BN layers\nwrote back.pt\n"
    for name, value in bntools.load("back.pt").state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


@pytest.mark.parametrize("name", ["model.onnx", "model.keras"])
def test_other_frameworks(run, name, tmp_path, monkeypatch):
    """ONNX and Keras files go the same way."""
    monkeypatch.chdir(tmp_path)
    if name == "model.onnx":
        onnx_files.keep(onnx_files.small(), Path(name))
    else:
        residual_net().save(name)
    run(f"stats save {name} -o site.safetensors")
    assert run(f"reset {name} --in-place").status == 0
    assert run(f"stats apply {name} site.safetensors").status == 0
    written = name.replace(".", ".applied.")
    assert run(f"diff {written} site.safetensors").out.endswith("no difference\n")


def test_refusals(run, refused, desk):
    """What exists, what is no such file, and statistics of other weights are refused; the last on demand applied."""
    run("stats save model.pt -o site.safetensors")
    assert "exists" in refused("stats save model.pt -o site.safetensors")
    assert "expected that suffix" in refused("stats save model.pt -o site.pt")
    assert "not of statistics" not in refused("stats apply model.pt images.npy")
    model = bntools.load("model.pt")
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] += 1
    torch.save(model, "tuned.pt")
    assert "site.safetensors: the statistics do not fit the model: its weights" in refused(
        "stats apply tuned.pt site.safetensors"
    )
    outcome = run("stats apply tuned.pt site.safetensors --other-weights --json")
    assert json.loads(outcome.out)["output"] == "tuned.applied.pt"
    assert "exists" in refused("stats apply tuned.pt site.safetensors --other-weights")
    assert run("stats apply tuned.pt site.safetensors --in-place -o x.pt").status == 2


@pytest.fixture
def sites(desk) -> Path:
    """Images of two sites, one folder each."""
    files = sorted(Path("data").rglob("*.png"))
    for index, path in enumerate(files[:24]):
        place = Path("sites", "ab"[index % 2], path.name)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return Path("sites")


def test_a_file_for_each_domain(run, sites):
    """Each holds what the domain alone gives, weighed against the model's own; the model's file stays as it is."""
    before = Path("model.pt").read_bytes()
    outcome = run("recalibrate model.pt sites --per-domain --prior 5")
    assert outcome.status == 0, outcome.err
    assert outcome.out.endswith("wrote 2 files of statistics and record.json to model.sites\n")
    assert sorted(path.name for path in Path("model.sites").iterdir()) == [
        "a.safetensors",
        "b.safetensors",
        "record.json",
    ]
    assert Path("model.pt").read_bytes() == before
    run("recalibrate model.pt sites/b --prior 5")
    assert run("diff model.recalibrated.pt model.sites/b.safetensors").out == "3 BN layers: no difference\n"
    record = json.loads(Path("model.sites/record.json").read_text())
    assert (record["domains"]["a"]["samples"], record["source"]["file"]) == (12, "model.pt")
    assert record["domains"]["b"]["fingerprint"] == bntools.load_stats("model.sites/b.safetensors").fingerprint
    model = bntools.load("model.pt")
    with bntools.use(model, "model.sites/b.safetensors"):
        assert bntools.diff(model, "model.recalibrated.pt").same


def test_all_domains_or_none(run, refused, sites):
    """A domain that cannot be read or measured is named, and nothing is written."""
    np.save(sites / "c.npy", np.full((4, 1, 8, 8), np.nan, np.float32))
    assert refused("recalibrate model.pt sites --per-domain").startswith("c: ")
    (sites / "c.npy").unlink()
    (sites / "d").mkdir()
    assert "sites/d" in refused("recalibrate model.pt sites --per-domain")
    (sites / "d").rmdir()
    shutil.copy(sites / "a" / next((sites / "a").iterdir()).name, sites / "stray.png")
    assert "stray.png" in refused("recalibrate model.pt sites --per-domain")
    assert "is no folder" in refused("recalibrate model.pt images.npy --per-domain")
    assert run("recalibrate model.pt sites --per-domain --in-place").status == 2
    assert run("recalibrate model.pt sites --per-domain --html report.html").status == 2


def test_only_such_folders_are_replaced(run, refused, sites):
    """--force replaces files of an earlier time, never a folder of something else."""
    run("recalibrate model.pt sites --per-domain")
    assert "exists" in refused("recalibrate model.pt sites --per-domain")
    shutil.rmtree(sites / "b")
    assert run("recalibrate model.pt sites --per-domain --force").status == 0
    assert not Path("model.sites/b.safetensors").exists()
    before = contents(sites)
    assert "not replaced" in refused("recalibrate model.pt sites --per-domain -o sites --force")
    assert contents(sites) == before
    Path("model.sites/mine.txt").write_text("notes")
    assert "holds 'mine.txt'" in refused("recalibrate model.pt sites --per-domain --force")
    assert Path("model.sites/mine.txt").read_text() == "notes"
