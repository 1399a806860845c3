"""What the processes of a group have to agree on, before they measure one model together and afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import numpy as np

from bntools import __version__
from bntools.batches import Source
from bntools.digests import digest, of_batch
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.layer import Stats
from bntools.measurement import Job
from bntools.processes import Group


@contextmanager
def one_model(group: Group, backend: ModuleType, model: Any, options: Mapping[str, Any]) -> Iterator[None]:
    """See that all processes measure the same model in the same way, and start from the same statistics.

    Weights, layers and ``options`` have to be the same; BntoolsError says what differs. Statistics differ in a
    training with DistributedDataParallel, which takes those of rank 0 into the next forward pass; so does this. If
    the block fails, each process gets its own back.
    """
    if group.size == 1:
        yield
        return
    _compare(group, _facts(backend, model, options))
    own = _statistics(backend, model)
    if _one(group, own):
        yield
        return
    try:
        _store(backend, model, group.gather(own if group.rank == 0 else None)[0])
        yield
    except BaseException:
        with uninterrupted():
            _store(backend, model, own)
        raise


def check_one_result(group: Group, backend: ModuleType, model: Any) -> None:
    """Raise BntoolsError, on every process, where their statistics are not the same to the bit."""
    if group.size > 1 and not _one(group, _statistics(backend, model)):
        raise BntoolsError(
            f"the {group.size} processes have come to different statistics, so each would go on with another model: "
            f"nothing was changed. Does the forward pass itself change the statistics of a layer?"
        )


def check_possible(job: Job, method: str) -> None:
    """Raise BntoolsError for what several processes cannot do together."""
    if job.group.size == 1 or method == "exact":
        return
    if method == "ema":
        raise BntoolsError(
            f"method='ema' is a moving average over batches that come one after the other, and {job.group.size} "
            f"processes have no such order: use 'exact' or 'precise', or one process"
        )
    synced = [layer.name for layer in job.before.values() if layer.kind == "SyncBatchNorm"]
    if synced:
        raise BntoolsError(
            f"layer {synced[0]!r} is a SyncBatchNorm, which in train mode waits for as many batches on each of the "
            f"{job.group.size} processes: only method='exact' can recalibrate it here"
        )


def own_share(group: Group, samples: int | None) -> int | None:
    """How many of so many samples this process takes."""
    if samples is None:
        return None
    return int(samples) // group.size + (group.rank < int(samples) % group.size)


def same_data(group: Group, source: Source, counted: Mapping[str, Any]) -> list[str]:
    """A note where processes begin with the same batch, which counts its samples more than once.

    That moves no statistics; but what depends on their number it would. Raises BntoolsError where one of ``counted``,
    arguments by name, is given.
    """
    if group.size == 1:
        return []
    batch = source.next()
    if batch is not None:
        source.give_back([batch])
    every = group.gather(None if batch is None else of_batch(batch.content))
    alike = [rank for rank, one in enumerate(every) if one is not None and every.count(one) > 1]
    if not alike:
        return []
    what = f"ranks {', '.join(map(str, alike))} of {group.size} begin with the same batch"
    if given := [name for name, value in counted.items() if value]:
        raise BntoolsError(
            f"{what}, and {given[0]}= counts each sample once: give every process its own share of the data, as "
            f"torch.utils.data.DistributedSampler does"
        )
    return [f"{what}: their samples are counted more than once, which moves no statistics but takes longer"]


def one_order(group: Group, data: Any) -> None:
    """See that processes that deal out one order among them have the same: samples would be lost, and others counted
    twice. Raises BntoolsError where they differ in how it begins, as after shuffling without a seed.
    """
    every = group.gather(data.begins)
    rank = next((rank for rank, one in enumerate(every) if one != every[0]), None)
    if rank is not None:
        raise BntoolsError(
            f"{data.spec['source']}: begins with other samples on rank {rank} of {group.size} than on rank 0, and each "
            f"process takes its share of one and the same order: seed what is drawn or shuffled there, and let every "
            f"process yield all of the data"
        )


def padded(group: Group, batches: Any) -> list[str]:
    """A note where a DistributedSampler gives some samples to two processes, so that all have as many."""
    sampler = getattr(batches, "sampler", None)
    try:
        extra = int(sampler.total_size - len(sampler.dataset)) if sampler is not None else 0
    except (AttributeError, TypeError):  # another kind of sampler
        extra = 0
    extra = max(group.gather(extra)) if group.size > 1 else 0
    if extra <= 0:
        return []
    return [f"the DistributedSampler hands out {extra} of the samples twice, so that all processes have as many"]


def _facts(backend: ModuleType, model: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    layers = [(layer.name, layer.kind, layer.features, layer.eps, layer.dtype) for layer in backend.layers(model)]
    return {
        "bntools": __version__,
        "BN layers": layers,
        "weights": backend.digest(model),
        **{f"{name}=": repr(value) for name, value in options.items()},
    }


def _compare(group: Group, facts: dict[str, Any]) -> None:
    every = group.gather(facts)
    for rank, other in enumerate(every):
        differ = [name for name, value in every[0].items() if other.get(name) != value]
        if differ:
            mine, theirs = every[0][differ[0]], other.get(differ[0])
            said = "" if differ[0] == "BN layers" else f" ({theirs} and {mine})"
            raise BntoolsError(
                f"rank {rank} of {group.size} and rank 0 differ in {', '.join(differ)}{said}: every process has to "
                f"recalibrate the same model with the same arguments"
            )


def _statistics(backend: ModuleType, model: Any) -> dict[str, Stats]:
    return {layer.name: layer.stats for layer in backend.layers(model) if layer.mean is not None}


def _store(backend: ModuleType, model: Any, statistics: dict[str, Stats]) -> None:
    backend.write(model, {name: (*both, None) for name, both in statistics.items()})


def _one(group: Group, statistics: dict[str, Stats]) -> bool:
    arrays = [np.ascontiguousarray(values) for both in statistics.values() for values in both]
    return len(set(group.gather(digest(*(array.data for array in arrays))))) == 1
