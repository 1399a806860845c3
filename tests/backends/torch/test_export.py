"""PyTorch's exporters: what they are given, and what they say when they fail."""

from __future__ import annotations

import models
import onnx
import pytest
import torch
from torch import nn

from bntools import BntoolsError
from bntools.backends.torch.export import export, flattened
from bntools.backends.torch.running import eval_mode


def names(path):
    """Inputs, outputs and initializers of a file."""
    graph = onnx.load(path).graph
    return [[one.name for one in values] for values in (graph.input, graph.output, graph.initializer)]


def test_batch_norm_stays_visible(tmp_path):
    """The TorchScript exporter fuses no BN, and the file's weights have the names of the model's parameters."""
    model = models.cnn()
    for value in model.state_dict().values():  # unlike each other: this exporter merges equal ones
        value.copy_(torch.rand(value.shape))
    export(model, torch.randn(2, 3, 8, 8), tmp_path / "m.onnx", exporter="torchscript")
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert operators.count("BatchNormalization") == 2
    expected = {name for name in model.state_dict() if "num_batches" not in name}
    assert names(tmp_path / "m.onnx")[:2] == [["input"], ["output"]]
    assert expected == set(names(tmp_path / "m.onnx")[2])


def test_axes(tmp_path):
    """Axes that differ between two examples are dynamic, also those of outputs that are no batch axis."""

    class Pairs(nn.Module):
        def forward(self, x, table):
            return (x[:, None] * x[None]).flatten(0, 1), x + table.sum()

    small, large = ({"x": torch.randn(n, 3), "table": torch.randn(4)} for n in (2, 5))
    export(Pairs(), small, tmp_path / "m.onnx", exporter="torchscript", other=large)
    graph = onnx.load(tmp_path / "m.onnx").graph
    axes = {
        value.name: [axis.dim_param or axis.dim_value for axis in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert axes == {"x": ["batch", 3], "table": [4], "output_0": ["output_0_dim_0", 3], "output_1": ["batch", 3]}


def test_flattened():
    """The model as a function of tensors gives its own outputs, and belongs to a copy."""
    model = models.TwoInputs()
    batch = {"left": torch.randn(3, 3), "right": torch.randn(3, 2)}
    with eval_mode(model):
        flat = flattened(model, batch)
        (output,) = flat.module(*flat.tensors)
        assert torch.equal(output, model(**batch))
    assert flat.inputs == ["left", "right"]
    assert list(flat.outputs) == ["output"]
    assert "forward" not in vars(model)
    assert dict(flat.module.named_parameters()).keys() == dict(model.named_parameters()).keys()


def test_names_are_unique():
    """Outputs of one name, or of the name of an input, get names of their own."""

    class Same(nn.Module):
        def forward(self, x):
            return {"a_b": x + 1, "a": {"b": x + 2}, "x": x, "0 %": x}

    assert list(flattened(Same(), {"x": torch.ones(1)}).outputs) == ["a_b", "a_b_", "output_x", "0__"]


def test_nothing_to_export(tmp_path):
    """A model that returns no tensor is refused."""
    with pytest.raises(BntoolsError, match="Identity returns no tensors"):
        export(nn.Identity(), {"input": None}, tmp_path / "m.onnx", exporter="torchscript")


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_failing_exporter(tmp_path, capfd, exporter):
    """An exporter that fails prints nothing; its error is one line, and what it printed is a note of the cause."""

    class Unsupported(nn.Module):
        def forward(self, x):
            print("I am traced")
            return torch.linalg.eigvals(x)

    with pytest.raises(BntoolsError, match=f"the {exporter} exporter fails") as caught:
        export(Unsupported(), torch.randn(2, 2), tmp_path / "m.onnx", exporter=exporter)
    assert "\n" not in str(caught.value)
    assert "I am traced" in "".join(caught.value.__cause__.__notes__)
    assert capfd.readouterr() == ("", "")
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("exporter", ["dynamo", "torchscript"])
def test_modes_after_a_failure(tmp_path, exporter):
    """Modes, flags and values are as before when an exporter fails."""

    class Fails(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn, self.dropout = nn.BatchNorm1d(3), nn.Dropout()

        def forward(self, x):
            return torch.linalg.eigvals(self.dropout(self.bn(x)))

    model = Fails().train()
    model.dropout.eval()
    with pytest.raises(BntoolsError):
        export(model, torch.randn(3, 3), tmp_path / "m.onnx", exporter=exporter)
    assert [module.training for module in model.modules()] == [True, True, False]
    assert int(model.bn.num_batches_tracked) == 0
    assert type(model.bn.weight) is nn.Parameter


class Calls(nn.Module):
    """Gives what a function makes of its input."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (
            lambda x: x * (2 if x[x > 0].shape[0] > 3 else 1),
            r"size depends on computed values \(index\).*test_export.py",
        ),
        (lambda x: x * len(x.nonzero()), r"size depends on computed values \(nonzero\)"),
        (lambda x: x * sum(x[0].tolist()), r"reads a computed value into Python \(tolist\)"),
        (lambda x: x * float(x.numpy().max()), r"reads a computed value into Python \(numpy\)"),
        (lambda x: x * (2 if x.max() > 1 else 1), r"reads a computed value into Python \(if, float, int, item\)"),
    ],
)
def test_a_trace_freezes_nothing(tmp_path, function, words):
    """What a trace would take for a constant though it depends on values is refused, with its module."""
    model = nn.Sequential(nn.Linear(3, 3), Calls(function))
    with pytest.raises(BntoolsError, match=f"module '1' .*{words}"):
        export(model, torch.randn(4, 3), tmp_path / "m.onnx", exporter="torchscript")


@pytest.mark.parametrize("function", [lambda x: x[x > 0].sum(), lambda x: x if x.shape[0] > 2 else x * 2])
def test_a_trace_may_hold(tmp_path, function):
    """A size that depends on values but stays in the graph is traced, and so is a decision on the input's shape."""
    export(Calls(function), torch.randn(4, 3), tmp_path / "m.onnx", exporter="torchscript")
    assert (tmp_path / "m.onnx").exists()
