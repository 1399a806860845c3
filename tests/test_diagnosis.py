"""inspect(model, batches): what it measures is right, and nothing of the model changes."""

from __future__ import annotations

import copy

import models
import numpy as np
import onnx_files
import pytest
import torch
from torch import nn

import bntools
from bntools import BntoolsError
from bntools.course import Course
from bntools.diagnosis import drift


@pytest.fixture(autouse=True)
def _one_thread():
    """Networks so small only wait for each other's threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def images(n=24, size=6, seed=0):
    """Images (n, 3, size, size) of mean 1 and standard deviation 2."""
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def rows(n=24, features=3, seed=0):
    """Rows (n, features) whose mean is 0 and whose variance is 1 in every column, exactly."""
    x = np.random.default_rng(seed).standard_normal((n, features))
    return torch.tensor((x - x.mean(0)) / x.std(0), dtype=torch.float32)


def cnn():
    """A small network with statistics of its own."""
    torch.manual_seed(0)
    model = models.cnn()
    bntools.recalibrate(model, images(seed=1), check=False)
    return model


def state(model):
    """All that has to stay: tensors bit by bit, modes, flags, hooks and attributes."""
    tensors = {name: value.clone() for name, value in model.state_dict().items()}
    modules = [(m.training, len(m._forward_hooks), sorted(vars(m)), getattr(m, "momentum", 0)) for m in model.modules()]
    return tensors, modules, [p.requires_grad for p in model.parameters()]


def assert_unchanged(model, before):
    """Nothing of ``state`` has changed, NaN included."""
    tensors, *others = state(model)
    assert others == list(before[1:])
    for name, value in before[0].items():
        assert torch.equal(tensors[name].nan_to_num(), value.nan_to_num()), name
        assert torch.equal(tensors[name].isnan(), value.isnan()), name


def test_a_planted_shift_is_found_with_its_size():
    """A channel moved by 3 stored standard deviations and stretched by 2 shows just that; the others show nothing."""
    model = nn.Sequential(nn.BatchNorm1d(3, eps=0))
    model[0].running_var.fill_(4)
    x = rows() * 2
    x[:, 1] = x[:, 1] * 2 + 6
    (layer,) = bntools.inspect(model, x.split(7))
    np.testing.assert_allclose(layer.mean_shift, [0, 3, 0], atol=1e-6)
    np.testing.assert_allclose(layer.std_ratio, [1, 2, 1], atol=1e-6)
    assert layer.drift == pytest.approx(3)
    (lead,) = layer.leading(1)
    assert (lead.channel, lead.mean, lead.ratio) == (1, pytest.approx(3), pytest.approx(2))
    assert layer.kl[1] == pytest.approx(0.5 * (4 + 9 - 1) - np.log(2), abs=1e-5)


def test_channels_lead_by_what_drift_is():
    """The first of the leading channels is where the drift is, also where another's divergence is larger."""
    model = nn.Sequential(nn.BatchNorm1d(3, eps=0))
    x = rows()
    x[:, 0], x[:, 2] = x[:, 0] * 1.9, x[:, 2] * 0.2
    (layer,) = bntools.inspect(model, [x], alternatives=False)
    first, second = layer.leading(2)
    assert (first.channel, abs(first.ratio - 1)) == (0, pytest.approx(layer.drift))
    assert (second.channel, second.kl) == (2, layer.kl.max())


