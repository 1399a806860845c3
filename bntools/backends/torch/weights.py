"""State dicts: finding one in a checkpoint, fitting it to a model, and writing a model's values back into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from bntools.errors import BntoolsError

# Where training scripts put weights, in the order in which they are preferred.
ENTRIES = (
    "state_dict", "model", "model_state_dict", "model_state", "net", "network", "weights", "module", "params",
    "ema", "model_ema", "ema_state_dict", "state_dict_ema", "params_ema", "generator", "backbone", "encoder",
)  # fmt: skip
OPTIMIZERS = ("optim", "sched", "scaler", "momentum", "buffer")
COUNTER = "num_batches_tracked"
BESIDE = ("n_averaged",)  # torch.optim.swa_utils.AveragedModel keeps it beside the model's own keys
SHOWN = 4


@dataclass(frozen=True)
class Fit:
    """Which key of a file is which key of the model, and which of the model's the file lacks."""

    keys: dict[str, str]
    absent: frozenset[str]


def is_state_dict(value: Any) -> bool:
    """Whether an object is a state dict: names to tensors (and the extra state some modules add)."""
    if not isinstance(value, Mapping) or not any(isinstance(v, torch.Tensor) for v in value.values()):
        return False
    return all(
        isinstance(key, str) and (isinstance(v, torch.Tensor) or key.endswith("_extra_state"))
        for key, v in value.items()
    )


def find(path: str, holds: Any) -> tuple[str, ...]:
    """Where in what a file holds the model is: () for all of it, else the keys that lead there.

    Raises BntoolsError where there is none, or several and none has a usual name.
    """
    if isinstance(holds, nn.Module) or is_state_dict(holds):
        return ()
    if not isinstance(holds, Mapping):
        raise BntoolsError(f"{path}: holds {_described(holds)}, no model and no state dict")
    found = dict(_entries(holds, ()))
    for entry in sorted(found, key=_preference):
        if _preference(entry)[0] < len(ENTRIES) or len(found) == 1:
            return entry
    keys = ", ".join(map(str, list(holds)[:8])) or "nothing"
    if found:
        raise BntoolsError(
            f"{path}: several entries could be the model ({', '.join(map('.'.join, found))}): "
            f"save the one you mean alone"
        )
    raise BntoolsError(f"{path}: a dict with {keys}, but no model and no state dict in it")


def at(holds: Any, entry: tuple[str, ...]) -> Any:
    """The part of what a file holds that the keys lead to."""
    for key in entry:
        holds = holds[key]
    return holds


def replaced(holds: Any, entry: tuple[str, ...], value: Any) -> Any:
    """A copy of what a file holds with another value in one place; everything else is the same objects."""
    if not entry:
        return value
    result = copy.copy(holds)
    result[entry[0]] = replaced(holds[entry[0]], entry[1:], value)
    return result


def fill(path: str, model: nn.Module, state: Mapping[str, Any]) -> Fit:
    """Load a state dict into a model, in place; prefixes that wrappers add to all keys are taken off.

    Counters of updates that old checkpoints lack are tolerated. Raises BntoolsError naming the keys
    that are missing, unexpected or of another shape.
    """
    fit = _fit(state, model)
    own = _own_state(model)
    lacking = {key for key in own if key not in fit.keys.values()}
    shapes = {key: (state[key].shape, own[name].shape) for key, name in _mismatched(state, own, fit)}
    known = {name: state[key] for key, name in fit.keys.items()}
    try:
        if shapes:
            raise BntoolsError(_misfit(path, lacking, set(), shapes))
        missing, unexpected = model.load_state_dict(known, strict=False)
    except RuntimeError as error:
        raise BntoolsError(f"{path}: does not fit arch: {error}") from error
    missing = [key for key in missing if not key.endswith(COUNTER) and not _tied(own, key, fit)]
    if missing or unexpected:
        raise BntoolsError(_misfit(path, set(missing), set(unexpected), {}))
    return Fit(fit.keys, frozenset(lacking))


def updated(path: str, state: Mapping[str, Any], fit: Fit, model: nn.Module) -> Any:
    """The state dict of a file with a model's values in it: same keys, order and dtypes, same entries beside.

    Values that did not change stay the objects they were. Raises BntoolsError where the model's
    structure changed since it was loaded, or a value does not fit the dtype in the file.
    """
    own = _own_state(model)
    gone = sorted(name for name in fit.keys.values() if name not in own)
    new = sorted(set(own) - set(fit.keys.values()) - fit.absent)
    if gone or new or any(_mismatched(state, own, fit)):
        raise BntoolsError(_restructured(path, gone, new))
    result = copy.copy(state)
    for key, name in fit.keys.items():
        result[key] = _stored(path, key, state[key], own[name])  # type: ignore[index]
    return result


