"""Model files: loading a model, saving it in the form it came in, and atomic writing."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

from bntools import backends, imports
from bntools.datafiles import data_file, taken
from bntools.errors import BntoolsError
from bntools.swapping import atomic_folder

_origins: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # model -> what its back end remembers of its file


def load(path: str | os.PathLike[str], *, arch: Any = None, allow: Sequence[str] | str = ()) -> Any:
    """The model in a file, on the CPU; :func:`save` writes it back in the form it came in.

    An ``.onnx`` file gives an onnx.ModelProto, or an onnx_ir.Model where its weights lie in external files; ``.keras``,
    ``.h5`` and a SavedModel folder of Keras 2 a keras.Model.

    ``arch`` is for files that hold weights alone: a model, a callable without arguments that returns
    one, or the name of either, ``package.module:factory``. ``allow`` names packages whose module
    classes and enums may be unpickled, besides those of torch.nn, torchvision and timm, or whose Keras classes and
    functions may be used. Nothing in the file is ever executed.

        model = bntools.load("resnet.safetensors", arch="torchvision.models:resnet18")

    Raises BntoolsError where the file is missing, empty, damaged, no model, or holds what is not
    admitted.
    """
    path = Path(path)
    backend = reader(path)
    arch = imports.named(arch, "arch") if isinstance(arch, str) else arch
    with _readable(path):
        model, origin = backend.load(str(path), arch=arch, allow=(allow,) if isinstance(allow, str) else tuple(allow))
    with suppress(TypeError):  # a model type that cannot be referred to weakly, and so has no form to go back to
        _origins[model] = origin
    return model


def working(path: str | os.PathLike[str], *, arch: Any = None, allow: Sequence[str] | str = ()) -> Any:
    """As ``load``, for programs that change a model and save it elsewhere.

    Of an ONNX file with external weights only those are read that are asked for: its size does not matter.
    """
    path = Path(path)
    backend = reader(path)
    if not hasattr(backend, "working"):
        return load(path, arch=arch, allow=allow)
    with _readable(path):
        return backend.working(path, arch)


def peek(path: str | os.PathLike[str], *, arch: Any = None, allow: Sequence[str] | str = ()) -> Any:
    """What ``inspect`` needs of a file: read without its framework where that is possible, else as ``working`` does."""
    path = Path(path)
    backend = reader(path)
    if arch is None and hasattr(backend, "peek") and path.is_file():
        with _readable(path):
            found = backend.peek(str(path))
        if found is not None:
            return found
    return working(path, arch=arch, allow=allow)


def reader(path: Path) -> ModuleType:
    """The back end that reads a file; raises BntoolsError for what is no file."""
    if not path.exists():
        raise BntoolsError(f"{path}: no such file")
    if not path.is_file() and not backends.is_saved_model(path):
        found = "a folder" if path.is_dir() else "no regular file"
        raise BntoolsError(f"{path}: is {found}; expected a model file, or a folder with {backends.SAVED_MODEL}")
    return backends.of_path(path)


State = tuple[int, int, int] | None


def state(path: str | os.PathLike[str]) -> State:
    """What tells, without reading it, whether a file was replaced or written to; None where there is none."""
    try:
        now = os.stat(path)
    except OSError:
        return None
    return now.st_ino, now.st_size, now.st_mtime_ns


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        before = state(path)
        if path.is_file() and not path.stat().st_size:
            raise BntoolsError(f"{path}: the file is empty")
        yield
        if path.is_file() and state(path) != before:
            raise BntoolsError(f"{path}: was changed while it was read: try again when it is written to its end")
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be read: {error.strerror or error}") from error


def save(model: Any, path: str | os.PathLike[str], *, overwrite: bool = True) -> None:
    """Write a model to a file, all or not at all, in the form in which it was loaded.

    A checkpoint keeps its other entries, a safetensors file its metadata; weights of an ONNX model that lie in
    external files go to one such file, ``model.1a2b3c4d.data``, beside the new file. Where the suffix asks for
    another form than the model came in, or the model was not loaded from a file, the suffix decides:
    ``.pt`` and ``.pth`` are the whole model pickled, ``.safetensors`` its state dict, ``.keras`` and ``.h5`` a whole
    Keras model. One from a SavedModel folder is saved as such a folder under a name without these suffixes.
    ``overwrite=False`` refuses to replace a file, also one that appears while the model is written.

    Raises BntoolsError where that form cannot hold the model (a state dict of a folded one, say) or
    the file cannot be written; the file is then as before.
    """
    backend = backends.of(model)
    came = origin(model)
    if getattr(came, "folder", False) and Path(path).suffix.lower() not in backends.SUFFIXES:
        with atomic_folder(path, overwrite=overwrite) as temporary:
            backend.save(model, str(path), temporary, came)
        return
    if backends.of_path(Path(path)) is not backend:
        remedy = "an ONNX model is saved as .onnx" if hasattr(backend, "external_files") else "use bntools.export"
        raise BntoolsError(f"{path}: a {type(model).__name__} is not saved as {Path(path).suffix}; {remedy}")
    referred: Callable[[Path], set[str]] = getattr(backend, "external_files", lambda _: set())
    with data_file(path, referred) as data, atomic_write(path, overwrite=overwrite) as temporary:
        backend.save(model, str(path), temporary, came, data)


def origin(model: Any) -> Any:
    """What is remembered of the file a model was loaded from, None if it was not or is a copy."""
    try:
        return _origins.get(model)
    except TypeError:
        return None


@contextmanager
def atomic_write(path: str | os.PathLike[str], *, overwrite: bool = True) -> Iterator[Path]:
    """Write a file all or not at all: yields a temporary path in the same folder to write to.

    When the block ends, what was written is flushed to the disk and takes the place of ``path`` in
    one step, with the permissions of the file it replaces. When the block raises, anything at all,
    the temporary file is removed and ``path`` is as before. The temporary path has the suffix of
    ``path``; a symbolic link stays a link and the file it leads to is replaced. A process that is killed leaves at most
    the temporary file, ``.model.1a2b3c4d.pt``, which nothing reads. With ``overwrite=False`` nothing is replaced.

    Raises BntoolsError where the file cannot be written: no such folder, read-only, disk full.
    """
    target = Path(os.path.realpath(path))
    _check_target(path, target, overwrite)
    temporary = target.with_name(f".{target.stem}.{secrets.token_hex(4)}{target.suffix}")
    try:
        mode = _create(temporary, target)
        yield temporary
        _settle(temporary, target, mode)
        _place(path, temporary, target, overwrite)
    except OSError as error:
        raise BntoolsError(
            f"{path}: cannot be written: {error.strerror or error} "
            f"({'the file there is as before' if target.exists() else 'no file was left behind'})"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def _check_target(path: str | os.PathLike[str], target: Path, overwrite: bool) -> None:
    if target.is_dir():
        raise BntoolsError(f"{path}: is a folder; expected the name of a file to write")
    if target.exists() and not target.is_file():
        raise BntoolsError(f"{path}: is no regular file (a device or a pipe?), so it cannot be replaced by one")
    if not target.parent.is_dir():
        raise BntoolsError(f"{path}: the folder {target.parent} does not exist; create it first")
    if not overwrite and target.exists():
        raise taken(path)


def _create(temporary: Path, target: Path) -> int:
    """Create the file with the permissions a new file gets here (umask) and return those to end with."""
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    try:
        default = os.fstat(descriptor).st_mode
    finally:
        os.close(descriptor)
    return stat.S_IMODE(target.stat().st_mode if target.exists() else default)


def _settle(temporary: Path, target: Path, mode: int) -> None:
    """Flush. The permissions come last: some writers recreate the file they are given."""
    descriptor = os.open(temporary, os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    os.chmod(temporary, mode)


def _place(path: str | os.PathLike[str], temporary: Path, target: Path, overwrite: bool) -> None:
    """Give what was written its name. Raises BntoolsError where a file has it that is not to be replaced.

    Such a file may have appeared just now: who looks first, and replaces then, is too late.
    """
    if overwrite:
        os.replace(temporary, target)
        return
    try:
        try:
            os.link(temporary, target)
        except FileExistsError:
            raise
        except OSError:  # a file system without second names: an empty file holds the place
            os.close(os.open(target, os.O_CREAT | os.O_EXCL))
            try:
                os.replace(temporary, target)
            except BaseException:
                target.unlink()
                raise
    except FileExistsError as error:
        raise taken(path) from error
