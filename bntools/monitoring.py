"""The verb watch: what the statistics do while a model trains, and a stop where they are not finite any more."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from numbers import Integral
from typing import Any, Protocol

import numpy as np

from bntools import backends
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, Selection, distance, select

WAITING = 64  # readings under way on a device before the oldest is waited for

Log = Callable[[Mapping[str, float], int], None]


class Reading(Protocol):
    """Numbers on their way from a device."""

    def ready(self) -> bool:
        """Whether ``values`` would not wait."""

    def values(self) -> np.ndarray:
        """The numbers, of shape (n,) float64; waits for them."""


class Watch:
    """What ``watch`` returns: call ``step()`` after each training step; a context manager.

    ``steps`` counts them. ``figures`` are those that were logged last.
    """

    def __init__(self, observer: Any, layers: list[BatchNorm], every: int, log: Log | None, stop: bool):
        self.layers = [layer.name for layer in layers]
        self.steps = 0
        self.figures: dict[str, float] = {}
        self._start, self._observer, self._every, self._log, self._stop = layers, observer, every, log, stop
        self._waiting: deque[tuple[Callable[[Reading, int], None], Reading, int]] = deque()

    def step(self, number: int | None = None) -> None:
        """Look at the statistics after a training step; ``number`` is what the step is called, its count by default.

        Nothing waits for an accelerator: what a step has left is read by a later one, or at the end.
        Raises BntoolsError where statistics are not finite, naming the first layer and the step.
        """
        self.steps += 1
        number = self.steps if number is None else number
        if self._stop:
            self._waiting.append((self._judge, self._observer.peaks(), number))
        if self._log is not None and self.steps % self._every == 0:
            self._waiting.append((self._report, self._observer.statistics(), number))
        while self._waiting and (len(self._waiting) > WAITING or self._waiting[0][1].ready()):
            self._take()

    def finish(self) -> None:
        """Wait for what is still to be read, log and judge it."""
        while self._waiting:
            self._take()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._observer.close()
        if kind is None:
            self.finish()
        self._waiting.clear()

    def _take(self) -> None:
        use, reading, number = self._waiting.popleft()
        use(reading, number)

    def _judge(self, reading: Reading, number: int) -> None:
        peaks = reading.values()
        if np.isfinite(peaks).all():
            return
        order = self._observer.order()
        names = [name for name, peak in zip(self.layers, peaks, strict=True) if not np.isfinite(peak)]
        names.sort(key=lambda name: order.index(name) if name in order else len(order))
        others = f", and {len(names) - 1} more" * (len(names) > 1)
        self._waiting.clear()
        raise BntoolsError(
            f"layer {names[0]!r}{others}: NaN or Inf in the running statistics after step {number}, first seen there. "
            f"Look at the batch and the loss of that step (learning rate, mixed precision, data), and go on from a "
            f"checkpoint of before: running averages never forget a NaN"
        )

    def _report(self, reading: Reading, number: int) -> None:
        parts = iter(np.split(reading.values(), np.cumsum([n for one in self._start for n in [one.features] * 2])[:-1]))
        figures: dict[str, float] = {}
        for layer, mean, var in zip(self._start, parts, parts, strict=False):
            drift = distance(layer.stats, (mean, var), layer.eps)
            figures |= {f"bn/{layer.name}/drift": drift}
            figures |= {f"bn/{layer.name}/mean": float(mean.mean()), f"bn/{layer.name}/variance": float(var.mean())}
        worst = float(np.max([figures[f"bn/{name}/drift"] for name in self.layers]))  # NaN if one of them is
        self.figures = {"bn/drift": worst, **figures}
        assert self._log is not None
        self._log(self.figures, number)


def watch(model: Any, *, every: int = 50, log: Any = None, layers: Selection = None, stop: bool = True) -> Watch:
    """Follow the running statistics of a model in a training loop of any kind.

    After each ``step()`` of the result every layer's statistics are looked at, and training is stopped, by a
    BntoolsError that names the first layer (in the order in which the model runs, where that could be seen) and the
    step, once they are not finite; ``stop=False`` leaves that out. Every ``every`` steps ``log`` gets, for each layer,
    ``bn/NAME/drift``, how far its statistics have moved since ``watch`` was called, in standard deviations of then;
    ``bn/NAME/mean`` and ``bn/NAME/variance``, both averaged over the channels; and ``bn/drift``, the largest drift.

    ``log`` is a SummaryWriter of TensorBoard, anything else with its ``add_scalar(tag, value, step)``, or a function
    ``log(figures, step)``.

    Raises BntoolsError for models that do not train, and for statistics that are not finite to begin with.

        with bntools.watch(model, every=100, log=SummaryWriter()) as watch:
            for batch in loader:
                train_step(model, batch)
                watch.step()
    """
    if not isinstance(every, Integral) or isinstance(every, bool) or every < 1:
        raise BntoolsError(f"found every={every!r}, expected a number of steps, 1 or more")
    backend = backends.of(model)
    if not hasattr(backend, "observer"):
        raise BntoolsError(f"a {type(model).__name__} does not train: there is nothing to watch")
    chosen = [layer for layer in select(backend.layers(model), layers, backends.absence(model)) if layer.tracked]
    if not chosen:
        raise BntoolsError("none of the BN layers keeps statistics: there is nothing to watch")
    for layer in chosen:
        if not layer.initialized:
            raise BntoolsError(f"layer {layer.name!r} is not initialized yet: run one batch through the model first")
        if not all(np.isfinite(values).all() for values in layer.stats):
            raise BntoolsError(
                f"layer {layer.name!r}: NaN or Inf in the running statistics before the first step: "
                f"bntools.reset(model) or bntools.recalibrate(model, batches) mends them"
            )
    observer = backend.observer(model, [layer.name for layer in chosen])
    return Watch(observer, chosen, int(every), as_log(log), stop)


def as_log(log: Any) -> Log | None:
    """A function of figures and step, of what was given as ``log``. Raises BntoolsError for anything else."""
    if log is None or (callable(log) and not hasattr(log, "add_scalar")):
        return log
    if not hasattr(log, "add_scalar"):
        raise BntoolsError(
            f"found log={log!r}, expected a SummaryWriter (something with add_scalar) or a function of figures and step"
        )

    def write(figures: Mapping[str, float], step: int) -> None:
        for tag, value in figures.items():
            log.add_scalar(tag, value, step)

    return write
