"""freeze, unfreeze and assert_frozen: what does not apply to an ONNX model."""

from __future__ import annotations

from typing import NoReturn

from bntools.errors import BntoolsError


def refuse_freezing() -> NoReturn:
    """Raise the BntoolsError that says why."""
    raise BntoolsError(
        "an ONNX model does not train: its BN statistics, scale and shift are constants, which nothing moves. "
        "There is nothing to freeze; freeze the framework's own model where it is trained"
    )
