"""verify: all outputs of two models, and where they part."""

from __future__ import annotations

import copy
from collections import UserDict
from dataclasses import replace

import models
import numpy as np
import onnx
import pytest
import torch
from torch import nn

import bntools
from bntools import BntoolsError, backends
from bntools.backends.onnx import running
from bntools.noise import caught
from bntools.verification import default_tolerance


def images(n=6):
    """A tensor of images (n, 3, 8, 8)."""
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def cnn():
    """A small CNN whose BN layers do something."""
    torch.manual_seed(0)
    model = models.cnn()
    for _ in range(3):
        model(images() * 2 + 1)
    return model.eval()


@pytest.fixture(scope="session")
def files(cnn, tmp_path_factory):
    """The CNN as PyTorch's exporters write it: BN visible, and BN fused by the exporter."""
    folder = tmp_path_factory.mktemp("files")
    with caught():
        batch = torch.export.Dim("batch")
        for name, shapes in (("dynamo", None), ("dynamic", ({0: batch},))):
            program = torch.onnx.export(cnn, (images(),), dynamo=True, optimize=False, dynamic_shapes=shapes)
            program.save(folder / f"{name}.onnx", external_data=name == "dynamo")
        for name, training in (("fused", torch.onnx.TrainingMode.EVAL), ("visible", torch.onnx.TrainingMode.PRESERVE)):
            torch.onnx.export(cnn, images(), folder / f"{name}.onnx", dynamo=False, training=training)
    return folder


class Outputs(nn.Module):
    """Gives what a function makes of its input, in train and eval mode alike."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def differing(model, layer):
    """A copy of the model with one layer's weight off by a tenth of its scale."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        weight = other.get_submodule(layer).weight
        weight += 0.1 * weight.abs().max()
    return other


def corrupted(path, initializer):
    """The model of a file, with one initializer off by a tenth of its scale."""
    model = onnx.load(path)
    corrupt(model, initializer)
    return model


def corrupt(model, initializer):
    """Put one initializer off by a tenth of its scale."""
    tensor = next(one for one in model.graph.initializer if one.name == initializer)
    values = onnx.numpy_helper.to_array(tensor)
    tensor.CopyFrom(onnx.numpy_helper.from_array(values + 0.1 * np.abs(values).max(), initializer))


def test_equal(cnn):
    """A model agrees with its copy: no error, all classes equal, nothing to say."""
    check = bntools.verify(cnn, copy.deepcopy(cnn), images())
    assert check.passed
    assert (check.error, check.agreement, check.samples, check.provider) == (0, 1, 6, "cpu")
    assert (check.reason, check.first_divergence, check.optimization, check.notes) == (None, None, None, ())
    assert [(one.name, one.shape, one.dtype) for one in check.outputs] == [("output", (6, 4), "float32")]
    assert str(check).startswith("verified on 6 samples: error 0.0e+00")


@pytest.mark.parametrize("layer", ["0", "1", "3", "4", "8"])
def test_names_the_layer(cnn, layer):
    """The first layer whose output differs is named, whichever it is."""
    check = bntools.verify(cnn, differing(cnn, layer), images())
    assert not check.passed
    assert check.first_divergence == layer
    assert "more than the tolerance of 1e-04" in check.reason
    assert f"first difference at '{layer}'" in str(check)


def test_names_the_layer_behind_a_branch():
    """A difference in one branch is named, though a branch that runs later agrees."""

    class Branched(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right, self.head = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x):
            return self.head(self.left(x) + self.right(x))

    model = Branched()
    assert bntools.verify(model, differing(model, "left"), torch.randn(4, 3)).first_divergence == "left"


