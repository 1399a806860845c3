"""Writing a document to a file, tensor by tensor: memory holds one weight at a time beside the model."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from types import TracebackType
from typing import IO

import onnx
from google.protobuf.message import EncodeError

from bntools.backends.onnx.document import Document
from bntools.backends.onnx.protobuf import (
    DATA,
    Place,
    about_bytes,
    copied_without_initializers,
    copy_fields,
    is_external,
    location_of,
    place_of,
    tensors,
)
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
    if not moving and sum(about_bytes(one) for one in proto.graph.initializer if not is_external(one)) <= MOST:
        path.write_bytes(_encoded(proto, document.name))
        return
    new = copied_without_initializers(proto)
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
        if is_external(tensor) or not tensor.HasField("raw_data") or about_bytes(tensor) < SMALL:
            new.CopyFrom(tensor)
            self.move(new)
            return
        copy_fields(tensor, new, DATA)
        raw = tensor.raw_data
        offset = begin(self._file, len(raw))
        self._file.write(raw)
        refer(new, self._data.name, offset, len(raw))

    def move(self, tensor: onnx.TensorProto) -> None:
        """Let a tensor whose weights lie in another file refer to a copy of them in the data file."""
        if not is_external(tensor) or location_of(tensor) in self._kept:
            return
        name, document = tensor.name, self._document
        try:
            place = place_of(tensor, document.folder, document.name)
            key = str(place.path), place.offset, place.length
            if key not in self._moved:
                self._moved[key] = begin(self._file, place.length)
                copy(place, self._file)
        except (OSError, ValueError) as error:
            if getattr(error, "filename", None) in (None, str(self._data)) and isinstance(error, OSError):
                raise  # it is the file to be written that fails
            raise BntoolsError(f"{document.name}: the values of {name!r} cannot be read: {error}") from error
        refer(tensor, self._data.name, self._moved[key], place.length)


def begin(file: IO[bytes], length: int) -> int:
    """Go on to where a weight of so many bytes may begin in a data file; returns that place."""
    unit = PAGE if length >= LARGE else LINE
    file.write(bytes(-file.tell() % unit))
    return file.tell()


def copy(place: Place, file: IO[bytes]) -> None:
    """Write the values of an external tensor to a data file. Raises ValueError where their own ends too early."""
    left = place.length
    with open(place.path, "rb") as source:
        source.seek(place.offset)
        while left:
            chunk = source.read(min(left, CHUNK))
            if not chunk:
                raise ValueError(f"{place.path.name} ends {left} bytes too early")
            file.write(chunk)
            left -= len(chunk)


def refer(tensor: onnx.TensorProto, location: str, offset: int, length: int) -> None:
    """Let a tensor say that its values lie in a file."""
    del tensor.external_data[:]
    for key, value in (("location", location), ("offset", str(offset)), ("length", str(length))):
        tensor.external_data.add(key=key, value=value)
    tensor.data_location = onnx.TensorProto.EXTERNAL


def _encoded(proto: onnx.ModelProto, name: str) -> bytes:
    try:
        return proto.SerializeToString()
    except (EncodeError, ValueError) as error:
        raise BntoolsError(f"{name}: holds more beside its weights than the 2 GB of a protobuf message") from error
