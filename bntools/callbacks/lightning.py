"""Callbacks for ``lightning.Trainer``: freeze, recalibrate, stop where statistics are not finite, and monitor BN.

They serve the package ``lightning`` and, where only that is installed, ``pytorch_lightning``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from bntools.callbacks.shared import Recalibrator, check_after
from bntools.errors import BntoolsError
from bntools.freezing import Frozen, freeze
from bntools.layer import Selection
from bntools.monitoring import Watch, as_log, watch
from bntools.recalibrated import Recalibration

try:
    from lightning.pytorch.callbacks import Callback
except ModuleNotFoundError:
    from pytorch_lightning.callbacks import Callback  # type: ignore[assignment]  # the same class by another name

# Lightning's own that put averaged weights into the model, in either of its packages.
AVERAGING = ("WeightAveraging", "EMAWeightAveraging", "StochasticWeightAveraging")


class FreezeBatchNorm(Callback):
    """Freeze BN layers when ``after`` epochs, or with ``unit="steps"`` optimizer steps, of training are done.

    The other arguments are those of ``bntools.freeze``. Lightning puts the module into train mode before each epoch,
    which undoes ``eval()`` and does not undo this. With ``after=0`` the layers are frozen before optimizers are made.
    It lasts when training is over: ``frozen`` is what ``bntools.freeze`` returned, None before, and undoes it.

    Raises BntoolsError for an ``after`` that is no such number, and in ``fit`` what ``bntools.freeze`` raises; with
    StochasticWeightAveraging, which resets statistics that frozen layers never get back; and where scale and shift
    would be frozen in the midst of DDP, which goes on waiting for their gradients.

        trainer = Trainer(max_epochs=10, callbacks=[FreezeBatchNorm(after=6)])
    """

    def __init__(
        self, after: int = 0, *, unit: str = "epochs", stats: bool = True, affine: bool = True, layers: Selection = None
    ):
        self.after, self.unit = check_after(after, unit), unit
        self.stats, self.affine, self.layers = stats, affine, layers
        self.frozen: Frozen | None = None

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Freeze at once if nothing is to be waited for, before the module is wrapped and optimizers are made."""
        if stage != "fit":
            return
        if self.stats and _has(trainer, "StochasticWeightAveraging"):
            raise BntoolsError(
                "FreezeBatchNorm with StochasticWeightAveraging, which resets all statistics before its last epoch: "
                "frozen layers would be left without any. Use Lightning's WeightAveraging, or freeze with stats=False"
            )
        waits = "DDP" in type(trainer.strategy).__name__ and trainer.world_size > 1
        if self.affine and self.after and waits and not _finds_unused(trainer.strategy):
            raise BntoolsError(
                "FreezeBatchNorm(after=...) in DDP, which goes on waiting for the gradients of scale and shift: give "
                "affine=False, or the strategy 'ddp_find_unused_parameters_true'"
            )
        if not self.after and not _overrides(pl_module, "configure_model"):
            self._freeze(pl_module)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze, with after=0, a module that was made by ``configure_model``."""
        if not self.after:
            self._freeze(pl_module)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Freeze if it is time."""
        if self.unit == "epochs" and trainer.current_epoch >= self.after:
            self._freeze(pl_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        """Freeze if it is time."""
        if self.unit == "steps" and trainer.global_step >= self.after:
            self._freeze(pl_module)

    def _freeze(self, module: Any) -> None:
        if self.frozen is None:
            self.frozen = freeze(module, stats=self.stats, affine=self.affine, layers=self.layers)


class RecalibrateBatchNorm(Callback):
    """Recalibrate BN before each validation of ``fit`` and at the end of training, on data that can be read again.

    Validation then measures the weights, not how far the running averages lag behind them. ``batches`` and the
    arguments after ``at_end`` are those of ``bntools.recalibrate``; ``forward(module, batch)`` is needed where the
    module's own forward does not take the first element of a batch. ``check`` is off, for it takes another pass.
    ``results`` holds a Recalibration for each time. Lightning's check of validation before training changes nothing;
    nothing is done twice for the same weights, nothing where all statistics are frozen, which a warning says.

    Averaged weights get statistics of their own: behind WeightAveraging and EMAWeightAveraging the average that is
    validated, and the one that is left at the end; behind StochasticWeightAveraging the one at the end. This callback
    belongs after them in the list. On several processes all measure together: give each its own share of the
    batches, as a DistributedSampler does, or, without ``prior``, ``tolerance`` and ``max_samples``, all the same.

    Raises BntoolsError for data that can be read only once, and in ``fit`` for a place before an averaging callback,
    and what ``bntools.recalibrate`` raises.

        trainer = Trainer(callbacks=[WeightAveraging(), RecalibrateBatchNorm(train_batches, max_samples=2048)])
    """

    def __init__(
        self,
        batches: Iterable[Any],
        *,
        before_validation: bool = True,
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
        self.before_validation, self.at_end = before_validation, at_end
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

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Look at this callback's place in the list."""
        place = trainer.callbacks.index(self)
        later = [name for name in map(_kind, trainer.callbacks[place + 1 :]) if name in AVERAGING]
        if stage == "fit" and later:
            raise BntoolsError(
                f"RecalibrateBatchNorm stands before {later[0]} in the list of callbacks, and would measure other "
                f"weights than those that it puts in: let it stand after {later[0]}"
            )

    def on_validation_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate before the validation of a ``fit``."""
        if self.before_validation and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._recalibrate(pl_module)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Recalibrate once more, unless the last validation has done so for these weights."""
        if self.at_end and trainer.global_step:
            self._recalibrate(pl_module)


class MonitorBatchNorm(Callback):
    """Log, every ``every`` batches, each layer's drift since the start of ``fit``, its mean and its variance.

    The figures are those of ``bntools.watch``. They go to the trainer's loggers, TensorBoard for one, or to ``log``: a
    SummaryWriter, or a function of figures and step. On several processes they are those of the first.

        trainer = Trainer(logger=TensorBoardLogger("logs"), callbacks=[MonitorBatchNorm(every=100)])
    """

    def __init__(self, *, every: int = 50, layers: Selection = None, log: Any = None):
        self.every, self.layers = every, layers
        self._to = as_log(log)  # not self.log: Lightning puts its own there
        self.watch: Watch | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Take the statistics from which drift is counted."""

        def to_loggers(figures: Any, step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(dict(figures), step)

        if trainer.is_global_zero:
            log = self._to or to_loggers
            self.watch = watch(pl_module, every=self.every, log=log, layers=self.layers, stop=False)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log if it is time."""
        if self.watch is not None:
            self.watch.step(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Log what is still on its way."""
        if self.watch is not None:
            self.watch.finish()


class StopOnNonFinite(Callback):
    """Stop ``fit``, by a BntoolsError, at the step that has left NaN or Inf in the statistics of a layer.

    It names the first such layer, in the order in which the model runs, and the optimizer step. Every process looks at
    its own statistics; the error of one ends the others as any error does.

        trainer = Trainer(callbacks=[StopOnNonFinite()])
    """

    def __init__(self, *, layers: Selection = None):
        self.layers = layers
        self._watch: Watch | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Look at the statistics as they are: those that are not finite to begin with are refused."""
        self._watch = watch(pl_module, layers=self.layers)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Raise BntoolsError if statistics are not finite."""
        if self._watch is not None:
            self._watch.step(trainer.global_step)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Look at what is still on its way."""
        if self._watch is not None:
            self._watch.finish()


def _kind(callback: Any) -> str:
    """The name of Lightning's own class that a callback is, or that it is derived from; else empty."""
    return next((base.__name__ for base in type(callback).__mro__ if base.__name__ in AVERAGING), "")


def _has(trainer: Any, kind: str) -> bool:
    return any(_kind(callback) == kind for callback in trainer.callbacks)


def _finds_unused(strategy: Any) -> bool:
    return bool(getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters"))


def _overrides(module: Any, hook: str) -> bool:
    """Whether the user's module has such a hook of its own."""
    owner = next((base for base in type(module).__mro__ if hook in vars(base)), None)
    return owner is not None and not owner.__module__.startswith(("lightning.", "pytorch_lightning."))
