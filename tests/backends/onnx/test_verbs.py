"""The verbs that do not serve ONNX models say so."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

import bntools
from bntools import BntoolsError, backends

EXAMPLE = np.ones((1, 1), np.float32)

VERBS = {
    "inspect": bntools.inspect,
    "freeze": bntools.freeze,
    "unfreeze": bntools.unfreeze,
    "assert_frozen": bntools.assert_frozen,
    "reset": bntools.reset,
    "recalibrate": lambda model: bntools.recalibrate(model, EXAMPLE),
    "fold": lambda model: bntools.fold(model, EXAMPLE),
    "export": lambda model: bntools.export(model, "never.onnx", EXAMPLE),
}


@pytest.mark.parametrize("verb", VERBS)
def test_verbs(verb):
    """Every verb but verify refuses an ONNX model with one message that names what serves it."""
    with pytest.raises(BntoolsError, match=r"this version serves bntools\.verify only"):
        VERBS[verb](onnx.ModelProto())


def test_other_names():
    """What no back end has is an ordinary missing attribute."""
    assert not hasattr(backends.backend("onnx"), "nonsense")
