"""PyTorch's two ONNX exporters, with their own optimizers off."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bntools.backends.torch.decisions import Decision, watching
from bntools.backends.torch.layers import unwrap
from bntools.backends.torch.running import eval_mode, prepared
from bntools.errors import BntoolsError
from bntools.noise import brief, caught

EXPORTERS = ("dynamo", "torchscript")  # in the order in which they are tried


@dataclass(frozen=True)
class Flat:
    """A model as a function of tensors: its inputs in order and by name, its outputs by name."""

    module: nn.Module
    tensors: tuple[torch.Tensor, ...]
    inputs: list[str]
    outputs: dict[str, torch.Tensor]


def export(
    model: nn.Module, example: Any, path: Path, *, exporter: str, other: Any = None, opset: int | None = None
) -> None:
    """Write the model as an ONNX file with one of EXPORTERS, in eval mode and without gradients.

    ``other`` is the example with another number of samples: axes of inputs and outputs whose size
    differs between the two become dynamic; None makes every axis static. Inputs are named by the
    keywords of a dict example, or ``input``; outputs by the keys of a dict, or ``output``, with their
    places in a nested result. ``opset=None`` is the exporter's own. The exporter prints nothing;
    what it said is a note of the error's cause.

    Raises BntoolsError where the exporter fails, OSError where the file cannot be written.
    """
    model = unwrap(model)
    # The older exporter is in C++ in part, which prints a graph that it cannot convert.
    with eval_mode(model), caught(native=exporter == "torchscript") as said:
        try:
            flat = flattened(model, example)
            axes = _dynamic_axes(flat, None if other is None else flattened(model, other))
            write = {"dynamo": _dynamo, "torchscript": _torchscript}[exporter]
            write(flat, axes, path, opset)
        except (OSError, BntoolsError):
            raise
        except Exception as error:  # an exporter may raise anything, from many libraries
            if noise := said():
                error.add_note(f"the exporter said: {noise}")
            # torch.onnx wraps what went wrong into pages of advice.
            root = error.__cause__ or error
            raise BntoolsError(f"the {exporter} exporter fails: {type(root).__name__}: {brief(root)}") from error


def _dynamo(flat: Flat, axes: dict[str, dict[int, str]], path: Path, opset: int | None) -> None:
    dims = {name: torch.export.Dim(name) for shape in axes.values() for name in shape.values()}
    shapes = tuple({axis: dims[dim] for axis, dim in axes.get(name, {}).items()} for name in flat.inputs)
    program: Any = torch.onnx.export(
        flat.module,
        flat.tensors,
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=flat.inputs,
        output_names=list(flat.outputs),
        dynamic_shapes=(shapes,) if axes else None,
        opset_version=opset,
    )
    program.save(path)


def _torchscript(flat: Flat, axes: dict[str, dict[int, str]], path: Path, opset: int | None) -> None:
    with watching(flat.module) as decisions:
        flat.module(*flat.tensors)
    if decisions.read is not None:
        raise BntoolsError(
            f"{_place(decisions.read, flat.module)} reads a computed value into Python ({decisions.read.how}): "
            f"a trace would freeze what the example decides. Write it with torch.where or torch.cond"
        )
    with _tracing() as frozen:
        _trace(flat, axes, path, opset)
    # Without such a tensor, what was frozen are sizes of the example, and other sizes are verified.
    if frozen and decisions.sized is not None:
        raise BntoolsError(
            f"{_place(decisions.sized, flat.module)} makes a tensor whose size depends on computed values "
            f"({decisions.sized.how}), and Python reads a size at {frozen[0]}: a trace would freeze that of the example"
        )


def _trace(flat: Flat, axes: dict[str, dict[int, str]], path: Path, opset: int | None) -> None:
    torch.onnx.export(
        flat.module,
        flat.tensors,
        str(path),  # not a Path: that is taken for an open file, which can have nothing beside it
        dynamo=False,
        do_constant_folding=False,
        training=torch.onnx.TrainingMode.PRESERVE,  # EVAL would also fuse BN into convolutions
        input_names=flat.inputs,
        output_names=list(flat.outputs),
        dynamic_axes=axes,
        opset_version=opset,
    )


@contextmanager
def _tracing() -> Iterator[list[str]]:
    """Gives the places, file and line, where the tracer warns that Python reads what it traces: a trace freezes it."""
    places: list[str] = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        try:
            yield places
        finally:
            frozen = [one for one in warned if issubclass(one.category, torch.jit.TracerWarning)]
            places += [f"{Path(one.filename).name}:{one.lineno}" for one in frozen]
    for one in warned:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)


def _place(decision: Decision, module: nn.Module) -> str:
    return f"module {decision.path or type(module).__name__!r}"


def flattened(model: nn.Module, example: Any) -> Flat:
    """The model as a function of tensors alone; what else the example holds is baked in.

    Both exporters have their own rules for keywords, dicts, tuples and dataclasses: this way they see
    none. The function belongs to a shallow copy of the model, so that the paths of modules and
    parameters, which end up in the file, are the model's own.
    """
    inputs = prepared(model, example)
    keywords = isinstance(inputs, dict)
    found, spec = pytree.tree_flatten_with_path(inputs)
    places = [i for i, (_, leaf) in enumerate(found) if isinstance(leaf, torch.Tensor)]

    def forward(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(_distinct([tensor for _, tensor in _tensors(run(*tensors))], tensors))

    def run(*tensors: torch.Tensor) -> Any:
        leaves = [leaf for _, leaf in found]
        for place, tensor in zip(places, tensors, strict=True):
            leaves[place] = tensor
        arguments = pytree.tree_unflatten(leaves, spec)
        return model(**arguments) if keywords else model(arguments)

    module = copy.copy(model)
    module.forward = forward
    # The model's own hooks run inside, where the model is called as its author meant it to be.
    vars(module).update({name: hooks for name, hooks in vars(nn.Module()).items() if name.endswith("_hooks")})
    tensors = tuple(found[i][1] for i in places)
    inputs_named = _unique([_name(found[i][0], "" if keywords else "input") for i in places], [])
    results = _tensors(run(*tensors))
    if not results:
        raise BntoolsError(f"{type(model).__name__} returns no tensors: there is nothing to export")
    outputs = _unique([_name(path, "output") for path, _ in results], inputs_named)
    return Flat(module, tensors, inputs_named, dict(zip(outputs, (tensor for _, tensor in results), strict=True)))


def _tensors(result: Any) -> list[tuple[Any, torch.Tensor]]:
    """The tensors of a nested result, with the paths to them."""
    return [(path, leaf) for path, leaf in pytree.tree_flatten_with_path(result)[0] if isinstance(leaf, torch.Tensor)]


def _distinct(tensors: list[torch.Tensor], inputs: tuple[torch.Tensor, ...]) -> Iterator[torch.Tensor]:
    """A graph has one value for a tensor that is returned twice, or as it came in: give it two."""
    seen = {id(tensor) for tensor in inputs}
    for tensor in tensors:
        yield tensor.clone() if id(tensor) in seen else tensor
        seen.add(id(tensor))


def _name(path: tuple[Any, ...], root: str) -> str:
    """A path into a nested value as an identifier: ``logits``, ``output_0``, ``aux_1``."""
    keys = [next(getattr(key, a) for a in ("key", "idx", "name") if hasattr(key, a)) for key in path]
    if not keys or not isinstance(keys[0], str):
        keys = [root, *keys]
    return re.sub(r"\W", "_", "_".join(str(key) for key in keys if key != ""))


def _unique(names: list[str], taken: list[str]) -> list[str]:
    unique: list[str] = []
    for name in names:
        candidate = name if name not in taken else f"output_{name}"
        while candidate in unique or candidate in taken:
            candidate += "_"
        unique.append(candidate)
    return unique


def _dynamic_axes(flat: Flat, other: Flat | None) -> dict[str, dict[int, str]]:
    """The axes whose size differs between the two, by name of the input or output."""
    if other is None:
        return {}
    here = {**dict(zip(flat.inputs, flat.tensors, strict=True)), **flat.outputs}
    there = {**dict(zip(other.inputs, other.tensors, strict=True)), **other.outputs}
    batch = {
        (a, b) for x, y in zip(flat.tensors, other.tensors, strict=True) for a, b in zip(x.shape, y.shape, strict=True)
    }
    axes = {
        name: {
            axis: "batch" if (size, there[name].shape[axis]) in batch else f"{name}_dim_{axis}"
            for axis, size in enumerate(tensor.shape)
            if size != there[name].shape[axis]
        }
        for name, tensor in here.items()
    }
    return {name: shape for name, shape in axes.items() if shape}
