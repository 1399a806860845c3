"""The Keras back end: keras.Model of Keras 3, on TensorFlow and on Keras's torch back end.

Looking at a ``.keras`` archive needs no framework: what imports Keras is imported from its home when it is
asked for.
"""

from __future__ import annotations

import os
import sys
from typing import Any

from bntools.backends import imported

# Homes are called otherwise than their functions: a submodule is an attribute of its package as well.
_HOME = {
    "EXPORTERS": "shipping",
    "absorb": "surgery",
    "canonical": "feeding",
    "commit": "editing",
    "counters": "found",
    "digest": "digests",
    "edit": "editing",
    "export": "shipping",
    "feed": "feeding",
    "free_memory": "memory",
    "freeze": "freezing",
    "graph": "describing",
    "handed": "editing",
    "input_channels": "inputs",
    "labels": "visible",
    "live": "switching",
    "load": "files",
    "measuring": "replica",
    "parts": "naming",
    "peek": "archive",
    "observer": "observing",
    "predict": "running",
    "preprocessing": "applications",
    "require_exporter": "shipping",
    "reset": "editing",
    "runners": "tracing",
    "save": "files",
    "takes": "inputs",
    "unfreeze": "freezing",
    "write": "found",
}

# Who has not set it wants no remarks of TensorFlow's about the machine between those of bntools.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")


def layers(model: Any) -> Any:
    """The records of all BN layers of a model, or of a file that was only looked into."""
    archive = sys.modules.get(f"{__name__}.archive")
    if archive is not None and isinstance(model, archive.Archive):
        return list(model.records)
    return imported(f"{__name__}.found", "keras").layers(model)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(imported(f"{__name__}.{_HOME[name]}", "keras"), name)
