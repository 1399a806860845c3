"""What algebra says of the statistics of a network when its data or its weights change: one function a relation.

Each takes a case and raises AssertionError where the relation does not hold. Numbers are in standard deviations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import random_nets as nets
from built_nets import in_keras, in_onnx, in_torch
from random_nets import Design, Stats, Step, Weights

import bntools
from bntools.layer import distance

TOLERANCE = 1e-4  # float32 through up to six layers; a wrong weight or divisor is off by 1e-3 and more
BUILD = {"torch": in_torch, "keras": in_keras, "onnx": in_onnx}


@dataclass(frozen=True)
class Case:
    """A network in one framework, and data; ``seed`` is that of all further draws."""

    backend: str
    design: Design
    samples: int
    seed: int

    @property
    def random(self) -> np.random.Generator:
        """The same numbers at every call."""
        return np.random.default_rng(self.seed + 2)

    @property
    def rounding(self) -> float:
        """Between runs that compute the same: none, but what Keras compiles after a few batches rounds otherwise."""
        return 1e-5 if self.backend == "keras" else 0.0

    @property
    def weights(self) -> Weights:
        """The network's, before anything was measured."""
        return nets.weights_of(self.design, self.seed)

    @property
    def data(self) -> np.ndarray:
        """Of shape (samples, channels, ...), whatever the framework's own layout."""
        return nets.data_of(self.design, self.samples, self.seed + 1)

    def model(self, weights: Weights) -> Any:
        """The network with these weights."""
        return BUILD[self.backend](self.design, weights)

    def laid_out(self, x: np.ndarray) -> np.ndarray:
        """The data as the framework takes it."""
        return np.ascontiguousarray(np.moveaxis(x, 1, -1)) if self.backend == "keras" else x

    def batches(self, x: np.ndarray) -> list[np.ndarray]:
        """The data in batches of random sizes, two or more."""
        cuts = self.random.choice(np.arange(1, len(x)), min(len(x) - 1, self.random.integers(1, 4)), replace=False)
        return np.split(self.laid_out(x), np.sort(cuts))

    def measured(self, weights: Weights, x: np.ndarray, **options: Any) -> Stats:
        """The statistics after one recalibration on the data, in batches."""
        model = self.model(weights)
        bntools.recalibrate(model, self.batches(x), check=False, **options)
        return stats(model)


def stats(model: Any) -> Stats:
    """Mean and variance of each layer of a model."""
    return {layer.name: layer.stats for layer in bntools.inspect(model)}


def agree(case: Case, found: Stats, expected: Stats, tolerance: float = TOLERANCE, layers: Iterable[str] = ()) -> None:
    """All layers, or those named, are as expected; to the bit if the tolerance is 0."""
    assert found.keys() == expected.keys()
    eps = {step.makes: step.eps for step in nets.norms(case.design)}
    for name in layers or expected:
        gap = distance(expected[name], found[name], eps[name])
        assert gap <= tolerance, f"{name} is off by {gap:.2g} standard deviations"


def definition(case: Case) -> None:
    """Any order and any cut of the data give what float64 NumPy gives for one batch of it, layer behind layer."""
    shuffled = case.random.permutation(case.data)
    agree(case, case.measured(case.weights, shuffled), nets.by_definition(case.design, case.weights, case.data)[0])


def scaling(case: Case) -> None:
    """Inputs and first biases times s, eps times s^2: first means times s and variances times s^2, the rest as it was.

    To the bit where s is a power of two.
    """
    s = float(case.random.choice([0.125, 64.0, 0.01, 30.0]))
    before = case.measured(case.weights, case.data)
    scaled = replace(case, design=replace(case.design, raw=s * s))
    weights, raw = case.weights, {step.makes for step in nets.norms(case.design) if step.raw}
    for step in _before_bn(case.design):
        weights[f"{step.makes}.bias"] = np.float32(s) * weights[f"{step.makes}.bias"]
    after = scaled.measured(weights, np.float32(s) * case.data)
    expected = {name: (m * s, v * s * s) if name in raw else (m, v) for name, (m, v) in before.items()}
    agree(scaled, after, expected, case.rounding if np.log2(s).is_integer() else TOLERANCE)


