"""How far a measurement has come, kept in a file, so that a run that was killed can go on from there.

What is kept is what later batches are merged with, and what decides where virtual batches end: the same data then
gives the same statistics, bit for bit, as a run that nobody interrupted.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from time import monotonic
from types import ModuleType
from typing import Any

import numpy as np

from bntools.batches import Batch, Source
from bntools.course import Course
from bntools.digests import digest
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm
from bntools.measured import Measured
from bntools.moments import Moments
from bntools.processes import Group
from bntools.stats import is_count
from bntools.tensorfiles import Kind

EVERY = 5.0  # seconds between two writings, so that they cost nothing
KIND = Kind("bntools.resume", 1, "recalibration progress", "that is written by bntools recalibrate as it goes")
DIGESTS = ("weights", "statistics", "layers", "data")  # told apart by digests, which say nothing to a reader

Facts = dict[str, Any]


@dataclass
class Standing:
    """How far a measurement has come: what is measured, and what the next virtual batch depends on.

    ``passes`` counts virtual batches, ``wanted`` is how many samples the next is to have, ``order`` which layers were
    seen to lead to which, ``memory`` the bytes that replicas may hold, None as long as nobody decided.
    """

    measured: Measured = field(default_factory=Measured)
    passes: int = 0
    wanted: float = math.inf
    order: set[tuple[str, str]] = field(default_factory=set)
    memory: float | None = None


def opened(
    path: str | os.PathLike[str] | None,
    group: Group,
    backend: ModuleType,
    model: Any,
    before: list[BatchNorm],
    data: Any,
    run: Mapping[str, Any],
) -> Checkpoint | None:
    """The checkpoint at a path, taken up where it left off; None for none.

    ``before`` are the layers to measure as they were, ``run`` the arguments of the run by name, its method among them.
    Raises BntoolsError for a run that cannot go on from one, and as ``load`` does.
    """
    if path is None:
        return None
    if group.size > 1:
        raise BntoolsError(
            f"found checkpoint= in {group.size} processes: only one alone can go on where it was stopped"
        )
    if run["method"] == "ema":
        raise BntoolsError(
            "found checkpoint= with method='ema': its moving average is in the model itself, which is as before when a "
            "run is stopped; expected 'exact' or 'precise'"
        )
    found = Checkpoint(path, data, partial(fingerprint, backend, model, before, data, run))
    found.load()
    return found


class Checkpoint:
    """A file that holds the standing of one run on some data, written now and then.

    ``fingerprint()`` says what the run is of; it is asked for only when a file is there, or is to be written.
    """

    def __init__(self, path: str | os.PathLike[str], data: Any, fingerprint: Callable[[], Facts]):
        self.path = Path(path)
        self._data = data
        self._fingerprint = fingerprint
        self._facts: Facts | None = None
        self._last: tuple[int, str, int] = 0, "", 0  # the last batch, and how many files could not be read until then
        self._written = monotonic()
        self.standing: Standing | None = None
        self.trouble = ""  # why it could not be written

    @property
    def memory(self) -> float | None:
        """The bytes that replicas might hold in the run that it is of; None where there is none."""
        return None if self.standing is None else self.standing.memory

    def load(self) -> None:
        """Take up the standing in the file, if there is one.

        Raises BntoolsError for a file that is damaged, or whose run had another model, other data or options, and where
        none could be written.
        """
        if not self.path.parent.is_dir():
            raise BntoolsError(f"{self.path}: the folder {self.path.parent} does not exist; create it first")
        if not self.path.exists():
            return
        with KIND.reading(self.path) as (facts, tensors):
            self._check(dict(facts["run"]))
            standing, (samples, text, damaged) = _standing(facts, tensors), facts["last"]
            if not 0 < _counted(samples) <= standing.measured.samples:
                raise ValueError(f"its last batch has {samples} samples")
            self.standing, self._last = standing, (samples, str(text), _counted(damaged))

    def skip(self, source: Source) -> None:
        """Pass over the data that the standing has in it.

        Raises BntoolsError where that data is not what it was then.
        """
        if self.standing is None:
            return
        samples, (length, text, damaged) = self.standing.measured.samples, self._last
        # Where files turned out damaged on the way, only reading finds them, and with them the place.
        last = source.skip(samples, length, read=damaged != _damaged(self._data))
        if last is None or content_digest(last.content) != text:
            raise BntoolsError(
                f"{self.path}: the data is not that of the run which stopped after {samples:,} samples: the batch that "
                f"was its last is another now. Give the same batches in the same order (a shuffled loader needs a "
                f"fixed seed), or remove the file to start anew"
            )

    def due(self) -> bool:
        """Whether it is time to write."""
        return monotonic() - self._written >= EVERY

    def save(self, standing: Standing, last: Batch) -> None:
        """Write a standing, whose last batch of data was ``last``. A run does not fail because that fails."""
        self._facts = self._facts or self._fingerprint()
        facts, tensors = _described(standing)
        end = [last.samples, content_digest(last.content), _damaged(self._data)]
        run = {"run": self._facts, "last": end}
        try:
            KIND.write(self.path, run | facts, tensors)
        except BntoolsError as error:
            self.trouble = str(error)
        self._written = monotonic()

    def finish(self) -> list[str]:
        """Remove the file, for the run is at its end; sentences worth reading."""
        with suppress(OSError):
            self.path.unlink()
        return [f"no checkpoint could be written: {self.trouble}"] if self.trouble else []

    def _check(self, then: Facts) -> None:
        now = self._facts = self._fingerprint()
        wrong = [_difference(name, then.get(name), now.get(name)) for name in {**now, **then}]
        if found := [text for text in wrong if text]:
            raise BntoolsError(
                f"{self.path}: is of another run, with {', '.join(found)}. Run it as it was to go on from there, or "
                f"remove the file to start anew"
            )


def fingerprint(
    backend: ModuleType, model: Any, before: list[BatchNorm], data: Any, options: Mapping[str, Any]
) -> Facts:
    """What a run is of, as JSON: version, model, layers with the statistics they had, data and options.

    Of data that does not describe itself nothing is known; what was read of it is compared when it is read again.
    """
    from bntools import __version__

    spec = getattr(data, "spec", None)
    spec = spec if isinstance(spec, dict) and "options" in spec else {"options": {}}
    return {
        "bntools": __version__,
        "weights": backend.digest(model),
        "statistics": digest(
            *(np.ascontiguousarray(values, np.float64).data for one in before for values in one.stats)
        ),
        "layers": digest("\0".join(one.name for one in before).encode()),
        "data": digest(repr([spec.get(name) for name in ("kind", "measured", "files", "size")]).encode()),
        **{name: plain(value) for name, value in options.items()},
        **{f"{name} of the data": plain(value) for name, value in spec["options"].items()},
    }


def content_digest(content: Any) -> str:
    """A digest of a batch: of its arrays, and of the structure that they are in."""
    return digest(*_pieces(content))


def plain(value: Any) -> Any:
    """An option as JSON gives it back."""
    if isinstance(value, (tuple, list)):
        return [plain(each) for each in value]
    return value if value is None or isinstance(value, (str, int, float)) else str(value)


def _pieces(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for key, each in value.items():
            yield str(key).encode()
            yield from _pieces(each)
    elif isinstance(value, (tuple, list)):
        yield f"{type(value).__name__} {len(value)}".encode()
        for each in value:
            yield from _pieces(each)
    elif hasattr(value, "shape"):
        yield f"{value.dtype} {tuple(value.shape)}".encode()
        yield _bytes(value)
    else:
        yield type(value).__name__.encode()


def _bytes(array: Any) -> Any:
    """The bytes of an array, wherever it lies; none where NumPy has no such numbers (bfloat16, ragged)."""
    for move in ("detach", "cpu"):
        array = getattr(array, move)() if hasattr(array, move) else array
    try:
        values = np.ascontiguousarray(array)
    except (TypeError, ValueError, RuntimeError):
        return b""
    return values.tobytes() if values.dtype != object else b""


def _damaged(data: Any) -> int:
    """How many files of the data could not be read so far."""
    found = getattr(data, "skipped", 0)
    return found if is_count(found) else 0


def _difference(name: str, then: Any, now: Any) -> str:
    if then == now:
        return ""
    return f"other {name}" if name in DIGESTS else f"{name} {then!r} and not {now!r}"


def _described(standing: Standing) -> tuple[Facts, dict[str, np.ndarray]]:
    measured, tensors, layers = standing.measured, {}, []
    for name, moments in measured.moments.items():
        course = measured.courses.get(name)
        points = [moments, *([course.total, *course.points] if course else [])]
        layers.append({"name": name, "counts": [float(point.count) for point in points]})
        numbers = [values for point in map(Moments.numpy, points) for values in (point.mean, point.m2)]
        tensors[name] = np.concatenate(numbers).astype("<f8")
    facts = {
        "samples": measured.samples,
        "layers": layers,
        "calls": measured.calls,
        "late": sorted(measured.late),
        "passes": standing.passes,
        "wanted": None if math.isinf(standing.wanted) else standing.wanted,
        "order": sorted(standing.order),
        "memory": standing.memory,
    }
    return facts, tensors


def _standing(facts: Facts, tensors: dict[str, np.ndarray]) -> Standing:
    measured = Measured(
        samples=_counted(facts["samples"]),
        calls={str(name): _counted(calls) for name, calls in facts["calls"].items()},
        late={str(name) for name in facts["late"]},
    )
    for layer in facts["layers"]:
        name, counts = layer["name"], [float(count) for count in layer["counts"]]
        values = tensors.pop(name).reshape(len(counts), 2, -1)
        first, *course = [Moments(n, mean, m2) for n, (mean, m2) in zip(counts, values, strict=True)]
        measured.moments[name] = first
        if course:
            measured.courses[name] = Course(course[0], course[1:])
    if tensors or not measured.moments:
        raise ValueError("its layers and its tensors do not belong together")
    return Standing(
        measured,
        _counted(facts["passes"]),
        math.inf if facts["wanted"] is None else float(facts["wanted"]),
        {(str(before), str(after)) for before, after in facts["order"]},
        None if facts["memory"] is None else float(facts["memory"]),
    )


def _counted(value: Any) -> int:
    if not is_count(value):
        raise ValueError(f"found {value!r} where a number of things was expected")
    return int(value)