def _entries(holds: Mapping[Any, Any], under: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    for key, value in holds.items():
        if not isinstance(key, str) or any(word in key.lower() for word in OPTIMIZERS):
            continue
        if isinstance(value, nn.Module) or is_state_dict(value):
            yield (*under, key), value
        elif isinstance(value, Mapping) and not under:
            yield from _entries(value, (key,))


def _preference(entry: tuple[str, ...]) -> tuple[int, int]:
    ranks = [ENTRIES.index(key) if key in ENTRIES else len(ENTRIES) for key in entry]
    return max(ranks), len(entry)


def _fit(state: Mapping[str, Any], model: nn.Module) -> Fit:
    """The renaming under which most keys of the file are keys of the model."""
    own = set(_own_state(model))
    keys = [key for key in state if key not in BESIDE]
    best: dict[str, str] = {}
    for prefix in _common_prefixes(keys):
        renamed = {key: key.removeprefix(prefix).replace("_orig_mod.", "") for key in keys}
        if not best or len(own & set(renamed.values())) > len(own & set(best.values())):
            best = renamed
    return Fit(best, frozenset())


def _common_prefixes(keys: list[str]) -> Iterator[str]:
    yield ""
    prefix = ""
    while keys and all("." in key[len(prefix) :] and key.startswith(prefix) for key in keys):
        prefix += keys[0][len(prefix) :].split(".")[0] + "."
        if all(key.startswith(prefix) for key in keys):
            yield prefix


def _own_state(model: nn.Module) -> dict[str, Any]:
    return dict(model.state_dict(keep_vars=True))


def _mismatched(state: Mapping[str, Any], own: Mapping[str, Any], fit: Fit) -> Iterator[tuple[str, str]]:
    for key, name in fit.keys.items():
        mine, theirs = own.get(name), state[key]
        plain = isinstance(mine, torch.Tensor) and not is_lazy(mine)
        if plain and isinstance(theirs, torch.Tensor) and mine.shape != theirs.shape:  # type: ignore[union-attr]
            yield key, name


def _tied(own: Mapping[str, Any], key: str, fit: Fit) -> bool:
    """Whether a key shares its tensor with one that the file has (safetensors writes tied weights once)."""
    mine = own.get(key)
    if not isinstance(mine, torch.Tensor) or not mine.numel():
        return False
    return any(
        isinstance(other := own.get(name), torch.Tensor) and other.data_ptr() == mine.data_ptr()
        for name in fit.keys.values()
    )


def _stored(path: str, key: str, before: Any, now: Any) -> Any:
    """What goes into the file for one key: what was there if nothing changed, else the value in its dtype."""
    if not isinstance(before, torch.Tensor) or not isinstance(now, torch.Tensor):
        return now
    value = now.detach().to("cpu", before.dtype)
    if torch.equal(value, before):
        return before
    if value.is_floating_point() and bool((torch.isinf(value) & torch.isfinite(now.detach().cpu())).any()):
        raise BntoolsError(f"{path}: {key!r} has values that do not fit the {before.dtype} in which the file keeps it")
    value = value.clone()
    return nn.Parameter(value, before.requires_grad) if isinstance(before, nn.Parameter) else value


def _misfit(path: str, missing: set[str], unexpected: set[str], shapes: dict[str, Any]) -> str:
    parts = []
    if missing:
        parts.append(f"the file lacks {_some(sorted(missing))}")
    if unexpected:
        parts.append(f"the model has no {_some(sorted(unexpected))}")
    if shapes:
        parts.append("; ".join(f"{k} is {tuple(a)}, expected {tuple(b)}" for k, (a, b) in list(shapes.items())[:SHOWN]))
        parts += [f"{len(shapes) - SHOWN} more shapes differ"] if len(shapes) > SHOWN else []
    return f"{path}: the state dict does not fit the model that arch builds: {'; '.join(parts)}"


def _restructured(path: str, gone: list[str], new: list[str]) -> str:
    parts = [f"without {_some(gone)}"] * bool(gone) + [f"with new {_some(new)}"] * bool(new)
    return (
        f"{path}: not saved as a state dict, because the model's structure changed since it was loaded "
        f"({', '.join(parts) or 'other shapes'}; folded?) and the arch that rebuilds it would not take it. Save "
        f"it whole with torch.save(model, path), or export it to ONNX"
    )


def _some(keys: list[str]) -> str:
    more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
    return ", ".join(keys[:SHOWN]) + more


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return f"a {type(value).__name__}" + (f" of {len(value)}" if isinstance(value, (list, tuple)) else "")
