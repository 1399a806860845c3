"""export: a verified file, by the first exporter whose file is right, or nothing."""

from __future__ import annotations

import copy
import ctypes
import errno
import json
from collections import UserDict, namedtuple
from importlib.metadata import version
from pathlib import Path

import models
import numpy as np
import onnx
import pytest
import shim
import torch
from torch import nn

import bntools
from bntools import BntoolsError, VerificationError, backends, exporting
from bntools.backends.onnx import tidying

torch_backend = backends.backend("torch")
onnx_backend = backends.backend("onnx")
real_export = torch_backend.export


def images(n=4):
    """A tensor of images (n, 3, 8, 8)."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def cnn():
    """A small CNN whose BN layers do something, in train mode but for one layer."""
    torch.manual_seed(0)
    model = models.cnn().train()
    for _ in range(3):
        model(images(8) * 2 + 1)
    model[4].eval()
    return model


def shapes(path):
    """The inputs and outputs of a file with their axes; one that is free is called s0 by PyTorch 2.6, then batch."""
    graph = onnx.load(path).graph
    return {
        value.name: ["batch" if axis.dim_param else axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }


def content(folder):
    """What lies in a folder, by name."""
    return {path.name: path.read_bytes() if path.is_file() else None for path in Path(folder).iterdir()}


@pytest.fixture
def exporters(monkeypatch):
    """Replaces what the two exporters do; the TorchScript one, being quick, stands in for the other."""

    def replaced(**behaviours):
        tried = []

        def export(model, example, path, *, exporter, other=None, opset=None):
            tried.append((exporter, other is not None))
            real_export(model, example, path, exporter="torchscript", other=other, opset=opset)
            behaviours.get(exporter, lambda path: None)(path)

        monkeypatch.setattr(torch_backend, "export", export)
        return tried

    return replaced


def corrupt(path):
    """Make a file wrong: the weight of the last layer is off by a tenth of its scale."""
    model = onnx.load(path)
    tensor = next(one for one in model.graph.initializer if one.name == "8.weight")
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values + 0.1 * np.abs(values).max(), "8.weight"))
    onnx.save(model, path)


def raising(error):
    """An exporter that raises."""

    def behave(path):
        raise error

    return behave


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A CNN, its state before, its verified file by the dynamo exporter, and what export gave."""
    model = cnn()
    before = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    return model, before, path, bntools.export(model, path, images())


def test_verified_file(exported):
    """The file of a plain CNN is folded, verified on several batch sizes, and lies alone in its folder."""
    model, _, path, check = exported
    assert check.passed
    assert check.error < 2e-6
    assert (check.exporter, check.dynamic, check.samples, check.agreement) == ("dynamo", True, 4 + 1 + 2 + 5 + 4 + 4, 1)
    assert set(check.folded) == {"1", "4"}
    assert not check.kept
    assert not any(node.op_type == "BatchNormalization" for node in onnx.load(path).graph.node)
    assert [entry.name for entry in path.parent.iterdir()] == ["model.onnx"]
    assert bntools.verify(model, path, images(7)).passed


def test_batch_axis_is_dynamic(exported):
    """Inputs and outputs of the file take any batch size."""
    assert shapes(exported[2]) == {"input": ["batch", 3, 8, 8], "output": ["batch", 4]}


def test_model_is_left_as_it_was(exported):
    """Values, each module's own mode, hooks and gradient flags of the model are untouched."""
    model, (state, modes), _, _ = exported
    assert [module.training for module in model.modules()] == modes
    assert modes.count(False) == 1
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "forward" not in vars(model)


def test_file_says_what_it_is(exported):
    """The file passes the checker and carries version, source, exporter, what was folded, and the error."""
    _, _, path, check = exported
    onnx.checker.check_model(path, full_check=True)
    said = {entry.key: entry.value for entry in onnx.load(path).metadata_props}
    assert said["bntools.version"] == bntools.__version__
    assert said["bntools.source"] == f"Sequential (torch {version('torch')})"
    assert said["bntools.exporter"] == "dynamo"
    assert json.loads(said["bntools.folded"]) == check.folded
    assert json.loads(said["bntools.kept"]) == {}
    assert float(said["bntools.error"]) == pytest.approx(check.error, rel=1e-3)
    assert said["bntools.verified"].startswith("CPUExecutionProvider")