def test_measured_is_what_recalibration_stores():
    """Every layer is measured behind layers with their new statistics, also where recalibrate skips it as frozen."""
    model = cnn()
    found = bntools.inspect(model, images().split(5), alternatives=False)
    stored = {
        change.name: change.after for change in bntools.recalibrate(copy.deepcopy(model), images().split(5)).layers
    }
    assert [layer.name for layer in found] == list(stored)
    for layer in found:
        np.testing.assert_allclose(layer.mean, stored[layer.name].mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(layer.var, stored[layer.name].var, rtol=1e-5)
    with bntools.freeze(model):
        frozen = bntools.inspect(model, images().split(5), alternatives=False)
    assert [layer.drift for layer in frozen] == [layer.drift for layer in found]
    assert frozen.modes == []
    assert any("frozen" in note for note in frozen.notes)


def test_divergence_against_the_closed_form():
    """KL(measured || stored) agrees with PyTorch's of two normal distributions, in float64."""
    generator = np.random.default_rng(0)
    mean, var, seen_mean, seen_var = generator.uniform(0.1, 3, (4, 50))
    model = nn.Sequential(nn.BatchNorm1d(50, eps=1e-3)).double()
    model[0].running_mean.copy_(torch.tensor(mean))
    model[0].running_var.copy_(torch.tensor(var))
    (layer,) = bntools.inspect(model)
    stored, seen = (
        torch.distributions.Normal(torch.tensor(m), torch.tensor(np.sqrt(v + 1e-3)))
        for m, v in ((mean, var), (seen_mean, seen_var))
    )
    expected = torch.distributions.kl_divergence(seen, stored).numpy()
    np.testing.assert_allclose(drift.between(layer, seen_mean, seen_var).kl, expected, rtol=1e-12)


def test_standard_error_against_repeated_draws():
    """What the measured mean varies by from draw to draw is the standard error, with samples whose pixels correlate."""
    generator = np.random.default_rng(0)

    def draw(n=60):
        return generator.standard_normal((n, 1, 1, 1)) * 3 + generator.standard_normal((n, 1, 4, 4))

    spread = np.std([draw().mean() for _ in range(2000)])
    model = nn.Sequential(nn.BatchNorm2d(1))
    errors = [bntools.inspect(model, [draw()], alternatives=False)[0].standard_error for _ in range(4)]
    assert np.mean(errors) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 20, 12], [2, 2, 33]])
def test_a_course_does_not_depend_on_the_batches(sizes):
    """The moments of the first 2, 4, 8, ... samples are those of their means, however the samples come."""
    means = np.random.default_rng(0).standard_normal((37, 2)) + 5
    course = Course()
    for part in np.split(means, np.cumsum(sizes)[:-1]):
        course.add(part)
    assert [point.count for point in course.settling()] == [2, 4, 8, 16, 32, 37]
    for point in course.settling():
        first = means[: int(point.count)]
        np.testing.assert_allclose(point.mean, first.mean(0))
        np.testing.assert_allclose(point.standard_error(), first.std(0, ddof=1) / np.sqrt(len(first)))


def test_standard_error_of_a_layer_that_is_called_twice():
    """A second call on the same values teaches nothing of the mean; channels that never vary are known exactly."""
    x = rows()
    x[:, 2] = 0
    once, twice = nn.Sequential(nn.BatchNorm1d(3, eps=0)), models.Shared()
    (one,) = bntools.inspect(once, [x], alternatives=False)
    assert one.remaining_error == pytest.approx(1 / np.sqrt(23))
    (two,) = bntools.inspect(twice, [x], forward=lambda model, x: (model.bn(x), model.bn(x))[0], alternatives=False)
    assert two.standard_error == pytest.approx(one.standard_error, rel=0.03)


def test_convergence_ends_at_the_standard_error():
    """It falls with the number of samples, to the worst layer's; recalibrate has it with a tolerance."""
    model, x = cnn(), images(40)
    found = bntools.inspect(model, x.split(16), alternatives=False)
    assert [samples for samples, _ in found.convergence] == [2, 4, 8, 16, 32, 40]
    assert found.convergence[-1][1] == pytest.approx(max(layer.remaining_error for layer in found))
    assert found.convergence[-1][1] < found.convergence[1][1]
    result = bntools.recalibrate(model, x.split(16), tolerance=10, check=False)
    assert result.convergence[-1] == (result.samples, pytest.approx(result.standard_error))


@pytest.mark.parametrize("size", [1, 2, 8, None])
def test_train_mode_is_the_modules_own(size):
    """The gap between the modes is that of model.eval() and model.train() on the same batches, with dropout off."""
    model = nn.Sequential(*cnn(), nn.Dropout(0.0))
    x = images(16)
    found = next(one for one in bntools.inspect(model, x.split(5)).modes if one.batch_size == size)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        given = twin.eval()(x)
        trained = torch.cat([twin.train()(part) for part in x.split(size or 16)])
    assert found.error == pytest.approx(float((given - trained).abs().max() / given.abs().max()), rel=1e-4)
    assert found.agreement == pytest.approx(float((given.argmax(1) == trained.argmax(1)).float().mean()))


