"""The verb fold: what it gives, what it leaves alone, what it undoes, and its errors."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from dataclasses import replace
from itertools import count

import pytest
import torch
from folding_nets import Net, folds, image, randomized
from torch import nn

import bntools
from bntools import BntoolsError


def test_layers_without_usable_statistics_are_kept():
    """Statistics that are not tracked, NaN or negative are a reason, and not a NaN weight."""
    parts = {
        name: nn.BatchNorm2d(3, track_running_stats=name != "untracked") for name in ("untracked", "nan", "negative")
    }
    model = Net(lambda m, x: m.conv(x) + m.untracked(x) + m.nan(x) + m.negative(x), conv=nn.Conv2d(3, 3, 1), **parts)
    model.run = lambda m, x: (m.untracked(m.conv(x)), m.conv(x))[1]
    model.nan.running_mean[1] = float("nan")
    model.negative.running_var[2] = -1.0
    kept = bntools.fold(model.eval(), image(3)).kept
    assert kept == {
        "untracked": "it keeps no statistics and normalizes with each batch's own",
        "nan": "its mean is NaN or Inf in channel 1",
        "negative": "its variance is negative in channel 2 (-1)",
    }


def test_layers_are_selected_by_name_glob_and_predicate():
    """What was not selected stays as it is, and is reported as such."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1), nn.BatchNorm2d(5)))
    for selection in ("3", ["[3-9]"], lambda layer: layer.features == 5):
        result = folds(model, image(3), layers=selection)
        assert (result.folded, result.kept) == (["3"], {"1": "not selected by layers="})
        assert isinstance(result.model[1], nn.BatchNorm2d)
    with pytest.raises(BntoolsError, match="did you mean"):
        bntools.fold(model, image(3), layers="4")


