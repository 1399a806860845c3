"""Runner: one way to run a model, as a back end hands it to the verbs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Outputs = dict[str, np.ndarray]


@dataclass(frozen=True)
class Trace:
    """The values inside one run of a model on one batch.

    ``points`` names what can be read, in execution order. ``modules`` maps the path of a module of
    the source model to the point that holds its output. ``read`` runs the model once and returns the
    arrays at the points asked for; a point that holds no array is left out. ``inputs`` says from which
    points each is computed directly, ``ops`` its operator and the node that computes it; both are empty
    where the model does not say.
    """

    points: tuple[str, ...]
    modules: Mapping[str, str]
    read: Callable[[Sequence[str]], Outputs]
    inputs: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ops: Mapping[str, tuple[str, str]] = field(default_factory=dict)


@dataclass(frozen=True)
class Runner:
    """One way to run a model: ``run(batch)`` gives its outputs in eval mode by name.

    ``name`` is how messages call the model, ``framework`` the back end. ``provider`` is what computes:
    a device of PyTorch or the ONNX Runtime provider that is active. ``optimization`` is the level of
    graph optimizations, "off" or "default", None where there is no such thing. ``dtype`` is the least
    precise floating dtype among the model's weights, inputs and outputs. ``placed()`` says, after a run, how
    many nodes each provider ran; empty where that is not known. ``class_axis`` is where its outputs have their
    classes. ``notes`` should be said with any result, ``where`` with a bad one.
    """

    name: str
    framework: str
    provider: str
    optimization: str | None
    dtype: str
    run: Callable[[Any], Outputs]
    trace: Callable[[Any], Trace]
    placed: Callable[[], Mapping[str, int]] = dict
    class_axis: int = 1
    notes: tuple[str, ...] = ()
    where: str = ""


PRECISION = ("float64", "float32", "float16", "bfloat16")  # most precise first


def least_precise(dtypes: set[str]) -> str:
    """The least precise of the floating dtypes in a set of dtype names; float32 if there is none."""
    return max((dtype for dtype in dtypes if dtype in PRECISION), key=PRECISION.index, default="float32")
