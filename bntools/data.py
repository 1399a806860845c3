"""Data for a model: images in folders, tars or tables, arrays, or a factory of batches, opened as batches.

What was done to the data on the way (sizes, scaling, normalization, what was skipped) is in the
description, which the commands print, and in ``spec``, which they record.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bntools import preprocessing, sources
from bntools.digests import of_batch
from bntools.errors import BntoolsError
from bntools.factories import Factory
from bntools.reading import Reading
from bntools.sources import opening

if TYPE_CHECKING:
    from bntools.sources.opening import Source

MEASURED = 64  # samples from which the spec's mean and std come
MANY = 4096  # from so many channels on, one mean and std for all


class Data:
    """Batches that can be read again and again, always the same ones in the same order.

    ``len(data)`` counts samples; it is a TypeError for a factory or stream, which only reading could count.
    """

    def __init__(self, kind: str, source: Source, name: str):
        self._source = source
        self.note = ""  # what else is worth saying about how it is read
        first = next(source.batches(MEASURED), None)
        if first is None:
            raise BntoolsError(f"{name}: yields no batches")
        self.begins = of_batch(first)  # a digest of its first samples, on all processes that share it
        self._given = {
            "kind": kind,
            "source": name,
            "options": source.reading.record(),
            "measured": _measured(first, source.details().get("channel_axis", 1)),
        }

    def __iter__(self) -> Iterator[Any]:
        return self._source.batches()

    def batches_after(self, samples: int) -> tuple[Iterator[Any], int] | None:
        """The batches behind the first ``samples`` samples, and how many come before; None where that needs reading.

        What comes before is not decoded, so that damage in it is not known, as it would be by reading.
        """
        size = self._source.reading.batch_size
        if samples % size or isinstance(self._source, Factory):
            return None
        return self._source.batches(skip=samples), samples // size

    @property
    def samples(self) -> int | None:
        """How many samples there are; None for a factory or a stream, which only reading could count."""
        return self._source.samples

    def __len__(self) -> int:
        if self.samples is None:
            raise TypeError("data that only comes as it comes has no length")
        return self.samples

    @property
    def drawn(self) -> bool:
        """Whether the first samples are drawn at random from all, so that they stand for them."""
        return self._source.drawn

    @property
    def dealt(self) -> bool:
        """Whether this is the share of one of several processes, each of which has other samples."""
        return self._source.reading.shard is not None

    def __bool__(self) -> bool:
        return True

    @property
    def spec(self) -> dict[str, Any]:
        """What the data is and how it was read, for a JSON record; enough for :func:`reopen` and :func:`example`.

        ``measured`` has shape, dtype, mean, std, min and max per channel of the first batch (at most 64
        samples) as the model gets it, for a dict batch by name. Files that turned out
        damaged while reading are in ``skipped`` afterwards.
        """
        note = {"note": self.note} if self.note else {}
        return {**self._given, "samples": self.samples, **note, **self._source.details()}

    @property
    def skipped(self) -> int:
        """How many files were skipped so far; reading may find more of them."""
        return len(getattr(self._source, "skipped", ()))

    def damage(self, since: int) -> str:
        """The files that were skipped after the first ``since``, in a line; empty if there are none."""
        found = getattr(self._source, "damage", None)
        return found(since) if found else ""

    @property
    def description(self) -> str:
        """The same for people, in one line."""
        return "; ".join(filter(None, (self._source.description(), self.note)))


def open(
    source: Any,
    *,
    channels: int | None = None,
    size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    batch_size: int = 32,
    max_samples: int | None = None,
    seed: int = 0,
    layout: str = "NCHW",
    raw: Sequence[str] = (),
    preprocess: str | None = None,
    column: str | None = None,
    shard: tuple[int, int, int] | None = None,
) -> Data:
    """Open images, arrays, or a factory ``package.module:function`` as batches.

    ``source`` is a folder of images; tar shards as WebDataset writes them, Parquet files, or a folder that holds
    nothing else; a pattern of such files (``train-{000..011}.tar``, ``data/*.parquet``); a dataset of Hugging Face,
    as an object or a folder from ``save_to_disk``; a file of arrays; or a factory, which may return such a dataset.
    Of a table the column of images is read, or ``column``, or where there are no images those of numbers as arrays.

    Images become float32 in 0..1 of shape (batch, channels, height, width), or with the channels last
    for ``layout="NHWC"``. Where they share one size they are taken as they are; else, or with
    ``size`` (height, width) in pixels, they are scaled to cover it and centre-cropped. The size is
    then the one that more than half of them have; if there is none, 224, or the median of the shorter
    sides where that is less. ``channels`` is 1 (grey) or 3 (RGB), by default what the images are.
    ``mean`` and ``std``, one number a channel, are subtracted and divided by after scaling; or ``preprocess`` names a
    module of keras.applications (``mobilenet_v2``) whose preprocess_input takes the place of all three. Files
    that cannot be read are skipped and named. Decoding runs ahead of the consumer in a few threads.

    Parquet is read row group by row group, in random order, its rows mixed within 64 MiB; of a streamed dataset 1,000
    rows are mixed at a time. ``drawn`` tells whether the first samples stand for all.

    Arrays (``.npy``, ``.npz``, ``.pt``, ``.safetensors``; first axis: samples) are taken as they are, except
    uint8 arrays of rank 4, which are images and scaled to 0..1. Several arrays in one file give
    dict batches. ``raw`` names arrays whose 8-bit images stay as they are, for models that take whole
    numbers; "" stands for a folder or a single array. Samples come in an order that only ``seed`` decides,
    and ``max_samples`` are drawn from all of them; a factory, which nobody can draw from, is cut short instead.
    ``shard=(rank, count, together)`` reads the share of one of ``count`` processes: in groups of ``together`` samples,
    which is 1 but for models bound to a batch size, every count-th of that order; of a factory every count-th batch.
    Length, description and ``spec`` are those of the whole data.

        batches = data.open("photos/", size=(224, 224), mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))

    Raises BntoolsError where there is nothing to read, or it cannot be read as asked.
    """
    channels = 3 if preprocess is not None and channels is None else channels
    reading = Reading(
        channels,
        _tuple(size),
        _tuple(mean),
        _tuple(std),
        batch_size,
        max_samples,
        seed,
        layout,
        tuple(raw),
        preprocess,
        _tuple(shard),
        column,
    )
    if preprocess is not None:
        preprocessing.find(preprocess)
    kind, name, found = opening.opened(source, reading)
    return Data(kind, found, name)


def holds_images(source: str | Path) -> bool:
    """Whether a source is certain to be read as images: a folder, a tar, or a file that is none of arrays."""
    found = sources.find(source)
    return found is not None and found.kind in ("folder", "image", "tar")


def reopen(spec: dict[str, Any]) -> Data:
    """The data that a spec describes, read in the same way, from where it was.

    Raises BntoolsError where it cannot be: it is gone, or came as an object in memory.
    """
    if spec["source"].startswith(opening.UNNAMED) and ":" not in spec["source"]:
        raise BntoolsError(f"{spec['source']}: came as an object, which only its maker can open again")
    return open(spec["source"], **spec["options"])


def example(spec: dict[str, Any], n: int = 2, seed: int = 0) -> Any:
    """A random batch of ``n`` samples like the data that a spec describes: an array, or a dict of arrays.

    Each channel has the mean and standard deviation that were measured, within the range that was
    seen. The data itself need not exist any more.

    Raises BntoolsError where the spec has no shapes, which some factories' batches do not have.
    """
    generator = np.random.default_rng(seed)
    measured = spec.get("measured")
    if not measured:
        raise BntoolsError(
            f"nothing is recorded of the shape of {spec.get('source', 'the data')}: give data, or the shape of a sample"
        )
    if "shape" in measured:
        return _random(measured, spec.get("channel_axis", 1), n, generator)
    return {name: _random(each, 1, n, generator) for name, each in measured.items()}


def _tuple(values: Any) -> tuple[Any, ...] | None:
    return None if values is None else tuple(values)


def _measured(batch: Any, axis: int) -> dict[str, Any] | None:
    """What :func:`example` needs to know; None for batches that are not made of numbers."""
    if isinstance(batch, dict):
        each = {str(name): _measured(value, 1) for name, value in batch.items()}
        return None if None in each.values() else each
    if isinstance(batch, (tuple, list)):
        return _measured(batch[0], axis) if batch else None
    if not hasattr(batch, "shape"):
        return None
    array = np.asarray(batch)[:MEASURED]
    if array.dtype.kind not in "fiub" or not array.ndim:
        return None
    per_channel = array.ndim > 1 and array.shape[axis] <= MANY
    values = np.moveaxis(array, axis, -1) if per_channel else array
    values = values.reshape(-1, array.shape[axis] if per_channel else 1).astype(np.float64)
    finite = np.isfinite(values)
    values = np.where(finite, values, np.nan if finite.any(axis=0).all() else 0.0)
    return {
        "shape": list(array.shape[1:]),
        "dtype": str(array.dtype),
        "samples": len(array),
        **{name: getattr(np, f"nan{name}")(values, axis=0).tolist() for name in ("mean", "std", "min", "max")},
    }


def _random(measured: dict[str, Any], axis: int, n: int, generator: np.random.Generator) -> np.ndarray:
    shape = (n, *measured["shape"])
    along = [1] * len(shape)
    if len(measured["mean"]) > 1:
        along[axis] = -1
    mean, std, least, most = (np.reshape(measured[name], along) for name in ("mean", "std", "min", "max"))
    values = np.clip(mean + std * generator.standard_normal(shape), least, most)
    dtype = np.dtype(measured["dtype"])
    return values.astype(dtype) if dtype.kind == "f" else np.rint(values).astype(dtype)
