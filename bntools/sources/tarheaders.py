"""The headers of a tar file (POSIX.1-2001 pax, ustar and GNU), one by one, without trusting them.

Python's tarfile keeps every header it has seen (1 kB each) and reads extended headers of any length; here nothing is
kept, and what a header says is held against the size of the file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bntools import sniff
from bntools.errors import BntoolsError

BLOCK = 512
LONGEST = 1 << 20  # bytes of an extended header: names and times take hundreds
COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
FILES, FOLDER, SPARSE = (b"0", b"\0", b"7"), b"5", b"S"
EXTENDED, GLOBAL, LONG_NAME, LONG_LINK = b"x", b"g", b"L", b"K"
KINDS = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
}
EMPTY = (*KINDS, FOLDER)  # what has no bytes of its own, whatever its header says of its size


@dataclass(frozen=True)
class Member:
    """A member of an archive: where its bytes are, and why they are not to be read, empty if they are."""

    name: str
    offset: int
    size: int
    is_folder: bool
    problem: str


def members(path: Path, descriptor: int, length: int) -> Iterator[Member]:
    """The members of an open tar file of so many bytes. Raises BntoolsError for bytes that are no header."""
    position = 0
    extended: dict[str, str] = {}
    while position + BLOCK <= length:
        block = os.pread(descriptor, BLOCK, position)
        if not block.strip(b"\0"):
            return
        _check_sum(path, block, position)
        kind, offset = block[156:157], position + BLOCK
        size = _number(path, block, position)
        if kind in (EXTENDED, GLOBAL, LONG_NAME, LONG_LINK):
            position = offset + _padded(size)
            if size > min(LONGEST, length - offset):
                raise BntoolsError(f"{path}: damaged: an extended header of {size:,} bytes at byte {offset - BLOCK:,}")
            if kind in (EXTENDED, LONG_NAME):
                extended |= _extended(kind, os.pread(descriptor, size, offset))
            continue
        if kind == SPARSE:  # an old form, in which more headers follow
            raise BntoolsError(f"{path}: holds a sparse member ({_name(block)}): pack it without --sparse")
        if re.fullmatch("[0-9]{1,18}", extended.get("size", "")):
            size = int(extended["size"])
        position = offset + (0 if kind in EMPTY else _padded(size))
        name = extended.get("path") or _name(block)
        extended, sparse = {}, any(key.startswith("GNU.sparse") for key in extended)
        folder = kind == FOLDER or (kind in FILES and name.endswith("/"))
        yield Member(name, offset, size, folder, "" if folder else _problem(kind, name, sparse, offset + size > length))
    if not position:
        raise BntoolsError(f"{path}: no tar archive, but {sniff.described(os.pread(descriptor, BLOCK, 0))}")


def has_end(descriptor: int, length: int) -> bool:
    """Whether an open tar file of so many bytes has its end, blocks of zeros, and was not cut between two members."""
    return not os.pread(descriptor, BLOCK, max(0, length - BLOCK)).strip(b"\0")


def _problem(kind: bytes, name: str, sparse: bool, beyond: bool) -> str:
    if sparse or kind not in FILES:
        return f"{'a sparse file' if sparse else KINDS.get(kind, 'of an unknown kind')}, not an ordinary member"
    if name.startswith("/") or ".." in name.split("/"):
        return "its path leads out of the archive"
    return "the archive ends in the middle of it" if beyond else ""


def _check_sum(path: Path, block: bytes, position: int) -> None:
    try:
        said = int(block[148:156].strip(b" \0") or b"0", 8)
    except ValueError:
        said = -1
    if said != sum(block) - sum(block[148:156]) + 8 * ord(" "):
        found = f"no tar header at byte {position:,}: the archive is damaged" if position else "no tar archive"
        raise BntoolsError(f"{path}: {found}{'' if position else f', but {sniff.described(block)}'}")


def _number(path: Path, block: bytes, position: int) -> int:
    """The size field: octal digits, or for 8 GiB and more a big-endian number behind the byte 0x80."""
    field = block[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        size = int(field.strip(b" \0") or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise BntoolsError(f"{path}: damaged: no size in the tar header at byte {position:,}")
    return size


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


def _name(block: bytes) -> str:
    name = block[:100].split(b"\0", 1)[0]
    if block[257:263] == b"ustar\0" and block[345]:  # GNU's magic differs, and it has other things there
        name = block[345:500].split(b"\0", 1)[0] + b"/" + name
    return os.fsdecode(name)


def _extended(kind: bytes, content: bytes) -> dict[str, str]:
    """What an extended header says of the member that follows; ``b"12 path=a/b\\n"`` repeated, or a name alone."""
    if kind == LONG_NAME:
        return {"path": os.fsdecode(content.split(b"\0", 1)[0])}
    found = {}
    while content:
        digits, _, _ = content.partition(b" ")
        if not digits.isdigit() or not len(digits) < int(digits[:8]) <= len(content):
            break
        record, content = content[len(digits) + 1 : int(digits)], content[int(digits) :]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        found[os.fsdecode(key)] = os.fsdecode(value)
    return found