def test_the_blocks_of_the_story_fold_back():
    """Three blocks conv -> BN -> ReLU -> pool, then Linear -> BN1d -> ReLU -> Dropout -> Linear: all four fold."""
    widths = (3, 8, 16, 32)
    blocks = [
        layer
        for i in range(3)
        for layer in (
            nn.Conv2d(widths[i], widths[i + 1], 3, padding=1),
            nn.BatchNorm2d(widths[i + 1]),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
    ]
    head = [nn.Flatten(), nn.Linear(32 * 4, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(), nn.Linear(16, 10)]
    result = folds(randomized(nn.Sequential(*blocks, *head)), image(3, size=16))
    assert len(result.folded) == 4
    assert str(result) == "folded 4 of 4"


def test_layers_behind_activations_fold_forward():
    """conv -> ReLU -> BN -> MaxPool, twice, then Flatten -> Linear: both go forward unless a scale is negative."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3),
        nn.ReLU(),
        nn.BatchNorm2d(6, eps=1e-3),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3),
        nn.ReLU(),
        nn.BatchNorm2d(8, eps=1e-3),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    randomized(model, positive=True)
    assert folds(model, image(3, size=14)).folded == ["2", "6"]
    with torch.no_grad():
        model[6].weight[3] *= -1
    result = folds(model, image(3, size=14))
    assert result.folded == ["2"]
    assert "max_pool2d '7' needs a scale that is not negative, and channel 3 has" in result.kept["6"]


def test_a_model_without_bn_is_an_error():
    """Also one that was folded before: it has nothing left to fold."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(BntoolsError, match="no BN layers: were they folded already"):
        bntools.fold(bntools.fold(model, image(3)).model, image(3))


def test_an_example_that_does_not_fit_is_an_error():
    """The framework's own complaint is in the message and in the cause; the model is as before."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(
        BntoolsError, match=r"Sequential does not run on the example \(RuntimeError: .*3 channels"
    ) as error:
        bntools.fold(model, image(2))
    assert isinstance(error.value.__cause__, RuntimeError)
    assert "forward" not in vars(model)
    with pytest.raises(BntoolsError, match="holds no samples"):
        bntools.fold(model, image(3)[:0])


def test_the_original_is_untouched():
    """Weights, statistics, modes, attributes and gradients flags of the model are those before."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4), nn.Dropout()))
    model.train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    before, state = pickle.dumps(model), copy.deepcopy(model.state_dict())
    folded = bntools.fold(model, image(3)).model
    assert pickle.dumps(model) == before
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())
    assert [m.training for m in folded.modules()] == [m.training for m in model.modules()]
    assert not folded[0].weight.requires_grad


def test_the_result_runs_without_bntools_from_its_file(tmp_path):
    """A folded model saves and loads whole, with the bias that folding added, and its state dict fits it."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.BatchNorm2d(4)))
    folded = bntools.fold(model, image(3)).model
    assert b"bntools" not in pickle.dumps(folded)
    torch.save(folded, tmp_path / "folded.pt")
    loaded = torch.load(tmp_path / "folded.pt", weights_only=False)
    assert torch.equal(loaded(image(3)), folded(image(3)))
    assert list(loaded.state_dict()) == ["0.weight", "0.bias"]
    buffer = io.BytesIO()
    torch.save(folded.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer))
    torch.testing.assert_close(loaded(image(3)), model(image(3)))


class Forgetful(nn.Module):
    """Reads an attribute of its BN layer, which whatever stands in the layer's place does not have."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn2(self.conv2(self.bn(self.conv(x)).relu())) * self.bn.num_features


def test_a_fold_after_which_the_model_does_not_run_is_undone():
    """The layer that breaks the model is found and kept, with the model's own complaint; the others stay folded."""
    result = folds(randomized(Forgetful()), image(3))
    assert result.folded == ["bn2"]
    assert result.kept["bn"].startswith("undone: ")
    assert "'Identity' object has no attribute 'num_features'" in result.kept["bn"]


@pytest.mark.parametrize("layer", ["1", "3", "5"])
def test_a_graph_that_lies_is_caught_by_the_comparison(layer, monkeypatch):
    """A deliberate mutant: where the graph swaps a weight's axes, the fold is undone and the others are kept folded.

    Where in the model a difference begins, which takes many runs, is not asked at each try.
    """
    monkeypatch.setattr(bntools.verification, "first_divergence", None)
    backend, widths = bntools.backends.of(nn.Module()), (4, 4, 4, 4)
    parts = [part for n in widths[1:] for part in (nn.Conv2d(4, n, 1), nn.BatchNorm2d(n))]
    model = randomized(nn.Sequential(*parts))
    honest = backend.graph

    def lying(model, example):
        graph = honest(model, example)
        slot = f"{int(layer) - 1}.weight"
        nodes = tuple(
            replace(n, op=replace(n.op, out_axis=1, in_axis=0)) if slot in n.reads else n for n in graph.nodes
        )
        return replace(graph, nodes=nodes)

    monkeypatch.setattr(backend, "graph", lying)
    result = bntools.fold(model, image(4))
    assert set(result.folded) == {"1", "3", "5"} - {layer}
    assert result.kept[layer].startswith("undone: the outputs differ (")
    assert result.check.passed


def test_patience_with_wrong_folds_ends(monkeypatch):
    """Where many folds are wrong, they are not searched for one at a time for ever; what is left is right."""
    backend = bntools.backends.of(nn.Module())
    parts = [part for _ in range(6) for part in (nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))]
    model = randomized(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), *parts))
    honest, wrong = backend.graph, {f"{i}.weight" for i in range(3, 15, 2)}

    def lying(model, example):
        graph = honest(model, example)
        nodes = tuple(
            replace(n, op=replace(n.op, out_axis=1, in_axis=0)) if wrong & n.reads else n for n in graph.nodes
        )
        return replace(graph, nodes=nodes)

    monkeypatch.setattr(backend, "graph", lying)
    monkeypatch.setattr(bntools.folding, "PATIENCE", 2)
    result = bntools.fold(model, image(4))
    assert result.folded == ["1"]
    assert all(reason.startswith("undone: the outputs differ (") for reason in result.kept.values())


