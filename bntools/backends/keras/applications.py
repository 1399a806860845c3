"""The preprocessing functions of keras.applications, by the names of their modules."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import keras
import numpy as np

from bntools.errors import BntoolsError


def preprocessing(name: str) -> Callable[[np.ndarray], np.ndarray]:
    """What ``keras.applications.NAME.preprocess_input`` does to images: float32, 0..255, (samples, h, w, 3), RGB.

    The function leaves its argument as it is. Raises BntoolsError for a name that Keras does not have.
    """
    known = {key: value for key, value in vars(keras.applications).items() if _preprocesses(value)}
    if name not in known:
        raise BntoolsError(f"preprocess={name!r}: keras.applications has no such module; it has {', '.join(known)}")
    given = known[name].preprocess_input

    def applied(images: np.ndarray) -> np.ndarray:
        return np.asarray(given(np.array(images, dtype=np.float32), data_format="channels_last"), dtype=np.float32)

    return applied


def _preprocesses(value: Any) -> bool:
    general = value is keras.applications.imagenet_utils  # asks for a mode instead of a model
    return isinstance(value, ModuleType) and hasattr(value, "preprocess_input") and not general
