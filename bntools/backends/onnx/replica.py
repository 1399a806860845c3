"""Replicas: micro-batches on their way through an ONNX graph, which stop at every BN layer."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from bntools.backends.onnx.document import Document
from bntools.backends.onnx.editing import write
from bntools.backends.onnx.inference import check_inference
from bntools.backends.onnx.layers import MOMENTUM, Found, attribute, found, stats_of
from bntools.backends.onnx.running import feed
from bntools.backends.onnx.stages import cut, graph_inputs, outputs_of
from bntools.backends.onnx.staging import Runs
from bntools.errors import BntoolsError
from bntools.kernel import moments_of
from bntools.layer import Stats
from bntools.moments import Arrival, Moments
from bntools.runner import Outputs


@contextmanager
def measuring(
    model: Document,
    names: Iterable[str],
    *,
    normalize: str = "stored",
    forward: Callable[[Any, Any], Any] | None = None,
    per_sample: bool = False,
    memory: float = 0,
    waiting: bool = False,
    outputs: bool = False,
    values: Collection[str] = (),
) -> Iterator[Walk]:
    """Cut the graph at the inputs of the named layers; yields what starts a replica on a batch.

    The named layers normalize with their ``"stored"`` statistics, with those of the ``"batch"``, or also
    move the stored ones as the operator's training mode would (``"update"``). ``waiting`` tells that all
    replicas go from layer to layer together, so that one stage at a time is in memory. A graph has no use for
    ``memory``, with which a module is made faster. With ``outputs`` replicas run on behind the last layer, to the
    outputs of the graph. Of the layers in ``values`` the input itself is handed over.

    Raises BntoolsError for a model in training mode and for ``forward``, which a graph has no place for.
    """
    if forward is not None:
        raise BntoolsError("found forward= with an ONNX model: its inputs have names, give batches as dicts by name")
    check_inference(model)
    wanted = set(names)
    layers = [one for one in found(model) if one.name in wanted]
    yield Walk(model, layers, normalize, per_sample, waiting, outputs, frozenset(values))


class Walk:
    """Starts replicas, and knows what all of them share: the stages, their sessions and the statistics."""

    held = 0  # bytes beyond what replicas hold

    def __init__(
        self,
        document: Document,
        layers: list[Found],
        normalize: str,
        per_sample: bool,
        waiting: bool,
        outputs: bool,
        values: frozenset[str],
    ):
        stages = cut(document, layers, together=normalize == "stored" and not waiting, outputs=outputs)
        self.document = document
        self.normalize = normalize
        self.per_sample = per_sample
        self.values = values
        self.outputs = outputs_of(document) if outputs else []
        self.inputs = graph_inputs(document)
        self.runs = Runs(document, stages, keep=not waiting)

    def __call__(self, batch: Any) -> Replica:
        """A replica that stands before the first stage."""
        return Replica(self, feed(self.inputs, batch, self.document.name))

    def stats(self, one: Found) -> Stats:
        """The statistics that a layer is to normalize with, where they are not the batch's."""
        return self.document.stats.get(one.name) or stats_of(self.document, one)


class Replica:
    """One micro-batch on its way through the graph."""

    def __init__(self, walk: Walk, inputs: dict[str, np.ndarray]):
        self._walk = walk
        self._values: dict[str, Any] = dict(inputs)
        self._given = frozenset(inputs)
        self._own: dict[str, Stats] = {}  # the batch's statistics by layer, where they normalize it
        self._stage = -1
        self._waiting: list[tuple[Found, str]] = []

    def advance(self) -> Arrival | None:
        """Run on to the next layer; None when there is none."""
        while not self._waiting:
            self._drop()
            self._stage += 1
            if self._stage == len(self._walk.runs.stages):
                return None
            stage = self._walk.runs.stages[self._stage]
            stats = {one.name: self._own.get(one.name) or self._walk.stats(one) for one in stage.applied}
            self._walk.runs.run(self._stage, self._values, stats)
            self._waiting = list(stage.targets)
        one, value = self._waiting.pop(0)
        moments, samples = moments_of(self._values[value], self._walk.per_sample)
        if self._walk.normalize != "stored":
            self._normalize(one, moments)
        return Arrival(one.name, moments, samples, self._rows(one, value))

    def close(self) -> None:
        """End it where it stands."""
        self._walk.runs.let_go(self._values, set(self._values))
        self._stage = len(self._walk.runs.stages) - 1
        self._waiting = []

    def held(self) -> int:
        """Bytes of the values that it holds, without the batch itself."""
        return sum(getattr(value, "nbytes", 0) for name, value in self._values.items() if name not in self._given)

    def outputs(self) -> Outputs:
        """What the graph gave, by name; the replica has come to its end."""
        found = {name: self._values[name] for name in self._walk.outputs}
        return {name: np.array(value) for name, value in found.items() if isinstance(value, np.ndarray)}

    def _rows(self, one: Found, value: str) -> np.ndarray | None:
        if one.name not in self._walk.values:
            return None
        rows = np.moveaxis(self._values[value], 1, -1)
        return np.array(rows.reshape(-1, rows.shape[-1]))

    def _drop(self) -> None:
        if self._stage >= 0:
            self._walk.runs.let_go(self._values, self._walk.runs.stages[self._stage].drops)

    def _normalize(self, one: Found, moments: Moments) -> None:
        if moments.count <= 1:
            raise BntoolsError(
                f"layer {one.name!r} saw a single value per channel in a batch, which cannot be normalized with its "
                f"own statistics: give larger batches, or take method='exact'"
            )
        self._own[one.name] = moments.mean, moments.var
        if self._walk.normalize == "update":
            keep = attribute(one.node, "momentum", MOMENTUM)
            mean, var = self._walk.stats(one)
            moved = keep * mean + (1 - keep) * moments.mean, keep * var + (1 - keep) * moments.var
            write(self._walk.document, {one.name: (*moved, None)})
