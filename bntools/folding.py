"""The verb fold: BN layers taken out of a model, by other weights taking up their scale and shift."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from bntools import backends
from bntools.affine import Affine, scale_shift
from bntools.batches import count
from bntools.errors import BntoolsError
from bntools.graph import Graph
from bntools.layer import HALF, BatchNorm, Selection, select
from bntools.legality import Step, plan
from bntools.sizes import other_sizes
from bntools.verification import Verification, default_tolerance, held

# After so many folds that had to be undone one at a time, what comes after the next one is left as well.
PATIENCE = 8


@dataclass(frozen=True)
class Folded:
    """What ``fold`` gives.

    ``model`` is the new model, ``folded`` names the layers that are gone from it, ``kept`` the others,
    each with its reason; ``check`` compares both models on the example. ``into`` has all layers in model order, each
    with the weights, or BN layers, that took it up: none for one that was kept, or went together with another.
    """

    model: Any
    folded: list[str]
    kept: dict[str, str]
    check: Verification
    into: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        count = f"folded {len(self.folded)} of {len(self.folded) + len(self.kept)}"
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.kept.items())
        return f"{count}, kept {len(self.kept)}:{reasons}" if self.kept else count


@dataclass(frozen=True)
class _Failure:
    """What is wrong with a model after some folds; ``blurred`` if that may be the original's own rounding."""

    reason: str
    blurred: bool = False


def fold(model: Any, example: Any, *, layers: Selection = None) -> Folded:
    """A new model in which BN layers are part of the weights before or after them.

    In eval mode a BN layer is a scale and shift per channel. Where that is exact, the weights before it take them up
    (Jacob et al. 2018, eq. 14), or those after it, also across views, pooling and concatenation. What
    cannot be folded is kept, with a reason. The result is a plain model of the same class,
    compared with the original on the example; a fold that does not hold there is undone and reported. Where the model
    amplifies rounding so much that the example tells nothing, all are kept, and the reason says so.

    Args:
        model: stays as it is.
        example: one batch, as the model takes it: an array, a tuple (its first element) or a dict.
        layers: names, globs or a predicate on BatchNorm; None for all layers.

    Raises BntoolsError for a model without BN layers, one that does not run on the example or cannot be copied.

        folded = bntools.fold(model, images)
        print(folded)                       # folded 51 of 53, kept 2: ...
    """
    backend = backends.of(model)
    given, model = model, backend.edit(model)
    example = backends.canonical(model, example)
    found = backend.layers(model)
    chosen = {layer.name for layer in select(found, layers, backends.absence(model))}
    affines, fixed = _affines(found, chosen)
    graph = backend.graph(model, example)
    if not count(example):
        raise BntoolsError("the example holds no samples: there is nothing to compare the models on")
    others: list[Graph] = []
    other_sizes(example, lambda batch: others.append(backend.graph(model, batch)))
    undone: dict[str, str] = {}
    while True:
        steps, kept = _plan_everywhere(graph, others, affines, fixed | undone)
        trial = _tried(backend, model, graph, steps, example)
        if not isinstance(trial, _Failure):
            names = [layer.name for layer in found]
            kept = {name: kept[name] for name in names if name in kept}
            folded = [name for name in names if name not in kept]
            return Folded(backend.handed(trial[0], given), folded, kept, trial[1], _into(names, steps))
        if not steps:
            raise BntoolsError(f"the model does not agree with its own copy on the example: {trial.reason}")
        if trial.blurred:  # without the folds that are left out first it would be, too
            undone |= {step.layer: trial.reason for step in steps}
            continue
        first, problem = _culprit(backend, model, graph, steps, example, trial.reason)
        wrong = steps[first:] if len(undone) >= PATIENCE else [steps[first]]
        undone |= {step.layer: f"undone: {problem}" for step in wrong}


def _into(names: list[str], steps: list[Step]) -> dict[str, tuple[str, ...]]:
    """The weights that took up each layer, by name."""
    places = {step.layer: tuple(dict.fromkeys(target.place for target in step.targets)) for step in steps}
    return {name: places.get(name, ()) for name in names}


def _affines(found: list[BatchNorm], chosen: set[str]) -> tuple[dict[str, Affine], dict[str, str]]:
    """Every layer's scale and shift, and the layers that are to stay, each with its reason."""
    affines: dict[str, Affine] = {}
    fixed: dict[str, str] = {}
    for layer in found:
        if layer.name not in chosen:
            fixed[layer.name] = "not selected by layers="
        try:
            affines[layer.name] = scale_shift(layer)
        except BntoolsError as error:
            fixed.setdefault(layer.name, str(error))
    return affines, fixed


def _plan_everywhere(
    graph: Graph, others: list[Graph], affines: dict[str, Affine], fixed: dict[str, str]
) -> tuple[list[Step], dict[str, str]]:
    """The folds that are the same ones at the example's size and at the others: a model may tell sizes apart."""
    while True:
        steps, kept = plan(graph, affines, fixed)
        for other in others:
            there, reasons = plan(other, affines, fixed)
            same = {step.layer: step for step in there}
            for step in steps:
                if step.layer in fixed:
                    continue
                if step.layer not in same or not step.same(same[step.layer]):
                    reason = reasons.get(step.layer, "other weights would have to take it up")
                    fixed = {**fixed, step.layer: f"in another size than the example's: {reason}"}
        if not fixed.keys() & {step.layer for step in steps}:
            return steps, kept


def _tried(
    backend: ModuleType, model: Any, graph: Graph, steps: list[Step], example: Any
) -> tuple[Any, Verification] | _Failure:
    """The model with these steps made and its comparison with the original, or what is wrong with it."""
    try:
        new = backend.absorb(model, graph, steps)
        check = held(model, new, example, _tolerance(graph))
    except BntoolsError as error:
        return _Failure(str(error))
    if check.passed:
        return new, check
    if not check.blurred:
        return _Failure(f"the outputs differ ({check.reason})")
    reason = (
        "the example does not tell whether a fold is right: the model turns a rounding of it into "
        f"{check.noise:.1e} of its output's scale (give one like the data that its statistics are of)"
    )
    return _Failure(reason, blurred=True)


def _tolerance(graph: Graph) -> float | None:
    """What rounding explains where a model computes in half precision inside, which its outputs need not show."""
    half = graph.dtypes & set(HALF)
    return default_tolerance(set(half), "cpu") if half else None


def _culprit(
    backend: ModuleType, model: Any, graph: Graph, steps: list[Step], example: Any, problem: str
) -> tuple[int, str]:
    """Which step breaks the model, and how: the last of the shortest run of steps that fails."""
    passes, fails = 0, len(steps)
    while fails - passes > 1:
        middle = (passes + fails) // 2
        trial = _tried(backend, model, graph, steps[:middle], example)
        if isinstance(trial, _Failure):
            fails, problem = middle, trial.reason
        else:
            passes = middle
    return fails - 1, problem
