"""Statistics of an nn.Module that follow its batches: hooks on the layers, and one on the model for each pass."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bntools.backends.torch.hooks import Hook
from bntools.backends.torch.layers import modules, unwrap
from bntools.backends.torch.measuring import moments_of, stays
from bntools.backends.torch.normalizing import is_stock
from bntools.backends.torch.running import runs_for_bntools
from bntools.errors import BntoolsError
from bntools.interrupts import uninterrupted
from bntools.moments import Moments, merged
from bntools.past import Past

REFUSAL = "the model adapts to its batches: undo bntools.adapt before it is pickled or saved whole"


def adapt(
    model: nn.Module, names: Iterable[str], prior: float, past: Past
) -> tuple[Callable[[], float], Callable[[], None]]:
    """Let the named layers adapt; returns what tells the samples in memory, and what undoes it.

    Raises BntoolsError, before anything is done, for a layer or model in which hooks would be passed over.
    """
    _check_model(model)
    found = modules(model)
    for name in names:
        _check_layer(name, found[name])
    stream = _Stream(unwrap(model), [_Layer(name, found[name], prior, past) for name in names])
    return stream.samples, stream.undo


class _Layer:
    """One layer that adapts: what it had, and what it remembers."""

    def __init__(self, name: str, module: Any, prior: float, past: Past):
        self.name, self.module, self.past = name, module, past
        self.before = [module.running_mean.clone(), module.running_var.clone()]
        self.device = module.running_mean.device
        own = [values.detach() if stays(self.device) else values.detach().cpu() for values in self.before]
        mean, var = (values.double() if stays(self.device) else values.double().numpy() for values in own)
        self.stored = Moments.from_variance(prior, mean, var)

    def statistics(self, past: Past) -> list[torch.Tensor]:
        """Mean and variance with this past, in the layer's dtype."""
        both = self.stored if past.total is None else self.stored.merge(past.total)
        return [torch.as_tensor(values).to(self.module.running_mean) for values in (both.mean, both.var)]

    @torch.no_grad()
    def store(self, statistics: list[torch.Tensor]) -> None:
        """Write mean and variance into the module."""
        self.module.running_mean.copy_(statistics[0])
        self.module.running_var.copy_(statistics[1])


class _Stream:
    """The passes of one model, one after the other, each whole or not at all."""

    def __init__(self, model: nn.Module, layers: list[_Layer]):
        self._layers = layers
        self._touched: dict[_Layer, tuple[Past, list[torch.Tensor]]] = {}
        self._thread: int | None = None  # the one that has a pass under way
        self._outer: BaseException | None = None  # what was being handled when the pass began
        hooks = [
            layer.module.register_forward_pre_hook(Hook(partial(self._arrive, layer), REFUSAL)) for layer in layers
        ]
        begin = model.register_forward_pre_hook(Hook(self._begin, REFUSAL), prepend=True)
        end = model.register_forward_hook(Hook(self._end, REFUSAL), always_call=True)
        self._hooks = [*hooks, begin, end]

    def samples(self) -> float:
        """The most that a layer remembers."""
        return max(layer.past.samples for layer in self._layers)

    def undo(self) -> None:
        """No hooks any more, and the statistics of before."""
        with uninterrupted():
            for hook in self._hooks:
                hook.remove()
            for layer in self._layers:
                layer.store(layer.before)

    def _begin(self, *_: Any) -> None:
        if runs_for_bntools():
            return
        self._check_thread()
        self._take_back()  # a pass that Ctrl-C has ended told nobody
        self._thread, self._outer = threading.get_ident(), sys.exception()

    def _end(self, *_: Any) -> None:
        if runs_for_bntools() or self._thread != threading.get_ident():
            return
        if sys.exception() is not self._outer:
            self._take_back()
        self._touched.clear()
        self._thread = self._outer = None

    def _arrive(self, layer: _Layer, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """A layer is about to normalize ``args[0]``, of shape (N, C, ...)."""
        if module.training or runs_for_bntools() or not args or not args[0].numel():
            return
        self._check_thread()
        if args[0].device != layer.device:  # where what it remembers is
            raise BntoolsError(
                f"layer {layer.name!r} runs on {args[0].device}, and began to adapt on {layer.device}: undo "
                f"bntools.adapt, move the model, and adapt it there"
            )
        measured = merged([moments_of(args[0])])
        past = layer.past.after(Moments.from_variance(len(args[0]), measured.mean, measured.var))
        statistics = layer.statistics(past)
        if not all(bool(values.isfinite().all()) for values in statistics):
            self._take_back()
            raise BntoolsError(
                f"layer {layer.name!r}: the batch is not finite there, or too large for the "
                f"{statistics[0].dtype} of its statistics: nothing was learned from it, the statistics are as before"
            )
        if self._thread is not None:  # else the layer was called by itself, which is a pass of its own
            now = [layer.module.running_mean.clone(), layer.module.running_var.clone()]
            self._touched.setdefault(layer, (layer.past, now))
        layer.past = past
        layer.store(statistics)

    def _check_thread(self) -> None:
        if self._thread not in (None, threading.get_ident()):
            raise BntoolsError(
                "the model adapts to its batches and is running in another thread: run it in one thread at a time, or "
                "give each thread a model of its own"
            )

    def _take_back(self) -> None:
        for layer, (past, statistics) in self._touched.items():
            layer.past = past
            layer.store(statistics)
        self._touched.clear()


def _check_model(model: nn.Module) -> None:
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise BntoolsError(
            "the model is in DataParallel, whose replicas are thrown away with what they have learned: adapt the "
            "module inside, on one device"
        )
    if any(name.split(".")[-1] == "_orig_mod" or _compiled(module) for name, module in model.named_modules()):
        raise BntoolsError(
            "the model is compiled, and compiled code passes over what is hooked to its layers: adapt the module as it "
            "was before torch.compile"
        )


def _compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or isinstance(module, torch.jit.ScriptModule)


def _check_layer(name: str, module: nn.Module) -> None:
    if not (isinstance(module, _BatchNorm) and is_stock(module)):
        raise BntoolsError(
            f"layer {name!r} cannot adapt: what a {type(module).__name__} normalizes is not known to be its input"
        )
    if any(getattr(hook, "refusal", None) == REFUSAL for hook in module._forward_pre_hooks.values()):
        raise BntoolsError(f"layer {name!r} adapts already: undo that first")
