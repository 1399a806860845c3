"""Mutations of protobuf messages by their fields, as ONNX files are made of: lengths stay right all the way up."""

from __future__ import annotations

import random
from collections.abc import Iterator

from mutators import NUMBERS, TEXTS, blind

Field = tuple[int, int, object]  # number, wire type, value: an int, bytes, or a list of fields


def protobuf(data: bytes, rng: random.Random) -> bytes:
    """A few fields of a message, at any depth, changed, taken out, doubled or moved."""
    message = _parsed(data)
    if not message or rng.random() < 0.15:
        return blind(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holders = [(fields, place) for fields in _all(message) for place in range(len(fields))]
        if holders:
            _change(*rng.choice(holders), holders, rng)
    return _packed(message)


def _change(fields: list[Field], place: int, holders: list, rng: random.Random) -> None:
    number, kind, value = fields[place]
    what = rng.randrange(8)
    if what == 0:
        del fields[place]
    elif what == 1:
        fields.append(fields[place])
    elif what == 2:
        other, at = rng.choice(holders)
        if at < len(other) and len(_packed(other)) < 10_000:
            fields[place] = (number, *_copied(other[at])[1:])
    elif what == 3:
        fields[place] = (rng.randrange(1, 30), kind, value)
    elif isinstance(value, int):
        fields[place] = (number, kind, rng.choice((value + 1, *NUMBERS)) % (1 << 64))
    elif isinstance(value, list):
        fields[place] = (number, kind, blind(_packed(value), rng))
    else:
        assert isinstance(value, bytes)
        fields[place] = (number, kind, blind(value, rng) if rng.random() < 0.5 else rng.choice(TEXTS).encode())


def _copied(field: Field) -> Field:
    number, kind, value = field
    return number, kind, list(map(_copied, value)) if isinstance(value, list) else value


def _all(fields: list[Field]) -> Iterator[list[Field]]:
    yield fields
    for _, _, value in fields:
        if isinstance(value, list):
            yield from _all(value)


def _parsed(data: bytes, depth: int = 0) -> list[Field] | None:
    fields: list[Field] = []
    place = 0
    while place < len(data):
        try:
            tag, place = _varint(data, place)
            number, kind = tag >> 3, tag & 7
            if kind == 0:
                value: object
                value, place = _varint(data, place)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
                value, place = data[place : place + size], place + size
            elif kind == 2:
                size, place = _varint(data, place)
                inner, place = data[place : place + size], place + size
                value = (_parsed(inner, depth + 1) if depth < 6 and 1 < size < 100_000 else None) or inner
            else:
                return None
        except IndexError:
            return None
        if not number or number > 2000 or place > len(data):
            return None
        fields.append((number, kind, value))
    return fields


def _packed(fields: list[Field]) -> bytes:
    parts = []
    for number, kind, value in fields:
        parts.append(_encoded(number << 3 | kind))
        if isinstance(value, int):
            parts.append(_encoded(value))
        else:
            content = _packed(value) if isinstance(value, list) else value
            assert isinstance(content, bytes)
            parts.append(_encoded(len(content)) + content if kind == 2 else content)
    return b"".join(parts)


def _varint(data: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128 or shift > 63:
            return value, place


def _encoded(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])
