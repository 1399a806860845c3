"""Reading pickles safely: what a file names is looked at first, then PyTorch's restricted unpickler reads it.

The restricted unpickler (``torch.load(weights_only=True)``) refuses names that nobody admitted, but it
*calls* what was admitted if the pickle says so. Whole models need classes admitted; honest pickles
only ever create objects of them and fill in their state, so every other use is refused here.
"""

from __future__ import annotations

import enum
import io
import mmap
import os
import pickle
import re
import struct
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any, BinaryIO

import torch
import torch.nn.functional as F
from torch import _weights_only_unpickler, nn
from torch.nn.parameter import is_lazy

from bntools import imports, sniff
from bntools.backends.torch import opcodes
from bntools.errors import BntoolsError

ADMITTED = ("torch.nn", "torchvision", "timm")
OURS = (("bntools.backends.torch.layers", "StaysInEval"), ("bntools.backends.torch.frozen_affine", "FrozenAffine"))
FUNCTIONS = ("torch.nn.functional", "torch._C._nn")
BUILTIN_FUNCTIONS = ("torch", "torch._C._nn")
DAMAGES = (zipfile.BadZipFile, NotImplementedError, ValueError, EOFError, OSError, struct.error)  # of zipfile's
LEGACY_MAGIC = pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)
LEGACY_PICKLES = 5  # one after the other: the magic number, the protocol, facts of the system, the object, its storages
SLACK = 64 << 20  # bytes: below this no archive is called a bomb
LONGEST_TEXT = 1 << 20  # bytes beyond the size of the file; torch.save does not compress them
RATIO = 8  # float weights hardly compress, and torch.save does not even try


def read(path: str, allow: Sequence[str] = ()) -> Any:
    """What a file written by ``torch.save`` holds, on the CPU, without running any code from it.

    ``allow`` names packages whose ``nn.Module`` subclasses and enums are admitted besides those of
    torch.nn, torchvision and timm.

    Raises BntoolsError where the file is none of PyTorch's, is truncated, or needs or does
    something that is not admitted; every such name is in the message.
    """
    with open(path, "rb") as file:
        if sniff.is_zip(file):
            return _read_archive(path, file, allow)
        file.seek(0)
        if file.read(len(LEGACY_MAGIC)) == LEGACY_MAGIC:
            _check_legacy(path, file)
            return _read_legacy(path, file)
    raise BntoolsError(f"{path}: not a file that torch.save wrote, and no model file bntools knows")


def check_sizes(path: str, file: BinaryIO) -> None:
    """Refuse an archive that claims to unpack to far more than it is (a decompression bomb)."""
    try:
        with zipfile.ZipFile(file) as archive:
            claimed = sum(entry.file_size for entry in archive.infolist())
    except DAMAGES as error:
        raise BntoolsError(f"{path}: a damaged or truncated archive ({error})") from error
    actual = file.seek(0, io.SEEK_END)
    file.seek(0)
    _check_claim(path, actual, claimed)


def check_tensors(path: str, found: Iterable[Any]) -> None:
    """Refuse tensors that are far more than the file: views may repeat one number, or one another, without end."""
    tensors = (value for value in found if isinstance(value, torch.Tensor) and not is_lazy(value))
    claimed = sum(value.numel() * value.element_size() for value in tensors)
    _check_claim(path, os.path.getsize(path), claimed)


def is_plain(value: Any) -> bool:
    """Whether a value is a tensor of numbers in memory: none that is sparse, nested, quantized, or without values."""
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return False
    return not (value.is_meta or value.is_nested or value.is_quantized)


def _check_claim(path: str, actual: int, claimed: int) -> None:
    if claimed > RATIO * actual + SLACK:
        raise BntoolsError(
            f"{path}: claims to unpack from {actual:,} to {claimed:,} bytes, which no model does: not read"
        )


def scanned(path: str, file: BinaryIO) -> opcodes.Scan:
    """What the pickle in an archive would do. Raises BntoolsError where the archive or the pickle is damaged or a bomb.

    To be called before PyTorch reads it: its restricted unpickler runs nothing, but does not look at sizes and depths.
    """
    check_sizes(path, file)
    try:
        # The reader that torch.load uses: another zip library may see another data.pkl in a crafted file.
        content = torch._C.PyTorchFileReader(file).get_record("data.pkl")
        check_text(path, "data.pkl", content)
        return opcodes.scan(content)
    except (opcodes.Unreadable, RuntimeError, ValueError, OSError) as error:
        raise BntoolsError(f"{path}: damaged, truncated or no PyTorch file: {_first_line(error)}") from error


