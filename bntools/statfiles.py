"""Statistics in files: safetensors whose tensors are called as in a state dict, ``layer1.0.bn1.running_mean``.

All else is JSON in the metadata, under the key ``bntools.statistics``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from bntools.errors import BntoolsError
from bntools.stats import LayerStatistics, Statistics, is_count, statistics
from bntools.tensorfiles import DTYPES, Kind

SUFFIX = ".safetensors"
KIND = Kind("bntools.statistics", 1, "statistics", "those are written by bntools stats save, or bntools.save_stats")
LARGEST_EPS = float(np.finfo(np.float32).max)
MEAN, VAR = "running_mean", "running_var"


def save_stats(stats: Any, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Write statistics, or those of a model, to a ``.safetensors`` file, all or not at all.

    Float32 where that is exact, as it nearly always is, else float64: a ResNet-50 takes 226 kB. The file tells by
    itself what it is, and ``bntools stats show`` prints it. ``overwrite=False`` refuses to replace a file.

    Raises BntoolsError for another suffix, a model without statistics, and a file that cannot be written.
    """
    if Path(path).suffix.lower() != SUFFIX:
        raise BntoolsError(f"{path}: statistics are written as {SUFFIX} files; expected that suffix")
    stats = stats if isinstance(stats, Statistics) else statistics(stats)
    tensors = {
        f"{layer.name}.{kind}": _compact(values)
        for layer in stats
        for kind, values in ((MEAN, layer.mean), (VAR, layer.var))
    }
    KIND.write(Path(path), described(stats), tensors, overwrite=overwrite)


def load_stats(path: str | os.PathLike[str]) -> Statistics:
    """The statistics in a file that ``save_stats`` wrote; nothing in it is executed.

    Raises BntoolsError where the file is missing, damaged, something else, or holds numbers that cannot be statistics.
    """
    with KIND.reading(Path(path)) as (facts, tensors):
        return _statistics(facts, tensors)


def holds_stats(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of statistics, told by its header alone."""
    return Path(path).suffix.lower() == SUFFIX and KIND.is_kind(Path(path))


def _statistics(facts: dict[str, Any], tensors: dict[str, np.ndarray]) -> Statistics:
    layers = tuple(_layer(entry, tensors) for entry in facts["layers"])
    if tensors:
        raise ValueError(f"it holds {next(iter(tensors))!r}, which belongs to no layer")
    if not layers:
        raise ValueError("it lists no layers")
    return Statistics(
        layers, facts["framework"], facts["weights"], facts["samples"], facts["date"], facts["versions"], facts["note"]
    )


def _layer(entry: dict[str, Any], tensors: dict[str, np.ndarray]) -> LayerStatistics:
    name, eps, axis, updates = entry["name"], entry["eps"], entry["axis"], entry["updates"]
    sound = isinstance(name, str) and isinstance(entry["affine"], str) and (updates is None or is_count(updates))
    if not sound or not is_count(abs(axis)) or not 0 <= float(eps) < LARGEST_EPS:
        raise ValueError(f"layer {name!r} is described by other types of values than expected")
    return LayerStatistics(
        name, tensors.pop(f"{name}.{MEAN}"), tensors.pop(f"{name}.{VAR}"), float(eps), axis, updates, entry["affine"]
    )


def described(stats: Statistics) -> dict[str, Any]:
    """Statistics in terms of JSON, without the numbers themselves: what a file says of them."""
    return {
        "format": KIND.format,
        "fingerprint": stats.fingerprint,
        "framework": stats.framework,
        "weights": stats.weights,
        "samples": stats.samples,
        "date": stats.date,
        "versions": stats.versions,
        "note": stats.note,
        "layers": [
            {"name": one.name, "eps": one.eps, "axis": one.axis, "updates": one.updates, "affine": one.affine}
            for one in stats
        ],
    }


def _compact(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        narrow = values.astype(DTYPES["F32"])
    return narrow if np.array_equal(narrow.astype(np.float64), values) else values.astype(DTYPES["F64"])