def test_file_says_nothing_of_the_machine(exported):
    """No path of the machine that exported is in the file, though the exporter writes stack traces."""
    data = exported[2].read_bytes()
    assert b"site-packages" not in data
    assert str(Path.cwd()).encode() not in data


def test_quiet(tmp_path, capfd):
    """An export prints nothing, whatever the exporters print, warn or log."""
    bntools.export(models.TwoInputs(), tmp_path / "m.onnx", {"left": torch.randn(3, 3), "right": torch.randn(3, 2)})
    assert capfd.readouterr() == ("", "")
    assert shapes(tmp_path / "m.onnx") == {"left": ["batch", 3], "right": ["batch", 2], "output": ["batch", 4]}


class Nested(nn.Module):
    """Keyword inputs, one nested and one no tensor; outputs nested, twice the same, the input itself, exact ones."""

    def __init__(self):
        super().__init__()
        self.bn, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 4)

    def forward(self, x, *, pair, sign=1.0, missing=None):
        hidden = self.linear(self.bn(x) * sign + pair[0] - pair[1])
        return {"logits": hidden, "aux": (hidden * 2, {"x": x}), "again": hidden, "top": hidden.argmax(1), "n": 3}


@pytest.mark.parametrize("exporter", torch_backend.EXPORTERS)
def test_nested_inputs_and_outputs(tmp_path, monkeypatch, exporter):
    """Nested inputs and outputs get the names of their places, and constants are baked in, with either exporter."""
    monkeypatch.setattr(torch_backend, "EXPORTERS", (exporter,))
    example = {"x": torch.randn(3, 4), "pair": [np.ones((3, 4)), torch.randn(3, 4)], "sign": -1.0, "missing": None}
    check = bntools.export(Nested(), tmp_path / "m.onnx", example)
    assert check.passed
    assert check.exporter == exporter
    names = ["x", "pair_0", "pair_1", "logits", "aux_0", "aux_1_x", "again", "top"]
    assert list(shapes(tmp_path / "m.onnx")) == names
    assert next(one for one in check.outputs if "top" in one.name).exact


def test_any_mapping_is_an_example(tmp_path, exporters):
    """A mapping that is no dict, with a named tuple in it, is exported like a dict."""
    exporters()
    pair = namedtuple("pair", "a b")
    example = UserDict(x=torch.randn(3, 4), pair=pair(torch.ones(3, 4), torch.randn(3, 4)))
    assert bntools.export(Nested(), tmp_path / "m.onnx", example).dynamic
    assert list(shapes(tmp_path / "m.onnx"))[:3] == ["x", "pair_a", "pair_b"]


def test_first_exporter_wrong(tmp_path, exporters):
    """If the first exporter's file is wrong the second serves, and the result says why."""
    tried = exporters(dynamo=corrupt)
    check = bntools.export(cnn(), tmp_path / "m.onnx", images())
    assert check.passed
    assert check.exporter == "torchscript"
    assert tried == [("dynamo", True), ("torchscript", True)]
    assert len(check.notes) == 1
    assert "dynamo exporter, dynamic batch size: its file does not agree with the model" in check.notes[0]
    assert "first difference at '8'" in check.notes[0]


def test_first_exporter_fails(tmp_path, exporters):
    """If the first exporter fails the second serves, and the result says why."""
    exporters(dynamo=raising(BntoolsError("the dynamo exporter fails: no such operator")))
    check = bntools.export(cnn(), tmp_path / "m.onnx", images())
    assert check.exporter == "torchscript"
    assert check.notes == ("dynamo exporter, dynamic batch size: the dynamo exporter fails: no such operator",)


def test_every_exporter_wrong(tmp_path, exporters):
    """If no file verifies the error names the layer and holds the figures; what was there stays, nothing is left."""
    (tmp_path / "m.onnx").write_bytes(b"before")
    exporters(dynamo=corrupt, torchscript=corrupt)
    with pytest.raises(VerificationError, match=r"for no file verified.*first difference at '8'") as caught:
        bntools.export(cnn(), tmp_path / "m.onnx", images())
    assert caught.value.check is not None
    assert caught.value.check.first_divergence == "8"
    assert caught.value.check.error > 1e-3
    assert content(tmp_path) == {"m.onnx": b"before"}


