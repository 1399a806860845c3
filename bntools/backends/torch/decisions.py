"""Whether a model decides in Python on the values it computes: one run shows one of its paths only.

Shapes are no values: a model may look at the shape of its input as it likes. What depends on parameters, buffers
and constants alone is the same in every run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from bntools.backends.torch.operators import given_arguments, written

# ATen calls that give Python a value of a tensor, and methods that do so without an ATen call.
READS = {
    torch.ops.aten._local_scalar_dense: "if, float, int, item",
    torch.ops.aten.item: "if, float, int, item",
    torch.ops.aten.is_nonzero: "if, float, int, item",
    torch.ops.aten.equal: "torch.equal",
    torch.ops.aten.allclose: "torch.allclose",
}
METHODS = {"tolist": "tolist", "numpy": "numpy", "__array__": "numpy", "__dlpack__": "dlpack"}
MASKS = (torch.bool, torch.uint8)


@dataclass(frozen=True)
class Decision:
    """The innermost module that looks at values, by path (empty for the model itself), and how it does."""

    path: str
    how: str


class Decisions:
    """What was seen of a run: the first value that Python read, and the first tensor whose size depends on values."""

    read: Decision | None = None
    sized: Decision | None = None


@contextmanager
def watching(model: nn.Module) -> Iterator[Decisions]:
    """Watch what runs inside the block, a run of the model; the result is filled in as it goes on."""
    found = Decisions()
    with ModuleTracker() as tracker:
        watch = _Calls(found, tracker, _stored(model))
        with _Methods(watch), watch:
            yield found


def _stored(model: nn.Module) -> list[torch.Tensor]:
    attributes = [value for module in model.modules() for value in vars(module).values()]
    return [*model.parameters(), *model.buffers(), *(one for one in attributes if isinstance(one, torch.Tensor))]


class _Calls(TorchDispatchMode):
    """Follows by their memory the tensors that do not depend on the input; any other may."""

    def __init__(self, found: Decisions, tracker: ModuleTracker, stored: list[torch.Tensor]):
        super().__init__()
        self.found = found
        self._tracker = tracker
        # A weak reference keeps the address from being handed out again.
        self._constant: dict[int, StorageWeakRef] = {}
        for tensor in stored:
            self._mark(tensor, True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _tensors((args, kwargs))
        # torch.tensor: the values come from Python.
        constant = func is torch.ops.aten.lift_fresh.default or all(map(self.is_constant, given))
        if not constant and func.overloadpacket in READS:
            self.reads(READS[func.overloadpacket])
        if not constant and self.found.sized is None and _sizes_by_value(func, args, kwargs):
            self.found.sized = self._here(func.overloadpacket.__name__)
        result = func(*args, **kwargs)
        constant = constant and torch.Tag.nondeterministic_seeded not in func.tags
        named = given_arguments(func, args, kwargs)
        for tensor in (*_tensors(result), *_tensors([named.get(name) for name in written(func)])):
            self._mark(tensor, constant)
        return result

    def reads(self, how: str) -> None:
        """Note that Python reads a value here."""
        if self.found.read is None:
            self.found.read = self._here(how)

    def is_constant(self, tensor: torch.Tensor) -> bool:
        """Whether the values of a tensor are known not to depend on the input."""
        if tensor.layout != torch.strided:
            return False
        known = self._constant.get(tensor.untyped_storage()._cdata)
        return known is not None and not known.expired()

    def _mark(self, tensor: torch.Tensor, constant: bool) -> None:
        if tensor.layout != torch.strided:
            return
        storage = tensor.untyped_storage()
        if constant:
            self._constant[storage._cdata] = StorageWeakRef(storage)
        else:
            self._constant.pop(storage._cdata, None)

    def _here(self, how: str) -> Decision:
        return Decision(max(self._tracker.parents, key=len).partition(".")[2], how)


class _Methods(TorchFunctionMode):
    def __init__(self, calls: _Calls):
        super().__init__()
        self._calls = calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        how = METHODS.get(getattr(func, "__name__", ""))
        if how is not None and isinstance(args[0], torch.Tensor) and not self._calls.is_constant(args[0]):
            self._calls.reads(how)
        return func(*args, **(kwargs or {}))


def _sizes_by_value(func: Any, args: Any, kwargs: Any) -> bool:
    if torch.Tag.dynamic_output_shape not in func.tags:
        return False
    # Indexing is among them for its masks; with numbers the shape is that of the indices.
    return func is not torch.ops.aten.index.Tensor or any(t.dtype in MASKS for t in _tensors((args, kwargs))[1:])


def _tensors(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
