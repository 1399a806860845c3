"""The neutral graph of an nn.Module, from the ATen calls of a real forward pass.

Run in inference mode, composite operations (linear, batch_norm, flatten) reach the watch as they are.
Nothing is traced symbolically, so any model that runs has a graph.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from bntools.backends.torch.decisions import Decisions, watching
from bntools.backends.torch.exported import quiet
from bntools.backends.torch.layers import layers, modules, unwrap
from bntools.backends.torch.replacing import Replacement, replacement, tail
from bntools.backends.torch.running import eval_mode, prepared
from bntools.backends.torch.watching import Call, Watch
from bntools.errors import BntoolsError
from bntools.graph import Graph, Node, Norm
from bntools.layer import BatchNorm


def graph(model: nn.Module, example: Any) -> Graph:
    """The graph of one eval-mode forward pass of the model on ``example``, a batch.

    The model runs as a copy, so that whatever it stores on itself in ``forward`` stays out of the
    original. Raises BntoolsError where it cannot be copied or does not run on the example.
    """
    watch, decisions = _watched(copied(model), example)
    notes: dict[str, object] = {}
    fixed: dict[str, str] = {}
    on_values = _on_values(watch.model, decisions)
    nodes = {id(event): event.node for event in watch.events}
    records = {layer.name: layer for layer in layers(watch.model)}
    for name, module in modules(watch.model).items():
        calls = [c for c in watch.calls if c.module is module]
        found = [_taken_out(watch, records[name], c, nodes) for c in calls]
        if on_values is not None:
            fixed[name] = on_values
        elif reasons := [one for one in found if isinstance(one, str)]:
            fixed[name] = reasons[0]
        elif any(one != found[0] for one in found):
            fixed[name] = f"its {type(module).__name__} does something else at each call"
        elif _used_outside(watch, name, calls):
            fixed[name] = "its statistics are used outside of its own forward"
        elif found:
            notes[name] = found[0]
    dtypes = frozenset(str(t).removeprefix("torch.") for t in watch.values.dtypes.values() if t.is_floating_point)
    return Graph(
        tuple(nodes.values()),
        watch.values.shapes,
        watch.outputs,
        frozenset(watch.overwritten),
        dtypes,
        fixed,
        notes,
    )


def copied(model: nn.Module) -> nn.Module:
    """A deep copy of the user's own module, without wrappers.

    Tensors with a gradient history, which a training step may have left on a module, refuse to be
    copied and are detached in the copy. Raises BntoolsError where something else refuses.
    """
    model = unwrap(model)
    if any(isinstance(tensor, UninitializedTensorMixin) for tensor in (*model.parameters(), *model.buffers())):
        raise BntoolsError("the model has layers that are not initialized yet: run one batch through it first")
    memo = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in (*vars(module).values(), *module._buffers.values())
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    try:
        with quiet():
            return copy.deepcopy(model, memo)
    except Exception as error:
        raise BntoolsError(
            f"the {type(model).__name__} cannot be copied ({type(error).__name__}: {error}), and the result is to be "
            f"a new model: remove from it what copy.deepcopy refuses"
        ) from error


def _watched(model: nn.Module, example: Any) -> tuple[Watch, Decisions]:
    # Models that need a graph inside (autograd.grad in forward) or einsum under autocast do not run in
    # inference mode; without it they are seen decomposed.
    inputs = prepared(model, example)
    for mode in (torch.inference_mode, torch.no_grad):
        watch = Watch(model)
        try:
            with eval_mode(model), torch.compiler.set_stance("force_eager"), mode():
                with watching(model) as decisions, watch.watching():
                    result = model(**inputs) if isinstance(inputs, dict) else model(inputs)
                watch.outputs = watch.values.seen_outside(result)
                return watch, decisions
        except Exception as error:
            failure = error
    raise BntoolsError(
        f"the {type(model).__name__} does not run on the example ({type(failure).__name__}: {failure}): "
        f"give one batch as the model takes it"
    ) from failure


def _on_values(model: nn.Module, decisions: Decisions) -> str | None:
    """Why nothing of a model can be folded that may take another path for another batch."""
    decision = decisions.read or decisions.sized
    if decision is None:
        return None
    return (
        f"{decision.path or type(model).__name__!r} reads computed values or sizes into Python ({decision.how}): "
        f"if it decides on them, one example shows only one of the model's paths"
    )


def _taken_out(watch: Watch, layer: BatchNorm, made: Call, nodes: dict[int, Node]) -> Replacement | str:
    """What can stand for a BN layer in one of its calls, or why nothing can.

    Where a layer computes scale and shift by arithmetic of its own, its nodes give way to one Norm.
    """
    inside = [event for event in watch.events if event.call is not None and event.call.within(made)]
    found = replacement(watch, layer, made, inside)
    if isinstance(found, Replacement) and found.whole:
        children, value = tail(watch, made)
        gone = [event for event in inside if not children or event.call is made]
        reads = frozenset(slot for event in gone for slot in event.node.reads)
        assert value is not None
        norm = Node(Norm(layer.name, 1), f"batch norm {layer.name!r}", tuple(made.given), (value,), reads)
        nodes[id(gone[0])] = norm
        for event in gone[1:]:
            del nodes[id(event)]
    return found


def _used_outside(watch: Watch, name: str, calls: list[Call]) -> bool:
    return any(
        not any(event.call is not None and event.call.within(made) for made in calls)
        for event in watch.events
        if isinstance(event.node.op, Norm) and event.node.op.layer == name
    )