def shifting(case: Case) -> None:
    """An offset of the inputs moves a first BN's mean by it; behind a convolution that takes it off, nothing moves."""
    first = case.design.blocks[0]
    if first.padding and first.norm in ("after", "none"):  # zero padding is not shifted
        case = replace(case, design=_with_first(case.design, norm="both"))
    before = case.measured(case.weights, case.data)
    c = case.random.integers(-60, 60, case.design.channels)
    weights, start = case.weights, nets.steps(case.design)[0]
    if start.kind != "bn":
        weights[f"{start.makes}.bias"] -= _answer(start, weights, c).astype(np.float32)
    after = case.measured(weights, case.data + _column(c, case.data))
    moved = {name: (m + c, v) if name == "pre0" else (m, v) for name, (m, v) in before.items()}
    agree(case, after, moved, 1e-3)  # float32 rounds values of 60 thirty times as coarsely as those without the offset


def large_offset(case: Case) -> None:
    """Data whose mean is some thousand times its spread: the first BN's variance is as without the offset."""
    case = replace(case, design=_with_first(case.design, norm="both"))
    before, after = (case.measured(case.weights, case.data + c, layers="pre0") for c in (0, np.float32(4096)))
    expected = before | {"pre0": (before["pre0"][0] + 4096, before["pre0"][1])}
    agree(case, after, expected, 4e-3)  # a mean of 4096 to a millionth of it, as float32 adds up some hundred values


def input_channels(case: Case) -> None:
    """Channels of the inputs permuted together with the weights that read them: that BN's too, and nothing else."""
    weights, x = case.weights, case.data
    before = case.measured(weights, x)
    order = _permute_reader(case, weights, 0, case.design.channels)
    after = case.measured(weights, x[:, order])
    agree(case, after, {n: (m[order], v[order]) if n == "pre0" else (m, v) for n, (m, v) in before.items()}, 1e-5)


def output_channels(case: Case) -> None:
    """Outputs of one convolution permuted, and all that reads them: its BN's statistics too, and nothing else."""
    design, weights = case.design, case.weights
    before = case.measured(weights, case.data)
    blocks = design.blocks
    able = [i for i, b in enumerate(blocks) if b.groups == 1 and not b.residual]
    able = [i for i in able if i + 1 == len(blocks) or not blocks[i + 1].residual]
    i = int(case.random.choice([*able, len(blocks)]))  # the last is the hidden dense layer
    name = "hidden" if i == len(blocks) else f"{'conv' if blocks[i].kernel else 'dense'}{i}"
    order = _permute_reader(case, weights, i + 1, len(weights[f"{name}.bias"]))
    norm = "last" if name == "hidden" else f"bn{i}"
    for part in ("weight", "bias"):
        weights[f"{name}.{part}"] = weights[f"{name}.{part}"][order]
    for part in ("weight", "bias", "running_mean", "running_var"):
        if f"{norm}.{part}" in weights:
            weights[f"{norm}.{part}"] = weights[f"{norm}.{part}"][order]
    touched = {norm, f"pre{i + 1}"}
    moved = {n: (m[order], v[order]) if n in touched else (m, v) for n, (m, v) in before.items()}
    agree(case, case.measured(weights, case.data), moved, 1e-5)


def duplicates(case: Case) -> None:
    """Every sample any number of times, in any order: the same statistics."""
    times = int(case.random.integers(2, 5))
    repeated = case.random.permutation(np.concatenate([case.data] * times))
    agree(case, case.measured(case.weights, repeated), case.measured(case.weights, case.data), 1e-5)


def concatenation(case: Case) -> None:
    """First layers, of two sets of data together: the two sets' own, merged by count (Chan et al.)."""
    x = case.data
    cut = int(case.random.integers(2, len(x) - 1))
    one, other, both = (case.measured(case.weights, part) for part in (x[:cut], x[cut:], x))
    merged = {n: nets.weighed(one[n], other[n], len(x) - cut, cut) for n in both}
    agree(case, both, merged, layers=first_norms(case))


