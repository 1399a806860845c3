"""The Keras back end: keras.Model of Keras 3, on TensorFlow and, where they need nothing special, torch and JAX.

Looking at a ``.keras`` archive needs no framework: what imports Keras is imported from its home when it is
asked for.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

# Homes are called otherwise than their functions: a submodule is an attribute of its package as well.
_HOME = {
    "EXPORTERS": "shipping",
    "absorb": "surgery",
    "canonical": "feeding",
    "commit": "editing",
    "edit": "editing",
    "export": "shipping",
    "feed": "feeding",
    "free_memory": "memory",
    "freeze": "freezing",
    "graph": "describing",
    "handed": "editing",
    "input_channels": "inputs",
    "layers": "found",
    "load": "files",
    "measuring": "replica",
    "predict": "running",
    "reset": "editing",
    "runners": "tracing",
    "save": "files",
    "takes": "inputs",
    "unfreeze": "freezing",
    "write": "found",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