def test_dropout_stays_off():
    """Train mode is that of the BN layers alone: dropout draws nothing, and two diagnoses agree."""
    model = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(3))
    bntools.recalibrate(model, rows(), check=False)
    assert bntools.inspect(model, [rows()]).modes[-1].error < 1e-5


class OfItsBatch(nn.Module):
    """What it gives for a sample depends on the batch also in eval mode."""

    def __init__(self):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(x) + x.mean(0)


def test_a_sample_alone():
    """Eval mode gives for a sample what it gives for it in a batch, unless the model itself looks at the batch."""
    assert bntools.inspect(cnn(), images().split(8)).alone < 1e-5
    assert bntools.inspect(OfItsBatch(), [rows()]).alone > 0.1


def test_the_layer_that_makes_the_difference():
    """Where one layer's statistics are off, all of the outputs' difference goes back with it, and none with others."""
    model, x = cnn(), images()
    bntools.recalibrate(model, x)
    model[4].running_mean += 2
    first, second = bntools.inspect(model, x.split(8))
    assert second.gap == pytest.approx(1, abs=1e-3)
    assert first.gap == pytest.approx(0, abs=1e-3)
    bntools.recalibrate(model, x)
    assert [layer.gap for layer in bntools.inspect(model, x.split(8))] == [None, None]


