"""Model files of PyTorch: which form a file has, reading it, and writing a model back in that form."""

from __future__ import annotations

import copy
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bntools import sniff
from bntools.backends.torch import exported, pickles, sinks, weights
from bntools.backends.torch.layers import layers, unwrap
from bntools.errors import BntoolsError

TORCHSCRIPT = "constants.pkl"
MOST_MODULES = 1 << 17  # with those that stand in several places, which can double with each few bytes of a file
Arch = nn.Module | Callable[[], nn.Module]


@dataclass(frozen=True)
class Origin:
    """Where a model came from, so that it can be written back in kind.

    ``form`` is ``module`` (pickled whole), ``state dict``, ``safetensors`` or ``exported``. ``holds``
    is what the file held around the model (a checkpoint's other entries, the exported program) and
    ``entry`` the keys that lead to the model in it. ``fit`` says which key of the file is which of
    the model's. ``metadata`` is that of a safetensors file.
    """

    path: str
    form: str
    holds: Any = None
    entry: tuple[str, ...] = ()
    fit: weights.Fit | None = None
    metadata: Mapping[str, str] | None = None


def load(path: str, arch: Arch | None = None, allow: Sequence[str] = ()) -> tuple[nn.Module, Origin]:
    """The model in a file, on the CPU, and its origin.

    ``arch`` is an nn.Module, or a callable without arguments that returns one, for files that hold
    weights alone. ``allow`` names packages whose nn.Module classes and enums may be unpickled.

    Raises BntoolsError where the file is none of PyTorch's forms or does not fit ``arch``.
    """
    form = form_of(path)
    if form == "torchscript":
        raise BntoolsError(
            f"{path}: a TorchScript archive, whose layers run outside Python; load the nn.Module it was made "
            f"from and torch.save that (whole, or its state_dict() together with arch=)"
        )
    if form == "exported":
        _no_arch(path, arch, "an exported program")
        model, program = exported.load(path)
        return model, Origin(path, form, program)
    if form == "safetensors":
        state, metadata = read_safetensors(path)
        model = _built(path, arch, state)
        return model, Origin(path, form, state, (), weights.fill(path, model, state), metadata)
    holds = pickles.read(path, allow)
    entry = weights.find(path, holds)
    found = weights.at(holds, entry)
    if isinstance(found, nn.Module):
        _no_arch(path, arch, "a whole model")
        _check_whole(path, found)
        return found, Origin(path, "module", weights.replaced(holds, entry, None), entry)
    pickles.check_tensors(path, found.values())
    model = _built(path, arch, found)
    return model, Origin(path, "state dict", holds, entry, weights.fill(path, model, found))


def save(model: nn.Module, path: str, temporary: Path, origin: Origin | None = None, data: Path | None = None) -> None:
    """Write a model to ``temporary`` in the form that its origin and the suffix of ``path`` ask for.

    A checkpoint keeps its other entries, a safetensors file its metadata, an exported program its
    graph. No form needs a second file, ``data``. Raises BntoolsError where the form cannot hold the model; ``path``
    names it in messages.
    """
    model = model if isinstance(model, nn.DataParallel) else unwrap(model)
    suffix = Path(path).suffix.lower()
    form = origin.form if origin else "module"
    if form != "exported" and exported.is_exported(model):
        raise BntoolsError(
            f"{path}: a model from a .pt2 file that was folded or copied has no PyTorch form that it could be saved "
            f"in; export it to ONNX instead (bntools.export, --export)"
        )
    if suffix == ".pt2":
        if origin is None or form != "exported":
            raise BntoolsError(f"{path}: only a model loaded from a .pt2 file can be saved as one; use .pt instead")
        exported.save(path, model, origin.holds, temporary)
    elif form == "exported":
        raise BntoolsError(f"{path}: a model loaded from a .pt2 file can only be saved as .pt2, or exported to ONNX")
    elif suffix == ".safetensors":
        _write_safetensors(path, model, temporary, origin)
    elif origin is not None and form == "state dict":
        old = weights.at(origin.holds, origin.entry)
        assert origin.fit is not None
        new = weights.updated(path, old, origin.fit, model)
        _write_pickle(path, weights.replaced(origin.holds, origin.entry, new), temporary)
    elif origin is not None and form == "module":
        _write_pickle(path, weights.replaced(origin.holds, origin.entry, model), temporary)
    else:
        _write_pickle(path, model, temporary)


def form_of(path: str) -> str:
    """Which of PyTorch's forms a file has. Raises BntoolsError for none of them."""
    if sniff.is_zip(path):
        with open(path, "rb") as file:
            pickles.check_sizes(path, file)
        with zipfile.ZipFile(path) as archive:
            inner = {name.partition("/")[2] or name for name in archive.namelist()}
        if TORCHSCRIPT in inner:
            return "torchscript"
        if {"archive_format", "serialized_exported_program.json"} & (inner | set(archive.namelist())):
            return "exported"
        if "data.pkl" in inner:
            return "pickle"
        raise BntoolsError(f"{path}: a zip archive, but no model that torch.save or torch.export.save wrote")
    if _is_safetensors(path):
        return "safetensors"
    with open(path, "rb") as file:
        if file.read(len(pickles.LEGACY_MAGIC)) == pickles.LEGACY_MAGIC:
            return "pickle"
    raise BntoolsError(f"{path}: found {_found(path)} where a model file was expected")


def _found(path: str) -> str:
    what = sniff.describe(path)
    if what == "a pickle":
        return "a pickle that torch.save did not write (use torch.save(model, path))"
    return "a damaged or truncated zip archive" if what == "a zip archive" else what