def test_every_exporter_fails(tmp_path, exporters):
    """If no exporter can export the error holds the causes of all, and nothing is left."""
    tried = exporters(dynamo=raising(BntoolsError("cannot A")), torchscript=raising(BntoolsError("cannot B")))
    with pytest.raises(BntoolsError, match=r"dynamo.*cannot A; torchscript.*cannot B") as caught:
        bntools.export(cnn(), tmp_path / "m.onnx", images())
    assert not isinstance(caught.value, VerificationError)
    assert {str(cause) for cause in caught.value.__cause__.exceptions} == {"cannot A", "cannot B"}
    assert tried == [("dynamo", True), ("torchscript", True), ("dynamo", False), ("torchscript", False)]
    assert content(tmp_path) == {}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
@pytest.mark.parametrize("place", ["exporter", "tidy", "verify", "add_metadata", "replace"])
def test_interrupted(tmp_path, exporters, monkeypatch, place, error):
    """Ctrl-C or a full disk at any moment leaves what was there, and nothing else."""
    (tmp_path / "m.onnx").write_bytes(b"before")
    exporters(**({"dynamo": raising(error)} if place == "exporter" else {}))
    targets = {"tidy": (onnx_backend, "tidy"), "add_metadata": (onnx_backend, "add_metadata")}
    targets |= {"verify": (exporting, "verify"), "replace": (exporting.os, "replace")}

    def fail(*args, **kwargs):
        raise error

    if place in targets:
        monkeypatch.setattr(*targets[place], fail)
    expected = KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else BntoolsError
    with pytest.raises(expected) as caught:
        bntools.export(cnn(), tmp_path / "m.onnx", images())
    if expected is BntoolsError:
        assert "m.onnx: cannot be written: No space left on device" in str(caught.value)
    assert content(tmp_path) == {"m.onnx": b"before"}


def test_replaces(tmp_path, exporters, monkeypatch):
    """An existing file is replaced in one step with its permissions; its weights beside it go when it has gone."""
    exporters()
    monkeypatch.setattr(tidying, "EXTERNAL_ABOVE", 100)
    path = tmp_path / "m.onnx"
    bntools.export(cnn(), path, images())
    first = content(tmp_path)
    assert len(first) == 2
    path.chmod(0o640)
    (tmp_path / "m.data").write_bytes(b"another's")
    assert bntools.export(cnn(), path, images()).passed
    second = content(tmp_path)
    assert len(second) == 3
    assert set(first) & set(second) == {"m.onnx"}
    assert path.stat().st_mode & 0o777 == 0o640
    assert bntools.verify(cnn(), path, images()).passed


@pytest.mark.parametrize(
    ("name", "words"),
    [("m.pt", "expected a name that ends in .onnx"), ("nowhere/m.onnx", "nowhere/m.onnx: cannot be written: No such")],
)
def test_paths(tmp_path, name, words):
    """A path that cannot be written is an error that names it."""
    with pytest.raises(BntoolsError, match=words):
        bntools.export(cnn(), tmp_path / name, images())
    assert content(tmp_path) == {}


def test_example_that_does_not_fit(tmp_path, exporters):
    """A model that fails on the example is an error with its cause, before any exporter is tried."""
    tried = exporters()
    with pytest.raises(BntoolsError, match=r"Sequential fails on the batch \(\(2, 5, 8, 8\)\)"):
        bntools.export(cnn(), tmp_path / "m.onnx", torch.randn(2, 5, 8, 8))
    assert not tried


def test_provider_that_is_not_there(tmp_path, exporters):
    """A provider that is not active is an error before any exporter is tried."""
    tried = exporters()
    with pytest.raises(BntoolsError, match=r"'cuda' .* was asked for and is not active"):
        bntools.export(cnn(), tmp_path / "m.onnx", images(), providers=("cuda",))
    assert not tried
    assert content(tmp_path) == {}


class Reads(nn.Module):
    """Runs on a batch as the example has it only."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(x.reshape(3, 4))


class Bakes(nn.Module):
    """Computes with its batch size as a plain number, which a trace takes for a constant."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x):
        return self.bn(x) * float(x.shape[0])


