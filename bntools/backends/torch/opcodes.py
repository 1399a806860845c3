"""What a pickle would do if it were read: a walk over its opcodes that runs nothing.

Follows the stack as pickle's virtual machine does (``pickletools`` documents each opcode), keeping of
each value only which global names can be reached through it.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

Name = tuple[str, str]  # module, attribute


class Unreadable(Exception):
    """The bytes are no pickle of the kind that torch.save writes."""


@dataclass
class Scan:
    """The global names in a pickle, and what it does with them.

    ``called``: called (REDUCE). ``created``: instantiated without running ``__init__`` (NEWOBJ).
    ``passed``: reachable from the arguments of a call. ``refilled``: the result of calling it was
    given other state (BUILD). ``calls_computed``: something other than a named global is called.
    """

    names: set[Name] = field(default_factory=set)
    called: set[Name] = field(default_factory=set)
    created: set[Name] = field(default_factory=set)
    created_with_arguments: set[Name] = field(default_factory=set)
    passed: set[Name] = field(default_factory=set)
    refilled: set[Name] = field(default_factory=set)
    calls_computed: bool = False


@dataclass(eq=False)
class _Value:
    """A value on the stack: the global it is or is an instance of, and the values inside it."""

    name: Name | None = None
    is_global: bool = False
    is_result: bool = False
    is_empty_tuple: bool = False
    inside: list[_Value] = field(default_factory=list)

    def reachable(self) -> set[Name]:
        seen: set[int] = set()
        names: set[Name] = set()
        pending = [self]
        while pending:
            value = pending.pop()
            if id(value) not in seen:
                seen.add(id(value))
                names |= {value.name} if value.name else set()
                pending += value.inside
        return names


def scan(data: bytes) -> Scan:
    """Walk over a pickle. Raises Unreadable for opcodes that the restricted unpickler does not know."""
    machine = _Machine()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of odd escapes in damaged names, which are refused
            for opcode, argument, position in pickletools.genops(data):
                if opcode.name == "GLOBAL" and position is not None:
                    argument = _global_name(data, position)
                machine.step(opcode.name, argument)
    except Unreadable:
        raise
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise Unreadable(f"damaged or truncated pickle ({error})") from error
    return machine.scan


def _global_name(data: bytes, position: int) -> Name:
    """The two lines of a GLOBAL as they stand: ``pickletools`` undoes escapes in them that unpicklers do not."""
    module, name, _ = data[position + 1 :].split(b"\n", 2)
    if b"\\" in module + name:
        raise Unreadable(f"crafted global name {module + b' ' + name!r}")
    return module.decode("ascii"), name.decode("ascii")


class _Machine:
    def __init__(self) -> None:
        self.scan = Scan()
        self.stack: list[_Value] = []
        self.marks: list[list[_Value]] = []
        self.memo: dict[int, _Value] = {}

    def step(self, opcode: str, argument: object) -> None:
        if opcode in CONSTANTS:
            self.stack.append(_Value())
        elif opcode in STEPS:
            STEPS[opcode](self)
        elif opcode in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = self.stack[-1]  # type: ignore[index]
        elif opcode in ("BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])  # type: ignore[index]
        elif opcode == "GLOBAL":
            self.scan.names.add(argument)  # type: ignore[arg-type]
            self.stack.append(_Value(argument, is_global=True))  # type: ignore[arg-type]
        elif opcode not in ("PROTO", "STOP"):
            raise Unreadable(
                f"pickle opcode {opcode} (written with a pickle_protocol other than 2?); save it again with "
                f"torch.save(model, path)"
            )

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[_Value]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_(self, size: int | None = None) -> None:
        items = self.pop_mark() if size is None else [self.stack.pop() for _ in range(size)]
        self.stack.append(_Value(inside=items))

    def put_in(self, count: int | None = None) -> None:
        items = self.pop_mark() if count is None else [self.stack.pop() for _ in range(count)]
        self.stack[-1].inside += items

    def reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if called.name and called.is_global:
            self.scan.called.add(called.name)
        else:
            self.scan.calls_computed = True
        self.scan.passed |= arguments.reachable()
        self.stack.append(_Value(called.name, is_result=True, inside=[arguments]))

    def newobj(self) -> None:
        arguments, made = self.stack.pop(), self.stack.pop()
        if not (made.name and made.is_global):
            self.scan.calls_computed = True
        else:
            self.scan.created.add(made.name)
            if not arguments.is_empty_tuple:
                self.scan.created_with_arguments.add(made.name)
        self.stack.append(_Value(made.name, inside=[arguments]))

    def build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if target.name and (target.is_result or target.is_global):
            self.scan.refilled.add(target.name)
        target.inside.append(state)

    def persistent(self) -> None:
        self.stack[-1] = _Value()  # a storage; the restricted unpickler loads nothing else this way


CONSTANTS = (
    "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "LONG1",
    "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET",
)  # fmt: skip
STEPS: dict[str, Callable[[_Machine], None]] = {
    "EMPTY_TUPLE": lambda machine: machine.stack.append(_Value(is_empty_tuple=True)),
    "MARK": _Machine.mark,
    "TUPLE": _Machine.tuple_,
    "TUPLE1": lambda machine: machine.tuple_(1),
    "TUPLE2": lambda machine: machine.tuple_(2),
    "TUPLE3": lambda machine: machine.tuple_(3),
    "APPEND": lambda machine: machine.put_in(1),
    "SETITEM": lambda machine: machine.put_in(2),
    "APPENDS": _Machine.put_in,
    "SETITEMS": _Machine.put_in,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
