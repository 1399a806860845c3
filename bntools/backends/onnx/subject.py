"""What of a model ONNX Runtime gets: its file, or its message as bytes, without needless copies of weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import EncodeError

from bntools.backends.onnx.document import Document, opened
from bntools.backends.onnx.protobuf import about_bytes, serialized
from bntools.errors import BntoolsError
from bntools.runner import least_precise

LARGE = 512 * 2**20  # bytes of weights from which on no two copies of a model are held in memory
FLOATS = {"float": "float32", "double": "float64"}


@dataclass(frozen=True)
class Subject:
    """A model to be run.

    ``source()`` is what a session is opened on: a file, by its path, or the bytes of a message, whose external
    weights lie in ``folder``. ``content()`` is always bytes, with external weights in ``content_folder``; ``proto()``
    the message. ``dtype`` is the least precise floating dtype of weights, inputs and outputs. ``large`` says
    whether memory matters.
    """

    name: str
    dtype: str
    large: bool
    source: Callable[[], str | bytes]
    folder: Path | None
    content: Callable[[], bytes]
    content_folder: Path | None
    proto: Callable[[], onnx.ModelProto]


def subject(model: Any) -> Subject:
    """A model in any of its forms, to be run as it is now. A path is read, checked and let go again."""
    document = opened(model)
    name, dtype, large = document.name, _least_precise(document.proto), weight_bytes(document.proto) > LARGE
    if isinstance(model, (str, Path)):
        path, beside = Path(model), document.folder
        return Subject(name, dtype, large, lambda: str(path), None, path.read_bytes, beside, lambda: opened(path).proto)

    def content() -> bytes:
        return content_of(document)

    return Subject(name, dtype, large, content, document.folder, content, document.folder, lambda: document.proto)


def content_of(document: Document) -> bytes:
    """The message of a document as bytes; its external weights, if any, stay in its folder."""
    if document.folder is None:
        return serialized(document.proto)
    try:
        return document.proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise BntoolsError(
            f"{document.name} holds more than the 2 GB that protobuf can hold: save it with external data "
            f"(bntools.save) and pass the path"
        ) from error


def weight_bytes(model: onnx.ModelProto) -> int:
    """How many bytes the initializers of a model take, wherever they lie."""
    total = 0
    for tensor in model.graph.initializer:
        lengths = [entry.value for entry in tensor.external_data if entry.key == "length"]
        total += int(lengths[0]) if lengths and lengths[0].isdigit() else about_bytes(tensor)
    return total


def _least_precise(proto: onnx.ModelProto) -> str:
    types = {tensor.data_type for tensor in proto.graph.initializer}
    types |= {value.type.tensor_type.elem_type for value in (*proto.graph.input, *proto.graph.output)}
    names = {name.lower() for name, number in onnx.TensorProto.DataType.items() if number in types}
    return least_precise({FLOATS.get(name, name) for name in names})
