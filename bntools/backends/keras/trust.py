"""Which classes and functions a model's config names, and which of them may be used.

Keras's own safe mode stays on. What it would look up is looked at first, so that one error names all that is not
admitted, and nothing is imported that nobody named. Python bytecode, as a Lambda layer of a ``lambda`` holds it, is
never run.
"""

from __future__ import annotations

import math
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras

from bntools import imports
from bntools.backends.keras.looking import RATIO, SLACK
from bntools.errors import BntoolsError

OWN = "bntools.backends.keras"
NO_PARTS = ("keras.utils", "keras.saving", "keras.config", "keras.datasets", "keras.src")  # functions of no model
NAMESPACES = (
    keras.layers,
    keras.models,
    keras.activations,
    keras.initializers,
    keras.regularizers,
    keras.constraints,
    keras.losses,
    keras.metrics,
    keras.optimizers,
    keras.ops,
)
LEGACY = ("Functional", "Model")  # names of classes in files of Keras 2 that have no public place in Keras 3


@dataclass(frozen=True)
class Named:
    """An object that a config names: where (the layer), its module ("" if it does not say), name and registration."""

    owner: str
    module: str
    name: str
    registered: str
    function: bool

    def __str__(self) -> str:
        inside = f" (in {self.owner!r})" if self.owner and self.owner != self.name else ""
        module = "" if self.module in ("", "builtins") else f"{self.module}."
        return f"the {'function' if self.function else 'class'} {module}{self.name}{inside}"


def admitted(path: str, configs: Sequence[Any], allow: Sequence[str]) -> dict[str, Any]:
    """The objects that a model's configs need besides Keras's, by the names under which Keras looks them up.

    Those count that the process has registered with Keras, and those of packages in ``allow``. Raises
    BntoolsError naming all others, and for bytecode.
    """
    try:
        found = list(dict.fromkeys(named for config in configs for named in _named(path, config, "")))
    except RecursionError as error:
        raise BntoolsError(f"{path}: damaged: its config is nested deeper than any model's") from error
    custom: dict[str, Any] = {}
    strangers = []
    for one in (each for each in found if _is_foreign(path, each)):
        value = _resolved(path, one, allow)
        if value is None:
            strangers.append(one)
        else:
            custom |= {one.registered: value, one.name: value}
    if strangers:
        raise BntoolsError(_not_admitted(path, strangers, allow))
    return custom


@contextmanager
def sized(path: str, stored: int) -> Iterator[None]:
    """Refuse layers whose variables are far larger than the file from which the model is built in the block.

    A config of a few bytes can ask for any number of units. ``stored`` is the size of the file in bytes. Raises
    BntoolsError, before Keras allocates anything.
    """
    thread, add, claimed = threading.get_ident(), keras.Layer.add_weight, 0

    def counted(layer: Any, *args: Any, **options: Any) -> Any:
        nonlocal claimed
        shape = args[0] if args else options.get("shape")
        if threading.get_ident() == thread and isinstance(shape, (tuple, list)) and all(map(_is_size, shape)):
            claimed += 4 * math.prod(shape)
            if claimed > RATIO * stored + SLACK:
                raise BntoolsError(
                    f"{path}: layer {layer.name!r} asks for variables of {tuple(shape)}, and the file has {stored:,} "
                    f"bytes: not loaded"
                )
        return add(layer, *args, **options)

    keras.Layer.add_weight = counted
    try:
        yield
    finally:
        keras.Layer.add_weight = add


def _is_size(value: Any) -> bool:
    return isinstance(value, int)