def test_names_the_layer_that_only_some_samples_reach():
    """A difference that the first sample does not show is traced with the whole batch."""

    class Clips(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Identity(), nn.Linear(1, 1)
            self.clip = nn.Hardtanh(-1, 1)

        def forward(self, x):
            return self.second(self.clip(x))

    model, other = Clips(), Clips()
    other.load_state_dict(model.state_dict())
    other.clip.max_val = 2
    check = bntools.verify(model, other, torch.tensor([[0.5], [1.5]]))
    assert check.first_divergence == "clip"


def test_folded_layers_are_no_divergence(cnn):
    """A convolution that has absorbed its BN is not where two models part."""
    folded = differing(cnn, "8")
    fused = torch.nn.utils.fusion.fuse_conv_bn_eval(folded[0], folded[1])
    folded[0], folded[1] = fused, nn.Identity()
    check = bntools.verify(cnn, folded, images())
    assert not check.passed
    assert check.first_divergence == "8"


@pytest.mark.parametrize("name", ["dynamo", "visible", "fused"])
def test_files_agree(cnn, files, name):
    """What PyTorch's exporters write of a plain CNN agrees with it to float32 rounding."""
    check = bntools.verify(cnn, files / f"{name}.onnx", images())
    assert check.passed
    assert check.error < 2e-6
    assert check.provider == "CPUExecutionProvider"
    assert check.optimization in ("off", "default")


@pytest.mark.parametrize("layer", ["0", "3", "8"])
@pytest.mark.parametrize("name", ["dynamo", "visible"])
def test_corrupted_weight_in_a_file(cnn, files, name, layer):
    """A corrupted weight in a file is detected, and its layer named."""
    check = bntools.verify(cnn, corrupted(files / f"{name}.onnx", f"{layer}.weight"), images())
    assert not check.passed
    assert check.first_divergence == layer


def test_corrupted_weight_in_a_fused_file(cnn, files):
    """In a file whose convolutions have absorbed their BN, the corrupted one is named and not the first."""
    model = onnx.load(files / "fused.onnx")
    convolutions = [node for node in model.graph.node if node.op_type == "Conv"]
    assert not [node for node in model.graph.node if node.op_type == "BatchNormalization"]
    corrupt(model, convolutions[1].input[1])
    assert bntools.verify(cnn, model, images()).first_divergence == "3"


def test_between_files(files):
    """Between two files the first value that differs is named; the files themselves agree."""
    path = files / "dynamo.onnx"
    assert bntools.verify(path, str(files / "fused.onnx"), images()).passed
    check = bntools.verify(path, corrupted(path, "3.weight"), images())
    assert not check.passed
    assert check.first_divergence == "conv2d_1"


def test_runtime_optimizer_is_wrong(cnn, files, monkeypatch):
    """A file that is right and a runtime that is not: the default level is reported, and where it parts."""
    opened = running.open_session

    def wrong(source, name, providers, *, optimize, folder=None, lean=False):
        model = onnx.load(source) if isinstance(source, str) else onnx.load_from_string(source)
        if optimize:
            corrupt(model, "3.weight")
        return opened(model.SerializeToString(), name, providers, optimize=optimize, folder=folder)

    monkeypatch.setattr(running, "open_session", wrong)
    check = bntools.verify(cnn, files / "dynamic.onnx", images())
    assert not check.passed
    assert check.optimization == "default"
    assert check.first_divergence == "conv2d_1"


def test_every_output_counts():
    """A difference in the second output alone is found and named."""
    reference = Outputs(lambda x: (x, {"deep": [x * 2, x.sum(1)]}))
    candidate = Outputs(lambda x: (x, {"deep": [x * 2, x.sum(1) * 1.01]}))
    check = bntools.verify(reference, candidate, torch.rand(3, 4))
    assert not check.passed
    assert check.error == pytest.approx(0.01, rel=1e-3)
    assert "output[1]['deep'][1]" in check.reason
    assert [one.error < 1e-6 for one in check.outputs] == [True, True, False]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda x: (x, x), "2 outputs (output[0], output[1]) where the reference has 1 (output)"),
        (lambda x: x[:, :2], "shape (3, 2) where the reference has (3, 4)"),
        (lambda x: x.long(), "dtype int64 where the reference has float32"),
        (lambda x: x / 0 * 0, "the candidate itself gives NaN in 12 of 12 values"),
        (lambda x: x / 0, "12 of 12 values are infinite in one model only"),
    ],
)
def test_incomparable_outputs(function, words):
    """Outputs that cannot be compared do not pass, whatever the tolerance, and the reason says why."""
    check = bntools.verify(Outputs(lambda x: x), Outputs(function), torch.rand(3, 4) + 1, tolerance=1e9)
    assert not check.passed
    assert check.error == float("inf")
    assert words in check.reason


