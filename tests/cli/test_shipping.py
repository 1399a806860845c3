"""``bntools fold``, ``export`` and ``verify``."""

from __future__ import annotations

import json
import os
from pathlib import Path

import onnx
import torch
from torch import nn

import bntools


def norms(path: str) -> int:
    """How many BN layers a model file has."""
    return len(bntools.inspect(bntools.load(path)))


def test_fold_right_after_recalibrate(run, desk):
    """bntools fold --export model.onnx takes the recalibrated model and its record, with nothing else said."""
    run("recalibrate model.pt data/")
    outcome = run("fold --export model.onnx")
    assert (outcome.status, outcome.err) == (0, "")
    lines = outcome.out.splitlines()
    assert lines[0] == "folding model.recalibrated.pt, the newest of model.recalibrated.pt, model.pt"
    assert lines[1] == "trying it on random input like the data that model.recalibrated.json describes"
    assert lines[2] == "folded 3 of 3 BN layers"
    assert lines[3].startswith("verified on ")
    assert lines[-1] == "wrote model.onnx"
    assert "BatchNormalization" not in {node.op_type for node in onnx.load("model.onnx").graph.node}
    verified = run("verify model.recalibrated.pt model.onnx data/")
    assert (verified.status, verified.err) == (0, "")
    assert "verified on 40 samples" in verified.out
    wrong = run("verify model.pt model.onnx data/ --json")
    assert wrong.status == 3
    assert json.loads(wrong.out)["passed"] is False
    assert "model.onnx does not agree with model.pt" in wrong.err
    assert wrong.err.count("\n") == 1
    assert "model.onnx exists" in run("fold --export model.onnx").err


def test_fold_in_the_own_format(run, desk):
    """bntools fold -o writes a model of the same kind without BN that computes the same."""
    outcome = run("fold model.pt data/ -o folded.pt")
    assert outcome.status == 0
    assert "folded 3 of 3 BN layers" in outcome.out
    assert norms("folded.pt") == 0
    assert run("verify model.pt folded.pt data/").status == 0


def test_kept_layers_have_their_reason(run, desk):
    """Layers that are not folded are listed with the reason, and counted."""
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.BatchNorm2d(2), nn.Sigmoid(), nn.Conv2d(2, 2, 3))
    torch.save(nn.Sequential(model, nn.BatchNorm2d(2)).eval(), "relu.pt")
    lines = run("fold relu.pt --shape 1,12,12 -o folded.pt").out.splitlines()
    assert lines[0] == "trying it on random input of shape 1x12x12"
    assert lines[1] == "folded 1 of 2 BN layers, kept 1:"
    assert lines[2].startswith("  0.2: ")
    assert "relu" in lines[2].lower()


def test_a_folded_model_is_not_written_as_tensors_alone(refused, desk):
    """A state dict of it would not fit the architecture it came with: nobody could load it."""
    assert "tensors alone could not be loaded" in refused("fold model.pt -o folded.safetensors --shape 1,8,8")


def test_fold_chosen_layers(run, desk):
    """--layers folds those alone, and --json tells which."""
    found = json.loads(run("fold model.pt --shape 1,8,8 -o folded.pt --layers 4 --json").out)
    assert found["folded"] == ["4"]
    assert found["check"]["passed"]
    assert norms("folded.pt") == 2


def test_without_record_or_shape(refused, desk):
    """Without a record, DATA or --shape the message says what to give."""
    line = refused("fold --export model.onnx")
    assert "--shape" in line
    assert "DATA" in line
    Path("model.json").write_text('{"layers": []}')
    assert "--shape" in refused("export model.pt model.onnx")


def test_without_a_model(refused, desk):
    """Without a model beside the export's name the message says what was looked for."""
    assert "other.recalibrated.*" in refused("fold --export other.onnx")


def test_layers_do_not_go_with_export(run, desk):
    """An ONNX file has all of its BN folded: --layers with --export is a usage error."""
    assert run("fold --export model.onnx --layers 1").status == 2


def test_export_with_its_options(run, desk):
    """Opset, tolerance and provider are passed on."""
    outcome = run("export model.pt out.onnx --shape 1,8,8 --opset 18 --tolerance 1e-3 --provider cpu --json")
    assert outcome.status == 0, outcome.err
    found = json.loads(outcome.out)
    assert found["check"]["tolerance"] == 1e-3
    assert found["folded"] == ["1", "4", "8"]
    opsets = {entry.domain: entry.version for entry in onnx.load("out.onnx").opset_import}
    assert opsets[""] == 18


def test_a_provider_that_is_not_there(refused, desk):
    """A provider that cannot run is an error that leaves no file, never a fallback."""
    assert "openvino" in refused("export model.pt out.onnx --shape 1,8,8 --provider openvino").lower()


def test_nothing_is_written_unless_it_verifies(refused, desk):
    """An export that misses its tolerance ends with status 3 and no file."""
    assert "tolerance" in refused("export model.pt out.onnx --shape 1,8,8 --tolerance 1e-12", status=3)
    assert "out.onnx" not in os.listdir()


def test_export_in_json_is_one_document(run, desk):
    """fold --export --json prints one document that names the model it chose."""
    run("recalibrate model.pt data/")
    assert json.loads(run("fold --export model.onnx --json").out)["model"] == "model.recalibrated.pt"
    assert "model.onnx" in os.listdir()


def test_wrong_input_shape(refused, desk):
    """An input that the model cannot take is one message."""
    assert refused("fold model.pt --shape 3,8,8 -o folded.pt")
    assert refused("export model.pt out.onnx --shape 8")


def test_exported_program_of_one_batch_size(run, desk):
    """A program exported for batches of four is recalibrated and shipped with nothing said but that size."""
    program = torch.export.export(torch.load("model.pt", weights_only=False), (torch.zeros(4, 1, 8, 8),))
    torch.export.save(program, "static.pt2")
    assert run("recalibrate static.pt2 data --batch-size 4").status == 0
    outcome = run("fold --export static.onnx")
    assert (outcome.status, outcome.err) == (0, "")


def test_arch_serves_the_file_that_needs_it(run, desk):
    """verify takes --arch for a state dict beside a whole model, which needs none."""
    torch.save(torch.load("model.pt", weights_only=False).state_dict(), "weights.pt")
    line = "verify {} {} --shape 1,8,8 --arch bntools.backends.torch.digits:network"
    assert run(line.format("weights.pt", "model.pt")).status == 0
    assert run(line.format("model.pt", "weights.pt")).status == 0


def test_onnx_by_the_wrong_option(run, desk):
    """fold -o model.onnx names the option that writes ONNX."""
    assert "use --export model.onnx" in run("fold model.pt -o model.onnx").err
