"""Every replica waits at every BN layer: all micro-batches run as one big batch.

The statistics of a layer depend on those of all layers before it. So each micro-batch runs up to a layer
and stops there; when all that can still reach the layer stand at it, their moments are merged, the
layer's statistics become the merged ones, and all go on. One forward pass of compute gives what one
batch of the whole data would give, whatever the size of the micro-batches. Where several processes work
together, the replicas of all of them wait for one another: the processes agree on the next layer, and each
merges the moments of all, by rank, to the same statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from bntools.batches import Batch, Source
from bntools.interrupts import uninterrupted
from bntools.measured import Measured
from bntools.moments import Moments, merged
from bntools.processes import Group
from bntools.unread import Later, check_finite
from bntools.walkers import Order, Replica, Walker

Progress = Callable[[str, int], None]  # what is done, and for how many samples so far

UNREAD = 16  # batches that run before what a device has measured of them is read

# (layer, which call of it in a forward pass) that was released -> where this process's other walkers stood then
Elsewhere = dict[tuple[str, int], dict[Walker, str]]


@dataclass(frozen=True)
class Stop:
    """What the replicas of one process that stand at a layer bring there: their moments, merged.

    ``calls`` tells which calls of the layer in their forward passes these are. ``late`` says where those of them stood
    that come to a call which was released before.
    """

    moments: Moments
    calls: frozenset[int]
    late: frozenset[str]


class _TooManyError(Exception):
    """The replicas hold more than memory allows; ``fits`` of this process's would do."""

    def __init__(self, fits: int):
        self.fits = fits


class _LateError(Exception):
    """A replica came to a layer after its release; the order of layers has been learned."""


def virtual_batch(
    start: Callable[[object], Replica],
    source: Source,
    order: Order,
    release: Callable[[str, Moments, int], None],
    group: Group,
    *,
    memory: float,
    wanted: float,
    progress: Progress,
) -> Measured | None:
    """Run one virtual batch: about ``wanted`` samples, or as many as fit in ``memory`` bytes of each process.

    ``release(layer, moments, samples)`` writes a layer's statistics when all replicas stand there. Where
    the replicas turn out to hold too much, or a layer was released too early, the same batches run
    again: all writes repeat. All processes of the group go through it together, also those without data. What comes
    back is the same on all of them, but for the batches, which are each one's own. None when all sources are empty.
    """
    fits: float = float("inf")
    while True:
        walkers: list[Walker] = []
        try:
            samples = _admit_together(walkers, start, source, group, memory, wanted, fits, progress)
            return _walk(walkers, samples, order, release, group, memory, progress) if samples else None
        except _TooManyError as too_many:
            fits = too_many.fits
            source.give_back(walker.batch for walker in walkers)
        except _LateError:
            fits = len(walkers)
            source.give_back(walker.batch for walker in walkers)
        finally:
            with uninterrupted():
                for walker in walkers:
                    walker.replica.close()


def one_by_one(
    start: Callable[[object], Replica],
    batches: Iterable[Batch],
    group: Group,
    what: str,
    progress: Progress,
    measured: Measured | None = None,
    after: Callable[[Measured, Batch], None] = lambda *_: None,
) -> Measured:
    """Run the batches one after the other, without waiting, and pool what they meet, on all processes of the group.

    They are pooled with what was ``measured`` before. ``after`` is called with all of that after each batch, or some
    batches where it lies on a device.
    """
    measured = measured or Measured()
    later = Later()
    for batch in batches:
        walker = Walker(start(batch.content), batch)
        try:
            with later.checked_on_failure():
                _run_through(walker, measured, later)
        finally:
            with uninterrupted():
                walker.replica.close()
        measured.samples += batch.samples
        _count_calls(measured, [walker])
        progress(what, measured.samples)
        if later.batches == UNREAD:
            later.read(measured, pool=True)
        if not later.batches:
            after(measured, batch)
    later.read(measured, pool=True)
    return measured.on_all(group)


def _run_through(walker: Walker, measured: Measured, later: Later) -> None:
    walker.advance()
    while (arrival := walker.arrival) is not None:
        if isinstance(arrival.moments, Moments):
            check_finite(arrival.layer, arrival.moments, [(walker.batch, arrival)])
            measured.add(arrival)
        else:
            later.add(walker.batch, arrival)
        walker.advance()


def _admit_together(
    walkers: list[Walker],
    start: Callable[[object], Replica],
    source: Source,
    group: Group,
    memory: float,
    wanted: float,
    fits: float,
    progress: Progress,
) -> int:
    """Start replicas on all processes; returns how many samples they have together.

    Each takes an equal share of what is wanted. What some cannot take, those take that have more data and room.
    """
    share = wanted / group.size
    while True:
        more = _admit(walkers, start, source, memory, share, fits, progress)
        every = group.gather((_samples(walkers), more))
        samples, able = sum(taken for taken, _ in every), sum(more for _, more in every)
        if samples >= wanted or not able:
            return samples
        share = _samples(walkers) + (wanted - samples) / able


