"""Exported programs (``.pt2``) as modules: every batch-norm call is a BatchNorm module again."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn

from bntools.backends.torch import archives, sinks
from bntools.errors import BntoolsError

aten = torch.ops.aten
# operator -> (place of the training flag or None, place of momentum, place of eps, whether it returns a tuple)
NORMS: dict[Any, tuple[int | None, int, int, bool]] = {
    aten.batch_norm.default: (5, 6, 7, False),
    aten.native_batch_norm.default: (5, 6, 7, True),
    aten.cudnn_batch_norm.default: (5, 6, 7, True),
    aten.miopen_batch_norm.default: (5, 6, 7, True),
    aten._native_batch_norm_legit.default: (5, 6, 7, True),
    aten._native_batch_norm_legit_no_training.default: (None, 5, 6, True),
    aten._batch_norm_no_update.default: (None, 5, 6, True),
}
IN_TRAINING = (
    aten._native_batch_norm_legit_functional.default,
    aten._batch_norm_with_update_functional.default,
    aten._batch_norm_with_update.default,
)
BY_RANK: dict[int, type[nn.modules.batchnorm._BatchNorm]] = {
    2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d,
}  # fmt: skip
FROM_FILE = "bntools.exported"
PARTS = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked"}


def load(path: str) -> tuple[nn.Module, torch.export.ExportedProgram]:
    """An exported program as a module, and the program, whose tensors the module shares.

    Raises BntoolsError where the archive is damaged, or holds more than a program of operators.
    """
    archives.check(path)
    try:
        with quiet():
            program = torch.export.load(path)
            return as_module(program, path), program
    except BntoolsError:
        raise
    except Exception as error:
        # The deserializer has no error of its own: a wrong byte can surface as any exception.
        raise BntoolsError(f"{path}: cannot be loaded as an exported program: {str(error).splitlines()[:1]}") from error


def save(path: str, model: nn.Module, program: torch.export.ExportedProgram, temporary: Path) -> None:
    """Write the program with the model's present values. Raises BntoolsError if its structure changed."""
    now = _tensors(model)
    for stored in (program.state_dict, program.constants):
        for name, value in stored.items():
            if isinstance(value, torch.Tensor) and name in now and now[name].shape != value.shape:
                raise BntoolsError(f"{path}: {name!r} has another shape than in the program; save to ONNX instead")
    if gone := sorted(name for name in program.state_dict if name not in now):
        raise BntoolsError(
            f"{path}: the model no longer has {', '.join(gone[:4])} (folded?), which the program needs; "
            f"export it to ONNX instead"
        )
    with torch.no_grad(), quiet():
        for stored in (program.state_dict, program.constants):
            for name, value in stored.items():
                if isinstance(value, torch.Tensor) and name in now:
                    value.copy_(now[name])
        try:
            with sinks.written(temporary) as file:
                torch.export.save(program, file)
        except RuntimeError as error:
            raise BntoolsError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error


def is_exported(model: nn.Module) -> bool:
    """Whether a module is, or was made from (copied, folded), one that :func:`load` returned."""
    return FROM_FILE in getattr(model, "meta", {})


def as_module(program: torch.export.ExportedProgram, path: str) -> nn.Module:
    """The program's graph with BatchNorm and Dropout modules in place of their calls.

    They sit where the original modules sat and share the program's tensors, so that the statistics
    have their old names, and train and eval mode work. Raises BntoolsError for a program that was
    exported in train mode and then decomposed: what is left there updates its own statistics.
    """
    model = program.module()
    assert isinstance(model, fx.GraphModule)
    for node in list(model.graph.nodes):
        if node.target in IN_TRAINING:
            raise BntoolsError(
                f"{path}: exported in train mode and decomposed, so its batch norms cannot be switched to eval "
                f"mode; export again from model.eval()"
            )
        if node.target in NORMS:
            _restore_norm(model, node)
        elif node.target is aten.dropout.default:
            _restore_dropout(model, node)
    _drop_unused(model.graph)
    _sort_by_use(model)
    for method in ("train", "eval"):  # torch.export puts methods there that only raise
        vars(model).pop(method, None)
    if hasattr(model, "_guards_fn"):
        inputs = [node.meta.get("val") for node in model.graph.nodes if node.op == "placeholder"]
        model._guards_fn = _InputGuards(path, model._guards_fn, _batch_size(inputs))
    model.meta[FROM_FILE] = path  # copies of the module, folded ones too, take it along
    model.graph.lint()
    model.recompile()
    return model


