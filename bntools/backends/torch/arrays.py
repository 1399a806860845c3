"""Tensors in files as numpy arrays: data for a model rather than a model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bntools.backends.torch import files, pickles
from bntools.backends.torch.running import to_numpy
from bntools.errors import BntoolsError


def arrays(path: str) -> np.ndarray | dict[str, np.ndarray]:
    """The data in a ``.pt`` or ``.safetensors`` file: one array, or several by name.

    Of a tuple or list the first tensor is the input. bfloat16 becomes float32.

    Raises BntoolsError where the file holds anything but tensors.
    """
    safe = Path(path).suffix.lower() == ".safetensors"
    content: Any = files.read_safetensors(path)[0] if safe else pickles.read(path)
    if isinstance(content, (tuple, list)) and content:
        content = content[0]
    pickles.check_tensors(path, content.values() if isinstance(content, Mapping) else [content])
    if pickles.is_plain(content):
        return to_numpy(content)
    if isinstance(content, Mapping) and content and all(map(pickles.is_plain, content.values())):
        named = {str(key): to_numpy(value) for key, value in content.items()}
        return next(iter(named.values())) if safe and len(named) == 1 else named
    kind = "a model" if isinstance(content, torch.nn.Module) else f"a {type(content).__name__}"
    raise BntoolsError(f"{path}: holds {kind} where data was expected: a tensor, a tuple of them, or a dict of them")
