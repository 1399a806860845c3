"""Callbacks for ``keras.Model.fit``: freeze, recalibrate, stop where statistics are not finite, and monitor BN."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import keras

from bntools.callbacks.shared import Recalibrator, check_after
from bntools.errors import BntoolsError
from bntools.freezing import Frozen, freeze
from bntools.layer import Selection
from bntools.monitoring import Log, Watch, as_log, watch
from bntools.recalibrated import Recalibration


class FreezeBatchNorm(keras.callbacks.Callback):
    """Freeze BN layers when ``after`` epochs of training are done, counted from epoch 0 as ``fit`` counts them.

    With ``unit="steps"``, ``after`` is a number of batches, counted from the start of ``fit``. The other arguments are
    those of ``bntools.freeze``. It takes effect with the next batch, without recompiling, and
    lasts when training is over: ``frozen`` is what ``bntools.freeze`` returned, None before, and undoes it.

    Raises BntoolsError for an ``after`` that is no such number, and in ``fit`` what ``bntools.freeze`` raises.

        model.fit(x, y, epochs=10, callbacks=[FreezeBatchNorm(after=6)])
    """

    def __init__(
        self, after: int = 0, *, unit: str = "epochs", stats: bool = True, affine: bool = True, layers: Selection = None
    ):
        super().__init__()
        self.after: int = check_after(after, unit)
        self.unit = unit
        self.stats: bool = stats
        self.affine: bool = affine
        self.layers: Selection = layers
        self.frozen: Frozen | None = None
        self._batches = _Batches()

    def on_train_begin(self, logs: Any = None) -> None:
        """Count from here."""
        self._batches = _Batches()

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Freeze if it is time."""
        if self.unit == "epochs":
            self._freeze_after(epoch)

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Freeze if it is time."""
        if self.unit == "steps":
            self._freeze_after(self._batches.done)
        self._batches.begin(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Count the batch."""
        self._batches.end(batch)

    def _freeze_after(self, done: int) -> None:
        if done >= self.after and self.frozen is None:
            self.frozen = freeze(self.model, stats=self.stats, affine=self.affine, layers=self.layers)


class RecalibrateBatchNorm(keras.callbacks.Callback):
    """Recalibrate BN before each validation of ``fit`` and at the end of training, on data that can be read again.

    Validation then measures the weights, not how far the moving averages lag behind them. ``batches`` and the
    arguments after ``at_end`` are those of ``bntools.recalibrate``; ``check`` is off, for it takes another pass.
    ``results`` holds a Recalibration for each time. Nothing is done twice for the same weights, nothing where all
    statistics are frozen, which a warning says, and nothing in an ``evaluate`` outside of ``fit``. The averaged
    weights of an optimizer with ``use_ema=True``, which ``fit`` puts in at the end, get their own statistics. A
    callback that changes weights, as EarlyStopping or SwapEMAWeights may, belongs before this one in the list.

    Raises BntoolsError for data that can be read only once, and in ``fit`` what ``bntools.recalibrate`` raises.

        recalibration = RecalibrateBatchNorm(train_data, max_samples=2048)
        model.fit(train_data, validation_data=held_out, epochs=10, callbacks=[recalibration])
        print(recalibration.results[-1])
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
        super().__init__()
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
            kinds="a list of batches, arrays, a tf.data.Dataset or a keras.utils.PyDataset",
        )
        self._fit: Any = None
        self._trained = False

    @property
    def results(self) -> list[Recalibration]:
        """What each recalibration did."""
        return self._recalibrate.results

    def on_train_begin(self, logs: Any = None) -> None:
        """Remember which call of ``fit`` this is: validation inside it has the same parameters."""
        self._fit, self._trained = self.params, False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """From here on the weights are others than those that were measured."""
        self._trained = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Recalibrate before the validation of a ``fit``."""
        if self.before_validation and self._trained and self._fit is not None and self.params is self._fit:
            self._recalibrate(self.model)

    def on_train_end(self, logs: Any = None) -> None:
        """Recalibrate once more, unless the last validation has done so for these weights."""
        if self.at_end and self._trained:
            self._recalibrate(self.model)
        self._fit = None


class MonitorBatchNorm(keras.callbacks.Callback):
    """Log, every ``every`` batches, each layer's drift since the start of ``fit``, its mean and its variance.

    ``log`` is a folder, in which a summary file for TensorBoard is written (``tf.summary``, which needs TensorFlow and
    the package tensorboard), or a function of figures and step. The figures are those of ``bntools.watch``.

        model.fit(data, epochs=10, callbacks=[MonitorBatchNorm("logs/bn", every=100)])
    """

    def __init__(self, log: Any, *, every: int = 50, layers: Selection = None):
        super().__init__()
        self.log, self.every, self.layers = log, every, layers
        self.watch: Watch | None = None
        self._close: Callable[[], None] = lambda: None
        self._batches = _Batches()

    def on_train_begin(self, logs: Any = None) -> None:
        """Take the statistics from which drift is counted."""
        if callable(self.log) or hasattr(self.log, "add_scalar"):
            log = as_log(self.log)
        else:
            log, self._close = _summaries(self.log)
        self.watch = watch(self.model, every=self.every, log=log, layers=self.layers, stop=False)
        self._batches = _Batches()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Count the batch."""
        self._batches.begin(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Log if it is time."""
        done = self._batches.end(batch)
        if self.watch is not None:
            self.watch.step(done)

    def on_train_end(self, logs: Any = None) -> None:
        """Close the file."""
        if self.watch is not None:
            self.watch.finish()
        self._close()


class StopOnNonFinite(keras.callbacks.Callback):
    """Stop ``fit``, by a BntoolsError, at the batch that has left NaN or Inf in the statistics of a layer.

    It names the first such layer in the model's order, and the step, counted from the start of ``fit``.

        model.fit(data, epochs=10, callbacks=[StopOnNonFinite()])
    """

    def __init__(self, *, layers: Selection = None):
        super().__init__()
        self.layers = layers
        self._watch: Watch | None = None
        self._batches = _Batches()

    def on_train_begin(self, logs: Any = None) -> None:
        """Look at the statistics as they are: those that are not finite to begin with are refused."""
        self._watch, self._batches = watch(self.model, layers=self.layers), _Batches()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        """Count the batch."""
        self._batches.begin(batch)

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        """Raise BntoolsError if statistics are not finite."""
        done = self._batches.end(batch)
        if self._watch is not None:
            self._watch.step(done)


class _Batches:
    """How many batches of a ``fit`` are done: ``steps_per_execution`` runs several between begin and end."""

    def __init__(self) -> None:
        self.done = self._first = 0

    def begin(self, batch: int) -> None:
        """The batch of this number in its epoch begins."""
        self._first = batch

    def end(self, batch: int) -> int:
        """The batch of this number has ended; returns how many are done."""
        self.done += batch - self._first + 1
        return self.done


def _summaries(folder: Any) -> tuple[Log, Callable[[], None]]:
    """A log that writes summaries of TensorFlow into a folder, and what closes it."""
    try:
        import tensorboard  # noqa: F401
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise BntoolsError(
            f"MonitorBatchNorm({str(folder)!r}) needs the package {error.name!r}, which is not installed: pip install "
            f"tensorflow tensorboard, or give a function of figures and step"
        ) from error
    writer = tf.summary.create_file_writer(str(folder))

    def log(figures: Any, step: int) -> None:
        with writer.as_default():
            for tag, value in figures.items():
                tf.summary.scalar(tag, value, step=step)

    return log, writer.close