def _tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Every parameter and buffer by name, shared ones under each of their names, kept in state dicts or not."""
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return dict[str, torch.Tensor](named)


def _batch_size(inputs: list[Any]) -> int | None:
    """The one batch size that a program takes, None if it takes others too or its inputs have several."""
    sizes = [value.shape[0] for value in inputs if isinstance(value, torch.Tensor) and value.ndim]
    fixed = {size for size in sizes if isinstance(size, int)}  # a dynamic one is a torch.SymInt
    return fixed.pop() if len(fixed) == 1 and all(isinstance(size, int) for size in sizes) else None


class _InputGuards(nn.Module):
    """Tells in words when a batch does not have a size that the program was exported for."""

    def __init__(self, path: str, guards: Any, batch_size: int | None):
        super().__init__()
        self.path = path
        self.guards = guards
        self.batch_size = batch_size

    def forward(self, *inputs: Any) -> None:
        try:
            self.guards(*inputs)
        except AssertionError as error:
            shapes = [tuple(i.shape) for i in inputs if isinstance(i, torch.Tensor)]
            size = self.batch_size
            remedy = "use such batches"
            if size is not None and any(shape[:1] != (size,) for shape in shapes):
                remedy = f"give batches of {size}: --batch-size {size} / batch_size={size}"
            raise BntoolsError(
                f"{self.path}: a batch of shape {', '.join(map(str, shapes))} does not fit the sizes the program was "
                f"exported with ({error}); {remedy}, or export again with dynamic_shapes="
            ) from error


def _restore_norm(model: fx.GraphModule, node: fx.Node) -> None:
    training_at, momentum_at, eps_at, is_tuple = NORMS[node.target]
    weight, bias, mean, var = (node.args[i] for i in (1, 2, 3, 4))
    if not _is_attribute(mean) or not _is_attribute(var):
        return  # statistics that are not tracked, or computed: no BN layer to speak of
    if is_tuple and any(user.target is not operator.getitem or user.args[1] != 0 for user in node.users):
        return
    place = str(mean.target).rpartition(".")[0]  # type: ignore[union-attr]
    name = place if place and _holds_only_norm(model.get_submodule(place)) else f"{place}.batch_norm".lstrip(".")
    norm = _norm(model, place, node, weight, bias)
    norm.momentum, norm.eps = float(node.args[momentum_at]), float(node.args[eps_at])  # type: ignore[arg-type]
    norm.training = bool(node.args[training_at]) if training_at is not None else False
    model.add_submodule(name, norm)
    with model.graph.inserting_before(node):
        call = model.graph.call_module(name, (node.args[0],))
    call.meta = dict(node.meta)
    for user in list(node.users) if is_tuple else [node]:
        call.meta["val"] = user.meta.get("val")
        user.replace_all_uses_with(call)
        if user is not node:
            model.graph.erase_node(user)
    model.graph.erase_node(node)


def _norm(model: fx.GraphModule, place: str, node: fx.Node, weight: Any, bias: Any) -> nn.modules.batchnorm._BatchNorm:
    """A BatchNorm module that shares the program's tensors."""
    mean, var = (_tensor(model, node.args[i]) for i in (3, 4))
    rank = node.args[0].meta["val"].ndim  # type: ignore[union-attr]
    norm = BY_RANK[rank](mean.numel(), affine=weight is not None or bias is not None, device="meta")
    norm._buffers["running_mean"], norm._buffers["running_var"] = mean, var
    norm._buffers["num_batches_tracked"] = model.get_submodule(place)._buffers.get("num_batches_tracked")
    for key, given in (("weight", weight), ("bias", bias)):
        tensor = _tensor(model, given) if given is not None else None
        if tensor is not None and not isinstance(tensor, nn.Parameter):
            tensor = nn.Parameter(tensor, requires_grad=False)
        norm._parameters[key] = tensor
    return norm


def _restore_dropout(model: fx.GraphModule, node: fx.Node) -> None:
    name = f"_dropout_{node.name}"
    model.add_submodule(name, nn.Dropout(float(node.args[1])).train(bool(node.args[2])))  # type: ignore[arg-type]
    with model.graph.inserting_before(node):
        call = model.graph.call_module(name, (node.args[0],))
    call.meta = dict(node.meta)
    node.replace_all_uses_with(call)
    model.graph.erase_node(node)


def _drop_unused(graph: fx.Graph) -> None:
    """Take out what counted the updates in train mode (the modules do that themselves) and unused attributes."""
    for node in list(graph.nodes):
        counts = node.target is aten.add_.Tensor and str(getattr(node.args[0], "target", "")).endswith(
            "num_batches_tracked"
        )
        if counts and not node.users:
            graph.erase_node(node)
    for node in list(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _sort_by_use(model: fx.GraphModule) -> None:
    """Put submodules in the order in which they run: the program lists those with parameters first."""
    position = {node: place for place, node in enumerate(model.graph.nodes)}
    used: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op in ("get_attr", "call_module"):
            first = position[node] if node.op == "call_module" else min(position[user] for user in node.users)
            parts = str(node.target).split(".")
            for path in (".".join(parts[: depth + 1]) for depth in range(len(parts))):
                used[path] = min(first, used.get(path, first))
    for prefix, module in list(model.named_modules()):
        places = {name: used.get(f"{prefix}.{name}".lstrip("."), len(position)) for name in module._modules}
        for name in sorted(places, key=places.__getitem__):
            module._modules[name] = module._modules.pop(name)


def _holds_only_norm(module: nn.Module) -> bool:
    return not module._modules and {*module._parameters, *module._buffers} <= PARTS


def _is_attribute(node: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def _tensor(model: fx.GraphModule, node: Any) -> Any:
    owner, _, name = str(node.target).rpartition(".")
    return getattr(model.get_submodule(owner), name)


@contextmanager
def quiet() -> Iterator[None]:
    """PyTorch 2.13 warns of its own use of a deprecated class when it copies the layout of inputs."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield
