"""Writing a document to a file, tensor by tensor: memory holds one weight at a time beside the model."""

from __future__ import annotations

import math
from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO

import onnx
from google.protobuf.message import EncodeError

from bntools.backends.onnx.document import Document
from bntools.backends.onnx.protobuf import is_external, location_of, place_of, tensors
from bntools.datafiles import flush
from bntools.errors import BntoolsError

SMALL = 1024  # bytes: what is smaller stays in the file beside external weights, as in onnx.save
LARGE = 1 << 20  # a weight from here on begins on a page of memory, so that it can be mapped
PAGE, LINE = 4096, 64
MOST = 1_900_000_000  # bytes in a message; protobuf holds at most 2 GiB
CHUNK = 16 << 20


def store(document: Document, path: Path, data: Path, kept: Collection[str] = ()) -> None:
    """Write the message to ``path``; weights from external files, and all where they fit no message, go to ``data``.

    External files in ``kept`` are referred to where they are. The document stays as it is.
    Raises BntoolsError where a weight cannot be read, OSError where a file cannot be written.
    """
    proto = document.proto
    moving = any(is_external(one) and location_of(one) not in kept for one in tensors(proto))
    if not moving and sum(map(_inside, proto.graph.initializer)) <= MOST:
        path.write_bytes(_encoded(proto, document.name))
        return
    new = _without_initializers(proto)
    with _Writer(document, data, kept) as writer:
        for tensor in tensors(new):
            writer.move(tensor)
        for tensor in proto.graph.initializer:
            writer.add(tensor, new.graph.initializer.add())
    flush(data)
    path.write_bytes(_encoded(new, document.name))


class _Writer:
    """The file to which weights go, one after the other."""

    def __init__(self, document: Document, data: Path, kept: Collection[str]):
        self._document = document
        self._data = data
        self._kept = kept
        self._file: IO[bytes]
        self._moved: dict[tuple[str, int, int], int] = {}  # weights that several tensors share are written once

    def __enter__(self) -> _Writer:
        self._file = open(self._data, "xb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, tensor: onnx.TensorProto, new: onnx.TensorProto) -> None:
        """Make a copy of a tensor whose weights lie in the data file if they are many or lay in a file before."""
        if is_external(tensor) or not tensor.HasField("raw_data") or _inside(tensor) < SMALL:
            new.CopyFrom(tensor)
            self.move(new)
            return
        for field, value in tensor.ListFields():
            if field.name in ("name", "data_type", "doc_string"):
                setattr(new, field.name, value)
            elif field.name in ("dims", "metadata_props"):
                getattr(new, field.name).extend(value)
        raw = tensor.raw_data
        offset = self._begin(len(raw))
        self._file.write(raw)
        self._refer(new, offset, len(raw))

    def move(self, tensor: onnx.TensorProto) -> None:
        """Let a tensor whose weights lie in another file refer to a copy of them in the data file."""
        if not is_external(tensor) or location_of(tensor) in self._kept:
            return
        name, document = tensor.name, self._document
        try:
            place = place_of(tensor, document.folder, document.name)
            key = str(place.path), place.offset, place.length
            if key not in self._moved:
                self._moved[key] = self._begin(place.length)
                self._copy(place.path, place.offset, place.length)
        except (OSError, ValueError) as error:
            if getattr(error, "filename", None) in (None, str(self._data)) and isinstance(error, OSError):
                raise  # it is the file to be written that fails
            raise BntoolsError(f"{document.name}: the values of {name!r} cannot be read: {error}") from error
        self._refer(tensor, self._moved[key], place.length)

    def _begin(self, length: int) -> int:
        unit = PAGE if length >= LARGE else LINE
        self._file.write(bytes(-self._file.tell() % unit))
        return self._file.tell()

    def _copy(self, path: Path, offset: int, length: int) -> None:
        with open(path, "rb") as source:
            source.seek(offset)
            while length:
                chunk = source.read(min(length, CHUNK))
                if not chunk:
                    raise ValueError(f"{path.name} ends {length} bytes too early")
                self._file.write(chunk)
                length -= len(chunk)

    def _refer(self, tensor: onnx.TensorProto, offset: int, length: int) -> None:
        del tensor.external_data[:]
        for key, value in (("location", self._data.name), ("offset", str(offset)), ("length", str(length))):
            tensor.external_data.add(key=key, value=value)
        tensor.data_location = onnx.TensorProto.EXTERNAL


def _without_initializers(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of all that is in a model but the weights of its main graph."""
    new = onnx.ModelProto()
    for field, value in proto.ListFields():
        if field.name == "graph":
            for inner, part in value.ListFields():
                if inner.name != "initializer":
                    _put(new.graph, inner.name, part)
        else:
            _put(new, field.name, value)
    return new


def _put(message: onnx.ModelProto | onnx.GraphProto, name: str, value: object) -> None:
    if isinstance(value, (str, int, bytes)):
        setattr(message, name, value)
    else:
        getattr(message, name).MergeFrom(value)


def _inside(tensor: onnx.TensorProto) -> int:
    """About how many bytes the values of a tensor take in the message."""
    if is_external(tensor):
        return 0
    try:
        return math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
    except KeyError:  # a type that this version of onnx does not know
        return math.prod(tensor.dims) * 8


def _encoded(proto: onnx.ModelProto, name: str) -> bytes:
    try:
        return proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise BntoolsError(f"{name}: holds more beside its weights than the 2 GB of a protobuf message") from error
