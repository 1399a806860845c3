"""What algebra says of one verb behind another, and of the options of recalibrate: one function a relation."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_nets
import random_nets as nets
from relations import Case, agree, first_norms, stats

import bntools


def prior(case: Case) -> None:
    """prior=N weighs stored and measured as sets of N and n samples, at every layer behind the new ones before it."""
    n = float(case.random.integers(1, 40))
    expected, _ = nets.by_definition(case.design, case.weights, case.data, prior=n)
    agree(case, case.measured(case.weights, case.data, prior=n), expected)


def prior_in_parts(case: Case) -> None:
    """First layers: one part of the data and then the other, each against all before it, is all of it at once."""
    x, n, model = case.data, float(case.random.integers(1, 40)), case.model(case.weights)
    cut = int(case.random.integers(2, len(x) - 1))
    for part, before in ((x[:cut], n), (x[cut:], n + cut)):
        bntools.recalibrate(model, case.batches(part), check=False, prior=before)
    agree(case, stats(model), case.measured(case.weights, x, prior=n), layers=first_norms(case))


def prior_of_the_same(case: Case) -> None:
    """Weighed against what the same data gave, whatever the weight, nothing moves."""
    model = case.model(case.weights)
    bntools.recalibrate(model, case.batches(case.data), check=False)
    before = stats(model)
    bntools.recalibrate(model, case.batches(case.data), check=False, prior=float(case.random.integers(1, 10**4)))
    agree(case, stats(model), before, 1e-5)


def selection(case: Case) -> None:
    """layers= measures what it names behind the others as they are stored, and leaves those to the bit."""
    norms = [step.makes for step in nets.norms(case.design)]
    chosen = {str(n) for n in case.random.choice(norms, case.random.integers(1, len(norms) + 1), replace=False)}
    expected, _ = nets.by_definition(case.design, case.weights, case.data, chosen=chosen)
    found = case.measured(case.weights, case.data, layers=sorted(chosen))
    agree(case, found, expected)
    if others := [name for name in norms if name not in chosen]:
        agree(case, found, expected, 0, layers=others)


def layer_after_layer(case: Case) -> None:
    """One layer at a time, in their order, gives what all at once give."""
    model = case.model(case.weights)
    for step in nets.norms(case.design):
        bntools.recalibrate(model, case.batches(case.data), check=False, layers=step.makes)
    agree(case, stats(model), case.measured(case.weights, case.data), 1e-5)


def twice(case: Case) -> None:
    """Recalibrating again on the same batches changes nothing, to the bit; nor does resetting in between."""
    model = case.model(case.weights)
    bntools.recalibrate(model, case.batches(case.data), check=False)
    once = stats(model)
    bntools.recalibrate(model, case.batches(case.data), check=False)
    agree(case, stats(model), once, case.rounding)
    assert len(bntools.reset(model)) == len(once)
    bntools.recalibrate(model, case.batches(case.data), check=False)
    agree(case, stats(model), once, case.rounding)


def virtual_batches(case: Case) -> None:
    """First layers do not depend on memory=, which cuts the data into virtual batches; one of them is all of it."""
    whole = case.measured(case.weights, case.data)
    agree(case, case.measured(case.weights, case.data, memory=1), whole, 1e-5, layers=first_norms(case))
    agree(case, case.measured(case.weights, case.data, memory=1 << 30), whole, case.rounding)


def precise(case: Case) -> None:
    """Pooled mini-batch moments are the exact ones at first layers, and at every layer if one batch holds all."""
    whole, x = case.measured(case.weights, case.data), case.laid_out(case.data)
    cut = int(case.random.integers(2, len(x) - 1))  # a single sample cannot be normalized with its own statistics
    for batches, layers in (([x[:cut], x[cut:]], first_norms(case)), ([x], ())):
        model = case.model(case.weights)
        bntools.recalibrate(model, batches, check=False, method="precise")
        agree(case, stats(model), whole, layers=layers)


def folded(case: Case) -> None:
    """The recalibrated network gives by definition what float64 NumPy gives, and so does the folded one."""
    model, x = case.model(case.weights), case.laid_out(case.data)
    residual = bntools.recalibrate(model, case.batches(case.data)).residual
    assert residual < 1e-5, residual
    _, expected = nets.by_definition(case.design, case.weights, case.data)
    result = bntools.fold(model, x[:2])
    for one in (model, result.model):
        (output,) = bntools.backends.of(model).predict(one, x).values()
        _close(output, expected)


def exported(case: Case) -> None:
    """The file that export writes of a recalibrated network gives what float64 NumPy gives by definition."""
    if case.backend == "keras":  # which runs groups on a CPU in code that no exporter takes: bntools says so
        blocks = tuple(replace(block, groups=1) for block in case.design.blocks)
        case = replace(case, design=replace(case.design, blocks=blocks))
    model, x = case.model(case.weights), case.laid_out(case.data)
    bntools.recalibrate(model, case.batches(case.data), check=False)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        assert bntools.export(model, path, x[:2]).passed
        (output,) = onnx_nets.run(path, x).values()
    _close(output, nets.by_definition(case.design, case.weights, case.data)[1])


def _close(found: np.ndarray, expected: np.ndarray) -> None:
    gap = np.abs(found - expected).max() / np.abs(expected).max()
    assert gap < 1e-4, f"the output is off by {gap:.2g} of its scale"


ALL = (
    *(prior, prior_in_parts, prior_of_the_same, selection, layer_after_layer, twice, virtual_batches, precise),
    *(folded, exported),
)
