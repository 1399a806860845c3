"""Measuring a model on another device than the one where it is, and in the precision in which it will run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from bntools import backends
from bntools.errors import BntoolsError


@dataclass(frozen=True)
class Placed:
    """A model where it is to be measured; ``device`` is None where the framework decides that by itself."""

    model: Any
    device: str | None
    autocast: str | None

    @property
    def record(self) -> dict[str, str | None]:
        """What a record says about it."""
        return {} if self.device is None else {"device": self.device, "autocast": self.autocast}


@contextmanager
def placed(model: Any, device: str | None = None, autocast: str | None = None) -> Iterator[Placed]:
    """A double of the model on a device, under autocast, for the block; the model gets its statistics at the end.

    ``device`` is a name such as ``cpu`` or ``cuda:0``, by default a GPU if there is one; ``autocast`` is ``float16``
    or ``bfloat16``. The model itself stays where it is. Where the block fails it stays as it was.

    Raises BntoolsError for a device that is not there, a dtype that it cannot compute in, and, if either is asked for,
    for models other than of PyTorch.
    """
    backend = backends.of(model)
    if not hasattr(backend, "double"):
        if device is not None or autocast is not None:
            raise BntoolsError(
                f"found device={device!r} and autocast={autocast!r} for a model that is not of PyTorch: leave both out"
            )
        yield Placed(model, None, None)
        return
    there, name = backend.double(model, device)
    with ExitStack() as stack:
        if autocast is not None:
            stack.enter_context(backend.autocast(name, autocast))
        yield Placed(there, name, autocast)
    if there is not model:
        measured = {layer.name: (*layer.stats, layer.updates) for layer in backend.layers(there) if layer.tracked}
        backend.write(model, measured)
