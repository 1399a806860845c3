"""External weights of a model in the making: one file in a temporary folder, written tensor by tensor."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from pathlib import Path

import numpy as np
import onnx

from bntools.backends.onnx.document import Document
from bntools.backends.onnx.protobuf import is_external, location_of, place_of, tensors
from bntools.backends.onnx.storing import SMALL, begin, copy, refer
from bntools.errors import BntoolsError

NAME = "weights.data"


class Folder:
    """A temporary folder that goes with the last model that needs it, without TemporaryDirectory's warning."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="bntools-")).resolve()
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


class WeightFile:
    """Takes the new weights first, then whatever else of the source's external weights the new model still names."""

    def __init__(self, source: Document):
        self._source = source
        self._folder = Folder()
        self._path = self._folder.path / NAME
        self._file = open(self._path, "wb")  # noqa: SIM115 - close() closes it

    def write(self, tensor: onnx.TensorProto, values: np.ndarray) -> bool:
        """Write the values and let the tensor say where; False for a tensor that is small enough to hold them."""
        if values.nbytes < SMALL:
            return False
        self._begin(tensor, values.nbytes)
        self._file.write(raw(values))
        return True

    def take_over(self, model: onnx.ModelProto) -> None:
        """Copy what the tensors of a model have in the source's files into this one."""
        external = [tensor for tensor in tensors(model) if is_external(tensor)]
        for tensor in external:
            if location_of(tensor) != str(self._path):
                self._move(tensor)
        for tensor in external:
            next(entry for entry in tensor.external_data if entry.key == "location").value = NAME

    def close(self) -> tuple[Path, Folder]:
        """The folder of the file, and what it lives as long as."""
        self._file.close()
        return self._path.parent, self._folder

    def _move(self, tensor: onnx.TensorProto) -> None:
        try:
            place = place_of(tensor, self._source.folder, self._source.name)
            self._begin(tensor, place.length)
            copy(place, self._file)
        except ValueError as error:
            raise BntoolsError(f"{self._source.name}: the values of {tensor.name!r} cannot be read: {error}") from error

    def _begin(self, tensor: onnx.TensorProto, length: int) -> None:
        # The whole path, until all is written: it tells new places from old ones.
        refer(tensor, str(self._path), begin(self._file, length), length)


def raw(values: np.ndarray) -> memoryview:
    """The bytes of an array, not copied where they lie in order."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
