"""Statistics in files: safetensors, read and written with NumPy alone.

The format (github.com/huggingface/safetensors): eight bytes with the length of a header, the header in JSON, which
tells dtype, shape and place of every tensor, then their bytes. Here the tensors are called as in a state dict of
PyTorch, ``layer1.0.bn1.running_mean``, and all else is JSON in the metadata under the key ``bntools.statistics``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bntools import sniff
from bntools.errors import BntoolsError
from bntools.files import atomic_write
from bntools.stats import LayerStatistics, Statistics, is_count, statistics

SUFFIX = ".safetensors"
KEY = "bntools.statistics"
FORMAT = 1
LONGEST = 16 << 20  # bytes of a header; one layer takes some 400
LARGEST = 1 << 30  # bytes of a file; the largest networks have some megabytes of statistics
LARGEST_EPS = float(np.finfo(np.float32).max)
DTYPES: dict[str, Any] = {"F32": np.dtype("<f4"), "F64": np.dtype("<f8")}
MEAN, VAR = "running_mean", "running_var"


def save_stats(stats: Any, path: str | os.PathLike[str]) -> None:
    """Write statistics, or those of a model, to a ``.safetensors`` file, all or not at all.

    Float32 where that is exact, as it nearly always is, else float64: a ResNet-50 takes 226 kB. The file tells by
    itself what it is, and ``bntools stats show`` prints it.

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
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].itemsize))  # so that float64 lies aligned
    header: dict[str, Any] = {"__metadata__": {KEY: json.dumps(described(stats), allow_nan=False)}}
    place = 0
    for name, values in tensors.items():
        kind = next(kind for kind, dtype in DTYPES.items() if dtype == values.dtype)
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [place, place + values.nbytes]}
        place += values.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, temporary.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.writelines(values.tobytes() for values in tensors.values())


def load_stats(path: str | os.PathLike[str]) -> Statistics:
    """The statistics in a file that ``save_stats`` wrote; nothing in it is executed.

    Raises BntoolsError where the file is missing, damaged, something else, or holds numbers that cannot be statistics.
    """
    path = Path(path)
    if path.is_dir():
        raise BntoolsError(f"{path}: is a folder; expected a file of statistics")
    with _readable(path):
        size = path.stat().st_size
        if not path.is_file():
            raise BntoolsError(f"{path}: is a device or a pipe; expected a file of statistics")
        if size > LARGEST:
            raise BntoolsError(f"{path}: {size:,} bytes, where statistics take megabytes at the most")
        data = path.read_bytes()
    header, start = _header(path, data)
    facts = _facts(path, header)
    with _damage(path):
        return _statistics(facts, _tensors(header, memoryview(data)[start:]))


def holds_stats(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one of statistics, told by its header alone."""
    path = Path(path)
    if path.suffix.lower() != SUFFIX or not path.is_file():
        return False
    with _readable(path), path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > LONGEST:
            return False
        try:
            metadata = json.loads(file.read(length)).get("__metadata__", {})
        except (ValueError, RecursionError, AttributeError):
            return False
    return isinstance(metadata, dict) and KEY in metadata


def _header(path: Path, data: bytes) -> tuple[dict[str, Any], int]:
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 or not data[8:9] == b"{":
        raise BntoolsError(f"{path}: found {sniff.describe(path)} where a file of statistics was expected")
    if length > min(LONGEST, len(data) - 8):
        raise BntoolsError(f"{path}: truncated or damaged: a header of {length:,} bytes in a file of {len(data):,}")
    with _damage(path):
        return json.loads(data[8 : 8 + length].decode(), object_pairs_hook=_unique), 8 + length


def _facts(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or KEY not in metadata:
        raise BntoolsError(
            f"{path}: a safetensors file of {len(header)} tensors, not of statistics: those are written by bntools "
            f"stats save, or bntools.save_stats"
        )
    with _damage(path):
        facts = json.loads(metadata[KEY], object_pairs_hook=_unique)
        if facts["format"] > FORMAT:
            raise BntoolsError(
                f"{path}: statistics in format {facts['format']}, and this bntools reads {FORMAT}: update it"
            )
        return facts


def _tensors(header: dict[str, Any], data: memoryview) -> dict[str, np.ndarray]:
    """The arrays by name; every byte of the file belongs to exactly one of them."""
    found, place = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if entry["dtype"] not in DTYPES:
            raise ValueError(f"{name!r} is of dtype {entry['dtype']!r}, expected one of {', '.join(DTYPES)}")
        (features,), (start, end), dtype = entry["shape"], entry["data_offsets"], DTYPES[entry["dtype"]]
        if not is_count(features) or start != place or end - start != features * dtype.itemsize or end > len(data):
            raise ValueError(f"{name!r} of shape {entry['shape']} does not lie where bytes {start} to {end} are")
        found[name] = np.frombuffer(data[start:end], dtype).astype(np.float64)
        place = end
    if place != len(data):
        raise ValueError(f"{len(data) - place:,} bytes belong to no tensor")
    return found


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
        "format": FORMAT,
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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) != len(pairs):
        raise ValueError("a name stands in it twice")
    return found


@contextmanager
def _damage(path: Path) -> Iterator[None]:
    """Whatever a crafted header makes Python raise means the same."""
    try:
        yield
    except BntoolsError as error:
        raise error if str(error).startswith(str(path)) else BntoolsError(f"{path}: {error}") from error
    except KeyError as error:
        raise BntoolsError(f"{path}: a damaged file of statistics: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise BntoolsError(f"{path}: a damaged file of statistics: {error}") from error


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise BntoolsError(f"{path}: no such file") from error
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be read: {error.strerror or error}") from error
