"""Where an nn.Module computes: a double of it on another device, and autocast there."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn

from bntools.backends.torch import exported
from bntools.errors import BntoolsError


def double(model: nn.Module, device: str | None) -> tuple[nn.Module, str]:
    """The model on a device and the device's name: a copy of it, or the model itself where it is there already.

    None stands for the GPU that CUDA has current, or for where the model is if there is no such GPU.
    """
    own = next((str(tensor.device) for tensor in (*model.parameters(), *model.buffers())), "cpu")
    bound = exported.is_exported(model)  # what a graph creates on the way, it creates on the device of its export
    if device is None:
        device = f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() and not bound else own
    name = _checked(device)
    if name == own:
        return model, name
    if bound:
        raise BntoolsError(
            f"found device {name!r} for a program that torch.export made: it computes on {own}, on which it was made"
        )
    try:
        return copy.deepcopy(model).to(name), name
    except Exception as error:  # out of memory; float64, which MPS does not know; a model that cannot be copied
        raise BntoolsError(f"the model cannot be moved to {name}: {str(error).splitlines()[0]}") from error


@contextmanager
def autocast(device: str, dtype: str) -> Iterator[None]:
    """Compute in this dtype where PyTorch holds that to be safe, as a deployment under autocast does."""
    kind = torch.device(device).type
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PyTorch warns of a dtype that it does not know there, and goes on without
        try:
            cast = torch.autocast(kind, dtype=getattr(torch, dtype))
        except (RuntimeError, UserWarning) as error:
            raise BntoolsError(f"autocast to {dtype} on {device}: {str(error).splitlines()[0]}") from error
    with cast:
        yield


def precision(model: nn.Module) -> str | None:
    """The dtype of torch.autocast where the model is; None where it is off."""
    kind = next((tensor.device.type for tensor in chain(model.parameters(), model.buffers())), "cpu")
    return str(torch.get_autocast_dtype(kind)).removeprefix("torch.") if torch.is_autocast_enabled(kind) else None


def _checked(device: str) -> str:
    try:
        there = torch.zeros(1, device=device)
        float(there)  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise BntoolsError(
            f"found device {device!r}, on which this PyTorch ({torch.__version__}) cannot compute here: expected one "
            f"of {', '.join(_devices())}"
        ) from error
    return str(there.device)


def _devices() -> list[str]:
    gpus = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    return ["cpu", *gpus, *(["mps"] if torch.backends.mps.is_available() else [])]
