"""Writing to .onnx files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx


def add_metadata(path: Path, entries: Mapping[str, str]) -> None:
    """Add metadata to a file without touching what it holds, whatever its size.

    The encoding of a protobuf message followed by that of another is the encoding of both merged
    (protobuf.dev/programming-guides/encoding, "Last One Wins"): what was verified stays byte for byte.
    """
    addition = onnx.ModelProto()
    onnx.helper.set_model_props(addition, dict(entries))
    with open(path, "ab") as file:
        file.write(addition.SerializeToString())
