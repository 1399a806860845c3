"""Lightning's own Trainer, on the CPU, with a network of two layers."""

import csv
import threading
import warnings
from copy import deepcopy
from itertools import pairwise

import pytest
import shim  # noqa: F401
import torch
from peers import together
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import lightning
    import pytorch_lightning
    from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging

import bntools
from bntools.callbacks.lightning import FreezeBatchNorm, MonitorBatchNorm, RecalibrateBatchNorm, StopOnNonFinite
from bntools.errors import BntoolsError
from bntools.processes import PeerError

pytestmark = pytest.mark.filterwarnings("ignore")  # Lightning's own, about workers, loggers and intervals
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)) * 3 + 2
BATCHES = [(X[:20],), (X[20:],)]


def module(base=lightning.LightningModule):
    """A LightningModule of Linear, BN, Linear."""

    class Net(base):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.ReLU(), nn.Linear(3, 1))

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        def validation_step(self, batch, batch_idx):
            self.log("loss", self(batch[0]).square().mean())

        def configure_optimizers(self):
            return torch.optim.SGD((p for p in self.parameters() if p.requires_grad), lr=0.05)

    return Net()


def fit(model, *callbacks, epochs=3, validate=True, trainer=lightning.Trainer, **options):
    """Train with these callbacks: four steps an epoch."""
    data = DataLoader(TensorDataset(X), batch_size=8)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    trainer(max_epochs=epochs, callbacks=list(callbacks), **{**quiet, **options}).fit(
        model, data, data if validate else None
    )
    return model


class Log(Callback):
    """The running mean at the end of each epoch of training, of each step, and while validating."""

    def __init__(self):
        self.epochs, self.steps, self.validating = [], [], []

    def on_train_epoch_end(self, trainer, pl_module):
        self.epochs.append(pl_module.net[1].running_mean.clone())

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.steps.append(pl_module.net[1].running_mean.clone())

    def on_validation_batch_start(self, trainer, pl_module, *_):
        if not trainer.sanity_checking:
            self.validating.append((pl_module.net[1].running_mean.clone(), exact(pl_module)))


@torch.no_grad()
def exact(model):
    """The mean of what the BN layer gets."""
    return model.net[0](X).mean(0)


@pytest.mark.parametrize(("after", "unit", "moving"), [(0, "epochs", 0), (2, "epochs", 8), (5, "steps", 5)])
def test_freezing_takes_effect_when_it_should(after, unit, moving):
    """Statistics and weights move for so many steps, and not after, although Lightning trains on in train mode."""
    log = Log()
    callback = FreezeBatchNorm(after, unit=unit)
    model = fit(module(), callback, log, epochs=4)
    means = [torch.zeros(3), *log.steps]
    changes = [not torch.equal(a, b) for a, b in pairwise(means)]
    assert changes == [True] * moving + [False] * (16 - moving)
    bntools.assert_frozen(model)
    callback.frozen.undo()
    assert not bntools.inspect(model)[0].stats_frozen


def test_freezing_from_the_start_is_seen_by_the_optimizer():
    """It comes before configure_optimizers: frozen parameters are not handed to it."""
    callback = FreezeBatchNorm()
    trainer = lightning.Trainer
    model = module()
    fit(model, callback, trainer=trainer, epochs=1)
    assert len(model.optimizers().param_groups[0]["params"]) == 4
    assert callback.frozen.layers == ["net.1"]


def test_recalibration_before_each_validation_and_never_twice():
    """Validation has the statistics of its weights; the check before training and its end measure nothing more."""
    log, callback = Log(), RecalibrateBatchNorm(BATCHES, check=True)
    model = fit(module(), callback, log)
    assert [result.samples for result in callback.results] == [32, 32, 32]
    assert max(result.residual for result in callback.results) < 1e-5
    assert len(log.validating) == 12
    for mean, expected in log.validating:
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.net[1].running_mean, exact(model), rtol=1e-4, atol=1e-5)
    assert model.training
    assert not model.net[1].running_mean.requires_grad


def test_recalibration_at_the_end_only_and_of_a_loader():
    """Without validation once, on a DataLoader, with Lightning's older name as well."""
    callback = RecalibrateBatchNorm(DataLoader(TensorDataset(X), batch_size=5), max_samples=32)
    model = fit(module(pytorch_lightning.LightningModule), callback, trainer=pytorch_lightning.Trainer, validate=False)
    assert len(callback.results) == 1
    torch.testing.assert_close(model.net[1].running_mean, exact(model), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "averaging",
    [
        WeightAveraging,
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: StochasticWeightAveraging(0.05, swa_epoch_start=1),
    ],
)
def test_averaged_weights_get_statistics_of_their_own(averaging):
    """What is validated, and what is left at the end, has the statistics of the averaged weights."""
    log, callback = Log(), RecalibrateBatchNorm(BATCHES)
    model = fit(module(), averaging(), callback, log)
    for mean, expected in log.validating:
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.net[1].running_mean, exact(model), rtol=1e-4, atol=1e-5)
    assert model.net[1].momentum == 0.1
    trained_on = fit(module(), averaging())
    assert torch.equal(trained_on.net[0].weight, model.net[0].weight)