@pytest.mark.parametrize("model", [Reads(), Bakes()])
def test_batch_size_that_cannot_be_dynamic(tmp_path, model):
    """Where the batch size cannot be dynamic the file is right at the example's, and says so."""
    check = bntools.export(model, tmp_path / "m.onnx", torch.randn(3, 4))
    assert check.passed
    assert not check.dynamic
    assert shapes(tmp_path / "m.onnx")["input"] == [3, 4]
    assert any("batch size" in note for note in check.notes)


def test_one_sample(tmp_path):
    """An example of one sample gives a file that takes more."""
    assert bntools.export(cnn(), tmp_path / "m.onnx", images(1).numpy()).dynamic
    assert bntools.verify(cnn(), tmp_path / "m.onnx", images(5)).passed


@pytest.mark.parametrize("model", [models.Branches(), nn.Sequential(nn.Linear(3, 3), models.Exits())])
def test_decisions_are_not_frozen(tmp_path, model):
    """A model that decides on the values it computes is refused: a trace would hold for the example only."""
    with pytest.raises(BntoolsError, match="reads a computed value into Python"):
        bntools.export(model, tmp_path / "m.onnx", torch.randn(4, 3))
    assert content(tmp_path) == {}


class Peeks(nn.Module):
    """Reads its first value from memory, which PyTorch does not see."""

    def forward(self, x):
        return x * ctypes.c_float.from_address(x.data_ptr()).value


def test_a_file_that_is_right_on_the_example_only(tmp_path):
    """A file is verified on other values than the example's, so that one that holds only there is not written."""
    with pytest.raises(VerificationError, match="torchscript exporter, dynamic batch size: its file does not agree"):
        bntools.export(Peeks(), tmp_path / "m.onnx", torch.randn(4, 3))
    assert content(tmp_path) == {}


@pytest.mark.parametrize(
    ("function", "noted"), [(lambda x: x.log(), False), (lambda x: (x[:, 1:] - x[:, :-1]).log(), True)]
)
def test_values_that_the_model_cannot_take(tmp_path, function, noted):
    """Where the model itself fails on other values than the example's, a note says that these are all it verified."""

    class Function(nn.Module):
        def forward(self, x):
            return function(x)

    example = torch.arange(1.0, 13.0).reshape(3, 4)
    check = bntools.export(Function(), tmp_path / "m.onnx", example)
    assert check.passed
    assert any("verified on the example's own values only" in note for note in check.notes) == noted


class NeedsNoGrad(nn.Module):
    """Gives numbers, which PyTorch refuses for a tensor that needs a gradient."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x):
        if torch.is_grad_enabled():
            raise RuntimeError("only without gradients")
        return self.bn(self.linear(x))


class Recurrent(nn.Module):
    """An LSTM whose output goes through BN over its features; gives its last state as well."""

    def __init__(self):
        super().__init__()
        self.lstm, self.bn = nn.LSTM(6, 8, batch_first=True), nn.BatchNorm1d(8)

    def forward(self, x):
        hidden, (state, _) = self.lstm(x)
        return self.bn(hidden.transpose(1, 2)), state


@pytest.mark.parametrize(
    ("model", "example"),
    [
        (Recurrent(), torch.randn(3, 5, 6)),
        (NeedsNoGrad(), torch.randn(3, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train(), torch.randn(3, 4)),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.ReLU()), images(2)),
        (nn.DataParallel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))), torch.randn(3, 4)),
        (nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).half(), np.ones((3, 4), np.float32)),
        (nn.Sequential(nn.Linear(4, 4)), torch.randn(3, 4)),
    ],
    ids=["recurrent", "no_grad", "dropout", "instance norm", "wrapped", "half", "no BN"],
)
def test_kinds_of_models(tmp_path, model, example):
    """Recurrent models, with dropout, in half precision, wrapped, without BN or only under no_grad are exported."""
    check = bntools.export(model, tmp_path / "m.onnx", example)
    assert check.passed
    # that of PyTorch 2.9 cannot take nn.LSTM
    assert check.exporter == "dynamo" or isinstance(model, Recurrent)
    assert check.error < (5e-3 if next(model.parameters()).dtype == torch.float16 else 2e-6)


def test_residual_network(tmp_path):
    """A ResNet-18 with statistics of its own comes out folded, to float32 rounding, and takes any batch size."""
    torchvision = shim.import_torchvision()
    torch.manual_seed(0)
    model = torchvision.models.resnet18(num_classes=10)
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 32, 32))
    check = bntools.export(model, tmp_path / "m.onnx", torch.randn(2, 3, 32, 32))
    assert check.exporter == "dynamo"
    assert check.dynamic
    assert len(check.folded) == 20
    assert check.error < 1e-5


def test_hooks_of_the_model(tmp_path):
    """What the user's own hook on the model does is part of what is exported."""
    model = nn.Sequential(nn.Linear(4, 4))
    model.register_forward_hook(lambda module, given, output: output * 3)
    check = bntools.export(model, tmp_path / "m.onnx", torch.ones(2, 4))
    assert check.passed
    assert len(model._forward_hooks) == 1


