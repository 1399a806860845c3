"""Preprocessing of images by the functions of keras.applications, for models of any framework."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from bntools import backends


@cache
def find(name: str) -> Callable[[Any], np.ndarray]:
    """The function of this name. Raises BntoolsError where there is none, or Keras is not installed."""
    return backends.backend("keras").preprocessing(name)


def preprocessed(name: str, batch: np.ndarray) -> np.ndarray:
    """RGB images in 0..1 of shape (samples, 3, height, width) as the function leaves them, in float32.

    The functions take 0..255 with the channels last, whatever the model takes.
    """
    done = find(name)(np.moveaxis(batch * np.float32(255), 1, -1))
    return np.ascontiguousarray(np.moveaxis(done, -1, 1))