def bias_before_bn(case: Case) -> None:
    """A constant on the bias of a convolution moves the mean of the BN behind it, and nothing else."""
    before, weights, norm = case.measured(case.weights, case.data), case.weights, _answered(case)
    mean, var = before[norm]
    # in standard deviations: float32 rounds a channel that hardly varies more coarsely beside a large constant
    c = (case.random.integers(-20, 20, len(mean)) * np.sqrt(var)).astype(np.float32)
    weights[f"{_reader(case, norm)}.bias"] += c
    agree(case, case.measured(weights, case.data), before | {norm: (mean + c, var)})


def negation(case: Case) -> None:
    """Weights and bias before a BN negated, and its scale: its mean is negated, the rest is as it was, to the bit."""
    before, weights, norm = case.measured(case.weights, case.data), case.weights, _answered(case)
    for name in (f"{_reader(case, norm)}.weight", f"{_reader(case, norm)}.bias", f"{norm}.weight"):
        weights[name] = -weights[name]
    mean, var = before[norm]
    agree(case, case.measured(weights, case.data), before | {norm: (-mean, var)}, case.rounding)


def _before_bn(design: Design) -> list[Step]:
    """The layers with a bias whose output has passed no BN."""
    found, normalized = [], {"x": False}
    for step in nets.steps(design):
        normalized[step.makes] = step.kind == "bn" or any(normalized[name] for name in step.reads)
        if step.kind in ("conv", "dense") and not normalized[step.makes]:
            found.append(step)
    return found


def first_norms(case: Case) -> list[str]:
    """The BN layers whose input has passed no other."""
    return [step.makes for step in nets.norms(case.design) if step.raw]


def _with_first(design: Design, norm: str) -> Design:
    return replace(design, blocks=(replace(design.blocks[0], norm=norm), *design.blocks[1:]))


def _answered(case: Case) -> str:
    """A BN that directly reads a convolution or a dense layer, drawn from all."""
    return str(case.random.choice([n.makes for n in nets.norms(case.design) if not n.makes.startswith("pre")]))


def _reader(case: Case, norm: str) -> str:
    return next(step.reads[0] for step in nets.norms(case.design) if step.makes == norm)


def _column(c: np.ndarray, x: np.ndarray) -> np.ndarray:
    return c.reshape(-1, *[1] * (x.ndim - 2)).astype(np.float32)


def _answer(step: Step, weights: Weights, c: np.ndarray) -> np.ndarray:
    """What a convolution without padding answers to an image that is c everywhere, in float64."""
    weight = weights[f"{step.makes}.weight"].astype(np.float64)
    groups = step.block.groups if step.block else 1
    sums = weight.reshape(*weight.shape[:2], -1).sum(-1).reshape(groups, step.out // groups, -1)
    return np.einsum("goi,gi->go", sums, c.reshape(groups, -1)).ravel()


def _permute_reader(case: Case, weights: Weights, i: int, channels: int) -> np.ndarray:
    """Permute, in place, what reads the channels that come into block i; each group's own stay with it."""
    blocks = case.design.blocks
    block = blocks[i] if i < len(blocks) else None
    groups = block.groups if block else 1
    size = channels // groups
    inside = [case.random.permutation(size)] * groups
    names = [f"conv{i}" if block.kernel else f"dense{i}"] if block else ["head" if i > len(blocks) else "hidden"]
    weight = weights[f"{names[0]}.weight"].reshape(groups, -1, size, *weights[f"{names[0]}.weight"].shape[2:])
    permuted = np.stack([part[:, order] for part, order in zip(weight, inside, strict=True)])
    weights[f"{names[0]}.weight"] = permuted.reshape(weights[f"{names[0]}.weight"].shape)
    order = np.concatenate([g * size + order for g, order in enumerate(inside)])
    if block and block.norm in ("before", "both"):
        for part in ("weight", "bias", "running_mean", "running_var"):
            weights[f"pre{i}.{part}"] = weights[f"pre{i}.{part}"][order]
    return order


ALL = (
    *(definition, scaling, shifting, large_offset, input_channels, output_channels, duplicates, concatenation),
    *(bias_before_bn, negation),
)
