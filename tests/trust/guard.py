"""What a file must not make its reader do, watched from inside the interpreter."""

from __future__ import annotations

import os
import sys
from typing import Any

FORBIDDEN = (
    "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty", "subprocess.Popen", "pty.spawn",
    "socket.connect", "socket.bind", "socket.getaddrinfo", "urllib.Request", "ftplib.connect", "http.client.connect",
    "ctypes.dlopen", "webbrowser.open", "os.putenv", "os.link", "os.symlink", "os.chmod", "os.chown", "os.kill",
    "shutil.rmtree", "code.__new__",
)  # fmt: skip
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
PLACES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir")  # their last argument is a folder, -1 for none
# Who makes classes and types from text; and PyTorch's parser of expressions and writer of guards, to which bntools lets
# nothing pass but arithmetic on sizes.
WRITERS = (
    "collections/__init__.py", "dataclasses.py", "/typing.py", "sympy/parsing/sympy_parser.py",
    "torch/export/_unlift.py",
)  # fmt: skip
GENERATED = ("<eval_with_key>", "<frozen", "<__array_function__", "<lambda", "<lambdifygenerated", "<attrs generated")


class Guard:
    """An audit hook: while ``armed`` it notes what reading a file must not do. It cannot be taken out again.

    ``folder`` is the only place where files may be written, ``modules`` the packages whose modules may be imported.
    """

    def __init__(self, folder: str):
        self.folder = os.path.realpath(folder)
        self.armed = False
        self.seen: list[str] = []
        self.packages = {name.partition(".")[0] for name in sys.modules}
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.armed:
            return
        if event in FORBIDDEN and not (event == "shutil.rmtree" and self._inside(arguments[0])):
            if not (event == "os.symlink" and self._inside(arguments[1])):
                self.seen.append(f"{event} {arguments!r:.200}")
        elif event in PLACES and arguments[-1] == -1 and not self._inside(arguments[0]):  # else shutil.rmtree's own
            self.seen.append(f"{event} {arguments!r:.200}")
        elif event == "open":
            self._opened(*arguments)
        elif event == "import":
            package = str(arguments[0]).partition(".")[0]
            if package not in self.packages:
                self.seen.append(f"import {arguments[0]}")
        elif event == "exec":
            place = getattr(arguments[0], "co_filename", "?")
            if not (os.path.isabs(place) or place.startswith(GENERATED) or _caller().endswith(WRITERS)):
                self.seen.append(f"exec of code in {place} by {_caller()}")

    def _opened(self, path: Any, mode: Any, flags: Any) -> None:
        writing = any(one in mode for one in "wax+") if isinstance(mode, str) else bool((flags or 0) & WRITES)
        if writing and not (isinstance(path, int) or self._inside(path)):
            self.seen.append(f"open {path!r} {mode!r}")

    def _inside(self, path: Any) -> bool:
        place = os.path.realpath(os.fsdecode(path)) if isinstance(path, (str, bytes, os.PathLike)) else self.folder
        return place.startswith(self.folder) or place == os.devnull


def _caller() -> str:
    """The file whose code does what the hook is told of."""
    return sys._getframe(2).f_code.co_filename
