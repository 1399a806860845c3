"""How many BN each tool folds in the same networks, and how far off the result is from the network in eval mode.

Each cell: BN folded, and the scale-relative error of the outputs in float32. A result that is off by more than 1e-3, or
does not run, counts as none folded.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from architectures import ARCHITECTURES, PIXELS
from measure import Row, at_most
from networks import with_statistics, write_onnx
from onnx_nets import run
from optimizers import ON_FILES, norms, torch_fx
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from toys import toys

import bntools

WRONG = 1e-3  # scale-relative: far beyond rounding
OURS = ("bntools, module", "bntools, file")


@dataclass(frozen=True)
class Result:
    """What a tool made of a network: how many BN it folded, rightly, its error, and both in words."""

    folded: int
    error: float
    text: str


def rows() -> Iterator[Row]:
    """Each architecture, then graphs of a few nodes, then what each tool folds over all architectures."""
    found = {}
    for name, make in ARCHITECTURES.items():
        there, results = found[name] = _architecture(name, make)
        yield _row(f"{name}, {there} BN", results)
    yield from (_row(f"{name}, {norms(model)} BN", _toy(model)) for name, model in toys().items())
    yield from totals(found)


def totals(found: dict[str, tuple[int, dict[str, Result]]]) -> Iterator[Row]:
    """What each tool folds over all architectures, from the BN that each runs and the tools' results."""
    what = f"{len(found)} architectures of torchvision and timm, {sum(there for there, _ in found.values()):,} BN"
    tools = {tool: [each[tool] for _, each in found.values()] for tool in next(iter(found.values()))[1]}
    for tool, results in tools.items():
        worst = max((result.error for result in results if result.error < WRONG), default=np.nan)
        failed = sum(not result.error < WRONG for result in results)
        folded = sum(result.folded for result in results)
        yield Row(f"{what}: folded by {tool}", f"{folded:,}; worst error {worst:.1e}; fails on {failed}", "", True)
    for tool in OURS:
        yield at_most(f"{what}: worst error of {tool}", max(result.error for result in tools[tool]), 1e-5)


def _row(what: str, results: dict[str, Result]) -> Row:
    """Ours, on module and file, has to fold as many as the best, and rightly."""
    ours = [results[tool] for tool in OURS if tool in results]
    best = max(result.folded for result in results.values())
    reached = all(result.folded >= best and result.error <= 1e-5 for result in ours)
    return Row(what, "", "most, at most 1e-05", reached, {tool: result.text for tool, result in results.items()})


def _architecture(name: str, make: Callable[[], nn.Module]) -> tuple[int, dict[str, Result]]:
    torch.manual_seed(0)
    model = with_statistics(make()).eval()
    pixels = PIXELS.get(name, 64)
    x = torch.randn(2, 3, pixels, pixels)
    truth, there = _outputs(model, x), _running(model, x)
    outputs = partial(_outputs, x=x)
    results = {
        OURS[0]: _result(there, truth, lambda: bntools.fold(model, x).model, outputs, lambda one: _running(one, x)),
        "torch.fx": _result(there, truth, lambda: torch_fx(model), outputs, norms),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = write_onnx(model, pixels, Path(folder) / "model.onnx")
        return there, results | _on_file(path, norms(onnx.load(path)), x.numpy())


def _toy(model: onnx.ModelProto) -> dict[str, Result]:
    x = np.random.default_rng(0).normal(size=(2, 3, 96, 96)).astype(np.float32)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "toy.onnx"
        onnx.save(model, path)
        return _on_file(path, norms(model), x)


def _on_file(path: Path, there: int, x: np.ndarray) -> dict[str, Result]:
    truth = list(run(path, x).values())
    tools = {OURS[1]: lambda one: bntools.fold(one, x).model, **ON_FILES}
    return {
        name: _result(there, truth, lambda tool=tool: tool(path), lambda one: list(run(one, x).values()), norms)
        for name, tool in tools.items()
        if tool is not None
    }


def _result(
    there: int,
    truth: list[np.ndarray],
    fold: Callable[[], Any],
    outputs: Callable[[Any], list[np.ndarray]],
    left: Callable[[Any], int],
) -> Result:
    try:
        model = fold()
    except Exception as error:  # a tool may raise anything
        return Result(0, np.inf, f"fails ({type(error).__name__})")
    count = there - left(model)
    try:
        error = _gap(truth, outputs(model))
    except Exception:  # what it gives may be no model
        return Result(0, np.inf, f"{count}, does not run")
    if not error < WRONG:
        return Result(0, error, f"{count}, off by {error:.1e}")
    return Result(count, error, f"{count} ({error:.1e})")


def _outputs(model: nn.Module, x: torch.Tensor) -> list[np.ndarray]:
    with torch.no_grad():
        outputs = model(x)
    values = outputs.values() if isinstance(outputs, dict) else outputs if isinstance(outputs, tuple) else [outputs]
    return [value.numpy() for value in values if value is not None]


def _running(model: nn.Module, x: torch.Tensor) -> int:
    """How many BN modules a forward pass runs: in eval mode some networks leave out a head."""
    seen: set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda one, _: seen.add(one))
        for module in model.modules()
        if isinstance(module, _BatchNorm)
    ]
    _outputs(model, x)
    for hook in hooks:
        hook.remove()
    return len(seen)


def _gap(truth: list[np.ndarray], found: list[np.ndarray]) -> float:
    """The largest difference in terms of the output's scale."""
    pairs = zip(truth, found, strict=True)
    return max(float(np.abs(a.astype(np.float64) - b).max() / max(np.abs(a).max(), 1e-30)) for a, b in pairs)
