"""Designs of small random networks, their weights and data, and their statistics by definition in float64 NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

SLOPE = 0.25  # of the leaky activation: like every activation here positively homogeneous, f(s x) = s f(x) for s > 0
Weights = dict[str, np.ndarray]  # by PyTorch's names and in its layout
Stats = dict[str, tuple[np.ndarray, np.ndarray]]  # mean and variance by layer


@dataclass(frozen=True)
class Block:
    """A convolution, dense where ``kernel`` is 0, with BN before it, after it, on both sides or not at all."""

    out: int
    kernel: int = 3
    stride: int = 1
    groups: int = 1
    padding: int = 0
    norm: str = "after"
    act: str = "relu"
    residual: bool = False


@dataclass(frozen=True)
class Design:
    """Blocks on (N, channels, pixels, pixels), or (N, channels) if ``pixels`` is 0; then dense, BN, ReLU, dense.

    ``raw`` multiplies the eps of the layers whose input has passed no BN.
    """

    channels: int
    pixels: int
    blocks: tuple[Block, ...]
    hidden: int = 4
    eps: float = 1e-3
    raw: float = 1.0


@dataclass(frozen=True)
class Step:
    """One operation: what it is, the values that it reads, and the one that it makes."""

    kind: str
    reads: tuple[str, ...]
    makes: str
    into: int = 0
    out: int = 0
    block: Block | None = None
    eps: float = 0.0
    raw: bool = False  # a BN whose input has passed no other


def steps(design: Design) -> list[Step]:
    """The operations in order; a layer has the name of the value that it makes."""
    return list(_steps(design))


def _steps(design: Design) -> Iterator[Step]:
    x, channels, normalized = "x", design.channels, False
    for i, block in enumerate(design.blocks):
        start = x
        if block.norm in ("before", "both"):
            yield _norm(design, x, f"pre{i}", channels, normalized)
            x, normalized = f"pre{i}", True
        kind = "conv" if block.kernel else "dense"
        yield Step(kind, (x,), f"{kind}{i}", channels, block.out, block)
        x, channels = f"{kind}{i}", block.out
        if block.norm in ("after", "both"):
            yield _norm(design, x, f"bn{i}", channels, normalized)
            x, normalized = f"bn{i}", True
        if block.residual:
            yield Step("add", (x, start), f"add{i}")
            x = f"add{i}"
        if block.act:
            yield Step(block.act, (x,), f"act{i}")
            x = f"act{i}"
    if design.pixels:
        yield Step("pool", (x,), "pooled")
        x = "pooled"
    yield Step("dense", (x,), "hidden", channels, design.hidden)
    yield _norm(design, "hidden", "last", design.hidden, normalized)
    yield Step("relu", ("last",), "rectified")
    yield Step("dense", ("rectified",), "head", design.hidden, 3)


def _norm(design: Design, x: str, name: str, channels: int, normalized: bool) -> Step:
    eps = design.eps * (1 if normalized else design.raw)
    return Step("bn", (x,), name, channels, channels, eps=eps, raw=not normalized)


def norms(design: Design) -> list[Step]:
    """The BN layers in order."""
    return [step for step in steps(design) if step.kind == "bn"]


def weights_of(design: Design, seed: int) -> Weights:
    """Random weights of variance preserving size, and statistics that are no data's."""
    generator, weights = np.random.default_rng(seed), {}
    for step in steps(design):
        if step.kind == "bn":
            signs = generator.choice([-1, 1], step.out, p=[0.2, 0.8])
            weights[f"{step.makes}.weight"] = signs * generator.uniform(0.5, 1.5, step.out)
            weights[f"{step.makes}.bias"] = generator.normal(0, 0.3, step.out)
            weights[f"{step.makes}.running_mean"] = generator.normal(0, 1, step.out)
            weights[f"{step.makes}.running_var"] = generator.uniform(0.5, 2, step.out)
        elif step.kind in ("conv", "dense"):
            block = step.block or Block(step.out, kernel=0)
            shape = (step.out, step.into // block.groups, *[block.kernel] * (2 if block.kernel else 0))
            weights[f"{step.makes}.weight"] = generator.normal(0, (2 / np.prod(shape[1:])) ** 0.5, shape)
            weights[f"{step.makes}.bias"] = generator.normal(0, 0.3, step.out)
    return {name: values.astype(np.float32) for name, values in weights.items()}


def data_of(design: Design, samples: int, seed: int) -> np.ndarray:
    """Random samples in sixteenths, so that float32 holds them also with an offset of some thousands."""
    generator = np.random.default_rng(seed)
    shape = (samples, design.channels, *[design.pixels] * (2 if design.pixels else 0))
    offsets = generator.normal(0, 2, (design.channels, *[1] * (len(shape) - 2)))
    return (np.round((generator.normal(0, 2, shape) + offsets) * 16) / 16).astype(np.float32)


@st.composite
def designs(draw: Any, images: bool | None = None) -> Design:
    """Any design of up to three blocks; of images, of rows, or either."""
    images = draw(st.booleans()) if images is None else images
    pixels = start = draw(st.integers(5, 8)) if images else 0
    channels = first = draw(st.integers(2, 4))
    blocks, normalized = [], False
    for _ in range(draw(st.integers(1, 3))):
        block = _block(draw, channels, pixels, normalized)
        blocks.append(block)
        channels, normalized = block.out, normalized or block.norm != "none"
        pixels = (pixels + 2 * block.padding - block.kernel) // block.stride + 1 if images else 0
    return Design(first, start, tuple(blocks), hidden=draw(st.integers(2, 5)))


def _block(draw: Any, channels: int, pixels: int, normalized: bool) -> Block:
    residual = normalized and draw(st.booleans())  # the input itself would mix what scales with what does not
    norm, act = draw(st.sampled_from(["after", "before", "both", "none"])), draw(st.sampled_from(["relu", "leaky", ""]))
    if not pixels:
        out = channels if residual else draw(st.integers(2, 5))
        return Block(out, 0, norm=norm, act=act, residual=residual)
    kernel = draw(st.sampled_from([1, 3])) if pixels >= 3 else 1
    groups = draw(st.sampled_from([n for n in (1, 2, channels) if channels % n == 0]))
    out = channels if residual else groups * draw(st.integers(1, 3))
    same = residual or draw(st.booleans())  # keeps the size
    stride = 1 if same else draw(st.sampled_from([1, 2]))
    return Block(out, kernel, stride, groups, kernel // 2 if same else 0, norm, act, residual)


def by_definition(
    design: Design,
    weights: Weights,
    x: np.ndarray,
    prior: float = 0,
    chosen: set[str] | None = None,
) -> tuple[Stats, np.ndarray]:
    """The statistics that one batch of all the data gives, layer behind layer, and the outputs then, in float64.

    Layers that are not ``chosen`` keep those of ``weights``.
    """
    values: dict[str, np.ndarray] = {"x": x.astype(np.float64)}
    found: Stats = {}
    wide = {name: array.astype(np.float64) for name, array in weights.items()}
    for step in steps(design):
        inputs = [values[name] for name in step.reads]
        if step.kind == "bn":
            stored = wide[f"{step.makes}.running_mean"], wide[f"{step.makes}.running_var"]
            measure = chosen is None or step.makes in chosen
            found[step.makes] = weighed(stored, moments(inputs[0]), len(x), prior) if measure else stored
        values[step.makes] = _computed(step, inputs, wide, found.get(step.makes))
    return found, values["head"]


def moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance per channel, which lies on axis 1; the divisor is the count."""
    others = tuple(i for i in range(x.ndim) if i != 1)
    return x.mean(others, dtype=np.float64), x.var(others, dtype=np.float64)


def weighed(stored: Any, measured: Any, samples: float, prior: float) -> tuple[np.ndarray, np.ndarray]:
    """(prior * stored + samples * measured) / (prior + samples), on the mean and on the second moment."""
    share = prior / (prior + samples)
    mean = share * stored[0] + (1 - share) * measured[0]
    second = share * (stored[1] + stored[0] ** 2) + (1 - share) * (measured[1] + measured[0] ** 2)
    return mean, second - mean**2


def _computed(step: Step, inputs: list[np.ndarray], weights: Weights, stats: Any) -> np.ndarray:
    (x, *more) = inputs
    column = (-1, *[1] * (x.ndim - 2))
    if step.kind == "bn":
        scale = weights[f"{step.makes}.weight"] / np.sqrt(stats[1] + step.eps)
        shift = weights[f"{step.makes}.bias"] - scale * stats[0]
        return x * scale.reshape(column) + shift.reshape(column)
    if step.kind == "conv":
        return _convolved(step, x, weights)
    if step.kind == "dense":
        return x @ weights[f"{step.makes}.weight"].T + weights[f"{step.makes}.bias"]
    if step.kind == "add":
        return x + more[0]
    if step.kind == "pool":
        return x.mean((2, 3))
    return np.where(x > 0, x, x * (SLOPE if step.kind == "leaky" else 0))


def _convolved(step: Step, x: np.ndarray, weights: Weights) -> np.ndarray:
    block, weight = step.block, weights[f"{step.makes}.weight"]
    assert block is not None
    p, groups = block.padding, block.groups
    x = np.pad(x, ((0, 0), (0, 0), (p, p), (p, p)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (block.kernel, block.kernel), (2, 3))
    windows = windows[:, :, :: block.stride, :: block.stride]
    windows = windows.reshape(len(x), groups, step.into // groups, *windows.shape[2:])
    weight = weight.reshape(groups, step.out // groups, *weight.shape[1:])
    result = np.einsum("ngihwyx,goiyx->ngohw", windows, weight)
    return result.reshape(len(x), step.out, *result.shape[3:]) + weights[f"{step.makes}.bias"][:, None, None]