def test_integer_outputs_are_exact():
    """An index that is off by one among large ones fails, whatever the tolerance."""
    reference = Outputs(lambda x: (x, (x * 1000).long()))
    candidate = Outputs(lambda x: (x, (x * 1000).long() + (x == x.max())))
    check = bntools.verify(reference, candidate, torch.rand(50, 4), tolerance=1.0)
    assert not check.passed
    assert "1 of 200 values of an exact output (int64) differ" in check.reason


def test_last_batch_counts():
    """A difference in the last of many batches is found, and the samples are counted over all."""
    reference, candidate = Outputs(lambda x: x), Outputs(lambda x: x + (x > 5))
    batches = [torch.rand(4, 3), torch.rand(4, 3), torch.full((2, 3), 6.0)]
    assert bntools.verify(reference, candidate, batches[:2]).passed
    check = bntools.verify(reference, candidate, batches)
    assert (check.passed, check.samples) == (False, 10)


@pytest.mark.parametrize(
    "batches",
    [
        images(),
        images().numpy(),
        images().double().numpy(),
        images().split(4),
        [images(2), (images(3), "label"), [images(1)]],
        iter([images(4), images(2)]),
    ],
    ids=["tensor", "array", "float64", "tuple", "list", "iterator"],
)
def test_forms_of_batches(cnn, files, batches):
    """An array is one batch, anything else but a dict an iterable of batches: also the tuple that split gives."""
    check = bntools.verify(cnn, corrupted(files / "dynamic.onnx", "8.weight"), batches)
    assert (check.passed, check.samples) == (False, 6)


def test_keyword_batches():
    """A dict is one batch of keyword inputs."""
    model = models.TwoInputs()
    batch = {"left": torch.randn(5, 3), "right": torch.randn(5, 2)}
    assert bntools.verify(model, copy.deepcopy(model), batch).samples == 5
    assert not bntools.verify(model, differing(model, "b"), batch).passed


def test_forward(cnn):
    """``forward`` runs modules that have their own calling convention."""
    seen = []

    def forward(model, batch):
        seen.append(model)
        return model(batch[0] + batch[1])

    other = differing(cnn, "8")
    assert not bntools.verify(cnn, other, [(images(), images())], forward=forward).passed
    assert {id(model) for model in seen} == {id(cnn), id(other)}


def test_eval_mode_is_forced_and_put_back():
    """Models in train mode are compared in eval mode; each module's own mode, hooks and statistics stay."""
    model = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 2))
    model.train()[1].eval()
    other = differing(model, "3")
    before = copy.deepcopy(model.state_dict())
    assert bntools.verify(model, copy.deepcopy(model).eval(), torch.randn(9, 3)).passed
    assert not bntools.verify(model, other, torch.randn(9, 3)).passed
    for one in (model, other):
        assert [module.training for module in one.modules()] == [True, True, False, True, True]
        assert not any(module._forward_hooks for module in one.modules())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_wrapped(cnn):
    """A wrapped model is compared as the model inside."""
    check = bntools.verify(nn.DataParallel(cnn), differing(cnn, "3"), images())
    assert check.first_divergence == "3"
    with caught():  # importing the compiler uses what PyTorch itself has deprecated
        compiled = torch.compile(cnn)
    assert bntools.verify(compiled, nn.DataParallel(cnn), images()).passed


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.float16, 2e-2), (torch.bfloat16, 1e-1)],
)
def test_tolerance_follows_the_dtype(dtype, tolerance):
    """The least precise floating dtype in either model sets the tolerance; rounding to it passes."""
    torch.manual_seed(0)
    exact = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 4)).double()
    check = bntools.verify(exact, copy.deepcopy(exact).to(dtype), np.random.default_rng(0).normal(size=(20, 16)))
    assert check.passed
    assert check.tolerance == tolerance
    assert (check.error > 0) == (dtype != torch.float64)


