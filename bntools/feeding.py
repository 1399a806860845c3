"""Data as a model takes it: with its channels, its layout, its size, its dtype and its batch size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bntools import backends, data
from bntools.errors import BntoolsError
from bntools.inputs import Input
from bntools.sources import huggingface


def given(model: Any, batches: Any, max_samples: int | None = None) -> Any:
    """What a user gave as batches: names and datasets of Hugging Face opened as the model takes them, else as it is."""
    if isinstance(batches, (str, Path)) or huggingface.is_dataset(batches):
        return opened(model, batches, max_samples=max_samples)
    return batches


def inputs_of(model: Any) -> list[Input]:
    """What the model says about its inputs; an empty list for models that say nothing."""
    if model is None or not hasattr(backend := backends.of(model), "takes"):
        return []
    return list(backend.takes(model))


def opened(
    model: Any,
    source: Any,
    *,
    batch_size: int = 32,
    size: tuple[int, int] | None = None,
    channels: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    max_samples: int | None = None,
    seed: int = 0,
    preprocess: str | None = None,
    column: str | None = None,
    processes: tuple[int, int] | None = None,
) -> data.Data:
    """The data behind a name or an object, as :func:`bntools.data.open` reads it, as the model takes it.

    That is with as many channels, and for a model that says more (ONNX, Keras) in its layout, size, dtype and batch
    size. Samples that fill no batch of a fixed size are left out, which the data's description says. ``processes`` is
    a rank and how many there are, of which each reads its share.
    """
    takes = inputs_of(model)
    alone = takes[0] if len(takes) == 1 else None
    bound = next((one for one in takes if one.batch), None)
    together = (bound.batch if bound else None) or 1
    scaled = mean is not None or preprocess is not None
    whole = [one for one in takes if one.integer or (one.pixels and not scaled)]
    options: dict[str, Any] = {
        "batch_size": together if bound else batch_size,
        "channels": channels or (None if model is None else backends.of(model).input_channels(model)),
        "mean": mean,
        "std": std,
        "seed": seed,
        "layout": "NHWC" if alone and alone.channel_axis == 3 else "NCHW",
        "raw": tuple(one.name for one in whole) + (("",) if alone in whole else ()),
        "preprocess": preprocess,
        "column": column,
        "shard": processes and (*processes, together),
    }
    own = alone.size if alone else None
    size = size or (own if _is_path(source) and data.holds_images(source) else None)
    found = data.open(source, size=size, max_samples=max_samples, **options)
    if size is None and own is not None and found.spec["kind"] == "images":  # which only opening it could tell
        size = own
        found = data.open(source, size=size, max_samples=max_samples, **options)
    if bound is None or found.samples is None:
        return found
    if found.samples < together:
        raise BntoolsError(
            f"{found.spec['source']}: {found.samples:,} sample{'s' * (found.samples != 1)}, and the model takes "
            f"batches of {together} only, at its input {bound}: give more"
        )
    left = found.samples % together
    if left:
        found = data.open(source, size=size, max_samples=found.samples - left, **options)
    found.note = f"in batches of {together}, the size that the model's input is bound to"
    found.note += f"; {left} left out" if left else ""
    return found


def _is_path(source: Any) -> bool:
    return isinstance(source, (str, Path))
