"""freeze and unfreeze on the BN layers of a Keras model."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import keras

from bntools.backends.keras.compiled import follow
from bntools.backends.keras.frozen import PARTS, FrozenBatchNormalization, keep_affine
from bntools.backends.keras.naming import named, norms
from bntools.errors import BntoolsError

STOCK = keras.layers.BatchNormalization


@dataclass
class Held:
    """How many freezes hold each part of a layer, and what the layer was before the first of them."""

    frozen: str | None
    trainable: bool
    affine: list[tuple[Any, bool]]  # gamma and beta, and whether each trained
    holders: Counter[str] = field(default_factory=Counter)


_held: WeakKeyDictionary[Any, Held] = WeakKeyDictionary()


def freeze(model: keras.Model, names: Iterable[str], *, stats: bool, affine: bool) -> Callable[[], None]:
    """Freeze the named layers; returns the function that gives them back what they had.

    Both parts together are Keras's own ``layer.trainable = False``. One part alone makes the layer, in place, a
    FrozenBatchNormalization. A compiled model need not be recompiled, nor the models nested in it; a model
    that was compiled around this one, and has trained already, cannot be seen from here: recompile it, or freeze it.

    Raises BntoolsError, before anything is changed, where one part of a subclass of BatchNormalization is asked for.
    """
    layers = norms(model)
    chosen = {name: layers[name] for name in names}
    parts = [part for part, wanted in zip(PARTS, (stats, affine), strict=True) if wanted]
    for name, layer in chosen.items():
        _check(name, layer, parts)
    for layer in chosen.values():
        _hold(layer, parts)
    follow(model)

    def undo() -> None:
        for layer in chosen.values():
            _let_go(layer, parts)
        follow(model)

    return undo


def unfreeze(model: keras.Model, names: Iterable[str]) -> None:
    """Let the named layers train again; a model that is not trainable itself becomes so, its other layers do not."""
    layers = norms(model)
    chosen = [layers[name] for name in names]
    if chosen and not model.trainable:
        _open(model)
    for layer in chosen:
        _held.pop(layer, None)
        _become(layer, None)
        layer.trainable = True
        for variable in _affine(layer):
            variable.trainable = True
    follow(model)


def _check(name: str, layer: Any, parts: list[str]) -> None:
    if len(parts) == 1 and type(layer) not in (STOCK, FrozenBatchNormalization):
        raise BntoolsError(
            f"layer {name!r} is a {type(layer).__name__}, whose statistics and affine parameters can only be frozen "
            f"together: only a keras.layers.BatchNormalization itself can keep one of the two. Freeze both, or leave "
            f"this layer out with layers="
        )


def _hold(layer: Any, parts: list[str]) -> None:
    held = _held.get(layer)
    if held is None:
        flags = [(variable, variable.trainable) for variable in _affine(layer)]
        held = _held[layer] = Held(getattr(layer, "frozen", None), layer.trainable, flags)
    held.holders.update(parts)
    _settle(layer, held)


def _let_go(layer: Any, parts: list[str]) -> None:
    held = _held.get(layer)
    if held is None:
        return  # unfreeze came first
    held.holders.subtract(parts)
    _settle(layer, held)
    if not any(held.holders.values()):
        del _held[layer]


def _settle(layer: Any, held: Held) -> None:
    """Make a layer what those who hold it ask for."""
    parts = {part for part in PARTS if held.holders[part] > 0}
    if parts and held.frozen is not None:
        parts.add(held.frozen)
    if len(parts) == len(PARTS):
        _become(layer, held.frozen)
        layer.trainable = False
        keep_affine(layer)  # a flag that has the value already may not be handed down to the variables
        return
    _become(layer, next(iter(parts), held.frozen))
    layer.trainable = held.trainable
    for variable, trained in held.affine:
        variable.trainable = trained and "affine" not in parts


def _become(layer: Any, frozen: str | None) -> None:
    """Turn a layer, in place, into one that freezes a part, or back into the stock class for None."""
    if frozen is None:
        if isinstance(layer, FrozenBatchNormalization):
            layer.__class__ = STOCK
            del layer.frozen
        return
    layer.__class__ = FrozenBatchNormalization
    layer.frozen = frozen
    if frozen == "affine":
        keep_affine(layer)


def _affine(layer: Any) -> list[Any]:
    return [variable for variable in (layer.gamma, layer.beta) if variable is not None]


def _open(model: keras.Model) -> None:
    """Make a model trainable that was not, but none of its layers: Keras hands the flag down to all."""
    layers = [(layer, layer.trainable) for layer in named(model).values()]
    variables = [(variable, variable.trainable) for variable in model.variables]
    model.trainable = True
    for thing, flag in (*layers, *variables):
        thing.trainable = flag
