"""Callbacks for ``keras.Model.fit``: freeze BN after some epochs, recalibrate before each validation and at the end."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import keras

from bntools.batches import is_repeatable
from bntools.errors import BntoolsError
from bntools.freezing import Frozen, freeze
from bntools.inspection import inspect
from bntools.layer import Selection
from bntools.recalibrated import Recalibration
from bntools.recalibration import recalibrate


class FreezeBatchNorm(keras.callbacks.Callback):
    """Freeze BN layers when ``after`` epochs of training are done, counted from epoch 0 as ``fit`` counts them.

    The other arguments are those of ``bntools.freeze``. It takes effect with the next epoch, without recompiling, and
    lasts when training is over: ``frozen`` is what ``bntools.freeze`` returned, None before, and undoes it.

    Raises BntoolsError for an ``after`` that is no number of epochs, and in ``fit`` what ``bntools.freeze`` raises.

        model.fit(x, y, epochs=10, callbacks=[FreezeBatchNorm(after=6)])
    """

    def __init__(self, after: int, *, stats: bool = True, affine: bool = True, layers: Selection = None):
        super().__init__()
        if not isinstance(after, Integral) or isinstance(after, bool) or after < 0:
            raise BntoolsError(f"after={after!r}: expected a number of epochs, 0 or more")
        self.after: int = int(after)
        self.stats: bool = stats
        self.affine: bool = affine
        self.layers: Selection = layers
        self.frozen: Frozen | None = None

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """Freeze if it is time."""
        if epoch >= self.after and self.frozen is None:
            self.frozen = freeze(self.model, stats=self.stats, affine=self.affine, layers=self.layers)


class RecalibrateBatchNorm(keras.callbacks.Callback):
    """Recalibrate BN before each validation of ``fit`` and at the end of training, on data that can be read again.

    Validation then measures the weights, not how far the moving averages lag behind them. ``batches`` and the
    arguments after ``at_end`` are those of ``bntools.recalibrate``; ``check`` is off, for it takes another pass.
    ``results`` holds a Recalibration for each time. Nothing is done twice for the same weights, nothing where all
    statistics are frozen, which a warning says, and nothing in an ``evaluate`` outside of ``fit``. A callback
    that restores weights at the end of training, as EarlyStopping may, belongs before this one in the list.

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
        if not is_repeatable(batches):
            raise BntoolsError(
                f"found a {type(batches).__name__}, which can be read only once, where data for several recalibrations "
                f"was expected: give a list of batches, arrays, a tf.data.Dataset or a keras.utils.PyDataset"
            )
        self.batches, self.before_validation, self.at_end = batches, before_validation, at_end
        self.method, self.prior, self.layers, self.forward = method, prior, layers, forward
        self.memory, self.tolerance, self.max_samples, self.check = memory, tolerance, max_samples, check
        self.results: list[Recalibration] = []
        self._fit: Any = None
        self._trained = False

    def on_train_begin(self, logs: Any = None) -> None:
        """Remember which call of ``fit`` this is: validation inside it has the same parameters."""
        self._fit = self.params

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        """From here on the weights are others than those that were measured."""
        self._trained = True

    def on_test_begin(self, logs: Any = None) -> None:
        """Recalibrate before the validation of a ``fit``."""
        if self.before_validation and self._fit is not None and self.params is self._fit:
            self._recalibrate()

    def on_train_end(self, logs: Any = None) -> None:
        """Recalibrate once more, unless the last validation has done so."""
        if self.at_end:
            self._recalibrate()
        self._fit = None

    def _recalibrate(self) -> None:
        if not self._trained:
            return
        if self._all_frozen():
            warnings.warn(
                "RecalibrateBatchNorm did nothing: all BN layers are frozen. Name those to recalibrate all the same in "
                "layers= ('*' for all of them)",
                stacklevel=2,
            )
            return
        result = recalibrate(
            self.model,
            self.batches,
            method=self.method,
            prior=self.prior,
            layers=self.layers,
            forward=self.forward,
            memory=self.memory,
            tolerance=self.tolerance,
            max_samples=self.max_samples,
            check=self.check,
        )
        self.results.append(result)
        self._trained = False

    def _all_frozen(self) -> bool:
        return self.layers is None and all(layer.stats_frozen for layer in inspect(self.model))