def _named(path: str, value: Any, owner: str) -> Iterator[Named]:
    if isinstance(value, (list, tuple)):
        for each in value:
            yield from _named(path, each, owner)
    if not isinstance(value, dict):
        return
    kind, config = value.get("class_name"), value.get("config")
    if isinstance(kind, str) and "config" in value:
        name = config.get("name") if isinstance(config, dict) else None
        owner = name if isinstance(name, str) and kind != "__keras_tensor__" else owner
        if _is_bytecode(kind, config):
            raise BntoolsError(
                f"{path}: not loaded, because its layer {owner!r} holds Python bytecode (a Lambda of a lambda), which "
                f"bntools never runs, whatever --allow says: replace it by layers, keras.ops, or a function with "
                f"@keras.saving.register_keras_serializable(), and save the model again"
            )
        yield from _object(value, kind, config, owner)
    for each in value.values():
        yield from _named(path, each, owner)


def _is_bytecode(kind: str, config: Any) -> bool:
    if kind != "Lambda" or not isinstance(config, dict):
        return kind == "__lambda__"
    legacy = [config.get(f"{part}_type") for part in ("function", "output_shape", "mask")]
    return isinstance(config.get("function"), list) or "lambda" in legacy


def _object(value: dict[str, Any], kind: str, config: Any, owner: str) -> Iterator[Named]:
    if kind.startswith("__") and kind != "__typespec__":
        return
    module, registered = value.get("module") or "", value.get("registered_name") or ""
    function = kind == "function"
    name = config if function else kind
    if function or module or (isinstance(config, dict) and "name" in config and "trainable" in config):
        yield Named(owner, str(module), str(name), str(registered or name), function)


def _is_foreign(path: str, one: Named) -> bool:
    """Whether an object is none of Keras's own, under its module or, in legacy files, by its name alone."""
    if one.module in ("", "builtins"):
        return ">" in one.registered or not (one.name in LEGACY or any(hasattr(m, one.name) for m in NAMESPACES))
    if one.module.partition(".")[0] != "keras":
        return True
    if one.function and _within(one.module, NO_PARTS):
        raise BntoolsError(f"{path}: not loaded, because it holds {one}, which is no part of any model")
    return False


def _resolved(path: str, one: Named, allow: Sequence[str]) -> Any:
    """The object, if the process has registered it or a package in ``allow`` has it; else None."""
    if (value := _registered(one)) is not None:
        return value
    if _within(one.module, (OWN,)):
        return getattr(imports.installed(one.module, f"{path}: {one}"), one.name, None)
    places = [one.module] if _within(one.module, allow) else []
    for place in places or allow:
        module = imports.imported(place, f"{path}: {one}" if places else f"allow {place!r}")
        if (value := _registered(one)) is not None:
            return value
        value = getattr(module, one.name.rpartition(">")[2], None)
        if _admissible(one, value, allow):
            return value
    if places:
        raise BntoolsError(
            f"{path}: needs {one}, which {one.module} as installed here does not have: install the version the file "
            f"was written with"
        )
    return None


def _registered(one: Named) -> Any:
    found = keras.saving.get_registered_object(one.registered)
    return found if found is not None or not one.function else keras.saving.get_registered_object(one.name)


def _admissible(one: Named, value: Any, allow: Sequence[str]) -> bool:
    if not _within(getattr(value, "__module__", None) or "", allow):
        return False
    if one.function:
        return isinstance(value, types.FunctionType)
    return isinstance(value, type) and hasattr(value, "from_config")


def _not_admitted(path: str, strangers: Sequence[Named], allow: Sequence[str]) -> str:
    modules = [one.module.partition(".")[0] for one in strangers if one.module not in ("", "builtins", "__main__")]
    packages = list(dict.fromkeys(modules)) or ["PACKAGE"]
    script = " (__main__ is the script that saved it)" if any(one.module == "__main__" for one in strangers) else ""
    tried = f"; {', '.join(allow)} has none of that name" if allow and not modules else ""
    listed = ", ".join(map(str, strangers[:5])) + (f" and {len(strangers) - 5} more" if len(strangers) > 5 else "")
    return (
        f"{path}: not loaded, because it holds {listed}{script}, not admitted{tried}. If you trust what you have "
        f"installed under that name, pass allow=({', '.join(map(repr, packages))},) "
        f"(--allow {' --allow '.join(packages)}), the package that defines it"
    )


def _within(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)
