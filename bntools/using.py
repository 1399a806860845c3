"""The verb use: a live model with other statistics for a while."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any
from weakref import WeakKeyDictionary

from bntools import backends
from bntools.applying import Source, naming, opened, wanted
from bntools.errors import BntoolsError
from bntools.fitting import check_fit
from bntools.interrupts import uninterrupted

_lock = threading.RLock()
# What a layer had before each block that has begun and not ended, in their order. By layer: a part is a model as well.
_before: WeakKeyDictionary[Any, dict[object, Any]] = WeakKeyDictionary()


class Use:
    """What ``use`` returns: a model has these statistics inside ``with`` blocks, as often as one likes.

    ``layers`` names the layers, ``notes`` are sentences worth reading.
    """

    def __init__(self, live: Any, values: Any, layers: list[str], notes: list[str]):
        self.layers = layers
        self.notes = notes
        self._live = live
        self._values = values
        self._turns: list[object] = []
        with _lock:
            self._before = {name: _before.setdefault(layer, {}) for name, layer in live.layers.items()}

    def __enter__(self) -> Use:
        count = len(self._turns)
        try:
            with uninterrupted():
                self._begin()
        except BaseException:
            with uninterrupted():
                if len(self._turns) > count:
                    self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with uninterrupted():
            self._end()

    def __repr__(self) -> str:
        state = "in use" if self._turns else "ready"
        return f"<statistics of {len(self.layers)} BN layer{'s' * (len(self.layers) != 1)} {state}>"

    def _begin(self) -> None:
        with _lock:
            turn = object()
            for name, values in self._live.taken().items():
                self._before[name][turn] = values
            self._turns.append(turn)
            self._live.put(self._values)

    def _end(self) -> None:
        """Put back what was there before; where another turn of a layer began later, that one gets it to put back."""
        with _lock:
            turn, back = self._turns.pop(), {}
            for name, before in self._before.items():
                turns, values = list(before), before.pop(turn)
                if turns[-1] is turn:
                    back[name] = values
                else:
                    before[turns[turns.index(turn) + 1]] = values
            self._live.put(back)


def use(model: Any, stats: Source, *, strict: bool = True) -> Use:
    """Give a live model other statistics for the length of a ``with`` block, fast enough to do it for each image.

    ``stats`` is what ``statistics`` or ``load_stats`` returned, or a file. All that takes time is done here: whether
    they fit (as in ``apply``, which describes ``strict``), and bringing them to the model's device. The block's
    beginning and end then only copy them into the model's own buffers or variables, so that compiled code, captured
    graphs and wrappers see them: a ResNet-50's 53 layers in 0.8 ms and back in 0.3 ms on two cores (in Keras on
    TensorFlow some 4 and 2 ms):

        sites = {name: bntools.use(model, f"model.sites/{name}.safetensors") for name in ("a", "b")}
        with sites["a"]:
            scores = model(image)

    Blocks nest, one ``Use`` may be entered many times, and at the end of a block the model has the statistics of
    before, whatever happened inside, training too. PyTorch's ``backward()`` belongs into the block: behind it
    autograd refuses, because statistics that it needs have changed. The statistics are the model's: all threads that
    run it see them.

    Raises BntoolsError where they do not fit, and for ONNX models, which do not run themselves.
    """
    taken, backend = opened(stats), backends.of(model)
    if not hasattr(backend, "live"):
        raise BntoolsError(
            "an ONNX model does not run itself, and a session of ONNX Runtime keeps the numbers that it was made with: "
            "bntools.apply the statistics to a copy of the model for each domain, and open a session on each"
        )
    with naming(stats):
        found, notes = check_fit(taken, backend, model, strict=strict)
    live = backend.live(backend.edit(model), [layer.name for layer in found])
    return Use(live, live.made(wanted(taken, found)), [layer.name for layer in found], notes)
