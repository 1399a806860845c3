"""Which BN layers can be folded, into what, and why the others cannot. Decided here once, for all frameworks.

Backward, the affine of a layer is asked of the value it reads, and the question goes up, through operations
that let it pass, to linear ones that can take it up. Every reader of a value on the way must ask for the same,
since all of them get to see the change. Forward, the affine is left out, and what is then missing goes down to
linear operations that make up for it; on the way every reader has to agree.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from bntools import passing
from bntools.affine import Affine
from bntools.graph import Bias, Graph, Linear, Node, Norm, Other
from bntools.passing import Refused


@dataclass(frozen=True, eq=False)
class Target:
    """A stored weight that takes up a scale and shift, on its output or on its input side.

    ``affine`` has one value per channel of that side; for a Bias it has the stored array's shape.
    """

    op: Linear | Norm | Bias
    side: str
    affine: Affine

    @property
    def place(self) -> str:
        """The slot of the weight, or the name of the BN layer that takes it up."""
        match self.op:
            case Linear(weight):
                return weight
            case Bias(slot):
                return slot
            case Norm(layer):
                return layer


@dataclass(frozen=True, eq=False)
class Step:
    """One BN layer taken out, and what takes up its scale and shift."""

    layer: str
    targets: tuple[Target, ...]

    def same(self, other: Step) -> bool:
        """Whether the same weights take up the same."""
        pairs = zip(self.targets, other.targets, strict=False)
        return len(self.targets) == len(other.targets) and all(
            a.place == b.place and a.side == b.side and a.affine.same(b.affine) for a, b in pairs
        )


def plan(graph: Graph, affines: Mapping[str, Affine], fixed: Mapping[str, str]) -> tuple[list[Step], dict[str, str]]:
    """The folds of a model, in the order in which to make them, and the reason for each layer that stays.

    ``affines`` are the layers' scale and shift by name, each of shape (features,); ``fixed`` are layers
    to leave, with the reason. A fold can make way for another one, so this goes on until none is left.
    """
    affines = dict(affines)
    steps: list[Step] = []
    reasons = dict(fixed)
    waiting = [layer for layer in affines if layer not in fixed]
    while True:
        before = len(waiting)
        for layer in list(waiting):
            if layer not in waiting:
                continue
            joined, twins = graph, []
            decision = decide(graph, layer, affines[layer])
            if isinstance(decision, str) and (twins := _twins(graph, layer, affines, waiting)):
                joined = graph.joined(layer, twins)
                decision = decide(joined, layer, affines[layer])
            if isinstance(decision, str):
                reasons[layer] = decision
                continue
            steps += [decision, *(Step(twin, ()) for twin in twins)]
            graph = joined.without(layer)
            for gone in (layer, *twins):
                waiting.remove(gone)
                reasons.pop(gone, None)
            for target in decision.targets:
                if isinstance(target.op, Norm) and target.op.layer in affines:
                    affines[target.op.layer] = target.affine.after(affines[target.op.layer])
        if len(waiting) == before:
            return steps, reasons


def _twins(graph: Graph, layer: str, affines: Mapping[str, Affine], waiting: list[str]) -> list[str]:
    """Other layers that do the same to the same values: what takes up the one takes up all of them."""

    def reads(name: str) -> set[tuple[int, int]]:
        return {(call.inputs[0], call.op.axis) for call in graph.calls.get(name, ()) if isinstance(call.op, Norm)}

    return [
        other
        for other in waiting
        if other != layer
        and other not in graph.fixed
        and affines[other].same(affines[layer])
        and reads(other) == reads(layer)
    ]


def decide(graph: Graph, layer: str, affine: Affine) -> Step | str:
    """How a layer can be folded, or why it cannot."""
    if layer in graph.fixed:
        return graph.fixed[layer]
    if layer not in graph.calls:
        return "the example never reaches it"
    if strangers := _strangers(graph, layer):
        return f"its weights or statistics are also read by {strangers[0].label}"
    try:
        return Step(layer, _backward(graph, layer, affine))
    except Refused as refused:
        back = str(refused)
    try:
        return Step(layer, _forward(graph, layer, affine))
    except Refused as refused:
        return f"cannot go back: {back}; cannot go forward: {refused}"


def _backward(graph: Graph, layer: str, affine: Affine) -> tuple[Target, ...]:
    asked: dict[int, list[Affine]] = {}
    for call in graph.calls[layer]:
        asked.setdefault(call.inputs[0], []).append(_against(graph, call, affine))
    found: dict[Node, Target] = {}
    for node in reversed(graph.nodes):
        if not node.outputs or node.outputs[0] not in asked:
            continue
        wanted = _agreed(graph, layer, node, asked.pop(node.outputs[0]))
        if isinstance(node.op, Norm) and node.op.layer == layer:
            raise Refused("it reads its own output")
        if isinstance(node.op, Linear | Norm):
            found[node] = _output_target(graph, node, wanted)
            continue
        if isinstance(node.op, Bias):
            found[node] = _bias_target(node, node.op, wanted)
            parts = [(node.inputs[0], replace(wanted, shift=np.zeros_like(wanted.shift)))]
        elif isinstance(node.op, Other):
            raise Refused(f"{node.label} stands between it and {_source(graph, node)}")
        else:
            parts = passing.backward(graph, node, wanted)
        for value, part in parts:
            asked.setdefault(value, []).append(part)
    if asked:
        raise Refused("it reads an input of the model or a constant")
    return _complete(graph, found)


def _forward(graph: Graph, layer: str, affine: Affine) -> tuple[Target, ...]:
    missing: dict[int, Affine] = {}
    found: dict[Node, Target] = {}
    for node in graph.nodes:
        given = {value: missing[value] for value in node.inputs if value in missing}
        if isinstance(node.op, Norm) and node.op.layer == layer:
            if given:
                raise Refused("it reads its own output")
            _check_source(graph, node)
            missing[node.outputs[0]] = _against(graph, node, affine)
            _check_inside(graph, node)
        elif isinstance(node.op, Linear) and given:
            found[node] = _input_target(graph, node, given)
        elif given:
            missing[node.outputs[0]] = passing.forward(graph, node, given)
            _check_inside(graph, node)
    return _complete(graph, found)


def _agreed(graph: Graph, layer: str, node: Node, wanted: list[Affine]) -> Affine:
    """What all readers of a node's output ask of it; Refused where one of them does not ask for the same."""
    value = node.outputs[0]
    if value in graph.outputs:
        raise Refused(f"the output of {node.label} is {graph.outputs[value]}")
    readers = graph.readers[value]
    if len(readers) > len(wanted):
        names = list(dict.fromkeys(reader.label for reader in readers))
        more = [f"{len(names) - 2} more"] if len(names) > 3 else names[2:]
        raise Refused(f"the output of {node.label} is read by {' and '.join([*names[:2], *more])}")
    if any(not one.same(wanted[0]) for one in wanted):
        raise Refused(f"the output of {node.label} is read in several places that need different scales")
    if len(readers) > 1 and any(call.outputs[0] in graph.overwritten for call in graph.calls[layer]):
        # Without the layer, what were several outputs of it are one tensor.
        raise Refused("an in-place operation overwrites one of its outputs")
    return wanted[0]


