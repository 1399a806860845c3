"""What PyTorch keeps per thread, and a model per forward pass: set aside while a replica waits."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn, overrides

_OWN = frozenset(vars(nn.Module())) - {"training"}  # what every nn.Module has: hooks, parameters, children

State = list[tuple[nn.Module, dict[str, Any], dict[str, Any]]]


@dataclass(frozen=True)
class Ambient:
    """What code can switch around a layer: grad mode, inference mode, autocast, default dtype, function modes."""

    grad: bool
    inference: bool
    dtype: torch.dtype
    modes: int
    autocast: dict[str, tuple[bool, torch.dtype]]

    @classmethod
    def now(cls, devices: frozenset[str]) -> Ambient:
        """What is set now, autocast for these kinds of device."""
        return cls(
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.get_default_dtype(),
            len(overrides._get_current_function_mode_stack()),
            {d: (torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in sorted(devices)},
        )

    @contextmanager
    def restored(self) -> Iterator[None]:
        """These settings for a while, whatever the model has switched in its forward pass.

        The settings are entered on top of the replica's own, in its own stack, and left before it
        goes on: PyTorch's guards nest, so they must never be undone out of order.
        """
        with ExitStack() as stack:
            stack.enter_context(_modes_taken_off(self.modes))
            if torch.get_default_dtype() != self.dtype:
                stack.callback(torch.set_default_dtype, torch.get_default_dtype())
                torch.set_default_dtype(self.dtype)
            if torch.is_inference_mode_enabled() != self.inference:
                stack.enter_context(torch.inference_mode(self.inference))
            if torch.is_grad_enabled() != self.grad:
                stack.enter_context(torch.set_grad_enabled(self.grad))
            for device, (enabled, dtype) in self.autocast.items():
                if (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) != (enabled, dtype):
                    stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled))
            yield


@contextmanager
def thread_kept() -> Iterator[None]:
    """Afterwards the function modes and the default dtype of this thread are those of before.

    Their own context managers see to that, unless Ctrl-C falls between two of their lines.
    """
    modes, dtype = overrides._get_current_function_mode_stack(), torch.get_default_dtype()
    try:
        yield
    finally:
        while overrides._get_current_function_mode_stack()[len(modes) :]:
            overrides._pop_mode()
        for mode in modes[len(overrides._get_current_function_mode_stack()) :]:
            overrides._push_mode(mode)
        torch.set_default_dtype(dtype)


class Attributes:
    """The plain attributes and buffers of a model's modules.

    Models store values on themselves in ``forward`` and read them back a few layers on. With several
    replicas under way, each has to find its own. PyTorch's own modules do no such thing unless a hook does it
    to them: they are passed over while they have no attribute more than at the start and held no
    value there, which makes a switch cost microseconds.
    """

    def __init__(self, model: nn.Module):
        modules = list(model.modules())
        self.watched = [m for m in modules if not type(m).__module__.startswith("torch.nn.") or _holds_tensors(m)]
        watched = set(self.watched)
        self.quiet = [(vars(m), len(vars(m)), m, frozenset(vars(m))) for m in modules if m not in watched]
        self.open = True
        self.start = self._taken()
        self._quiet = [own for own, *_ in self.quiet]
        self._loud = [own for module in self.watched for own in (vars(module), module._buffers)]
        self._untouched = self._fingerprint()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """The attributes as they were at the start, for as long as a replica waits."""
        if self._fingerprint() == self._untouched:
            yield  # whoever runs meanwhile leaves them so, too
            return
        mine = self._taken()
        self.restore()
        try:
            yield
        finally:
            self._put(mine)

    def _fingerprint(self) -> tuple[list[int], list[int]]:
        """Tells in microseconds that all attributes are the very objects of the start, as they are in most models."""
        values = chain.from_iterable(map(dict.values, self._loud))
        return list(map(len, self._quiet)), list(map(id, values))

    def restore(self) -> None:
        """Put back the attributes as they were at the start."""
        if self._fingerprint() == self._untouched:
            return
        for module, keys in self._extended():
            for key in vars(module).keys() - keys:
                del vars(module)[key]
        self._put(self.start)

    def close(self) -> None:
        """Put everything back for good: a replica that is cleared away later changes nothing any more."""
        self.restore()
        self.open = False

    def fresh(self) -> None:
        """Give the next replica its own copies of the lists and dicts that it may fill."""
        copies: dict[int, Any] = {}
        for module in self.watched:
            for key, value in vars(module).items():
                if key not in _OWN:
                    vars(module)[key] = _copied(value, copies)

    def _extended(self) -> list[tuple[nn.Module, frozenset[str]]]:
        return [(module, keys) for own, size, module, keys in self.quiet if len(own) != size]

    def _taken(self) -> State:
        return [
            (module, {key: value for key, value in vars(module).items() if key not in _OWN}, dict(module._buffers))
            for module in [*self.watched, *(module for module, _ in self._extended())]
        ]

    def _put(self, state: State) -> None:
        if not self.open:
            return
        for module, attributes, buffers in state:
            _replace(vars(module), attributes, kept=_OWN)
            _replace(module._buffers, buffers)


def _replace(current: dict[str, Any], wanted: dict[str, Any], kept: frozenset[str] = frozenset()) -> None:
    current.update(wanted)
    for key in current.keys() - wanted.keys() - kept:
        del current[key]


def _holds_tensors(module: nn.Module) -> bool:
    return any(isinstance(value, torch.Tensor) for value in vars(module).values())


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """A container copied with the containers in it, one that stands in two places once; other values as they are."""
    if type(value) not in (list, dict, set, deque):
        return value
    if id(value) not in copies:
        copies[id(value)] = twin = copy.copy(value)
        if isinstance(twin, dict):
            twin.update({key: _copied(part, copies) for key, part in twin.items()})
        elif isinstance(twin, list):
            twin[:] = [_copied(part, copies) for part in twin]
    return copies[id(value)]


@contextmanager
def _modes_taken_off(base: int) -> Iterator[None]:
    """Without the function modes (torch.device as a context, for one) entered since there were ``base``."""
    taken = [overrides._pop_mode() for _ in range(len(overrides._get_current_function_mode_stack()) - base)]
    try:
        yield
    finally:
        for mode in reversed(taken):
            overrides._push_mode(mode)
