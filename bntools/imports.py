"""Objects that a user names as ``package.module:attribute``, and the importing of what was named."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

from bntools.errors import BntoolsError


def named(spec: str, role: str) -> Any:
    """The object named ``package.module:attribute``; ``role`` says in errors what it is for (``arch``).

    The working folder counts as a place to import from, after all others.

    Raises BntoolsError where the name has another form, the module cannot be imported, or has no
    such attribute.
    """
    module_name, colon, attribute = spec.partition(":")
    if not (colon and module_name and attribute):
        raise BntoolsError(f"{role} {spec!r}: expected package.module:name, for example torchvision.models:resnet18")
    module = imported(module_name, f"{role} {spec!r}")
    value: Any = module
    for part in attribute.split("."):
        if not hasattr(value, part):
            public = [name for name in dir(module) if not name.startswith("_")]
            raise BntoolsError(
                f"{role} {spec!r}: {module_name} has no {attribute!r}; it has {', '.join(public[:8]) or 'nothing'}"
            )
        value = getattr(value, part)
    return value


def imported(name: str, role: str) -> ModuleType:
    """Import a module that the user named, from the import path or the working folder.

    Whatever goes wrong inside it becomes a BntoolsError with its cause.
    """
    with _working_folder():
        return _imported(name, role, "on the import path or in the working folder")


def installed(name: str, role: str) -> ModuleType:
    """Import a module that a file names, never from the working folder, where the file's maker may have put one.

    Whatever goes wrong inside it becomes a BntoolsError with its cause.
    """
    package = name.partition(".")[0]
    with _no_working_folder():
        return _imported(
            name,
            role,
            f"on the import path outside the working folder (install it; where the one in the working folder is "
            f"meant and trusted, pass allow=({package!r},), --allow {package})",
        )


def _imported(name: str, role: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and (name == error.name or name.startswith(error.name + ".")):
            raise BntoolsError(f"{role}: there is no module {error.name!r} {where}") from error
        raise BntoolsError(f"{role}: importing {name} failed: {error}") from error
    except Exception as error:
        raise BntoolsError(f"{role}: importing {name} failed: {type(error).__name__}: {error}") from error


@contextmanager
def _working_folder() -> Iterator[None]:
    """A console script, unlike ``python -m``, does not have the working folder on its import path."""
    folder = os.getcwd()
    if folder in sys.path or "" in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


@contextmanager
def _no_working_folder() -> Iterator[None]:
    """``python -m`` and ``python -c`` do have the working folder on the import path, as its first entry or as ''."""
    before = list(sys.path)
    folder = os.path.realpath(os.getcwd())
    sys.path[:] = [entry for entry in before if os.path.realpath(entry) != folder]
    try:
        yield
    finally:
        sys.path[:] = [*before, *(entry for entry in sys.path if entry not in before)]