def test_tolerance_follows_the_provider():
    """Accelerators get ten times the tolerance in float32, the CPU does not."""
    assert default_tolerance({"float32", "int64"}, "CUDAExecutionProvider") == pytest.approx(1e-3)
    assert default_tolerance({"float32"}, "cuda:0") == pytest.approx(1e-3)
    assert default_tolerance({"float32"}, "cuda:0", "CPUExecutionProvider") == pytest.approx(1e-3)
    assert default_tolerance({"float32"}, "cpu") == default_tolerance({"int64"}, "CPUExecutionProvider") == 1e-4


def test_tolerance_given(cnn, files):
    """A tolerance below rounding makes an exact file fail: the check can fail."""
    check = bntools.verify(cnn, files / "dynamo.onnx", images(), tolerance=1e-12)
    assert not check.passed
    assert check.tolerance == 1e-12


@pytest.mark.parametrize(
    ("reference", "candidate", "batches", "words"),
    [
        ("cnn", 3, images(), "found a builtins.int where a model was expected"),
        ("cnn", "cnn", [], "no batches to compare the models on"),
        ("cnn", "cnn", 3, "found a int where batches were expected"),
        ("cnn", "cnn", torch.randn(2, 5, 8, 8), "Sequential fails on the batch ((2, 5, 8, 8)): RuntimeError"),
        ("cnn", "model.pt", images(), "only an .onnx file is verified by its path"),
        ("cnn", "nowhere.onnx", images(), "nowhere.onnx: cannot be read: No such file"),
        ("cnn", "dynamo.onnx", images(2), "has (2, 3, 8, 8): its batch size is fixed at 6"),
        ("nothing", "cnn", images(), "Outputs gives no arrays"),
    ],
)
def test_refusals(cnn, files, reference, candidate, batches, words):
    """What cannot be compared at all is an error that says what was found and expected."""
    known = {"cnn": cnn, "nothing": Outputs(lambda x: None)}
    candidate = known.get(candidate, files / candidate if isinstance(candidate, str) else candidate)
    with pytest.raises(BntoolsError) as caught:
        bntools.verify(known[reference], candidate, batches)
    assert words in str(caught.value)


def test_provider_that_is_not_there(cnn, files):
    """A provider that was asked for and is not active is an error, for a file and for a module."""
    with pytest.raises(BntoolsError, match=r"'cuda' .CUDAExecutionProvider. was asked for and is not active"):
        bntools.verify(cnn, files / "dynamo.onnx", images(), providers=("cuda",))
    with pytest.raises(BntoolsError, match="a module runs where its parameters are"):
        bntools.verify(cnn, cnn, images(), providers=("cuda",))


@pytest.mark.parametrize(("provider", "tolerance"), [("cpu", 1e-4), ("cuda:0", 1e-3)])
def test_the_reference_may_be_on_an_accelerator(cnn, files, monkeypatch, provider, tolerance):
    """An accelerator that computes the reference rounds like one that computes the candidate."""
    torch_backend = backends.backend("torch")
    runner = replace(torch_backend.runners(cnn)[0], provider=provider)
    monkeypatch.setattr(torch_backend, "runners", lambda model, providers, forward: [runner])
    assert bntools.verify(cnn, files / "dynamo.onnx", images()).tolerance == pytest.approx(tolerance)


def test_a_difference_that_cannot_be_traced():
    """Where the modules cannot be watched, the failed check keeps its figures, and a note says so."""

    class Unwatchable(nn.Linear):
        def register_forward_hook(self, *args, **kwargs):
            raise RuntimeError("takes no hooks")

    model = nn.Sequential(Unwatchable(3, 3))
    check = bntools.verify(model, differing(model, "0"), torch.randn(4, 3))
    assert not check.passed
    assert check.error > 1e-3
    assert check.first_divergence is None
    assert "Sequential cannot be watched module by module: RuntimeError: takes no hooks" in check.notes[0]