def _output_target(graph: Graph, node: Node, wanted: Affine) -> Target:
    assert isinstance(node.op, Linear | Norm)
    axis = node.op.axis if isinstance(node.op, Norm) else node.op.y_axis
    affine = passing.along(wanted, graph.shapes[node.outputs[0]], axis, node.label)
    if isinstance(node.op, Linear):
        _check_weight(node, node.op, affine)
    return Target(node.op, "output", affine)


def _input_target(graph: Graph, node: Node, given: Mapping[int, Affine]) -> Target:
    assert isinstance(node.op, Linear)
    value = node.inputs[0]
    if list(given) != [value] or node.inputs.count(value) > 1:
        raise Refused(f"{node.label} reads it in place of a weight")
    affine = passing.along(given[value], graph.shapes[value], node.op.x_axis, node.label)
    if node.op.leak and affine.shift.any():
        raise Refused(f"{node.label} {node.op.leak}, which a shift would change")
    _check_weight(node, node.op, affine)
    return Target(node.op, "input", affine)


def _bias_target(node: Node, op: Bias, wanted: Affine) -> Target:
    def change(array: np.ndarray) -> np.ndarray:
        lead = array.ndim - len(op.shape)
        if any(n > 1 for n in array.shape[: max(lead, 0)]):
            raise Refused(f"{node.label} has no value per channel of the layer")
        array = array.reshape((1,) * max(-lead, 0) + array.shape[max(lead, 0) :])
        if any(n not in (1, size) for n, size in zip(array.shape, op.shape, strict=True)):
            raise Refused(f"{node.label} has no value per channel of the layer")
        return np.broadcast_to(array, op.shape)

    return Target(op, "output", wanted.map(change))


