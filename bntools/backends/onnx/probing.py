"""What one run of a graph tells about its values: their shapes, and what parameters that are computed come to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import onnx
import onnxruntime as ort

from bntools.backends.onnx.document import STANDARD, Document
from bntools.backends.onnx.running import feed
from bntools.backends.onnx.session import computed, open_session
from bntools.backends.onnx.subject import content_of
from bntools.backends.onnx.valuetypes import value_types
from bntools.errors import BntoolsError

# What else than data these operators read: small integers that an exporter may have left to be computed.
PARAMETERS = ("Pad", "Slice", "Resize", "Upsample", "ReduceMean", "ReduceMax", "Split", "Dropout")
PREFIX = "bntools_shape_of_"


@dataclass(frozen=True, eq=False)
class Probe:
    """A session that computes shapes (``shapes``: by output name, the value) and parameters of a graph."""

    session: ort.InferenceSession
    shapes: Mapping[str, str]
    parameters: Sequence[str]


# One session serves every size of the example; it holds the weights, so that ``forget`` ends it.
_PROBES: WeakKeyDictionary[Document, Probe] = WeakKeyDictionary()


def probe(document: Document, example: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, np.ndarray]]:
    """The shape of every tensor that the main graph takes or computes, and the values of computed parameters.

    Every operator runs as it stands in the file, and only shapes are handed out. Raises BntoolsError for an
    example that the model does not take, or a model that ONNX Runtime does not run.
    """
    if document not in _PROBES:
        _PROBES[document] = _opened(document)
    found = _PROBES[document]
    names = [*found.shapes, *found.parameters]
    inputs = feed(found.session.get_inputs(), example, document.name)
    results = computed(found.session, names, inputs, document.name)
    shapes = {value: tuple(map(int, results[name])) for name, value in found.shapes.items()}
    shapes |= {name: array.shape for name, array in inputs.items()}
    return shapes, {name: np.asarray(results[name]) for name in found.parameters}


def forget(document: Document) -> None:
    """End the session that serves ``probe``."""
    _PROBES.pop(document, None)


def _opened(document: Document) -> Probe:
    types = value_types(document)
    parameters = list(_parameters(document, types))
    computed = [
        output
        for node in document.proto.graph.node
        for output in node.output
        if output and node.op_type != "Constant" and types.get(output, 0) is not None
    ]
    try:
        return _session(document, computed, parameters)
    except BntoolsError:
        known = [name for name in computed if name in types]
        if known == computed:
            raise
        # A value whose type nothing tells may be no tensor, of which there is no shape.
        return _session(document, known, parameters)


def _session(document: Document, values: Sequence[str], parameters: Sequence[str]) -> Probe:
    """A session on the model with a Shape node for each of the values.

    The encoding of a message followed by that of another is the encoding of both merged, so that
    nothing of the model need be copied for what is added to it.
    """
    addition = onnx.ModelProto()
    shapes = {f"{PREFIX}{i}": value for i, value in enumerate(values)}
    for output, value in shapes.items():
        addition.graph.node.append(onnx.helper.make_node("Shape", [value], [output]))
        addition.graph.output.append(onnx.helper.make_tensor_value_info(output, onnx.TensorProto.INT64, None))
    known = {one.name for one in document.proto.graph.output}
    addition.graph.output.extend(onnx.ValueInfoProto(name=name) for name in parameters if name not in known)
    if not any(one.domain in STANDARD for one in document.proto.opset_import):
        addition.opset_import.append(onnx.helper.make_opsetid("", 13))
    source = content_of(document) + addition.SerializeToString()
    session = open_session(source, document.name, ("cpu",), optimize=False, folder=document.folder)
    return Probe(session, shapes, parameters)


def _parameters(document: Document, types: Mapping[str, int | None]) -> Iterator[str]:
    names = dict.fromkeys(
        name for node in document.proto.graph.node if node.op_type in PARAMETERS for name in node.input[1:] if name
    )
    computed = document.producers.keys() | document.inputs
    yield from (name for name in names if name in computed and types.get(name) and name not in document.constants)
