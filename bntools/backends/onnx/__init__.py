"""The ONNX back end: onnx.ModelProto and .onnx files, run by ONNX Runtime."""

from typing import Any

from bntools.backends.onnx.protobuf import check, external_files
from bntools.backends.onnx.running import predict, runners
from bntools.backends.onnx.session import require
from bntools.backends.onnx.tidying import tidy
from bntools.backends.onnx.writing import add_metadata
from bntools.errors import BntoolsError

__all__ = ["add_metadata", "check", "external_files", "predict", "require", "runners", "tidy"]

# What the verbs that change a model, or look at its layers, ask a back end for.
_MISSING = ("EXPORTERS", "absorb", "export", "freeze", "graph", "layers", "measuring", "reset", "unfreeze", "write")


def __getattr__(name: str) -> Any:
    if name in _MISSING:
        raise BntoolsError(
            "found an ONNX model: of ONNX models this version serves bntools.verify only, and bntools.export writes "
            "them; for anything else take the model that the file was exported from"
        )
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
