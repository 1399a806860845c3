"""Export of a model that is ONNX already: the same graph, in another opset where one is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
from onnx import version_converter

from bntools.backends.onnx.document import Document, opened
from bntools.backends.onnx.storing import store
from bntools.errors import BntoolsError
from bntools.noise import brief

EXPORTERS = ("onnx",)
OWN = "bntools."  # what an earlier export said of itself


def export(model: Any, path: Path, data_name: str, opset: int | None = None) -> None:
    """Write a model to ``path``, weights that are external to a file ``data_name`` beside it; the model stays as it is.

    Nothing but the opset is changed, and that only where it is another: metadata, functions and names
    survive. Raises BntoolsError where the model cannot be converted to that opset.
    """
    document = opened(model)
    proto = document.proto
    if opset is not None and opset != document.opset:
        proto = _converted(document, opset)
    if any(entry.key.startswith(OWN) for entry in proto.metadata_props):
        proto = _without_own_metadata(proto)
    store(Document(proto, document.folder, name=document.name), path, path.with_name(data_name))


def _converted(document: Document, opset: int) -> onnx.ModelProto:
    try:
        new = version_converter.convert_version(document.proto, opset)
    except Exception as error:  # the converter is C++, whose errors share no base class
        raise BntoolsError(
            f"{document.name} cannot be converted from opset {document.opset} to opset {opset}: {brief(error)}"
        ) from error
    # The converter drops functions, which say themselves in which opsets they are written, and what the
    # graph and its nodes say about themselves: the names of the source's modules, for one.
    new.functions.extend(document.proto.functions)
    new.graph.metadata_props.extend(document.proto.graph.metadata_props)
    for node in new.graph.node:
        old = document.producers.get(node.output[0]) if node.output else None
        if old is not None and old.op_type == node.op_type and not node.metadata_props:
            node.metadata_props.extend(old.metadata_props)
    return new


def _without_own_metadata(proto: onnx.ModelProto) -> onnx.ModelProto:
    new = onnx.ModelProto()
    new.CopyFrom(proto)
    del new.metadata_props[:]
    new.metadata_props.extend(entry for entry in proto.metadata_props if not entry.key.startswith(OWN))
    return new
