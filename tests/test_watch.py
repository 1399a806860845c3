import copy
import pickle

import numpy as np
import pytest
import torch
from models import cnn
from torch import nn

import bntools
from bntools.errors import BntoolsError
from bntools.layer import distance


def train_step(model, scale=1.0):
    """A forward pass in train mode, which is all that moves statistics."""
    model.train()(torch.randn(4, 3, 6, 6) * scale)


def test_figures_are_those_of_the_layers():
    """Every other step, by the names of the layers: drift since the start, mean and variance over the channels."""
    torch.manual_seed(0)
    model, seen = cnn(), []
    train_step(model)
    start = bntools.inspect(model)
    with bntools.watch(model, every=2, log=lambda figures, step: seen.append((step, dict(figures)))) as watch:
        for _ in range(5):
            train_step(model, 3.0)
            watch.step()
            if watch.steps == 4:
                now = bntools.inspect(model)
    assert [step for step, _ in seen] == [2, 4]
    last = seen[-1][1]
    drifts = [distance(a.stats, b.stats, a.eps) for a, b in zip(start, now, strict=True)]
    assert [last["bn/1/drift"], last["bn/4/drift"]] == pytest.approx(drifts, rel=1e-6)
    assert last["bn/drift"] == pytest.approx(max(drifts), rel=1e-6)
    assert last["bn/4/mean"] == pytest.approx(now[1].mean.mean(), rel=1e-6)
    assert last["bn/4/variance"] == pytest.approx(now[1].var.mean(), rel=1e-6)
    assert watch.figures == last


def test_a_summary_writer_is_a_log(tmp_path):
    """What is written for TensorBoard is read back from its file."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model = cnn()
    with SummaryWriter(tmp_path) as writer, bntools.watch(model, every=1, log=writer, layers="4") as watch:
        for _ in range(3):
            train_step(model)
            watch.step(watch.steps * 10)
    events = EventAccumulator(str(tmp_path)).Reload()
    assert sorted(events.Tags()["scalars"]) == ["bn/4/drift", "bn/4/mean", "bn/4/variance", "bn/drift"]
    assert [event.step for event in events.Scalars("bn/drift")] == [0, 10, 20]
    assert events.Scalars("bn/drift")[-1].value == pytest.approx(watch.figures["bn/drift"], rel=1e-6)


class Backwards(nn.Module):
    """Runs its layers in another order than it defines them in."""

    def __init__(self):
        super().__init__()
        self.last, self.middle, self.first = (nn.BatchNorm1d(3) for _ in range(3))

    def forward(self, x):
        return self.last(self.middle(self.first(x)) * self.gain)

    gain = 1.0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_statistics_that_are_not_finite_stop_at_the_first_layer_and_step(value):
    """The first in the order of execution, at the step at which it broke; what comes after it is only counted."""
    model = Backwards()
    with pytest.raises(BntoolsError, match=r"^layer 'middle', and 1 more: NaN or Inf .* after step 3"):
        stop_at(model, 3, lambda: model.first.register_forward_hook(lambda module, args, output: output * value))
    assert not any(module._forward_pre_hooks for module in model.modules())


def stop_at(model, step, breaks, **options):
    """Train, with something that breaks at a step."""
    with bntools.watch(model, **options) as watch:
        for index in range(1, 6):
            if index == step:
                breaks()
            model.train()(torch.randn(4, 3))
            watch.step()
    return watch


def test_the_largest_drift_is_nan_where_one_is():
    """A layer that broke is not outshone by one before it that did not."""
    model, seen = cnn(), []
    with bntools.watch(model, every=1, log=lambda figures, step: seen.append(figures["bn/drift"]), stop=False) as watch:
        model[4].running_mean[1] = torch.nan
        watch.step()
    assert np.isnan(seen).all()


def test_a_model_that_is_copied_or_saved_before_the_first_step():
    """A copy, an average of weights for one, is not watched and can be saved; the model itself after its first step."""
    model = cnn()
    with bntools.watch(model) as watch:
        pickle.dumps(copy.deepcopy(model))
        with pytest.raises(BntoolsError, match=r"bntools\.watch looks at the model's first training step"):
            pickle.dumps(model)
        train_step(model)
        watch.step()
        pickle.dumps(model)


def test_stopping_can_be_left_out():
    """A watch that only logs goes on, and shows it."""
    model, seen = Backwards(), []
    watch = stop_at(
        model,
        1,
        lambda: model.first.register_forward_hook(lambda module, args, output: output * float("nan")),
        stop=False,
        every=5,
        log=lambda figures, step: seen.append(figures["bn/middle/drift"]),
    )
    assert watch.steps == 5
    assert np.isnan(seen).all()


def test_readings_that_arrive_late_are_used_in_their_order(monkeypatch):
    """Where a device lags behind, nothing waits for it until the end, and the step is still the right one."""
    from bntools.backends.torch.observing import Reading

    monkeypatch.setattr(Reading, "ready", lambda self: False)
    model, seen = Backwards(), []
    watch = bntools.watch(model, every=1, log=lambda figures, step: seen.append(step))
    with watch:
        for index in range(4):
            if index == 2:
                model.first.running_mean[0] = float("nan")
            model.train()(torch.randn(4, 3))
            watch.step()
        assert seen == []
        with pytest.raises(BntoolsError, match="after step 3"):
            watch.finish()
    assert seen == [1, 2]


def test_keras_models_are_watched_too():
    """The same figures for a Keras model, and the same stop; ONNX files do not train."""
    import keras
    from onnx_nets import Builder

    model = keras.Sequential([keras.layers.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    seen = []
    with bntools.watch(model, every=1, log=lambda figures, step: seen.append(figures)) as watch:
        model(np.random.default_rng(0).normal(5, 2, (8, 3)).astype("float32"), training=True)
        watch.step()
        assert seen[0]["bn/bn/mean"] == pytest.approx(float(np.mean(model.get_layer("bn").moving_mean)))
        model.get_layer("bn").moving_variance.assign([1.0, np.nan, 1.0])
        with pytest.raises(BntoolsError, match=r"layer 'bn': NaN or Inf .* after step 2"):
            watch.step()
    b = Builder()
    with pytest.raises(BntoolsError, match="does not train"):
        bntools.watch(b.model([b.bn("x", 3)], ("n", 3, 4, 4)))


def test_what_cannot_be_watched_is_refused():
    """Wrong arguments, models without statistics, and statistics that are broken from the start."""
    with pytest.raises(BntoolsError, match="every=0"):
        bntools.watch(cnn(), every=0)
    with pytest.raises(BntoolsError, match="expected a SummaryWriter"):
        bntools.watch(cnn(), log="runs")
    with pytest.raises(BntoolsError, match="keeps statistics"):
        bntools.watch(nn.BatchNorm1d(3, track_running_stats=False))
    model = cnn()
    model[1].running_var[0] = float("nan")
    with pytest.raises(BntoolsError, match="before the first step"):
        bntools.watch(model)
