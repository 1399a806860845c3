"""The Trainer of Hugging Face, on the CPU, with a ResNet of two stages."""

from itertools import pairwise

import pytest
import shim  # noqa: F401
import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainerCallback, TrainingArguments

import bntools
from bntools.callbacks.transformers import FreezeBatchNorm, MonitorBatchNorm, RecalibrateBatchNorm, StopOnNonFinite
from bntools.errors import BntoolsError

pytestmark = pytest.mark.filterwarnings("ignore")  # the Trainer's own, about pinned memory and schedulers
IMAGES = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 + 1
DATA = [{"pixel_values": image, "labels": index % 3} for index, image in enumerate(IMAGES)]
BATCHES = [{"pixel_values": IMAGES[:6]}, {"pixel_values": IMAGES[6:]}]
FIRST = "resnet.embedder.embedder.normalization"


def network():
    """Seven BN layers."""
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=4,
        hidden_sizes=[4, 6],
        depths=[1, 1],
        num_labels=3,
        layer_type="basic",
        downsample_in_first_stage=True,
    )
    return ResNetForImageClassification(config)


def train(tmp_path, *callbacks, model=None, **options):
    """Two epochs of four steps, with these callbacks."""
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, **options}
    arguments = TrainingArguments(
        tmp_path, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", logging_strategy="no", **options
    )
    trainer = Trainer(
        network() if model is None else model,
        arguments,
        train_dataset=DATA,
        eval_dataset=DATA,
        callbacks=list(callbacks),
    )
    trainer.train()
    return trainer


class Log(TrainerCallback):
    """The running mean of the first layer after each step, and in each evaluation beside what it should be."""

    def __init__(self):
        self.steps, self.evaluated = [], []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.steps.append(first(model).running_mean.clone())

    def on_prediction_step(self, args, state, control, model=None, **kwargs):
        self.evaluated.append((first(model).running_mean.clone(), exact(model)))


def first(model):
    """The first BN layer."""
    return model.get_submodule(FIRST)


@torch.no_grad()
def exact(model):
    """The mean of what the first BN layer gets."""
    return model.resnet.embedder.embedder.convolution(IMAGES).mean((0, 2, 3))


@pytest.mark.parametrize(("after", "unit", "moving"), [(0, "epochs", 0), (1, "epochs", 4), (6, "steps", 6)])
def test_freezing_takes_effect_when_it_should(tmp_path, after, unit, moving):
    """Statistics move for so many steps, and not after, although the Trainer calls model.train() at each."""
    log, callback = Log(), FreezeBatchNorm(after, unit=unit)
    model = train(tmp_path, callback, log).model
    means = [torch.zeros(4), *log.steps]
    changes = [not torch.equal(a, b) for a, b in pairwise(means)]
    assert changes == [True] * moving + [False] * (8 - moving)
    bntools.assert_frozen(model)
    callback.frozen.undo()
    assert not bntools.inspect(model)[0].stats_frozen


@pytest.mark.parametrize(("strategy", "times"), [("epoch", 2), ("steps", 2), ("no", 1)])
def test_recalibration_before_each_evaluation_and_at_the_end(tmp_path, strategy, times):
    """Each evaluation has the statistics of its weights; what the last one measured is not measured again."""
    log, callback = Log(), RecalibrateBatchNorm(BATCHES, check=True)
    trainer = train(tmp_path, callback, log, eval_strategy=strategy, eval_steps=4)
    assert [result.samples for result in callback.results] == [16] * times
    assert max(result.residual for result in callback.results) < 1e-5
    assert len(log.evaluated) == (0 if strategy == "no" else 4)
    for mean, expected in log.evaluated:
        torch.testing.assert_close(mean, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first(trainer.model).running_mean, exact(trainer.model), rtol=1e-4, atol=1e-5)
    trainer.evaluate()
    assert len(callback.results) == times


def test_statistics_that_are_not_finite_stop_training(tmp_path):
    """The first layer, in the order of execution, and the step."""

    class Break(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 5:
                model.resnet.embedder.embedder.convolution.weight.data[0] = float("inf")

    log = Log()
    with pytest.raises(BntoolsError, match=rf"layer '{FIRST}', and 6 more: NaN or Inf .* after step 6"):
        train(tmp_path, Break(), StopOnNonFinite(), log)
    assert len(log.steps) == 5


def test_the_monitor_logs_every_so_many_steps(tmp_path):
    """Under the Trainer's own step, for each layer."""
    seen = []
    train(tmp_path, MonitorBatchNorm(lambda figures, step: seen.append((step, figures)), every=3))
    assert [step for step, _ in seen] == [3, 6]
    figures = seen[-1][1]
    assert len(figures) == 1 + 3 * 7
    assert figures["bn/drift"] == max(value for name, value in figures.items() if name.endswith("/drift"))
    assert figures["bn/drift"] > 0
