"""The small neutral graph that folding reasons on: which operation reads what, in words all frameworks share.

A back end describes one forward pass in eval mode. Values are numbered; an operation is one of the
frozen records below; a *slot* names a stored weight by where it lives (``"layer1.conv.weight"``, an
initializer's name). What an operation means for a scale and shift on its way is in ``passing.py``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import numpy as np


@dataclass(frozen=True)
class Linear:
    """conv, transposed conv or dense: a weight contracted with the input's channels.

    ``weight`` and ``bias`` are slots; ``bias`` also names the place of a bias that is not there yet,
    and is None where there is no place for one. ``out_axis`` and ``in_axis`` are axes of the weight,
    of which the one that ``groups`` splits is shorter than the channel count; ``x_axis`` and
    ``y_axis`` are the channel axes of input and output. ``locked`` says why the weight cannot be
    rewritten, ``leak`` why a shift of the input does not reach all output positions alike (zero
    padding); both are empty where there is no such reason.
    """

    weight: str
    bias: str | None
    out_axis: int
    in_axis: int
    groups: int
    x_axis: int
    y_axis: int
    locked: str = ""
    leak: str = ""


@dataclass(frozen=True)
class Norm:
    """BN in eval mode: scale and shift along ``axis``, of the layer with this name."""

    layer: str
    axis: int


@dataclass(frozen=True)
class Bias:
    """A stored array of this shape, added with broadcasting to the first input."""

    slot: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Scale:
    """The first input times a constant, float64 and finite, with broadcasting to the input's shape."""

    factor: np.ndarray


@dataclass(frozen=True)
class Pool:
    """Average or max over windows along ``axes``; ``partial`` where the weights need not sum to 1."""

    kind: Literal["average", "max"]
    axes: tuple[int, ...]
    partial: bool = False


@dataclass(frozen=True)
class Reduce:
    """Mean or max over all of ``axes``."""

    kind: Literal["average", "max"]
    axes: tuple[int, ...]
    keepdim: bool


@dataclass(frozen=True)
class Resize:
    """Interpolation along ``axes``: each output a sum of inputs with weights that sum to 1."""

    axes: tuple[int, ...]


@dataclass(frozen=True)
class Pad:
    """Padding along ``axes`` with ``value``, or with the input's own values where that is None."""

    axes: tuple[int, ...]
    value: float | None


@dataclass(frozen=True)
class Reshape:
    """The same elements in the same order in another shape: flatten, view, squeeze, unsqueeze."""


@dataclass(frozen=True)
class Permute:
    """Axis ``i`` of the output is axis ``order[i]`` of the input."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Concat:
    """The inputs one after the other along ``axis``."""

    axis: int


@dataclass(frozen=True)
class Slice:
    """Elements ``start:stop:step`` along ``axis``."""

    axis: int
    start: int
    stop: int
    step: int = 1


@dataclass(frozen=True)
class Add:
    """The sum of the inputs, with broadcasting."""


@dataclass(frozen=True)
class Identity:
    """The input as it is: dropout in eval mode, a copy, a cast between floating types."""


@dataclass(frozen=True)
class Other:
    """Anything else: no scale or shift gets past it."""


Op = (
    Linear
    | Norm
    | Bias
    | Scale
    | Pool
    | Reduce
    | Resize
    | Pad
    | Reshape
    | Permute
    | Concat
    | Slice
    | Add
    | Identity
    | Other
)


@dataclass(frozen=True, eq=False)
class Node:
    """One operation of a forward pass.

    ``label`` is how messages call it ("relu 'act1'"); ``reads`` are the slots whose stored values
    it depends on.
    """

    op: Op
    label: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    reads: frozenset[str] = frozenset()


@dataclass(frozen=True, eq=False)
class Graph:
    """One forward pass: its nodes in execution order, and what is known of their values.

    ``outputs`` are the values that are seen from outside, with how ("an output of the model").
    ``overwritten`` are values that an in-place operation later destroys. ``dtypes`` are the floating
    types that it computes in ("float32"). ``fixed`` are layers that the back end cannot take out, with
    the reason. ``notes`` is the back end's own, by layer name.
    """

    nodes: tuple[Node, ...]
    shapes: Mapping[int, tuple[int, ...]]
    outputs: Mapping[int, str]
    overwritten: frozenset[int] = frozenset()
    dtypes: frozenset[str] = frozenset()
    fixed: Mapping[str, str] = field(default_factory=dict)
    notes: Mapping[str, object] = field(default_factory=dict)

    @cached_property
    def producers(self) -> dict[int, Node]:
        """The node that makes each value; inputs and constants have none."""
        return {value: node for node in self.nodes for value in node.outputs}

    @cached_property
    def readers(self) -> dict[int, list[Node]]:
        """The nodes that read each value, a node once for every time."""
        found: dict[int, list[Node]] = {}
        for node in self.nodes:
            for value in node.inputs:
                found.setdefault(value, []).append(node)
        return found

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        """The nodes that depend on each slot."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for slot in node.reads:
                found.setdefault(slot, []).append(node)
        return found

    @cached_property
    def calls(self) -> dict[str, list[Node]]:
        """The nodes of each BN layer, one for every time that the layer runs."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            if isinstance(node.op, Norm):
                found.setdefault(node.op.layer, []).append(node)
        return found

    def is_used(self, value: int) -> bool:
        """Whether anything reads the value, in the model or outside."""
        return value in self.readers or value in self.outputs

    def joined(self, layer: str, others: Collection[str]) -> Graph:
        """The graph in which the calls of some other BN layers are calls of this one."""
        nodes = tuple(
            replace(node, op=Norm(layer, node.op.axis))
            if isinstance(node.op, Norm) and node.op.layer in others
            else node
            for node in self.nodes
        )
        return replace(self, nodes=nodes)

    def without(self, layer: str) -> Graph:
        """The graph with every call of a BN layer taken out: its readers read its input."""
        source: dict[int, int] = {}
        for node in self.calls[layer]:
            source[node.outputs[0]] = source.get(node.inputs[0], node.inputs[0])
        nodes = tuple(
            node
            if source.keys().isdisjoint(node.inputs)
            else replace(node, inputs=tuple(source.get(value, value) for value in node.inputs))
            for node in self.nodes
            if not (isinstance(node.op, Norm) and node.op.layer == layer)
        )
        outputs = {source.get(value, value): how for value, how in self.outputs.items()}
        overwritten = frozenset(source.get(value, value) for value in self.overwritten)
        return replace(self, nodes=nodes, outputs=outputs, overwritten=overwritten)
