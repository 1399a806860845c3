"""Callbacks for ``transformers.Trainer``: freeze, recalibrate, stop where statistics are not finite, and monitor BN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from transformers import TrainerCallback

from bntools.callbacks.shared import Recalibrator, check_after
from bntools.freezing import Frozen, freeze
from bntools.layer import Selection
from bntools.monitoring import Watch, as_log, watch
from bntools.recalibrated import Recalibration


class FreezeBatchNorm(TrainerCallback):
    """Freeze BN layers when ``after`` epochs, or with ``unit="steps"`` optimizer steps, of training are done.

    The other arguments are those of ``bntools.freeze``. The Trainer puts the model into train mode at every step, which
    undoes ``eval()`` and does not undo this. It lasts when training is over: ``frozen`` is what ``bntools.freeze``
    returned, None before, and undoes it. In DDP, which goes on waiting for gradients, freeze the model before it is
    given to the Trainer, or give ``affine=False``.

    Raises BntoolsError for an ``after`` that is no such number, and in ``train`` what ``bntools.freeze`` raises.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[FreezeBatchNorm(after=1000, unit="steps")])
    """

    def __init__(
        self, after: int = 0, *, unit: str = "epochs", stats: bool = True, affine: bool = True, layers: Selection = None
    ):
        self.after, self.unit = check_after(after, unit), unit
        self.stats, self.affine, self.layers = stats, affine, layers
        self.frozen: Frozen | None = None

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Freeze if it is time."""
        done = state.global_step if self.unit == "steps" else state.epoch or 0
        if done >= self.after and self.frozen is None:
            self.frozen = freeze(model, stats=self.stats, affine=self.affine, layers=self.layers)


class RecalibrateBatchNorm(TrainerCallback):
    """Recalibrate BN before each evaluation in ``train`` and at the end of training, on data that can be read again.

    The evaluation, and the checkpoint that is saved with it, then have the statistics of their weights. ``batches`` and
    the arguments after ``at_end`` are those of ``bntools.recalibrate``: dicts, as a data collator makes them, go into
    the model as keywords. ``check`` is off, for it takes another pass. ``results`` holds a Recalibration for each time.
    Nothing is done twice for the same weights, nothing where all statistics are frozen, which a warning says, and
    nothing for ``evaluate`` outside of ``train`` or before its first step. On several processes all
    measure together: give each its own share of the batches, as a DistributedSampler does, or, without ``prior``,
    ``tolerance`` and ``max_samples``, all the same.

    Raises BntoolsError for data that can be read only once, and in ``train`` what ``bntools.recalibrate`` raises.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[RecalibrateBatchNorm(batches)])
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        before_evaluation: bool = True,
        at_end: bool = True,
        method: str = "exact",
        prior: float = 0,
        layers: Selection = None,
        forward: Callable[[Any, Any], Any] | None = None,
        memory: int | None = None,
        tolerance: float | None = None,
        max_samples: int | None = None,
        check: bool = False,
    ):
        self.before_evaluation, self.at_end = before_evaluation, at_end
        self._recalibrate = Recalibrator(
            batches,
            method=method,
            prior=prior,
            layers=layers,
            forward=forward,
            memory=memory,
            tolerance=tolerance,
            max_samples=max_samples,
            check=check,
            kinds="a list of batches or a DataLoader",
        )

    @property
    def results(self) -> list[Recalibration]:
        """What each recalibration did."""
        return self._recalibrate.results

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Recalibrate if an evaluation follows: it has no event of its own before it."""
        if self.before_evaluation and control.should_evaluate:
            self._recalibrate(model)

    def on_epoch_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Recalibrate if an evaluation follows."""
        if self.before_evaluation and control.should_evaluate:
            self._recalibrate(model)

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Recalibrate once more, unless it was done for these weights; the best ones may have been loaded again."""
        if self.at_end and state.global_step:
            self._recalibrate(model)


class MonitorBatchNorm(TrainerCallback):
    """Log, every ``every`` optimizer steps, each layer's drift since the start of training, its mean and its variance.

    ``log`` is a SummaryWriter of TensorBoard, which may be shared with the Trainer's own callback, or a function of
    figures and step. The figures are those of ``bntools.watch``; on several processes those of the first.

        writer = SummaryWriter("runs/bn")
        trainer = Trainer(model, args, callbacks=[TensorBoardCallback(writer), MonitorBatchNorm(writer, every=100)])
    """

    def __init__(self, log: Any, *, every: int = 50, layers: Selection = None):
        self.log, self.every, self.layers = as_log(log), every, layers
        self.watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the statistics from which drift is counted."""
        if state.is_world_process_zero:
            self.watch = watch(model, every=self.every, log=self.log, layers=self.layers, stop=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log if it is time."""
        if self.watch is not None:
            self.watch.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Log what is still on its way."""
        if self.watch is not None:
            self.watch.finish()


class StopOnNonFinite(TrainerCallback):
    """Stop ``train``, by a BntoolsError, at the step that has left NaN or Inf in the statistics of a layer.

    It names the first such layer, in the order in which the model runs, and the optimizer step. Every process looks at
    its own statistics; the error of one ends the others as any error does.

        trainer = Trainer(model, args, train_dataset=data, callbacks=[StopOnNonFinite()])
    """

    def __init__(self, *, layers: Selection = None):
        self.layers = layers
        self._watch: Watch | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Look at the statistics as they are: those that are not finite to begin with are refused."""
        self._watch = watch(model, layers=self.layers)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raise BntoolsError if statistics are not finite."""
        if self._watch is not None:
            self._watch.step(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at what is still on its way."""
        if self._watch is not None:
            self._watch.finish()