def _admit(
    walkers: list[Walker],
    start: Callable[[object], Replica],
    source: Source,
    memory: float,
    wanted: float,
    fits: float,
    progress: Progress,
) -> bool:
    """Start replicas, each up to its first layer, while they fit; whether there may be more that would."""
    samples, held = _samples(walkers), sum(walker.replica.held() for walker in walkers)
    while samples < wanted:
        if len(walkers) >= fits or (walkers and held * (1 + 1 / len(walkers)) > memory):
            return False
        batch = source.next()
        if batch is None:
            return False
        walkers.append(Walker(start(batch.content), batch))
        walkers[-1].advance()
        samples += batch.samples
        held += walkers[-1].replica.held()
        progress("reading", samples)
    return True


def _samples(walkers: list[Walker]) -> int:
    return sum(walker.batch.samples for walker in walkers)


def _walk(
    walkers: list[Walker],
    samples: int,
    order: Order,
    release: Callable[[str, Moments, int], None],
    group: Group,
    memory: float,
    progress: Progress,
) -> Measured:
    """Release layer after layer until every replica of every process has come to its end."""
    measured, own, later = Measured(samples, batches=[walker.batch for walker in walkers]), Measured(), Later()
    elsewhere: Elsewhere = {}
    fits: int | None = None
    with later.checked_on_failure():
        while True:
            live = [walker for walker in walkers if walker.arrival is not None]
            every = group.gather((fits, _stops(live, elsewhere, group)))
            if any(room is not None for room, _ in every):
                raise _TooManyError(len(walkers) if fits is None else fits)
            places = {layer for _, stops in every for layer in stops}
            if not places:
                break
            layer = order.first(places, _paths(live, places, group))
            stops = [stops[layer] for _, stops in every if layer in stops]
            _note_late(layer, stops, order, measured)
            here = [walker for walker in live if walker.stands_at(layer)]
            waiting = {walker: walker.met.layer for walker in live if not walker.stands_at(layer)}
            elsewhere.update({(layer, call): waiting for stop in stops for call in stop.calls})
            for walker in here:
                _take(walker, own, later)
            measured.pool(layer, merged(stop.moments for stop in stops))
            release(layer, measured.moments[layer], samples)
            fits = _advance(here, live, memory)
            progress("recalibrating", _samples(walkers) * len(measured.moments) // len(order.layers))
    later.read(own, pool=False)
    _count_calls(own, walkers)
    measured.include(own.on_all(group))
    return measured


def _stops(live: list[Walker], elsewhere: Elsewhere, group: Group) -> dict[str, Stop]:
    """What the walkers of this process bring to the layers at which they stand."""
    found = {}
    for layer in dict.fromkeys(walker.met.layer for walker in live):
        here = [walker for walker in live if walker.stands_at(layer)]
        moments = merged(walker.met.moments for walker in here)
        moments = moments if group.size == 1 else moments.numpy()
        if moments.at_hand:
            check_finite(layer, moments, [(walker.batch, walker.met) for walker in here])
        calls = {walker: walker.path.count(layer) for walker in here}
        late = {
            elsewhere[layer, call].get(walker, layer) for walker, call in calls.items() if (layer, call) in elsewhere
        }
        found[layer] = Stop(moments, frozenset(calls.values()), frozenset(late))
    return found


def _take(walker: Walker, own: Measured, later: Later) -> None:
    if isinstance(walker.met.moments, Moments):
        own.follow(walker.met)
    else:
        later.add(walker.batch, walker.met)


def _paths(live: list[Walker], places: set[str], group: Group) -> Iterable[tuple[str, ...]]:
    """In which order the walkers of all processes have passed these layers; not asked for where they are one."""
    if len(places) == 1:
        return ()
    own = {tuple(layer for layer in walker.path if layer in places) for walker in live}
    return (path for paths in group.gather(own) for path in paths)


def _note_late(layer: str, stops: list[Stop], order: Order, measured: Measured) -> None:
    late = {place for stop in stops for place in stop.late}
    if any(order.learn(place, layer) for place in sorted(late)):
        raise _LateError
    if late:
        measured.late.add(layer)


def _advance(here: list[Walker], live: list[Walker], memory: float) -> int | None:
    """Let the walkers go on. If the first shows that all would hold too much, the others stay: how many would fit."""
    for walker in here:
        walker.advance()
        if walker is here[0] and (fits := _fitting(walker, live, memory)) is not None:
            return fits
    return None


def _fitting(first: Walker, live: list[Walker], memory: float) -> int | None:
    """How many of the walkers fit, at the next stop of the first of them; None where all do."""
    if first.arrival is None or len(live) < 2:
        return None
    held = first.replica.held() / first.batch.samples * _samples(live)
    return max(1, int(len(live) * memory / held)) if held > memory else None


def _count_calls(measured: Measured, walkers: list[Walker]) -> None:
    for walker in walkers:
        for layer in set(walker.path):
            measured.calls[layer] = max(measured.calls.get(layer, 0), walker.path.count(layer))