def test_a_place_before_averaging_is_refused():
    """It would measure other weights; so would freezing under an averaging that resets statistics."""
    with pytest.raises(BntoolsError, match="stands before EMAWeightAveraging"):
        fit(module(), RecalibrateBatchNorm(BATCHES), EMAWeightAveraging())
    with pytest.raises(BntoolsError, match="resets all statistics"):
        fit(module(), FreezeBatchNorm(after=1), StochasticWeightAveraging(0.1))


def test_an_averaged_model_of_pytorch_is_recalibrated_like_any():
    """torch.optim.swa_utils.AveragedModel in a plain loop."""
    model = module().net
    averaged = torch.optim.swa_utils.AveragedModel(model)
    model[0].weight.data += 1
    averaged.update_parameters(model)
    result = bntools.recalibrate(averaged, BATCHES)
    assert result.residual < 1e-5
    expected = averaged.module[0](X).mean(0)
    torch.testing.assert_close(averaged.module[1].running_mean, expected.detach(), rtol=1e-4, atol=1e-5)


def test_statistics_that_are_not_finite_stop_the_fit():
    """The layer and the step are named; the weights of later steps never come about."""

    class Break(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            if trainer.global_step == 5:
                pl_module.net[0].weight.data[0, 0] = float("nan")

    log = Log()
    with pytest.raises(BntoolsError, match=r"layer 'net\.1': NaN or Inf .* after step 6"):
        fit(module(), Break(), StopOnNonFinite(), log)
    assert len(log.steps) == 5


def test_the_monitor_writes_to_the_loggers(tmp_path):
    """A logger of Lightning gets the figures of every fifth batch, and training is the same with them."""
    from lightning.pytorch.loggers import CSVLogger

    logger, seen = CSVLogger(tmp_path), []
    plain = fit(module(), validate=False)
    model = fit(
        module(),
        MonitorBatchNorm(every=5),
        MonitorBatchNorm(every=4, log=lambda figures, step: seen.append(step)),
        validate=False,
        logger=logger,
    )
    logger.save()
    with open(logger.experiment.metrics_file_path, newline="") as file:
        logged = list(csv.DictReader(file))
    assert [row["step"] for row in logged] == ["5", "10"]
    assert float(logged[1]["bn/net.1/drift"]) == float(logged[1]["bn/drift"]) > 0
    assert {"bn/net.1/mean", "bn/net.1/variance"} <= set(logged[0])
    assert seen == [4, 8, 12]
    assert torch.equal(plain.net[1].running_mean, model.net[1].running_mean)


def trained_together(monkeypatch, work):
    """What ``work(rank)`` returns or raises on two processes of a distributed training."""
    from bntools.backends import torch as backend

    own = threading.local()
    monkeypatch.setattr(backend, "world", lambda: own.group)

    def run(group):
        own.group = group
        return work(group.rank)

    return together(2, run)


def recalibrator(batches, **options):
    """What the callback calls, without a training."""
    return RecalibrateBatchNorm(batches, **options)._recalibrate


def test_processes_measure_their_shares_together(monkeypatch):
    """However they are cut: all get the statistics of the whole data, and of the same data on each as well."""
    whole = module()
    recalibrator(BATCHES)(whole)
    for shares in ((BATCHES[:1], BATCHES[1:]), (BATCHES, BATCHES)):
        models = [module(), module()]
        results = trained_together(monkeypatch, lambda rank: recalibrator(shares[rank])(models[rank]))  # noqa: B023
        assert results == [None, None]
        assert torch.equal(models[0].net[1].running_mean, models[1].net[1].running_mean)
        torch.testing.assert_close(models[0].net[1].running_var, whole.net[1].running_var)


def test_processes_weigh_the_statistics_of_the_first_with_prior(monkeypatch):
    """In training each process has statistics of its own: a prior is those of the first on all of them."""
    models = [module(), module()]
    models[0].net[1].running_mean.fill_(6.0)
    shares = (BATCHES[:1], BATCHES[1:])
    results = trained_together(monkeypatch, lambda rank: recalibrator(shares[rank], prior=10**9)(models[rank]))
    assert results == [None, None]
    assert all((model.net[1].running_mean > 5.9).all() for model in models)


def test_a_process_that_fails_tells_the_others(monkeypatch):
    """Both raise, each in its own words, and each gets its own statistics back."""
    models = [module(), module()]
    models[1].net[1].running_mean.fill_(6.0)
    shares = (BATCHES, [(X * torch.nan,)])
    results = trained_together(monkeypatch, lambda rank: recalibrator(shares[rank])(models[rank]))
    assert [type(error) for error in results] == [PeerError, BntoolsError]
    assert str(results[0]).startswith("rank 1 of 2 has failed: batch 0 brings NaN or Inf")
    assert [float(model.net[1].running_mean[0]) for model in models] == [0, 6]


def test_a_module_that_trains_with_callbacks_can_be_copied():
    """Nothing that was put on the module for its time is left there."""
    model = fit(module(), StopOnNonFinite(), MonitorBatchNorm(every=1), RecalibrateBatchNorm(BATCHES), epochs=1)
    copy = deepcopy(model)
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in copy.modules())


def test_wrong_arguments_are_refused_at_once():
    """Before any training."""
    with pytest.raises(BntoolsError, match="number of steps"):
        FreezeBatchNorm(-1, unit="steps")
    with pytest.raises(BntoolsError, match="expected one of epochs, steps"):
        FreezeBatchNorm(1, unit="batches")
    with pytest.raises(BntoolsError, match="generator, which can be read only once"):
        RecalibrateBatchNorm(batch for batch in BATCHES)
