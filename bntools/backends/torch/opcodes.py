"""What a pickle would do if it were read: a walk over its opcodes that runs nothing.

Follows the stack as pickle's virtual machine does (``pickletools`` documents each opcode), keeping of
each value only which global names can be reached through it.
"""

from __future__ import annotations

import mmap
import pickletools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

Name = tuple[str, str]  # module, attribute
DEEPEST = 500  # tuples in one another; Python hashes a tuple by recursion, without a limit (a key of a dict is hashed)
LONGEST_NAME = 4096  # bytes
HEAVIEST = 1 << 60  # a few bytes can double what there is
WORK = 1 << 20  # values that may be hashed or copied, plus as many for each byte


class Unreadable(Exception):
    """The bytes are no pickle of the kind that torch.save writes."""


@dataclass
class Scan:
    """The global names in a pickle, and what it does with them.

    ``called``: called (REDUCE). ``created``: instantiated without running ``__init__`` (NEWOBJ).
    ``passed``: reachable from the arguments of a call. ``refilled``: the result of calling it was
    given other state (BUILD). ``calls_computed``: something other than a named global is called. ``filled``: the
    attributes that objects are given which one could call, between the classes of both. ``hooked``: reachable from
    what is called a hook. ``storages``: the number of elements that each storage is said to have.
    """

    names: set[Name] = field(default_factory=set)
    called: set[Name] = field(default_factory=set)
    created: set[Name] = field(default_factory=set)
    created_with_arguments: set[Name] = field(default_factory=set)
    passed: set[Name] = field(default_factory=set)
    refilled: set[Name] = field(default_factory=set)
    calls_computed: bool = False
    filled: set[tuple[Name, str, Name]] = field(default_factory=set)
    hooked: set[Name] = field(default_factory=set)
    storages: dict[str, int] = field(default_factory=dict)


@dataclass(eq=False, slots=True)
class _Value:
    """A value on the stack: the global it is or is an instance of, and the values inside it.

    ``constant`` is a text or number. ``depth`` and ``weight`` are those of tuples in one another: hashing the value
    takes so much of the C stack, and looks at so many values.
    """

    name: Name | None = None
    is_global: bool = False
    is_result: bool = False
    is_empty_tuple: bool = False
    inside: list[_Value] = field(default_factory=list)
    constant: object = None
    depth: int = 0
    weight: int = 1


def _reachable(values: list[_Value]) -> set[Name]:
    seen: set[int] = set()
    names: set[Name] = set()
    pending = list(values)
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            names |= {value.name} if value.name else set()
            pending += value.inside
    return names


def _heavy(values: Sequence[_Value]) -> int:
    return min(HEAVIEST, sum(value.weight for value in values))


def scan(data: bytes | mmap.mmap) -> Scan:
    """Walk over a pickle, or the next one in a mapped file, which is then read up to its end.

    Raises Unreadable for opcodes that the restricted unpickler does not know, and for a pickle made to take more
    time, memory or stack than its size.
    """
    machine = _Machine(WORK + len(data))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of odd escapes in damaged names, which are refused
            for opcode, argument, position in pickletools.genops(data):  # type: ignore[arg-type]
                if opcode.name == "GLOBAL" and position is not None:
                    argument = _global_name(data, position)
                machine.step(opcode.name, argument)
    except Unreadable:
        raise
    except (ValueError, IndexError, KeyError, UnicodeError) as error:
        raise Unreadable(f"damaged or truncated pickle ({error})") from error
    return machine.finished()


def _global_name(data: bytes | mmap.mmap, position: int) -> Name:
    """The two lines of a GLOBAL as they stand: ``pickletools`` undoes escapes in them that unpicklers do not."""
    module, name, _ = data[position + 1 : position + 1 + LONGEST_NAME].split(b"\n", 2)
    if b"\\" in module + name:
        raise Unreadable(f"crafted global name {module + b' ' + name!r}")
    return module.decode("ascii"), name.decode("ascii")


class _Machine:
    def __init__(self, work: int) -> None:
        self.scan = Scan()
        self.stack: list[_Value] = []
        self.marks: list[list[_Value]] = []
        self.memo: dict[int, _Value] = {}
        self.work = work
        self.passed: list[_Value] = []
        self.hooks: list[_Value] = []

    def step(self, opcode: str, argument: object) -> None:
        if opcode in CONSTANTS:
            self.stack.append(_Value(constant=argument))
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

    def finished(self) -> Scan:
        """What was seen. What values reach is looked up once, at the end: a list may be filled after it was passed."""
        self.scan.passed = _reachable(self.passed)
        self.scan.hooked = _reachable(self.hooks)
        return self.scan

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[_Value]:
        items, self.stack = self.stack, self.marks.pop()
        return items

    def tuple_(self, size: int | None = None) -> None:
        items = self.pop_mark() if size is None else [self.stack.pop() for _ in range(size)][::-1]
        self.stack.append(self.made_of(_Value(inside=items), items))

    def made_of(self, value: _Value, items: list[_Value]) -> _Value:
        value.depth = 1 + max((item.depth for item in items), default=0)
        value.weight = _heavy((value, *items))
        if value.depth > DEEPEST:
            raise Unreadable(f"tuples in tuples, more than {DEEPEST} deep, which no model has")
        return value

    def spend(self, weight: int) -> None:
        self.work -= weight
        if self.work < 0:
            raise Unreadable("it repeats its parts far more often than any model does")

    def append(self, size: int | None = None) -> None:
        self.put_in(self.pop_mark() if size is None else [self.stack.pop()])

    def put_in(self, items: list[_Value]) -> None:
        self.stack[-1].inside += items
        self.stack[-1].weight = _heavy((self.stack[-1], *items))

    def set_items(self, size: int | None = None) -> None:
        items = self.pop_mark() if size is None else [self.stack.pop() for _ in range(size)][::-1]
        self.spend(_heavy(items[::2]))  # they are hashed
        self.put_in(items)

    def reduce(self) -> None:
        arguments, called = self.stack.pop(), self.stack.pop()
        if called.name and called.is_global:
            self.scan.called.add(called.name)
        else:
            self.scan.calls_computed = True
        self.spend(arguments.weight)
        if called.name == ("builtins", "bytearray") and any(isinstance(one.constant, int) for one in arguments.inside):
            raise Unreadable("it makes an empty bytearray, which no model needs")
        self.passed.append(arguments)
        self.stack.append(self.made_of(_Value(called.name, is_result=True, inside=[arguments]), [arguments]))

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
        for held in state.inside if state.depth else [state]:  # a pair of a dict and of slots, or a dict
            for key, value in zip(held.inside[::2], held.inside[1::2], strict=False):
                if not isinstance(key.constant, str):
                    continue
                if key.constant.startswith("_") and key.constant.endswith("_hooks"):
                    self.hooks.append(value)
                if target.name and value.name and not value.is_result:
                    self.scan.filled.add((target.name, key.constant, value.name))
        target.inside.append(state)

    def persistent(self) -> None:
        """A storage; the restricted unpickler loads nothing else this way."""
        match [one.constant for one in self.stack[-1].inside]:
            case ["storage", _, key, _, int(number), *_]:
                self.scan.storages[str(key)] = number
        self.stack[-1] = _Value()


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
    "APPEND": lambda machine: machine.append(1),
    "SETITEM": lambda machine: machine.set_items(2),
    "APPENDS": _Machine.append,
    "SETITEMS": _Machine.set_items,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.newobj,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}