def test_rounding_undoes_no_fold(monkeypatch):
    """Where a model amplifies rounding, folds hold; where nothing is left but rounding, all stay, after one try."""
    model = Net(lambda m, x: torch.sin(m.gain * m.bn(m.conv(x / 255))), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    randomized(model).gain = 3e3
    images = torch.arange(150, dtype=torch.uint8).reshape(2, 3, 5, 5)
    result = bntools.fold(model, images)
    assert result.folded == ["bn"]
    assert 1e-4 < result.check.error < result.check.tolerance
    model.gain = 1e6
    monkeypatch.setattr(bntools.folding, "_culprit", None)
    kept = bntools.fold(model, images).kept
    assert kept["bn"].startswith("the example does not tell whether a fold is right: the model turns a rounding of it ")


def test_a_model_that_gives_other_outputs_each_time_is_an_error():
    """Where the model does not agree with its own copy, nothing can be verified and nothing is given out."""
    sizes = count(1)
    model = Net(lambda m, x: m.bn(m.conv(x)) + 10.0 ** next(sizes), conv=nn.Conv2d(3, 4, 1), bn=nn.BatchNorm2d(4))
    with pytest.raises(BntoolsError, match="does not agree with its own copy on the example"):
        bntools.fold(model, image(3))


def test_a_model_that_cannot_be_copied_is_an_error():
    """The result is a new model: what refuses to be copied is named."""
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))
    model.lock = threading.Lock()
    with pytest.raises(BntoolsError, match=r"Sequential cannot be copied \(TypeError: cannot pickle '_thread.lock'"):
        bntools.fold(model, image(3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_folds_with_one_rounding(dtype):
    """The folded weights are those of float64, rounded once to the model's dtype."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))).to(dtype)
    exact = bntools.fold(copy.deepcopy(model).double(), image(3).double()).model
    folded = bntools.fold(model, image(3).to(dtype)).model
    assert folded[0].weight.dtype == folded[0].bias.dtype == dtype
    assert torch.equal(folded[0].weight, exact[0].weight.to(dtype))
    assert torch.equal(folded[0].bias, exact[0].bias.to(dtype))


def test_weights_that_do_not_fit_half_precision_are_left():
    """A scale that takes a weight beyond the largest number of its dtype is undone, not stored as Inf."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4))).half()
    model[1].float()
    with torch.no_grad():
        model[0].weight.fill_(1.0)
        model[1].weight.fill_(1e6)
        model[1].running_var.fill_(1.0)
    kept = bntools.fold(model, image(3).half() * 1e-4).kept
    assert "does not fit torch.float16" in kept["1"]


def test_batches_may_be_dicts_tuples_and_arrays():
    """The example is a batch as every verb takes it."""
    model = randomized(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    for batch in (image(3).numpy(), (image(3), 7), {"input": image(3)}):
        assert bntools.fold(model, batch).folded == ["1"]


@pytest.mark.parametrize(
    "decides", [lambda x: float(x.std()) < 5, lambda x: x.tolist()[0][0][0][0] < 5, lambda x: len(x[x > 5]) < 5]
)
def test_a_model_that_decides_on_values_keeps_its_layers(decides):
    """Where another batch may take another path, one example does not tell what may be folded."""

    class Chooses(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(self.conv(x)) if decides(x) else self.conv(x)

    model, x = randomized(nn.Sequential(Chooses())), image(3)
    folded = bntools.fold(model, x)
    assert "'0' reads computed values or sizes into Python" in folded.kept["0.bn"]
    assert bntools.verify(model, folded.model, [x, x * 100]).passed


class PadsOddSizes(nn.Module):
    """As U-Nets do: zero padding that only inputs of an odd size see."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Conv2d(3, 2, 2)

    def forward(self, x):
        h = self.bn(self.conv(x).relu())
        return self.last(nn.functional.pad(h, (0, 1, 0, 1)) if h.shape[-1] % 2 else h)


class LengthOne(nn.Module):
    """A view that keeps the channels on their axis only where the length is 1."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.last = nn.Conv1d(2, 3, 3), nn.BatchNorm1d(3), nn.Linear(3, 4)

    def forward(self, x):
        return self.last(self.bn(self.conv(x).relu()).view(len(x), -1, 3))


class OneByOne(nn.Module):
    """Does something else to a single sample."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        h = self.conv(x)
        return self.bn(h.abs() if len(x) == 1 else h)


@pytest.mark.parametrize(
    ("make", "shape", "other"),
    [
        (PadsOddSizes, (2, 2, 8, 8), (2, 2, 7, 7)),
        (LengthOne, (2, 2, 3), (2, 2, 7)),
        (OneByOne, (2, 2, 4, 4), (1, 2, 4, 4)),
    ],
)
def test_other_sizes_are_tried_as_well(make, shape, other):
    """A fold that is legal at the example's size alone is not made, and the function is the same at the others."""
    torch.manual_seed(0)
    model = make().double().eval()
    nn.init.normal_(model.bn.bias)
    model.bn.running_mean.normal_()
    result = bntools.fold(model, torch.randn(shape, dtype=torch.float64))
    assert result.kept["bn"].startswith("in another size than the example's: cannot go")
    x = torch.randn(other, dtype=torch.float64)
    torch.testing.assert_close(result.model(x), model(x))


def test_products_with_factors_are_kept():
    """addmm with alpha and beta other than 1 is no plain dense layer: kept, with it named."""

    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight, self.bias = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4))
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return self.bn(torch.addmm(self.bias, x, self.weight, beta=0.5, alpha=2.0))

    result = bntools.fold(Factors().eval(), torch.randn(5, 3))
    assert "addmm stands between" in result.kept["bn"]
