"""Running an nn.Module for a comparison, and reading what its submodules give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bntools.backends.torch.layers import unwrap
from bntools.backends.torch.running import Forward, call, eval_mode, predict, to_numpy
from bntools.batches import shapes_of
from bntools.errors import BntoolsError
from bntools.runner import Outputs, Runner, Trace, least_precise


def runners(model: nn.Module, providers: Sequence[str] = ("cpu",), forward: Forward | None = None) -> list[Runner]:
    """The one way to run a module: in eval mode, where its parameters are, without TF32.

    Raises BntoolsError where another provider than "cpu" is asked for: providers are ONNX Runtime's.
    """
    if list([providers] if isinstance(providers, str) else providers) != ["cpu"]:
        raise BntoolsError(
            f"providers={tuple(providers)!r} was asked for, but a module runs where its parameters are: "
            f"move it there (model.to('cuda')), or export it and verify the file"
        )
    model = unwrap(model)
    tensors = [*model.parameters(), *model.buffers()]
    return [
        Runner(
            name=type(model).__name__,
            framework="torch",
            provider=str(tensors[0].device) if tensors else "cpu",
            optimization=None,
            dtype=least_precise({str(t.dtype).removeprefix("torch.") for t in tensors}),
            run=partial(_run, model, forward),
            trace=partial(trace, model, forward),
        )
    ]


def _run(model: nn.Module, forward: Forward | None, batch: Any) -> Outputs:
    try:
        with full_precision():
            return predict(model, batch, forward)
    except BntoolsError:
        raise
    except Exception as error:  # whatever the model's own code raises
        raise BntoolsError(
            f"{type(model).__name__} fails on the batch ({shapes_of(batch)}): {type(error).__name__}: {error}"
        ) from error


def trace(model: nn.Module, forward: Forward | None, batch: Any) -> Trace:
    """The outputs of the submodules, in the order in which they finish; names are their paths.

    A second call of a module is named ``path (call 2)``. nn.Identity, which is what folding leaves in
    the place of a BN, is left out: it gives nothing of its own.
    """
    order: list[str] = []
    _watch(model, forward, batch, lambda name, _: order.append(name))
    calls = Counter(name.split(" (call ")[0] for name in order)

    def read(points: Sequence[str]) -> Outputs:
        wanted, outputs = set(points), {}

        def take(name: str, output: Any) -> None:
            tensors = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]
            if name in wanted and tensors:
                outputs[name] = to_numpy(tensors[0])

        _watch(model, forward, batch, take)
        return outputs

    return Trace(tuple(order), {name: name for name in order if calls[name] == 1}, read)


def _watch(model: nn.Module, forward: Forward | None, batch: Any, see: Any) -> None:
    """Run the model; ``see`` gets the name of each call of a submodule, and its output, as it finishes."""
    calls: Counter[str] = Counter()

    def hook(path: str, _: nn.Module, __: Any, output: Any) -> None:
        calls[path] += 1
        see(path if calls[path] == 1 else f"{path} (call {calls[path]})", output)

    watched = [(path, one) for path, one in model.named_modules() if path and not isinstance(one, nn.Identity)]
    handles = []
    try:
        for path, module in watched:
            handles.append(module.register_forward_hook(partial(hook, path)))
        with eval_mode(model), full_precision():
            call(model, batch, forward)
    except Exception as error:  # whatever the model's own code raises, or a module that takes no hooks
        raise BntoolsError(
            f"{type(model).__name__} cannot be watched module by module: {type(error).__name__}: {error}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in full float32 on CUDA: TF32 would be measured as if the models differed.

    PyTorch has two interfaces for this and raises when both were used (pytorch.org/docs/stable/notes/cuda.html):
    the one that can be read is the one to use.
    """
    if not torch.cuda.is_available():
        yield
        return
    cudnn: Any = torch.backends.cudnn
    owners = [(torch.backends.cuda.matmul, "allow_tf32"), (cudnn, "allow_tf32")]
    try:
        before = [getattr(owner, name) for owner, name in owners]
    except RuntimeError:
        owners = [(owner, "fp32_precision") for owner in (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)]
        before = [getattr(owner, name) for owner, name in owners]
    off = ["ieee" if name == "fp32_precision" else False for _, name in owners]
    _set(owners, off, before)
    try:
        yield
    finally:
        _set(owners, before, off)


def _set(owners: list[tuple[Any, str]], values: list[Any], current: list[Any]) -> None:
    for (owner, name), value, now in zip(owners, values, current, strict=True):
        if value != now:
            setattr(owner, name, value)
