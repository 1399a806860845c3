"""Parts of the data against all of it: domains, the halves of it as it comes, the calls of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bntools import backends, feeding
from bntools.batches import Source
from bntools.diagnosis import pieces
from bntools.diagnosis.pieces import Deviation, Piece
from bntools.diagnosis.records import Domain

if TYPE_CHECKING:
    from bntools.data import Data

MOST = 256  # samples of a part: its statistics are then known to some hundredths of a standard deviation
MANY = 32  # more subfolders than that are classes, and reading them would take long
DIFFERENT = 0.2  # standard deviations at the first layer: digits by class showed 0.09, by camera 0.1 (noise) to 0.6
SHARE = 0.25  # of what the worst layer shows: digits by class 0.04 to 0.12, by camera 0.35 to 1
CLEAR = 3.0  # times what parts of that size would show if they were drawn at random

Forward = Callable[[Any, Any], Any]


def compare(model: Any, parts: Mapping[str, Any], *, forward: Forward | None = None) -> list[Domain]:
    """How far each part of the data, a mapping of names to batches, is from all of them together.

    ``model`` is what the back end's ``edit`` gives; one pass in eval mode with the statistics that it has, over at most
    MOST samples of each part. Empty for less than two parts that hold samples.
    """
    cut = {name: _pieces(model, part, forward) for name, part in parts.items()}
    cut = {name: some for name, some in cut.items() if some}
    if len(cut) < 2:
        return []
    return _compared(model, pieces.measured(model, cut, forward))


def halves(
    model: Any, contents: Iterable[Any], *, forward: Forward | None = None
) -> tuple[list[Domain], dict[str, tuple[int, float]]]:
    """The halves of the data in its order (``Diagnosis.halves``), and per layer ``calls`` and ``call_gap``.

    ``contents`` are batches as the back end takes them, which are all held in memory; at most MOST samples a half
    are run, spread evenly.
    """
    cut = pieces.cut(contents, 2 * MOST)
    if len(cut) < 2:
        return [], {}
    two = {"first half": cut[: len(cut) // 2], "second half": cut[len(cut) // 2 :]}
    found = pieces.measured(model, two, forward)
    every = [piece for part in found.values() for piece in part]
    return _compared(model, found), pieces.between_calls(every, _eps(model))


def differing(domains: Sequence[Domain]) -> list[Domain]:
    """The parts that differ in their look: in what the first layer sees, clearly more than random parts would.

    Parts of one domain that hold different classes differ in deep layers, which look for classes; in the first layer,
    which looks for edges and colours, cameras and sites differ as much. So the first layer decides.
    """
    return [one for one in domains if one.look > max(DIFFERENT, SHARE * one.drift, CLEAR * one.look_noise)]


def of_folder(path: str | Path, opened: Callable[[str, int], Data]) -> dict[str, Data] | None:
    """The subfolders of a folder that hold images, by their names; None where there are less than two, or over MANY.

    ``opened(path, most)`` opens a subfolder as the whole folder is opened, in the same size and channels and with the
    same scaling, and draws at most that many samples from it.
    """
    folder = Path(path)
    if not folder.is_dir():
        return None
    from bntools.sources import folders

    parts = sorted(part for part in folder.iterdir() if part.is_dir() and not part.name.startswith((".", "__MACOSX")))
    holding = [part for part in parts if folders.find(part).total] if len(parts) <= MANY else []
    return {part.name: opened(str(part), MOST) for part in holding} if len(holding) > 1 else None


def _pieces(model: Any, part: Any, forward: Forward | None) -> list[Any]:
    fed = backends.fed(model, feeding.given(model, part, MOST), MOST, whole=forward is not None)
    return pieces.cut((batch.content for batch in Source(fed, MOST)), MOST)


def _compared(model: Any, found: Mapping[str, Sequence[Piece]]) -> list[Domain]:
    if not found:
        return []
    deviations = pieces.deviations(found, _eps(model))
    return [_domain(name, sum(piece.samples for piece in found[name]), by) for name, by in deviations.items() if by]


def _domain(name: str, samples: int, by_layer: Mapping[str, Deviation]) -> Domain:
    first = next(iter(by_layer.values()))
    worst = max(by_layer.values(), key=lambda one: one.drift)
    return Domain(name, samples, worst.drift, worst.noise, first.drift, first.noise)


def _eps(model: Any) -> dict[str, float]:
    return {layer.name: layer.eps for layer in backends.of(model).layers(model)}
