"""Folding on the file that an exporter wrote, for a model that cannot be folded in its own framework."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bntools import backends
from bntools.errors import BntoolsError

NOTE = "BN was folded on the ONNX graph, not in the model: "
HIDDEN = "the file does not show it as one operator: it is computed as the exporter wrote it"


def fold_file(file: Path, data_name: str, example: Any, labels: Mapping[str, str]) -> tuple[list[str], dict[str, str]]:
    """Fold the BN layers in a file, in place; returns which layers of the source model were, and the reasons of others.

    ``labels`` gives the source's layer for what its operators are called in the file, up to the first slash. A layer
    counts as folded where all its calls are. Weights too large for the file go to ``data_name`` beside it.
    """
    from bntools.folding import fold  # here: an exporting that needs no fold works without

    onnx = backends.backend("onnx")
    operators = {one.name: labels.get(one.name.partition("/")[0]) for one in onnx.layers(file)}
    kept = {layer: HIDDEN for layer in labels.values() if layer not in operators.values()}
    if not operators:
        return [], kept
    try:
        result = fold(file, example)
        onnx.export(result.model, file, data_name)
        reasons = result.kept
    except BntoolsError as error:
        reasons = dict.fromkeys(operators, str(error))
    for operator, reason in reasons.items():
        layer = operators[operator] or operator
        calls = sum(one == layer for one in operators.values())
        kept.setdefault(layer, reason if calls < 2 else f"of its {calls} calls one cannot be folded: {reason}")
    return [layer for layer in labels.values() if layer not in kept], kept