def check_text(path: str, name: str, content: bytes) -> None:
    """Refuse a pickle or JSON that is far larger than its file: each of its bytes may take a hundred in memory."""
    if len(content) > os.path.getsize(path) + LONGEST_TEXT:
        raise BntoolsError(f"{path}: its {name} claims to unpack to {len(content):,} bytes: not read")


def _read_archive(path: str, file: BinaryIO, allow: Sequence[str]) -> Any:
    scan = scanned(path, file)
    file.seek(0)
    try:
        foreign = set(torch.serialization.get_unsafe_globals_in_checkpoint(file))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
        raise BntoolsError(f"{path}: damaged, truncated or no PyTorch file: {_first_line(error)}") from error
    file.seek(0)
    names = sorted(pair for pair in scan.names if ".".join(pair) in foreign)
    if renamed := foreign - {".".join(pair) for pair in names}:  # names of Python 2, which are translated
        raise BntoolsError(_not_admitted(path, [(name, "") for name in sorted(renamed)] + _strangers(names, allow)))
    objects = _admit(path, names, allow)
    _check_uses(path, scan, objects)
    return _restricted(path, file, [(value, ".".join(name)) for name, value in objects.items()])


def _check_legacy(path: str, file: BinaryIO) -> None:
    """Refuse a file of the old format whose pickles, or the storages in them, claim more than lies there."""
    try:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for _ in range(LEGACY_PICKLES):
                scan = opcodes.scan(content)
                _check_fill(path, scan, {})
                claimed = sum(max(0, number) for number in scan.storages.values())
                if claimed > len(content):
                    raise BntoolsError(f"{path}: truncated: it claims {claimed:,} numbers in {len(content):,} bytes")
    except opcodes.Unreadable as error:
        raise BntoolsError(f"{path}: damaged, truncated or no PyTorch file: {_first_line(error)}") from error


def _read_legacy(path: str, file: BinaryIO) -> Any:
    """The format from before PyTorch 1.6 wraps each module class in a way that the restricted unpickler refuses."""
    try:
        return _restricted(path, file, [])
    except BntoolsError as error:
        foreign = _foreign_legacy(file)
        message = f"{path}: not loaded, because it holds {', '.join(foreign)}, not admitted" if foreign else str(error)
        raise BntoolsError(
            f"{message}. It is in the format from before PyTorch 1.6, of which only weights can be read safely: "
            f"where you trust the file, torch.load it with weights_only=False and torch.save it again; else have "
            f"its author save model.state_dict() alone and pass arch= (--arch)"
        ) from error


def _foreign_legacy(file: BinaryIO) -> list[str]:
    """The names in a file of the old format that PyTorch does not admit, as far as it can be walked through."""
    file.seek(0)
    names: set[str] = set()
    with suppress(pickle.UnpicklingError, EOFError, struct.error, ValueError, IndexError):
        for _ in range(LEGACY_PICKLES):
            names |= _weights_only_unpickler.get_globals_in_pkl(file)
    return sorted(names - set(_weights_only_unpickler._get_allowed_globals()))


def _restricted(path: str, file: BinaryIO, admitted: list[tuple[Any, str]]) -> Any:
    file.seek(0)
    try:
        with torch.serialization.safe_globals(admitted):  # type: ignore[arg-type]
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Anything can surface here: the bytes are not ours, and admitted classes restore their own state.
        raise BntoolsError(f"{path}: damaged, truncated or not readable safely: {_explained(error)}") from error


def _explained(error: Exception) -> str:
    if found := re.search(r"Unsupported global: GLOBAL (\S+)", str(error)):
        return f"it holds {found[1]}, which is not admitted; save model.state_dict() alone and pass arch= (--arch)"
    return f"{type(error).__name__}: {_first_line(error)}"


def _admit(path: str, names: list[tuple[str, str]], allow: Sequence[str]) -> dict[tuple[str, str], Any]:
    """The objects behind the names, all of them admissible; BntoolsError naming all that are not."""
    prefixes = (*ADMITTED, *allow)
    if strangers := _strangers(names, allow):
        raise BntoolsError(_not_admitted(path, strangers))
    objects = {name: _resolve(path, *name, allow) for name in names}
    wrong = [name for name, value in objects.items() if not _admissible(name, value, prefixes)]
    if wrong:
        raise BntoolsError(
            f"{path}: not loaded, because it holds {_listed(wrong)}: only nn.Module classes, enums and the "
            f"functions of torch.nn.functional are admitted. Save model.state_dict() and pass arch= (--arch)"
        )
    return objects