def test_any_mapping_is_a_batch_of_keywords(tmp_path):
    """A mapping that is no dict, as tokenizers give, is one batch of keyword inputs, for modules and files alike."""
    model = models.TwoInputs()
    batch = UserDict(left=torch.randn(3, 3), right=torch.randn(3, 2))
    with caught():
        names = ["left", "right"]
        torch.onnx.export(model.eval(), tuple(batch.values()), tmp_path / "m.onnx", dynamo=False, input_names=names)
    assert bntools.verify(model, tmp_path / "m.onnx", batch).passed
    assert bntools.verify(model, copy.deepcopy(model), [batch]).passed
    with pytest.raises(BntoolsError, match=r"fails on the batch \(left: \(3, 3\), right: \(3, 9\)\)"):
        bntools.verify(model, model, UserDict(left=torch.randn(3, 3), right=torch.randn(3, 9)))


def test_modes_survive_a_failure(cnn):
    """A batch on which the model fails leaves its modes as they were."""
    model = copy.deepcopy(cnn).train()
    with pytest.raises(BntoolsError):
        bntools.verify(model, model, torch.randn(2, 5, 8, 8))
    assert all(module.training for module in model.modules())


class Chaotic(nn.Module):
    """Turns the last bit of its input into the fourth digit of its output, and adds what is wrong with it."""

    def __init__(self, wrong=0.0):
        super().__init__()
        self.wrong = wrong

    def forward(self, x):
        return torch.sin(x * 3000) + self.wrong


@pytest.mark.parametrize("tolerance", [None, 1e-4])
@pytest.mark.parametrize(("wrong", "explained"), [(3e-4, True), (0.02, False)])
def test_rounding_noise(wrong, explained, tolerance):
    """An error that the reference's own rounding explains passes with a note; a larger one fails."""
    check = bntools.verify(Chaotic(), Chaotic(wrong), torch.linspace(0.5, 1.5, 40).reshape(10, 4), tolerance=tolerance)
    assert check.passed == (explained and tolerance is None)
    assert bool(check.notes) == check.passed
    if check.passed:
        assert "the tolerance was raised from 1e-04" in check.notes[0]
        assert 1e-4 < check.error <= check.tolerance <= 1e-2


class Bytes(Chaotic):
    """Takes images of bytes."""

    def forward(self, x):
        return super().forward(x.float() / 255)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_rounding_noise_of_bytes(dtype):
    """Where a model takes bytes for floats, its own rounding is measured, too; where it looks tokens up, it is not."""
    batch = torch.arange(40).reshape(10, 4)
    check = bntools.verify(Bytes(), Bytes(3e-4), batch.to(dtype))
    assert check.passed
    assert check.noise > 3e-5
    tokens = nn.Embedding(40, 3)
    other = copy.deepcopy(tokens)
    other.weight.data += 0.01
    assert bntools.verify(tokens, other, batch).noise == 0


def test_a_model_of_noise_alone():
    """Where rounding turns into outputs of their own, a comparison fails, and says that it tells nothing."""
    check = bntools.verify(Wild(), Wild(1e-7), torch.linspace(0.5, 1.5, 40).reshape(10, 4))
    assert not check.passed
    assert check.blurred
    assert "on these data no comparison tells whether a model is right" in check.notes[0]


class Wild(Chaotic):
    """Turns the last bit of its input into the first digit of its output."""

    def forward(self, x):
        return super().forward(1000 * (x + self.wrong))


def test_well_conditioned_models_get_no_pardon(cnn):
    """A wrong model of ordinary conditioning is not excused by its rounding."""
    other = copy.deepcopy(cnn)
    with torch.no_grad():
        other[8].bias += 3e-4 * cnn(images()).abs().max()
    check = bntools.verify(cnn, other, images())
    assert not check.passed
    assert check.error == pytest.approx(3e-4, rel=0.05)
