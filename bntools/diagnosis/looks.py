"""How the first BN layer would see the data under the usual ways of preprocessing images.

A wrong preprocessing looks like a domain shift. But it is one of a few known functions of the pixels: where one of
them brings the data back to what the first layer has stored, and nothing else does, it was left out, or done twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np

from bntools import backends
from bntools.batches import Batch, count
from bntools.diagnosis import scalings, wild
from bntools.diagnosis.pieces import sliced
from bntools.diagnosis.records import Preprocessing
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.layer import BatchNorm, distance
from bntools.resizing import mapped, to_numpy
from bntools.walkers import Walker

MOST = 64  # samples: a first layer sees thousands of pixels of each
BETTER = (
    1 / 3
)  # of the drift as given: a true shift of contrast or colour is not undone so far by a wrong preprocessing
FAR = 1 / 20  # of the drift as given: no camera is off by so much, and what is left may be one
FITS = 0.5  # standard deviations in the worst channel: what is left has to be of the order of a domain's own drift
SWAPPED = "RGB and BGR exchanged"

Forward = Callable[[Any, Any], Any]
Scaling = Callable[[np.ndarray], np.ndarray]  # of images (N, H, W, C), float64


def compare(model: Any, contents: Iterable[Any], *, forward: Forward | None = None) -> list[Preprocessing]:
    """The drift of the first BN layer under the usual preprocessings, the best first, and as the data is (``given``).

    ``model`` is what the back end's ``edit`` gives, with the statistics to which the data is compared; ``contents`` are
    batches as the back end takes them, of which the first MOST samples are used. How the pixels came is inferred from
    their range alone. Where some images are of another magnitude, all data is compared with and without them, too;
    with nothing else where the others fit. Empty for data that is not one input of images, (N, 1 or 3, H, W) or
    (N, H, W, 1 or 3), for a range that fits nothing known, and where the first layer's statistics are not finite.
    """
    contents = list(contents)
    batches = _first(contents)
    images = [image for batch in batches if (image := _images(batch)) is not None]
    if not images or len(images) < len(batches):
        return []
    first = _First(model, forward)
    found = _tamed(first, contents)
    if better(found) and found[1].drift < FITS:  # what fits the first MOST samples need not fit all of two ranges
        return found[::-1]
    given = first.drift(batches)
    if given is None:
        return []
    found = found or [Preprocessing("as given", given, given=True)]
    pixels = [np.reshape(last, (-1, last.shape[-1])) for last in map(_channels_last, images)]  # batches differ in size
    for name, change, how in _alternatives(np.concatenate(pixels), _leads(images[0])):
        drift = first.drift([_with(batch, _changed(one, change)) for batch, one in zip(batches, images, strict=True)])
        if drift is not None:
            found.append(Preprocessing(name, drift, how=how))
    moved = first.drift([_with(batch, _moved(image)) for batch, image in zip(batches, images, strict=True)])
    if moved is not None:  # a convolution refuses one of the layouts, a dense layer behind Flatten takes both
        name, axes = ("channels last", "1, -1") if _leads(images[0]) else ("channels first", "-1, 1")
        found.append(Preprocessing(name, moved, how=f"images = np.moveaxis(images, {axes})"))
    return sorted(found, key=lambda one: one.drift) if len(found) > 1 else []


def better(preprocessing: Iterable[Preprocessing]) -> tuple[Preprocessing, Preprocessing] | None:
    """The data as given and what fits far better; None where nothing does.

    Far better is a drift below BETTER of the given one that fits (FITS), or one below FAR of it. Where the given one
    fits already, nothing is better.
    """
    looks = sorted(preprocessing, key=lambda one: one.drift)
    given = next((one for one in looks if one.given), None)
    if given is None or looks[0] is given or given.drift < FITS:
        return None
    best = looks[0].drift
    return (given, looks[0]) if best < min(FITS, BETTER * given.drift) or best < FAR * given.drift else None


def _tamed(first: _First, contents: list[Any]) -> list[Preprocessing]:
    """All data as given and without the images whose values are wild; empty where there are none."""
    batches = [batch for batch in contents if count(batch)]
    images = [image for batch in batches if (image := _images(batch)) is not None]
    bound = wild.limit(images) if len(images) == len(batches) else None
    if bound is None:
        return []
    calm = [one[wild.peak(one) <= bound] for one in images]
    given = first.drift(batches)
    rest = first.drift([_with(batch, some) for batch, some in zip(batches, calm, strict=True) if len(some)])
    if given is None or rest is None:
        return []
    how = f"images = images[np.abs(images).max(axis=(1, 2, 3)) <= {bound:g}]"
    return [Preprocessing("as given", given, given=True), Preprocessing(wild.told(images, bound), rest, how=how)]


class _First:
    """The layer that a forward pass reaches first, and its drift on batches."""

    def __init__(self, model: Any, forward: Forward | None):
        self._model, self._forward = model, forward
        self._backend = backends.of(model)
        self._layers = {
            layer.name: layer
            for layer in self._backend.layers(model)
            if layer.initialized and layer.tracked and not layer.obstacle
        }
        self._name: str | None = None

    def drift(self, batches: list[Any]) -> float | None:
        """The distance of what eval mode brings to the layer from what it has stored; None where the model refuses."""
        names = [self._name] if self._name else list(self._layers)
        if not names:
            return None
        try:
            with self._backend.measuring(self._model, names, forward=self._forward, waiting=True) as start:
                arrivals = [self._arrival(start(batch), batch) for batch in batches]
        except BntoolsError:
            return None
        moments = [met.moments.numpy() for met in arrivals if met is not None]
        if not moments or len({met.layer for met in arrivals if met is not None}) > 1:
            return None
        self._name = arrivals[0].layer
        return _distance(self._layers[self._name], moments)

    def _arrival(self, replica: Any, batch: Any) -> Any:
        walker = Walker(replica, Batch(0, batch, count(batch)))
        try:
            walker.advance()
            return walker.arrival
        finally:
            with uninterrupted():
                replica.close()


def _distance(layer: BatchNorm, parts: list[Any]) -> float | None:
    moments = parts[0]
    for other in parts[1:]:
        moments = moments.merge(other)
    if moments.mean.shape != layer.stats[0].shape:  # a layer of its own make, which took what does not fit
        return None
    drift = distance(layer.stats, (moments.mean, moments.var), layer.eps)
    return drift if np.isfinite(drift) else None


def _alternatives(pixels: np.ndarray, channels_first: bool) -> Iterator[tuple[str, Scaling, str]]:
    """What else could have been done to the pixels (N, C): its name, the change, and its line of Python."""
    colour = pixels.shape[-1] == 3
    if colour:
        yield SWAPPED, _swapped, scalings.line(None, None, True, channels_first)
    for source in scalings.possible(pixels):
        for target in scalings.others(source, pixels):
            for swap in (False, True) if colour else (False,):
                name = f"{target.name}, {SWAPPED}" if swap else target.name
                line = scalings.line(source, target, swap, channels_first)
                yield name, partial(_rescaled, source, target, swap), line


def _rescaled(source: scalings.Scale, target: scalings.Scale, swap: bool, pixels: np.ndarray) -> np.ndarray:
    unit = source.to_unit(pixels)
    return target.of_unit(_swapped(unit) if swap else unit)


def _swapped(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., ::-1]


def _first(contents: Iterable[Any]) -> list[Any]:
    batches, left = [], MOST
    for content in contents:
        samples = count(content)
        if samples:
            batches.append(sliced(content, 0, left))
            left -= samples
        if left <= 0:
            break
    return batches


def _images(batch: Any) -> np.ndarray | None:
    """The batch's only input, where it is images of numbers."""
    if isinstance(batch, (tuple, list)):
        batch = batch[0] if batch else None
    if isinstance(batch, Mapping):
        arrays = [value for value in batch.values() if getattr(value, "shape", ())]
        batch = arrays[0] if len(arrays) == 1 else None
    shape = tuple(getattr(batch, "shape", ()))
    if len(shape) != 4 or not {shape[1], shape[3]} & {1, 3} or 1 in shape[2:3]:
        return None
    array = to_numpy(batch)
    return array if array.dtype.kind in "fiu" and np.isfinite(array).all() else None


def _channels_last(images: np.ndarray) -> np.ndarray:
    return np.moveaxis(images, 1, -1) if _leads(images) else images


def _leads(images: np.ndarray) -> bool:
    """Whether the channels come before height and width; of images that are 1 or 3 wide, too, nobody can tell."""
    return images.shape[1] in (1, 3)


def _changed(images: np.ndarray, change: Scaling) -> np.ndarray:
    """The images changed, in their own floating type."""
    values = change(_channels_last(images).astype(np.float64))
    values = np.moveaxis(values, -1, 1) if _leads(images) else values
    return np.ascontiguousarray(values, images.dtype if images.dtype.kind == "f" else np.float32)


def _moved(images: np.ndarray) -> np.ndarray:
    """The images in the other layout."""
    return np.ascontiguousarray(np.moveaxis(images, 1, -1) if _leads(images) else np.moveaxis(images, -1, 1))


def _with(batch: Any, images: np.ndarray) -> Any:
    """The batch with other images for its only ones."""
    if isinstance(batch, (tuple, list)):
        return (images, *batch[1:])
    if isinstance(batch, Mapping):
        return mapped(lambda value: images if getattr(value, "shape", ()) else value, batch)
    return images
