"""The verbs freeze, unfreeze, assert_frozen and reset."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from bntools import backends
from bntools.errors import BntoolsError, NotFrozenError
from bntools.layer import BatchNorm, Selection, select


class Frozen:
    """What ``freeze`` returns: undoes it by ``undo()`` or at the end of a ``with`` block.

    ``layers`` names what was frozen. Undoing twice does no more than undoing once.
    """

    def __init__(self, layers: list[str], undo: Callable[[], None]):
        self.layers = layers
        self._undo: Callable[[], None] | None = undo

    def undo(self) -> None:
        """Give each layer back the flags it had before ``freeze``."""
        undo, self._undo = self._undo, None
        if undo is not None:
            undo()

    def __enter__(self) -> Frozen:
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def __repr__(self) -> str:
        state = "undone" if self._undo is None else "frozen"
        return f"<{len(self.layers)} BN layer{'s' * (len(self.layers) != 1)} {state}>"


@backends.one_at_a_time
def freeze(model: Any, *, stats: bool = True, affine: bool = True, layers: Selection = None) -> Frozen:
    """Keep BN layers from moving while the rest of the model trains.

    ``stats`` keeps the statistics: the layers normalize with the stored ones, also in training,
    and a later ``model.train()`` does not wake them. ``affine`` keeps scale and shift: no gradient
    is computed for them and a pending one is dropped, so that no optimizer moves them. Keys of the
    state dict stay; a frozen model copies, pickles and compiles.

    A Keras model that is compiled already need not be recompiled; one that was compiled around it and has trained
    must be, or is frozen itself. Both parts are Keras's own ``layer.trainable = False``, which a ``trainable`` set on a
    model around the layer overrides, as everywhere in Keras; one part alone makes the layer a registered subclass that
    saves and reloads, and stays frozen until it is unfrozen.

    Raises BntoolsError where ``layers`` selects nothing, and for one part alone of a Keras layer that is of a subclass
    of BatchNormalization; nothing is frozen then.

        with bntools.freeze(model):
            train(model)                      # or: handle = bntools.freeze(model) ... handle.undo()
    """
    backend = backends.of(model)
    _check_trains(backend)
    names = [layer.name for layer in select(backend.layers(model), layers, backends.absence(model))]
    return Frozen(names, backend.freeze(model, names, stats=stats, affine=affine))


@backends.one_at_a_time
def unfreeze(model: Any, *, layers: Selection = None) -> None:
    """Let statistics, scale and shift move again, whoever froze them.

    The frozen variants that libraries build in (torchvision's FrozenBatchNorm2d and its like) have
    nothing that could move and stay as they are.
    """
    backend = backends.of(model)
    _check_trains(backend)
    backend.unfreeze(model, [layer.name for layer in select(backend.layers(model), layers, backends.absence(model))])


def assert_frozen(model: Any, *, stats: bool = True, affine: bool = True, layers: Selection = None) -> None:
    """Raise NotFrozenError, naming the layers, if any of them would still move in training.

    ``eval()`` alone is not frozen: the next ``model.train()`` undoes it; nor is a Keras layer that is called with
    ``training=False``, which ``fit`` overrides. ``stats=False`` or ``affine=False`` leaves that part out, as in
    ``freeze``.
    """
    backend = backends.of(model)
    _check_trains(backend)
    chosen = select(backend.layers(model), layers, backends.absence(model))
    moving = [f"{layer.name} ({what})" for layer in chosen if (what := _moving(layer, stats, affine))]
    if moving:
        raise NotFrozenError(
            f"{len(moving)} of {len(chosen)} BN layers are not frozen: {', '.join(moving)}. "
            f"bntools.freeze(model) keeps them through training"
        )


@backends.one_at_a_time
def reset(model: Any, *, layers: Selection = None) -> list[str]:
    """Set statistics to mean 0 and variance 1 and the update counter to 0; returns the names.

    Frozen layers are reset only when ``layers`` names them. After a reset the eval mode is wrong until
    the statistics were trained or recalibrated. Raises BntoolsError where nothing could be reset.
    """
    backend = backends.of(model)
    model = backend.edit(model)
    found = select(backend.layers(model), layers, backends.absence(model))
    chosen = [layer for layer in found if layer.tracked and not layer.obstacle]
    if layers is None:
        chosen = [layer for layer in chosen if not layer.stats_frozen]
    if not chosen:
        if all(layer.obstacle for layer in found):
            reasons = "; ".join(f"{layer.name}: {layer.obstacle}" for layer in found)
            raise BntoolsError(f"nothing to reset: none of the {len(found)} BN layers can be reset ({reasons})")
        raise BntoolsError(
            "nothing to reset: every BN layer is frozen or keeps no statistics. Name frozen layers in layers= "
            "to reset them all the same, or unfreeze the model first"
        )
    names = [layer.name for layer in chosen]
    backend.reset(model, names)
    backend.commit(model)
    return names


def _check_trains(backend: ModuleType) -> None:
    """Raise BntoolsError for a kind of model that does not train, before its layers are looked at."""
    if hasattr(backend, "refuse_freezing"):
        backend.refuse_freezing()


def _moving(layer: BatchNorm, stats: bool, affine: bool) -> str:
    parts = []
    if stats and not layer.stats_frozen:
        parts.append("statistics")
    if affine and not layer.affine_frozen:
        parts.append("scale and shift")
    return " and ".join(parts)
