"""Models that are compiled already: what training then does follows the flags of their layers.

Keras has no public function by which an optimizer that was built gets to know more variables: this reaches inside it.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any

import keras

from bntools.backends.keras.naming import named


def follow(model: keras.Model) -> None:
    """Let ``fit`` of a model, and of those nested in it, do what the layers' flags say now, without recompiling.

    The step that ``fit`` traced is made anew, in the middle of ``fit`` too. An optimizer that was built while
    variables were frozen gets to know them; its state for all others stays.
    """
    for one in (model, *named(model).values()):
        if not isinstance(one, keras.Model):
            continue
        strategy = getattr(one, "distribute_strategy", None)
        with nullcontext() if strategy is None else strategy.scope():  # new variables have to be made in it
            optimizer = getattr(one, "optimizer", None)
            _warn_on_jax(one, optimizer)
            if getattr(optimizer, "built", False):
                _introduce(optimizer, one.trainable_variables)
            if getattr(one, "train_function", None) is not None:
                one.make_train_function(force=True)


def _warn_on_jax(model: Any, optimizer: Any) -> None:
    """On JAX, ``fit`` refuses an optimizer that knows other variables than those that train now."""
    if keras.backend.backend() != "jax" or not getattr(optimizer, "built", False):
        return
    if {id(v) for v in optimizer._trainable_variables} != {id(v) for v in model.trainable_variables}:
        warnings.warn(
            f"the optimizer of the model {model.name!r} was built for other variables than train now, which Keras's "
            f"JAX back end refuses in fit: call model.compile again before it",
            stacklevel=2,
        )


def _introduce(optimizer: Any, variables: list[Any]) -> None:
    """Build an optimizer for these variables too: Keras refuses any that it was not built with."""
    known = list(optimizer._trainable_variables)
    wanted = {id(variable) for variable in variables}
    if hasattr(optimizer, "_inner_optimizers") or wanted <= {id(variable) for variable in known}:
        return
    everything = [*variables, *(variable for variable in known if id(variable) not in wanted)]
    if hasattr(optimizer, "inner_optimizer"):
        rebuild(optimizer.inner_optimizer, everything)
    rebuild(optimizer, everything)


def rebuild(optimizer: Any, variables: list[Any]) -> None:
    """Build an optimizer anew, in place; what it held for a variable, and by itself, it holds again."""
    held = _slots(optimizer)
    own = {name: value for name, value in vars(optimizer).items() if isinstance(value, keras.Variable)}
    optimizer._variables[:] = [optimizer._iterations, *_rate(optimizer)]
    optimizer._trainable_variables_indices.clear()
    optimizer.built = False
    optimizer.build(variables)
    for name, slots in _slots(optimizer).items():
        before = held.get(name, {})
        for key, (variable, slot) in slots.items():
            if key in before:
                slot.assign(before[key][1])
            elif name == "_model_variables_moving_average":  # else the average would begin at zero
                slot.assign(variable)
    for name, value in own.items():
        getattr(optimizer, name).assign(value)


def _slots(optimizer: Any) -> dict[str, dict[int, tuple[Any, Any]]]:
    """What an optimizer holds for each variable: attribute -> id of the variable -> it and the optimizer's own."""
    variables = optimizer._trainable_variables
    found = {}
    for name, value in vars(optimizer).items():
        if (
            name in ("_variables", "_trainable_variables")
            or not isinstance(value, list)
            or len(value) != len(variables)
        ):
            continue
        slots = {id(v): (v, slot) for v, slot in zip(variables, value, strict=True)}
        found[name] = {key: pair for key, pair in slots.items() if isinstance(pair[1], keras.Variable)}
    return found


def _rate(optimizer: Any) -> list[Any]:
    """The learning rate, where it is a variable and not a schedule."""
    rate = optimizer._learning_rate
    return [rate] if isinstance(rate, keras.Variable) else []
