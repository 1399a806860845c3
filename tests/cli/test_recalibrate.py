"""``bntools recalibrate``."""

from __future__ import annotations

import hashlib
import json
import os
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import bntools
from bntools.cli import digits, records


def statistics(path: str) -> dict[str, torch.Tensor]:
    """The running statistics in a model file."""
    state = torch.load(path, weights_only=False).state_dict()
    return {key: value for key, value in state.items() if "running" in key}


def test_writes_the_model_and_a_record(run, desk):
    """The recalibrated model and its record appear beside the model, which stays as it was."""
    before = Path("model.pt").read_bytes()
    outcome = run("recalibrate model.pt data/")
    assert (outcome.status, outcome.err) == (0, "")
    assert Path("model.pt").read_bytes() == before
    assert sorted(os.listdir()) == ["data", "model.pt", "model.recalibrated.json", "model.recalibrated.pt"]
    lines = outcome.out.splitlines()
    assert lines[0] == "data/: 40 images 1x8x8; scaled to 0..1"
    assert lines[-2].startswith("recalibrated 3 BN layers on 40 samples, residual ")
    assert lines[-1] == "wrote model.recalibrated.pt and model.recalibrated.json"


def test_statistics_are_those_of_the_folder(run, desk):
    """The statistics written are those that the library finds on the same images as one array."""
    run("recalibrate model.pt data/ --batch-size 7")
    model = torch.load("model.pt", weights_only=False)
    images = digits.inputs(digits.seen(digits.load().ink[:40], "contrast"))
    bntools.recalibrate(model, [images])
    for key, value in statistics("model.recalibrated.pt").items():
        torch.testing.assert_close(value, model.state_dict()[key], rtol=1e-4, atol=1e-5)


def test_worst_layer_first(run, desk):
    """The table has the layer that drifted most on top."""
    lines = run("recalibrate model.pt data/").out.splitlines()
    drifts = [float(line.split()[1]) for line in lines[2:5]]
    assert drifts == sorted(drifts, reverse=True)
    assert lines[1].split()[:2] == ["layer", "drift"]


def test_the_record_says_what_was_done(run, desk):
    """The record holds versions, command, source with its hash, input, and every layer before and after."""
    run("recalibrate model.pt data/ --seed 3 --max-samples 30")
    record = json.loads(Path("model.recalibrated.json").read_text())
    assert record["bntools"] == bntools.__version__
    assert record["versions"]["torch"] == version("torch")
    assert record["command"] == "bntools recalibrate model.pt data/ --seed 3 --max-samples 30"
    digest = hashlib.sha256(Path("model.pt").read_bytes()).hexdigest()
    assert record["source"] == {"file": "model.pt", "sha256": digest}
    assert record["output"] == "model.recalibrated.pt"
    assert record["input"]["measured"]["shape"] == [1, 8, 8]
    assert (record["method"], record["samples"], record["untouched"]) == ("exact", 30, {})
    assert record["residual"] < 1e-4
    before, after = statistics("model.pt"), statistics("model.recalibrated.pt")
    for layer in record["layers"]:
        key = f"{layer['name']}.running_mean"
        np.testing.assert_array_equal(np.float32(layer["before"]["mean"]), before[key].numpy())
        np.testing.assert_array_equal(np.float32(layer["after"]["mean"]), after[key].numpy())
        assert layer["drift"] > 0


def test_json_is_the_record(run, desk):
    """--json prints the record and nothing else."""
    printed = json.loads(run("recalibrate model.pt data/ --json").out)
    assert printed == json.loads(Path("model.recalibrated.json").read_text())


def test_layers_and_untouched(run, desk):
    """Layers that were not chosen keep their statistics."""
    record = json.loads(run("recalibrate model.pt data/ --layers 4 --json").out)
    assert [layer["name"] for layer in record["layers"]] == ["4"]
    before, after = statistics("model.pt"), statistics("model.recalibrated.pt")
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == {"4.running_mean", "4.running_var"}


@pytest.mark.parametrize("option", ["--method precise", "--method ema", "--prior 100", "--no-check", "--memory 1GiB"])
def test_options_reach_the_library(run, desk, option):
    """Method, prior, memory and --no-check are passed on: the record shows it."""
    plain = json.loads(run("recalibrate model.pt data/ --json -o plain.pt").out)
    record = json.loads(run(f"recalibrate model.pt data/ --json {option}").out)
    if "--method" in option:
        assert record["method"] == option.split()[1]
    if option == "--no-check":
        assert record["residual"] is None
    if option == "--prior 100":
        assert record["layers"][0]["drift"] < plain["layers"][0]["drift"] / 2
    if option == "--memory 1GiB":
        after, same = (np.array(each["layers"][-1]["after"]["var"]) for each in (record, plain))
        np.testing.assert_allclose(after, same, rtol=1e-5)


