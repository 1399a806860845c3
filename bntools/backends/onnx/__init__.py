"""The ONNX back end: onnx.ModelProto, onnx_ir.Model and .onnx files, run by ONNX Runtime.

Looking at a file needs neither ONNX Runtime nor onnx_ir, which take their time to import: what needs them is
imported from its home when it is asked for.
"""

from __future__ import annotations

from typing import Any

from bntools.backends import imported
from bntools.backends.onnx.document import opened
from bntools.backends.onnx.editing import commit, edit, handed, parts, reset, write
from bntools.backends.onnx.layers import layers
from bntools.backends.onnx.protobuf import check, external_files

__all__ = ["check", "commit", "edit", "external_files", "handed", "layers", "opened", "parts", "reset", "write"]

# Homes are called otherwise than their functions: a submodule is an attribute of its package as well.
_HOME = {
    "EXPORTERS": "shipping",
    "absence": "absent",
    "absorb": "surgery",
    "check_inference": "inference",
    "digest": "digests",
    "add_metadata": "writing",
    "export": "shipping",
    "free_memory": "memory",
    "graph": "describing",
    "input_channels": "inputs",
    "load": "files",
    "measuring": "replica",
    "predict": "running",
    "refuse_freezing": "freezing",
    "require": "session",
    "runners": "running",
    "save": "files",
    "takes": "inputs",
    "tidy": "tidying",
    "to_inference": "inference",
    "working": "files",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(imported(f"{__name__}.{_HOME[name]}", "onnx"), name)