@pytest.mark.parametrize("exporter", torch_backend.EXPORTERS)
def test_identical_biases(tmp_path, monkeypatch, exporter):
    """Convolutions and kept BN layers with biases all alike, which an exporter once mixed up, come out right."""
    # https://github.com/pytorch/pytorch/issues/166797
    monkeypatch.setattr(torch_backend, "EXPORTERS", (exporter,))
    torch.manual_seed(0)
    block = (lambda: nn.Conv2d(3, 3, 3, padding=1), nn.ReLU, lambda: nn.BatchNorm2d(3), nn.ReLU)  # nothing to fold
    model = nn.Sequential(*(make() for _ in range(4) for make in block))
    with torch.no_grad():
        for number, layer in enumerate(model):
            if hasattr(layer, "bias"):
                layer.bias.fill_(0.1)
            if hasattr(layer, "running_mean"):
                layer.running_mean.fill_(0.01 * number)
    check = bntools.export(model, tmp_path / "m.onnx", images())
    assert check.error < 2e-6
    assert list(check.kept) == ["2", "6", "10", "14"]
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators.count("BatchNormalization") == operators.count("Conv") == 4


def test_attention_network(tmp_path):
    """A small LeViT, convolutions and attention with BN everywhere, comes out folded and takes any batch size."""
    shim.import_torchvision()
    levit = pytest.importorskip("timm.models.levit")
    torch.manual_seed(0)
    model = levit.Levit(img_size=32, embed_dim=(32, 48), depth=(1, 1), num_heads=(2, 2), key_dim=8, num_classes=5)
    for _ in range(3):
        model.train()(torch.randn(8, 3, 32, 32))
    check = bntools.export(model, tmp_path / "m.onnx", torch.randn(2, 3, 32, 32))
    assert (check.exporter, check.dynamic) == ("dynamo", True)
    assert (len(check.folded), len(check.kept)) == (18, 0)
    assert check.error < 1e-5


def test_exported_program(tmp_path):
    """A model that was loaded from a .pt2 file is exported like the one it came from."""
    model = cnn().eval()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.export.save(program, tmp_path / "m.pt2")
    check = bntools.export(bntools.load(tmp_path / "m.pt2"), tmp_path / "m.onnx", images())
    assert check.folded == ["4"]
    assert "conv has no place for a bias" in check.kept["1"]
    assert bntools.verify(model, tmp_path / "m.onnx", images(3)).passed


def test_distributed_model(tmp_path, exporters):
    """A model in DistributedDataParallel is exported as the model inside."""
    exporters()
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(cnn())
        check = bntools.export(wrapped, tmp_path / "m.onnx", images())
    finally:
        dist.destroy_process_group()
    assert check.dynamic
    assert set(check.folded) == {"1", "4"}
    assert bntools.verify(wrapped.module, tmp_path / "m.onnx", images(3)).passed


@pytest.mark.parametrize(("opset", "exporter"), [(13, "torchscript"), (21, "dynamo")])
def test_opset(tmp_path, opset, exporter):
    """The file is in the opset asked for, by the exporter that can."""
    assert bntools.export(cnn(), tmp_path / "m.onnx", images(), opset=opset).exporter == exporter
    assert onnx.load(tmp_path / "m.onnx").opset_import[0].version == opset


def test_opset_that_nobody_writes(tmp_path):
    """An opset that no exporter can write is an error, never another opset."""
    with pytest.raises(BntoolsError, match=r"where opset 99 was asked for.*Unsupported onnx_opset_version: 99"):
        bntools.export(cnn(), tmp_path / "m.onnx", images(), opset=99)
