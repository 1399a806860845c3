"""Data as Keras users have it, as the batches that the verbs work on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from itertools import count as counting
from itertools import cycle, repeat
from typing import Any

import keras
import numpy as np

from bntools.backends.keras.calls import functional
from bntools.backends.keras.segments import takes_any_batch
from bntools.errors import BntoolsError
from bntools.resizing import mapped, to_numpy

CHUNK = 64  # samples at a time of what is given as one array
TOGETHER = 64  # samples of small batches that come together
JOINED = 1 << 24  # bytes of input: batches that are kept small for memory's sake stay so
ENDLESS = 2_000_000  # samples of data without a length, more than ImageNet has, after which it is taken for endless


class Feed:
    """Batches one by one, each as one array or as a dict of arrays by name.

    It can be iterated as often as what it stands for. ``samples`` is how many there are, None if unknown.
    """

    place: int | str = 0  # of the batch that came last, in the user's own counting
    read = 0  # batches of the user's so far

    def __init__(self, model: Any, batches: Any, limited: bool, whole: bool = False, joined: bool = False):
        self._model, self._batches, self._limited, self._whole = model, batches, limited, whole
        self._joined = joined
        self.samples: int | None = getattr(batches, "samples", None)
        self.repeatable = isinstance(batches, keras.utils.PyDataset) or not hasattr(batches, "__next__")

    def __iter__(self) -> Iterator[Any]:
        """The batches, small ones together where that was asked for."""
        return self._joining(self._each(self._batches, 0))

    def _joining(self, contents: Iterator[Any]) -> Iterator[Any]:
        group: list[Any] = []
        for content in contents:
            if group and not _fit_together(group, content):
                yield self._together(group, self.read - 1)
                group = []
            group.append(content)
            if not self._joined:
                yield self._together(group, self.read)
                group = []
        if group:
            yield self._together(group, self.read)

    def _together(self, group: list[Any], end: int) -> Any:
        """Batches up to the one with the number ``end`` as one, and where they are in the data."""
        start = end - len(group)
        self.place = start if len(group) == 1 else f"{start} to {end - 1}"
        if len(group) == 1:
            return group[0]
        if isinstance(group[0], Mapping):
            return {name: np.concatenate([one[name] for one in group]) for name in group[0]}
        return np.concatenate(group)

    def batches_after(self, samples: int) -> tuple[Iterator[Any], int] | None:
        """The batches behind the first ``samples`` samples, and how many come before; None where that needs reading."""
        after = getattr(self._batches, "batches_after", None)
        found = after(samples) if after else None
        if found is None:
            return None
        batches, before = found
        return self._joining(self._each(batches, before)), before

    def _each(self, batches: Any, before: int) -> Iterator[Any]:
        """The batches as they come, ``before`` of which came before.

        Raises BntoolsError for data that never ends or ends before it said it would.
        """
        announced = _length(batches)
        if announced == np.inf and not self._limited:
            raise BntoolsError(_endless("the data never ends"))
        self.read, seen = before, 0
        for batch in _items(batches, announced):
            content = batch if self._whole else canonical(self._model, batch)
            self.read += 1
            if announced is None and not self._limited:
                seen += _samples(content)
                if seen > ENDLESS:
                    raise BntoolsError(_endless(f"the data gave more than {ENDLESS:,} samples and may never end"))
            yield content
        if announced is not None and self.read < announced < np.inf:
            raise BntoolsError(
                f"the data ended after {self.read} batches, although it has {announced} by its own account"
            )


def feed(
    model: Any, batches: Any, max_samples: int | None = None, whole: bool = False, joined: bool = False
) -> Iterable[Any]:
    """Batches as the verbs take them: a tf.data.Dataset, a keras.utils.PyDataset, arrays, or any iterable.

    An array, or a dict of them, is cut into batches of CHUNK samples. Of ``(x, y, weights)`` the model gets x; several
    inputs become a dict by name. With ``whole``, for a caller's own forward, a batch stays as it is. With
    ``joined``, batches of fewer than TOGETHER samples and JOINED bytes come together, where that can make no difference
    to the model: each costs Keras's bookkeeping once.
    """
    if isinstance(batches, Feed):  # of another model that is compared with this one
        return batches
    if hasattr(batches, "shape") or isinstance(batches, Mapping):
        batches = _chunks(canonical(model, batches))
    return Feed(model, batches, limited=max_samples is not None, whole=whole, joined=joined and takes_any_batch(model))


def canonical(model: Any, batch: Any) -> Any:
    """One batch as an array, or a dict of arrays by the names of the model's inputs, on the CPU.

    Inputs of a model that has no names for them go by their position, a number.
    """
    if isinstance(batch, (tuple, list)):
        batch = batch[0] if batch else None
    if isinstance(batch, (tuple, list)) and all(hasattr(part, "shape") for part in batch):
        names = input_names(model)
        batch = dict(zip(names if len(names) == len(batch) else range(len(batch)), batch, strict=True))
    return mapped(lambda value: to_numpy(value) if _is_dense(value) else value, batch)


def input_names(model: Any) -> list[str]:
    """What Keras calls the inputs of a functional or Sequential model, in its order; empty for any other."""
    graph = functional(model)
    specs = graph.input_spec if hasattr(graph, "_inputs_struct") else None
    return [spec.name for spec in specs or []]


def _fit_together(group: list[Any], content: Any) -> bool:
    """Whether one more batch goes with those of a group: the same arrays of the same sizes, and not too many."""
    names, first = _parts(group[0])
    others, arrays = _parts(content)
    if names != others or not arrays or not all(map(_alike, first, arrays)):
        return False
    together = [array for one in (*group, content) for array in _parts(one)[1]]
    samples = sum(map(len, together)) // len(arrays)
    return samples <= TOGETHER and sum(array.nbytes for array in together) <= JOINED


def _parts(content: Any) -> tuple[list[Any], list[Any]]:
    return (list(content), list(content.values())) if isinstance(content, Mapping) else ([], [content])


def _alike(one: Any, other: Any) -> bool:
    """Whether two arrays of numbers differ in nothing but how many samples they hold."""
    if not all(isinstance(x, np.ndarray) and x.ndim and x.dtype.kind in "fiub" for x in (one, other)):
        return False
    return (one.shape[1:], one.dtype) == (other.shape[1:], other.dtype)


def _is_dense(value: Any) -> bool:
    return hasattr(value, "__array__") and hasattr(value, "shape")


def _chunks(arrays: Any) -> list[Any]:
    sizes = [len(a) for a in (arrays.values() if isinstance(arrays, Mapping) else [arrays]) if getattr(a, "ndim", 0)]
    size = sizes[0] if sizes else 1
    if len(set(sizes)) > 1:
        raise BntoolsError(f"the arrays have different numbers of samples: {', '.join(map(str, sizes))}")

    def part(start: int) -> Any:
        return mapped(lambda a: a[start : start + CHUNK] if getattr(a, "ndim", 0) else a, arrays)

    return [part(start) for start in range(0, max(size, 1), CHUNK)]


def _length(batches: Any) -> float | None:
    """How many batches there are by the data's own account; infinity for no end, None if it does not say."""
    if isinstance(batches, (cycle, repeat, counting)):
        return np.inf
    if isinstance(batches, keras.utils.PyDataset):
        try:
            number = batches.num_batches
        except NotImplementedError:
            return None
        return np.inf if number is None else number
    if hasattr(batches, "cardinality"):  # tf.data: -1 for infinite, -2 for unknown
        number = int(batches.cardinality())
        return number if number >= 0 else np.inf if number == -1 else None
    if hasattr(batches, "samples"):  # bntools.data.Data, whose length is that number
        return None
    with suppress(TypeError, NotImplementedError):
        return len(batches)
    return None


def _items(batches: Any, announced: float | None) -> Iterator[Any]:
    """The batches of one pass; Keras's datasets go by index, for some of their iterators never stop."""
    if not isinstance(batches, keras.utils.PyDataset) or announced is None:
        return iter(batches)
    indices = counting() if announced == np.inf else range(int(announced))
    return (batches[index] for index in indices)


def _samples(content: Any) -> int:
    first = next(iter(content.values()), None) if isinstance(content, Mapping) else content
    first = first[0] if isinstance(first, (tuple, list)) and first else first
    shape: tuple[int, ...] = getattr(first, "shape", ())
    return int(shape[0]) if shape else 1


def _endless(what: str) -> str:
    return f"{what}: say how many samples to use, with max_samples= (--max-samples)"