def _is_safetensors(path: str) -> bool:
    """Eight bytes of header size, then the header, a JSON object."""
    with open(path, "rb") as file:
        start = file.read(9)
    named = Path(path).suffix.lower() == ".safetensors" and sniff.describe(path) == "bytes of no known kind"
    return named or (len(start) == 9 and start[8:] == b"{" and int.from_bytes(start[:8], "little") < 100 << 20)


def read_safetensors(path: str) -> tuple[dict[str, torch.Tensor], dict[str, str] | None]:
    """The tensors of a safetensors file, in file order, and its metadata. Raises BntoolsError if damaged."""
    try:
        with safetensors.safe_open(path, framework="pt", device="cpu") as file:
            # The order in the file; .keys() sorts by name.
            return {key: file.get_tensor(key).clone() for key in file.offset_keys()}, file.metadata()
    except (safetensors.SafetensorError, OSError, RuntimeError) as error:
        raise BntoolsError(f"{path}: a damaged or truncated safetensors file ({error})") from error


def _write_safetensors(path: str, model: nn.Module, temporary: Path, origin: Origin | None) -> None:
    metadata: Mapping[str, str] | None = {"format": "pt"}
    if origin is not None and origin.fit is not None:
        old = weights.at(origin.holds, origin.entry)
        state = weights.updated(path, old, origin.fit, model)
        metadata = origin.metadata if origin.form == "safetensors" else metadata
    else:
        state = model.state_dict()
    # A copy of each: the format has no views, and tied weights may not share memory when written.
    plain = {k: v.detach().cpu().contiguous().clone() for k, v in state.items() if isinstance(v, torch.Tensor)}
    if dropped := sorted(set(state) - set(plain)):
        raise BntoolsError(f"{path}: safetensors holds tensors only, not {', '.join(dropped)}; save as .pt instead")
    try:
        # It writes to a name of its own beside the one it is given, which a killed process would leave behind.
        with TemporaryDirectory(prefix=f"{temporary.stem}.", dir=temporary.parent) as folder:
            own = Path(folder, temporary.name)
            safetensors.torch.save_file(plain, own, metadata=dict(metadata) if metadata is not None else None)
            os.replace(own, temporary)
    except (safetensors.SafetensorError, ValueError, RuntimeError) as error:
        raise BntoolsError(f"{path}: cannot be written as safetensors: {error}") from error


def _write_pickle(path: str, holds: Any, temporary: Path) -> None:
    try:
        with sinks.written(temporary) as file:
            torch.save(holds, file)
    except (pickle.PicklingError, AttributeError, TypeError, RecursionError) as error:
        raise BntoolsError(
            f"{path}: the model cannot be pickled whole ({error}); save its state dict instead, as .safetensors"
        ) from error
    except RuntimeError as error:
        raise BntoolsError(f"{path}: cannot be written: {str(error).splitlines()[0]}") from error


def _built(path: str, arch: Arch | None, state: Mapping[str, Any]) -> nn.Module:
    if arch is None:
        first = ", ".join(list(state)[:3])
        raise BntoolsError(
            f"{path}: a state dict of {len(state)} tensors ({first}, ...) without the model they belong to: pass "
            f"arch='package.module:factory' (--arch), a callable that returns the nn.Module"
        )
    if isinstance(arch, nn.Module):
        return copy.deepcopy(arch)
    try:
        model = arch()
    except Exception as error:
        raise BntoolsError(f"{path}: calling arch failed: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise BntoolsError(f"{path}: arch returned a {type(model).__name__}; expected an nn.Module")
    return model


def _no_arch(path: str, arch: Arch | None, what: str) -> None:
    if arch is not None:
        raise BntoolsError(f"{path}: holds {what}, which needs no arch=; leave it (--arch) out")


def _check_whole(path: str, model: nn.Module) -> None:
    """A crafted or damaged pickle can give a module any attributes; see that it hangs together."""
    try:
        _check_parts(path, model)
        layers(model)
        pickles.check_tensors(path, model.state_dict().values())
    except BntoolsError:
        raise
    except Exception as error:
        raise BntoolsError(f"{path}: the model in it is damaged: {type(error).__name__}: {error}") from error


def _check_parts(path: str, model: nn.Module) -> None:
    """Each module holds modules, parameters and buffers under names. Nothing of theirs is called before this is so."""
    pending, seen = [model], set()
    while pending:
        module = pending.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        held = vars(module) if isinstance(module, nn.Module) else {}
        for place, kind in (("_modules", nn.Module), ("_parameters", torch.Tensor), ("_buffers", torch.Tensor)):
            found = held.get(place)
            sound = isinstance(found, dict) and all(
                isinstance(name, str) and (value is None or isinstance(value, kind)) for name, value in found.items()
            )
            if not sound:
                raise BntoolsError(f"{path}: the model in it is damaged: the {place} of a module are none")
        pending += [value for value in held["_modules"].values() if value is not None]
        tensors = (*held["_parameters"].values(), *held["_buffers"].values())
        if not all(one is None or is_lazy(one) or pickles.is_plain(one) for one in tensors):
            raise BntoolsError(f"{path}: the model in it is damaged: it has weights that are no numbers in memory")
    for count, _ in enumerate(model.named_modules(remove_duplicate=False)):
        if count > MOST_MODULES:
            raise BntoolsError(f"{path}: the model in it has more than {MOST_MODULES:,} layers: not read")
