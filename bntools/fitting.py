"""Whether statistics fit a model: the same layers, and the weights behind which they were measured."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from bntools.errors import BntoolsError
from bntools.layer import BatchNorm
from bntools.stats import Statistics, affine_digest, framework, holding

NAMED = 4  # layers that a message names


def check_fit(stats: Statistics, backend: ModuleType, model: Any, *, strict: bool) -> tuple[list[BatchNorm], list[str]]:
    """The layers of a model that these statistics are for, and sentences about what could not be compared.

    Names and features have to agree. With ``strict`` also eps, axis and weights have to; between frameworks, whose
    weights lie differently, scale and shift of every layer stand for them.

    Raises BntoolsError that says what differs.
    """
    found = holding(backend, model)
    if problem := _other_layers(stats, found):
        raise BntoolsError(f"the statistics do not fit the model: {problem}")
    if not strict:
        return found, ["strict=False: eps, axis and the weights outside of BN were not compared"]
    same = framework(backend) == stats.framework
    problem = _other_settings(stats, found, same) or (
        _other_weights(stats, backend.digest(model)) if same else _other_affine(stats, found, framework(backend))
    )
    if problem:
        raise BntoolsError(
            f"the statistics do not fit the model: {problem}. Recalibrate the model instead; where it is meant all the "
            f"same, pass strict=False (--other-weights)"
        )
    if same:
        return found, []
    return found, [
        f"taken from a {stats.framework} model: its weights cannot be compared with those of {framework(backend)}, but "
        f"scale and shift agree in all {len(found)} layers"
    ]


def _other_layers(stats: Statistics, found: list[BatchNorm]) -> str:
    mine, theirs = {layer.name: layer for layer in found}, {layer.name: layer for layer in stats}
    parts = []
    if missing := [name for name in mine if name not in theirs]:
        parts.append(f"they have nothing for its layer{'s' * (len(missing) > 1)} {_some(missing)}")
    if unknown := [name for name in theirs if name not in mine]:
        parts.append(f"the model has no {_some(unknown)}")
    parts += [
        f"{name} has {mine[name].features} channels, and they are for {theirs[name].features}"
        for name in mine
        if name in theirs and mine[name].features != theirs[name].features
    ]
    return "; ".join(parts[:NAMED])


def _other_settings(stats: Statistics, found: list[BatchNorm], same: bool) -> str:
    for layer in found:
        of = stats[layer.name]
        if np.float32(layer.eps) != np.float32(of.eps):  # a file of ONNX has eps in float32
            return f"{layer.name} has eps={layer.eps:g}, and they were taken with eps={of.eps:g}"
        if same and layer.axis != of.axis:
            return f"{layer.name} has its channels on axis {layer.axis}, and they were taken with axis {of.axis}"
    return ""


def _other_weights(stats: Statistics, digest: str) -> str:
    if digest == stats.weights:
        return ""
    return f"its weights outside of BN statistics (digest {digest}) are not those they come from ({stats.weights})"


def _other_affine(stats: Statistics, found: list[BatchNorm], kind: str) -> str:
    other = [layer.name for layer in found if affine_digest(layer) != stats[layer.name].affine]
    if other:
        return f"they come from a {stats.framework} model whose scale and shift differ in {_some(other)}"
    if any(layer.affine for layer in stats):
        return ""
    return (
        f"they come from a {stats.framework} model, whose weights cannot be compared with those of {kind}, and no "
        f"layer has learned a scale and shift that could be"
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
