"""Loading, saving and rewriting .onnx files: weights in external files stay there, whatever their size."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bntools import sniff
from bntools.backends.onnx.document import Document, opened
from bntools.backends.onnx.protobuf import external_files, read
from bntools.backends.onnx.storing import store
from bntools.datafiles import data_file
from bntools.errors import BntoolsError
from bntools.files import atomic_write


def load(path: str, arch: Any = None, allow: Sequence[str] = ()) -> tuple[Any, None]:
    """The model in a file: an onnx.ModelProto, or an onnx_ir.Model where weights lie in external files.

    The second is no origin: an ONNX file has one form. Nothing in an ONNX file is executed by loading, so ``allow``
    has nothing to admit. Raises BntoolsError where the file is no model, or ``arch`` is given.
    """
    document = working(path, arch)
    return (as_ir(document) if document.external else document.proto), None


def working(path: str | Path, arch: Any = None) -> Document:
    """The document of a file to change and save elsewhere: nothing goes back into the file itself.

    Raises BntoolsError where the file is no model, or ``arch`` is given.
    """
    path = Path(path)
    if arch is not None:
        raise BntoolsError(f"{path}: an ONNX file holds the whole model, which needs no arch=; leave it (--arch) out")
    try:
        proto = read(path)
    except BntoolsError as error:
        found = sniff.describe(path) if path.is_file() else ""
        if found and found != "bytes of no known kind":
            raise BntoolsError(f"{path}: found {found} where an ONNX model was expected") from error
        raise
    return Document(proto, path.resolve().parent, name=str(path))


def save(model: Any, path: str, temporary: Path, origin: Any, data: Path) -> None:
    """Write a model to ``temporary``, and the weights that are not to lie in it to ``data``.

    Where the file that is at ``path`` now keeps its weights in the same external files, they are not written again.
    Raises BntoolsError where weights cannot be read or the file cannot be written.
    """
    document = opened(model)
    target = Path(os.path.realpath(path))
    shared = document.folder == target.parent and target.is_file()
    store(document, temporary, data, kept=external_files(target) if shared else set())


def replace(document: Document) -> None:
    """Rewrite the file that a document was read from, in one step; its external weights stay where they are."""
    path = document.source
    with data_file(path, external_files) as data, atomic_write(path) as temporary:
        save(document, str(path), temporary, None, data)


def as_ir(document: Document) -> Any:
    """The model as an onnx_ir.Model, whose external weights stay in their files."""
    import onnx_ir as ir

    try:
        model = ir.from_proto(document.proto)
    except Exception as error:  # a graph that no checker has seen: it may raise anything
        raise BntoolsError(
            f"{document.name}: is no graph that onnx_ir can hold ({type(error).__name__}: {error}); "
            f"bntools takes the file by its path as it is"
        ) from error
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        ir.external_data.set_base_dir(graph, document.folder or "")
    model.meta["bntools.keep"] = document.keep  # a temporary folder of its weights lives as long as the model
    return model
