"""Running an nn.Module on a batch, in eval mode, and leaving it as it was."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from bntools.alone import alone, check
from bntools.backends.torch.layers import parts, unwrap

Forward = Callable[[nn.Module, Any], Any]

_passes = threading.local()  # how many of bntools's own are under way in a thread


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode, without gradients; afterwards each has its own mode back.

    The flags are set one by one: ``model.eval()`` would also run ``train`` methods that do more,
    and ``train(was_training)`` afterwards would give all modules the mode of the outermost.

    Raises BntoolsError where bntools is at work on the model in another thread.
    """
    own = parts(model)
    check(own)
    # Threads that only run a model which is in eval mode anyway do each other no harm.
    with alone(own if any(module.training for module in model.modules()) else set()):
        before = [(module, module.training) for module in model.modules()]
        _passes.depth = getattr(_passes, "depth", 0) + 1
        try:
            for module, _ in before:
                module.training = False
            with torch.no_grad():
                yield
        finally:
            _passes.depth -= 1
            for module, training in before:
                module.training = training


def runs_for_bntools() -> bool:
    """Whether a model that runs in this thread does so for bntools, and not for its user."""
    return getattr(_passes, "depth", 0) > 0


def call(model: nn.Module, batch: Any, forward: Forward | None = None) -> Any:
    """Run the model on a batch: an array, a tuple or list (its first element), or a dict of keywords.

    Arrays are moved to the model's device, and floating ones take its dtype.
    """
    if forward is not None:
        return forward(model, batch)
    inputs = prepared(model, batch)
    return model(**inputs) if isinstance(inputs, dict) else model(inputs)


def prepared(model: nn.Module, batch: Any) -> Any:
    """What of the batch goes into the model: one input, or a dict of keyword inputs; arrays as tensors."""
    tensors = chain(model.parameters(), model.buffers())
    example = next((tensor for tensor in tensors if tensor.is_floating_point()), torch.empty(0))
    inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
    inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
    return pytree.tree_map(lambda value: _tensor(value, example), inputs)


def predict(model: nn.Module, batch: Any, forward: Forward | None = None) -> dict[str, np.ndarray]:
    """The model's outputs in eval mode by name, as numpy arrays (bfloat16 as float32).

    A nested output is flattened in order; its names are the paths into it, ``output`` alone if the
    model returns one tensor.
    """
    model = unwrap(model)
    with eval_mode(model):
        return named(call(model, batch, forward))


def named(outputs: Any) -> dict[str, np.ndarray]:
    """What a model gave, nested as it may be, as numpy arrays by their paths in it."""
    flat, _ = pytree.tree_flatten_with_path(outputs)
    return {"output" + pytree.keystr(path): to_numpy(value) for path, value in flat if isinstance(value, torch.Tensor)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """A copy of a tensor as numpy; bfloat16, which numpy lacks, as float32."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(force=True).copy()


def _tensor(value: Any, example: torch.Tensor) -> Any:
    """A copy, on the model's device: models that change their input in place would change the caller's data."""
    if isinstance(value, np.ndarray):
        value = torch.tensor(value)
    if not isinstance(value, torch.Tensor):
        return value
    dtype = example.dtype if value.is_floating_point() else value.dtype
    if example.is_cuda and value.device.type == "cpu" and value.layout is torch.strided and not value.is_pinned():
        # From pinned memory of its own, which nobody overwrites meanwhile, the copy waits for nothing that is queued.
        return value.to(dtype).pin_memory().to(example.device, non_blocking=True)
    return value.to(example.device, dtype, copy=True)
