"""The verb adapt: the statistics of a live model follow the batches that it is given."""

from __future__ import annotations

import math
from collections.abc import Callable
from numbers import Real
from typing import Any

from bntools import backends
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, Selection, select
from bntools.past import Past


class Adaptation:
    """What ``adapt`` returns: ends it by ``undo()`` or at the end of a ``with`` block.

    ``layers`` names what adapts. Undoing twice does no more than undoing once.
    """

    def __init__(self, layers: list[str], samples: Callable[[], float], undo: Callable[[], None]):
        self.layers = layers
        self._samples = samples
        self._undo: Callable[[], None] | None = undo

    @property
    def samples(self) -> float:
        """What the statistics remember now besides the stored ones, in samples: bounded by a window or half-life."""
        return self._samples()

    def undo(self) -> None:
        """Stop adapting, and give the layers back the statistics that they had, bit for bit."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Adaptation:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._undo is None else f"adapting, {self.samples:g} samples in memory"
        return f"<{len(self.layers)} BN layer{'s' * (len(self.layers) != 1)} {state}>"


def adapt(
    model: Any, *, prior: float, layers: Selection, window: float | None = None, half_life: float | None = None
) -> Adaptation:
    """Let the statistics of the named layers follow each batch that a live model is given in eval mode, in place.

    Before such a layer normalizes, the moments of its input are merged exactly, in float64, with those of the batches
    before and with the stored statistics, which weigh as ``prior`` samples for good. The output of a batch therefore
    uses statistics that include that batch. A batch weighs as many samples as its first axis has, whatever its size in
    pixels. Layers in train mode do as ever: only those that run in eval mode, or frozen, adapt. bntools's own passes
    (``recalibrate``, ``verify`` and so on) leave the statistics alone.

    ``window`` bounds the memory to the last batches that hold no more than that many samples together (the newest
    counts in any case); with ``half_life`` the weight of a sample halves with that many more. With neither, every
    sample counts for good, and statistics move less and less.

    A batch that is not finite where it reaches a layer raises BntoolsError; whenever a forward pass of the model
    raises, the statistics are as before that pass. The model is for one thread at a time: a call from a second one
    while a pass is under way is refused. On several processes each adapts by itself. Undo before the model is copied
    (a copy does not adapt) or pickled; ``state_dict`` holds the statistics as they are at the moment.

    Args:
        model: a torch.nn.Module, not compiled.
        prior: what the stored statistics weigh, in samples, above 0.
        layers: names, globs or a predicate on BatchNorm; ``"*"`` for all. There is no default.
        window: in samples.
        half_life: in samples.

    Raises BntoolsError for models of other frameworks and for layers that cannot adapt, each with its reason.

        with bntools.adapt(model, prior=256, layers="*", half_life=2000) as adaptation:
            serve(model)
    """
    _check(prior, layers, window, half_life)
    backend = backends.of(model)
    if not hasattr(backend, "adapt"):
        raise BntoolsError(
            f"found a {type(model).__name__} where a torch.nn.Module was expected: what runs of Keras models and ONNX "
            f"files is compiled, and cannot be followed layer by layer. bntools.recalibrate(model, batches, "
            f"prior={prior:g}) moves their statistics between batches"
        )
    chosen = select(backend.layers(model), layers, backends.absence(model))
    for layer in chosen:
        if problem := _obstacle(layer):
            raise BntoolsError(f"layer {layer.name!r} cannot adapt: {problem}")
    names = [layer.name for layer in chosen]
    samples, undo = backend.adapt(model, names, float(prior), Past(window, half_life))
    return Adaptation(names, samples, undo)


def _obstacle(layer: BatchNorm) -> str:
    if not layer.initialized:
        return "it is not initialized yet: run one batch through the model first"
    if not layer.tracked:
        return "it keeps no statistics"
    if not layer.pooled:
        return "instance normalization keeps averages over instances, not moments of the data"
    mean, var = layer.stats
    if not (math.isfinite(mean.sum()) and math.isfinite(var.sum()) and (var >= 0).all()):
        return "its stored statistics are not finite or negative: bntools.recalibrate mends them"
    return ""


def _check(prior: Any, layers: Any, window: Any, half_life: Any) -> None:
    given = {"prior": prior, "window": window, "half_life": half_life}
    for name, value in given.items():
        number = isinstance(value, Real) and not isinstance(value, bool) and 0 < float(value) < math.inf
        if not number and (value is not None or name == "prior"):
            raise BntoolsError(f"found {name}={value!r}, expected a number of samples above 0")
    if layers is None:
        raise BntoolsError("found layers=None: name the layers that are to adapt, layers='*' for all of them")
    if window is not None and half_life is not None:
        raise BntoolsError("found both window= and half_life=, expected one of them")