def _strangers(names: list[tuple[str, str]], allow: Sequence[str]) -> list[tuple[str, str]]:
    prefixes = (*ADMITTED, *allow)
    return [name for name in names if not (_within(name[0], prefixes) or name in OURS or name[0] in FUNCTIONS)]


def _resolve(path: str, module: str, name: str, allow: Sequence[str]) -> Any:
    if not all(part.isidentifier() for part in (*module.split("."), name)):
        raise BntoolsError(f"{path}: not loaded, because it holds the crafted name {module!r} {name!r}")
    # The user vouches for what the working folder holds only of the packages that the user named.
    find = imports.imported if _within(module, allow) else imports.installed
    found = find(module, f"{path}: class {module}.{name}")
    if not hasattr(found, name):
        version = getattr(import_module(module.split(".")[0]), "__version__", "installed here")
        raise BntoolsError(
            f"{path}: needs {module}.{name}, which {module.split('.')[0]} {version} does not have: "
            f"install the version the file was written with, or pass its state dict and arch= (--arch)"
        )
    return getattr(found, name)


def _admissible(name: tuple[str, str], value: Any, prefixes: Sequence[str]) -> bool:
    if name in OURS:
        return True
    if name[0] in FUNCTIONS:
        return _is_functional(name[1], value)
    return is_class(value) and _within(value.__module__, prefixes)


def is_class(value: Any) -> bool:
    """Whether an object is a module class or an enum."""
    return isinstance(value, type) and issubclass(value, (nn.Module, enum.Enum))


def _is_functional(name: str, value: Any) -> bool:
    if name.startswith("_") or getattr(F, name, None) is not value:
        return False
    if isinstance(value, types.FunctionType):
        return value.__module__ == F.__name__
    return isinstance(value, types.BuiltinFunctionType) and value.__module__ in BUILTIN_FUNCTIONS


def _check_uses(path: str, scan: opcodes.Scan, objects: dict[tuple[str, str], Any]) -> None:
    """Admitted classes may be instantiated empty and filled, enums looked up by value, no more."""
    enums = {n for n, v in objects.items() if isinstance(v, type) and issubclass(v, enum.Enum)}
    creatable = {n for n, v in objects.items() if isinstance(v, type)} - enums
    _check_fill(path, scan, objects)
    suspicious = (
        (set(objects) & scan.called) - enums
        | (set(objects) & scan.created) - creatable
        | set(objects) & (scan.created_with_arguments | scan.passed | scan.refilled | scan.hooked)
    )
    if suspicious or scan.calls_computed:
        what = _listed(sorted(suspicious)) if suspicious else "an object that it computes"
        raise BntoolsError(
            f"{path}: not loaded, because loading it would call {what}: no saved model does that, "
            f"so the file is damaged or hostile"
        )


def _check_fill(path: str, scan: opcodes.Scan, objects: dict[tuple[str, str], Any]) -> None:
    """An attribute that stands in front of a method would be called in its place."""
    for name, attribute, value in sorted(scan.filled):
        kind = objects.get(name, OrderedDict)  # what PyTorch itself admits is filled as one of these
        if callable(getattr(kind, attribute, None)) and value != OURS[0]:
            raise BntoolsError(
                f"{path}: not loaded, because it puts something else in the place of the method {attribute} of "
                f"{_listed([name])}: no saved model does that, so the file is damaged or hostile"
            )


def _not_admitted(path: str, names: list[tuple[str, str]]) -> str:
    packages = sorted({module.split(".")[0] for module, _ in names})
    allow = ", ".join(repr(package) for package in packages)
    script = " (__main__ is the script that saved it)" if "__main__" in packages else ""
    return (
        f"{path}: not loaded, because it holds {_listed(names)}{script}, not admitted. If these are nn.Module "
        f"classes or enums that you trust, pass allow=({allow},) (--allow {' --allow '.join(packages)}); else save "
        f"model.state_dict() alone and pass arch='package.module:factory' (--arch)"
    )


def _within(module: str, prefixes: Sequence[str]) -> bool:
    return any(module == prefix or module.startswith(prefix + ".") for prefix in prefixes)


def _listed(names: Sequence[tuple[str, str]]) -> str:
    return ", ".join(".".join(name).rstrip(".") for name in names)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].split(". ")[0]