def test_histogram():
    """Values come normalized by the stored statistics, every one counted, and only for the layers named."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].running_mean.fill_(2)
    first, second = bntools.inspect(model, rows(40).split(9), histograms="0")
    edges, counts = first.histogram
    assert len(edges) == len(counts) + 1
    assert counts.sum() == 40 * 3
    assert np.average((edges[1:] + edges[:-1]) / 2, weights=counts) == pytest.approx(-2, abs=0.1)
    assert second.histogram is None
    with pytest.raises(BntoolsError, match=r"'9' fits none"):
        bntools.inspect(model, rows(), histograms="9")


def test_dead_channels():
    """Channels that do not vary are named, also at a large mean, where float32 rounds; the others are not."""
    x = rows(24, 4)
    x[:, 1], x[:, 2] = 0.0, 1e4
    (layer,) = bntools.inspect(nn.Sequential(nn.BatchNorm1d(4)), [x])
    assert layer.dead == [1, 2]


def test_statistics_that_are_not_finite():
    """NaN in what is stored is an infinite drift and said; the layer is measured all the same."""
    model, x = cnn(), images()
    model[1].running_mean[2] = torch.nan
    before = state(model)
    found = bntools.inspect(model, x.split(8), histograms="*")
    assert found.worst()[0].name == "1"
    assert found[0].drift == np.inf
    assert np.isfinite(found[0].mean).all()
    assert found[0].leading(1)[0].channel == 2
    assert any("NaN or Inf in the stored statistics of 1" in note for note in found.notes)
    assert any("eval and train mode were not compared" in note for note in found.notes)
    assert_unchanged(model, before)


def test_layers_that_cannot_be_measured():
    """Each has its reason: not reached, not chosen, no statistics."""
    model = models.Shared()
    found = bntools.inspect(model, [rows()])
    assert found.untouched == {"unused": "never reached in a forward pass"}
    assert found[0].calls == 2
    two = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False), nn.BatchNorm1d(3))
    found = bntools.inspect(two, [rows()], layers=["0", "1"])
    assert {name: reason.split()[0] for name, reason in found.untouched.items()} == {"1": "keeps", "2": "not"}


def test_a_batch_size_that_bn_cannot_take():
    """Batches of one row, of which a dense BN has no variance, are left out with a note."""
    found = bntools.inspect(nn.Sequential(nn.BatchNorm1d(3)), [rows()])
    assert [one.batch_size for one in found.modes] == [2, 8, None]
    assert any("train mode at batch size 1 was left out: layer '0'" in note for note in found.notes)


def test_batches_of_several_shapes():
    """Samples that cannot be joined are measured; what needs them joined is left out with a note."""
    found = bntools.inspect(cnn(), [images(8, 6), images(8, 9)])
    assert found.samples == 16
    assert found.modes == []
    assert any("differ in the shapes of their samples" in note for note in found.notes)


def test_domains_are_compared():
    """Parts given by name are compared with one another."""
    found = bntools.inspect(cnn(), [images()], domains={"a": [images(16)], "b": [images(16) * 3]})
    assert [one.name for one in found.domains] == ["a", "b"]


class Counting(nn.Module):
    """Counts its forward passes, and raises from one of them on, or there once."""

    def __init__(self, model, error=KeyboardInterrupt, at=None):
        super().__init__()
        self.model = model
        self.log, self.error, self.at, self.once = Log(), error, at, False

    def forward(self, x):
        self.log.calls += 1
        if self.at is not None and (self.log.calls == self.at if self.once else self.log.calls >= self.at):
            raise self.error("now")
        return self.model(x)


class Log:
    """Keeps a count where a diagnosis, which puts attributes back, does not look."""

    calls = 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_nothing_changes(error):
    """Tensors, modes, flags and hooks are as before: after success, and wherever an error or Ctrl-C falls."""
    model = Counting(cnn(), error).train()
    model.model[4].eval()
    before = state(model)
    bntools.inspect(model, images().split(6), histograms="*")
    assert_unchanged(model, before)
    for at in range(1, model.log.calls, 7):
        model.log.calls, model.at = 0, at
        before = state(model)
        try:
            bntools.inspect(model, images().split(6), histograms="*")
        except (KeyboardInterrupt, BntoolsError):
            pass
        else:
            assert error is ValueError
            assert at > 4  # what follows the measurement itself is left out with a note
        assert_unchanged(model, before)


def test_one_failure_spoils_no_other_figure():
    """Where the model fails once, what needed that pass is left out; all else is measured as without the failure."""
    model = Counting(cnn(), ValueError)
    model.model[4].running_mean += 2
    batches = images(16).split(8)
    whole = bntools.inspect(model, batches)
    for at in range(3, 9):
        model.log.calls, model.at, model.once = 0, at, True
        found = bntools.inspect(model, batches)
        assert any("eval and train mode were not compared" in note for note in found.notes) or at == 3
        assert found.halves == whole.halves
        assert found.preprocessing == whole.preprocessing


def test_bad_data():
    """Data that is empty or holds NaN is refused, and options without data as well."""
    model = cnn()
    before = state(model)
    for data in ([], [images() * torch.nan], [images(0)]):
        with pytest.raises(BntoolsError):
            bntools.inspect(model, data)
    with pytest.raises(BntoolsError, match="without data"):
        bntools.inspect(model, max_samples=3)
    with pytest.raises(BntoolsError, match="max_samples=0"):
        bntools.inspect(model, [images()], max_samples=0)
    assert_unchanged(model, before)


def test_an_own_forward():
    """forward= is used throughout, on batches in the structure in which they come, whatever their size."""
    sizes = set()

    def forward(model, batch):
        values, labels = batch
        assert len(values) == len(labels)
        sizes.add(len(values))
        return model(values)

    model, x = Counting(cnn()), images()
    found = bntools.inspect(model, [(part, torch.zeros(len(part))) for part in x.split(8)], forward=forward)
    assert {1, 2, 8, 24} <= sizes
    assert [one.batch_size for one in found.modes] == [1, 2, 8, None]


def test_a_graph_bound_to_a_batch_size():
    """A file that takes batches of 6 alone is compared in these; the file stays as it was."""
    model = onnx_files.small(batch=6)
    before = model.SerializeToString()
    x = onnx_files.images(24)
    found = bntools.inspect(model, [x[i : i + 6] for i in range(0, 24, 6)], histograms="bn1")
    assert [one.batch_size for one in found.modes] == [6]
    assert found.alone is None
    assert all(layer.gap is not None for layer in found)
    assert found[0].histogram[1].sum() == 24 * 8 * 8 * 40
    assert any("batches of 6 only" in note for note in found.notes)
    assert model.SerializeToString() == before


def test_printed_it_says_what_to_do():
    """A diagnosis in words is its advice, not its arrays."""
    found = bntools.inspect(cnn(), images().split(8))
    lines = str(found).splitlines()
    assert lines[0].endswith("BN layers measured on 24 samples")
    assert lines[1] == f"{found.advice[0].action}: {found.advice[0].reason}"