def _check_weight(node: Node, op: Linear, affine: Affine) -> None:
    if op.locked:
        raise Refused(f"{node.label} cannot take it up: {op.locked}")
    if op.bias is None and affine.shift.any():
        raise Refused(f"{node.label} has no place for a bias")


def _check_source(graph: Graph, node: Node) -> None:
    # Once the layer is gone, its readers read its input, which must then still be there.
    if node.inputs[0] in graph.overwritten:
        raise Refused("an in-place operation overwrites its input")


def _check_inside(graph: Graph, node: Node) -> None:
    value = node.outputs[0]
    if value in graph.outputs:
        raise Refused(f"the output of {node.label} is {graph.outputs[value]}")
    if value not in graph.readers:
        raise Refused(f"nothing reads the output of {node.label}")


def _complete(graph: Graph, found: Mapping[Node, Target]) -> tuple[Target, ...]:
    """One target for each weight; Refused where a weight has another use that would see the change."""
    targets: dict[str, Target] = {}
    for node, target in found.items():
        for slot in _written(node, target):
            first = targets.setdefault(slot, target)
            if not (first.op == target.op and first.side == target.side and first.affine.same(target.affine)):
                raise Refused(f"the weights of {node.label} are used several times, and each use needs its own scale")
            if others := [user for user in graph.users.get(slot, ()) if user not in found]:
                label = "another call of it" if others[0].label == node.label else others[0].label
                raise Refused(f"the weights of {node.label} are also used by {label}")
    return tuple({target.op: target for target in targets.values()}.values())


def _written(node: Node, target: Target) -> list[str]:
    """The slots that a fold into this target changes."""
    match target.op:
        case Linear(weight, bias):
            moves_bias = bias is not None and (target.side == "output" or target.affine.shift.any())
            return [weight, bias] if bias is not None and moves_bias else [weight]
        case Bias(slot):
            return [slot]
    return sorted(node.reads)


def _strangers(graph: Graph, layer: str) -> list[Node]:
    calls = graph.calls[layer]
    return [user for call in calls for slot in call.reads for user in graph.users[slot] if user not in calls]


def _source(graph: Graph, node: Node) -> str:
    """The linear operation that a refusing node hides, for the message."""
    while node.inputs and (above := graph.producers.get(node.inputs[0])) is not None:
        if isinstance(above.op, Linear):
            return above.label
        node = above
    return "anything that could take it up"


def _against(graph: Graph, call: Node, affine: Affine) -> Affine:
    """A layer's affine as an array against the whole shape of what it reads."""
    assert isinstance(call.op, Norm)
    axis = call.op.axis
    shape = [1] * len(graph.shapes[call.inputs[0]])
    shape[axis] = len(affine.scale)
    return affine.map(lambda array: array.reshape(shape))