def test_normalization_of_images_is_recorded(run, desk):
    """Mean and standard deviation for the images are applied and recorded."""
    plain = json.loads(run("recalibrate model.pt data/ --json -o plain.pt").out)
    record = json.loads(run("recalibrate model.pt data/ --json --mean 0.25 --std 0.5").out)
    assert record["input"]["options"]["mean"] == [0.25]
    mean, seen = (each["input"]["measured"]["mean"][0] for each in (plain, record))
    assert seen == pytest.approx((mean - 0.25) / 0.5, rel=1e-5)


def test_channels_follow_the_model(run, desk):
    """Colour images are read as grey for a model that takes one channel."""
    (desk / "colour").mkdir()
    for index in range(4):
        pixels = np.random.default_rng(index).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(desk / "colour" / f"{index}.png")
    assert "1x8x8" in run("recalibrate model.pt colour").out
    assert "3 channels" in run("recalibrate model.pt colour --channels 3 -o c.pt").err


def test_named_output(run, desk):
    """-o names the model, and its record goes beside it."""
    assert run("recalibrate model.pt data/ -o other.pth").status == 0
    assert {"other.pth", "other.json"} <= set(os.listdir())


def test_in_place_replaces_the_model_and_its_own_record(run, desk):
    """--in-place replaces the model, and the second time also the record of the first."""
    before = Path("model.pt").read_bytes()
    assert run("recalibrate model.pt data/ --in-place").status == 0
    assert Path("model.pt").read_bytes() != before
    assert run("recalibrate model.pt data/ --in-place --max-samples 20").status == 0
    assert json.loads(Path("model.json").read_text())["samples"] == 20


def test_in_place_spares_a_json_file_of_somebody_else(refused, desk):
    """A model.json that is no record is not overwritten by --in-place."""
    Path("model.json").write_text('{"layers": 3}')
    assert "model.json exists" in refused("recalibrate model.pt data/ --in-place")


def test_existing_outputs_need_force(run, refused, desk):
    """An existing model or record is refused before any work, and replaced with --force."""
    run("recalibrate model.pt data/")
    assert "model.recalibrated.pt exists" in refused("recalibrate model.pt data/")
    Path("model.recalibrated.pt").unlink()
    assert "model.recalibrated.json exists" in refused("recalibrate model.pt no-such-data")
    assert run("recalibrate model.pt data/ --force").status == 0


def no_second_names(source, target):
    """A file system without second names."""
    raise OSError(95, "Operation not supported")


@pytest.mark.parametrize("in_place", ["", "--in-place"])
@pytest.mark.parametrize("broken", ["record", "model"])
def test_both_files_or_neither(refused, desk, monkeypatch, broken, in_place):
    """If the model or its record cannot be written, neither is, and a replaced file is back."""
    ending = ".json" if broken == "record" else ".pt"
    healing: list[str] = []

    def full(step, source, target):
        if str(target).endswith(ending) and not healing:
            healing.append(target)
            raise OSError(28, "No space left on device")
        return step(source, target)

    # A new file gets its name by the one, a replaced file by the other, to which a failing link also turns.
    monkeypatch.setattr(os, "replace", partial(full, os.replace))
    if not in_place:
        monkeypatch.setattr(os, "link", no_second_names)
    assert "No space left on device" in refused(f"recalibrate model.pt data/ {in_place}")
    assert healing


def test_records_survive_reading_back(tmp_path):
    """A record is read back as it was written; other JSON files and broken ones are no records."""
    record = {"bntools": "1", "input": {"a": float("nan")}, "layers": [{"name": "a"}, {"name": "b", "drift": 0.5}]}
    path = tmp_path / "model.json"
    path.write_text(records.text(record))
    assert records.read(path) == {**record, "input": {"a": None}}
    assert len([line for line in path.read_text().splitlines() if '"name"' in line]) == 2
    for text in ("[1, 2]", '{"other": 1}', "{", "\x00"):
        path.write_text(text)
        assert records.read(path) is None
    assert records.read(tmp_path / "missing.json") is None
    assert json.loads(records.text({"bntools": "1", "layers": []})) == {"bntools": "1", "layers": []}
