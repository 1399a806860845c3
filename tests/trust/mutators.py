"""Mutations of files by their structure: an archive stays one, a checksum is right again, a length fits its field.

Every mutator takes bytes and a ``random.Random`` and gives bytes; one that cannot make sense of its input falls back
to blind changes.
"""

from __future__ import annotations

import copy
import io
import json
import pickletools
import random
import struct
import zipfile
import zlib
from collections.abc import Callable

Mutator = Callable[[bytes, random.Random], bytes]
NUMBERS = (0, 1, 2, 7, 8, 127, 128, 255, 256, 32767, 65535, 1 << 20, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)
SIGNED = (*NUMBERS, *(-one for one in NUMBERS[1:]))
TEXTS = (
    "", ".", "..", "/", "../../x", "/etc/passwd", "/dev/zero", "\x00", "é" * 9, "a" * 3000, "__main__", "eval", "NaN",
    "os.system", "torch.nn.functional", "__class__", "__reduce__", "{}", "[]", "1e999", "-1", "Lambda", "keras.utils",
    "get_file", "BatchNormalization", "running_mean", "running_var", "F64", "BOOL", "float16", "http://127.0.0.1:9/x",
)  # fmt: skip
JSON_VALUES = (None, True, False, 0, -1, 1e308, 2**63, 10**30, float("nan"), float("inf"), [], {}, [[]], *TEXTS)


def blind(data: bytes, rng: random.Random) -> bytes:
    """A few bytes flipped, replaced by numbers of note, taken out, doubled, or moved; or the end cut off."""
    new = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4, 16))):
        if not new:
            break
        place = rng.randrange(len(new))
        kind = rng.randrange(7)
        if kind <= 1:
            new[place] ^= 1 << rng.randrange(8)
        elif kind == 2:
            new[place] = rng.randrange(256)
        elif kind == 3:
            size = rng.choice((1, 2, 4, 8))
            number = rng.choice(NUMBERS) & ((1 << 8 * size) - 1)
            new[place : place + size] = number.to_bytes(size, rng.choice(("little", "big")))
        elif kind == 4:
            del new[place : place + rng.choice((1, 2, 4, 8, 64))]
        elif kind == 5:
            size = rng.choice((1, 4, 16, 64))
            new[place:place] = new[rng.randrange(len(new)) :][:size]
        elif rng.random() < 0.3:
            del new[place:]
    return bytes(new)


def archive(members: Callable[[str], Mutator]) -> Mutator:
    """Mutates one member of a zip archive (as ``members`` tells by its name), with a right checksum, or its table."""

    def mutate(data: bytes, rng: random.Random) -> bytes:
        if rng.random() < 0.15:
            return blind(data, rng)
        try:
            with zipfile.ZipFile(io.BytesIO(data)) as file:
                entries = [(entry.filename, file.read(entry)) for entry in file.infolist()]
        except Exception:  # of a file that was damaged before
            entries = []
        if not entries:
            return blind(data, rng)
        place = rng.randrange(len(entries)) if rng.random() < 0.5 else _largest_by_interest(entries, rng)
        name, content = entries[place]
        if rng.random() < 0.85:
            entries[place] = (name, members(name)(content, rng))
        else:
            _rearrange(entries, place, rng)
        new = _zipped(entries, rng)
        return _lying_table(new, rng) if rng.random() < 0.08 else new

    return mutate


def _largest_by_interest(entries: list[tuple[str, bytes]], rng: random.Random) -> int:
    told = [i for i, (name, _) in enumerate(entries) if name.endswith((".pkl", ".json", ".h5", ".npy"))]
    return rng.choice(told) if told else rng.randrange(len(entries))


def _rearrange(entries: list[tuple[str, bytes]], place: int, rng: random.Random) -> None:
    name, content = entries[place]
    kind = rng.randrange(4)
    if kind == 0:
        del entries[place]
    elif kind == 1:
        entries.append((name, blind(content, rng)))
    elif kind == 2:
        entries[place] = (rng.choice(TEXTS) or "x", content)
    else:
        entries[place] = (rng.choice(("../", "/", "C:\\", "a/../../")) + name, content)


def _zipped(entries: list[tuple[str, bytes]], rng: random.Random) -> bytes:
    buffer = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, content in entries:
            info = zipfile.ZipInfo(name.replace("\x00", "_"))
            info.compress_type = method
            file.writestr(info, content)
    return buffer.getvalue()


def _lying_table(data: bytes, rng: random.Random) -> bytes:
    """Another number in an entry of the central directory: sizes, offset, method, flags."""
    places = [i for i in range(len(data)) if data.startswith(b"PK\x01\x02", i)]
    if not places:
        return data
    new = bytearray(data)
    offset, size = rng.choice(((8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (42, 4)))
    at = rng.choice(places) + offset
    new[at : at + size] = (rng.choice(NUMBERS) & ((1 << 8 * size) - 1)).to_bytes(size, "little")
    return bytes(new)


GLOBALS = (
    b"torch.nn.modules.batchnorm\nBatchNorm2d", b"torch.nn.functional\nrelu", b"collections\nOrderedDict",
    b"torch._utils\n_rebuild_tensor_v2", b"torch._utils\n_rebuild_parameter", b"torch._tensor\n_rebuild_from_type_v2",
    b"torch._utils\n_rebuild_meta_tensor_no_storage", b"torch._utils\n_rebuild_sparse_tensor",
    b"torch._utils\n_rebuild_qtensor", b"torch._utils\n_rebuild_nested_tensor", b"torch\nFloatStorage",
    b"torch._utils\n_rebuild_wrapper_subclass", b"builtins\nbytearray", b"builtins\nset", b"_codecs\nencode",
    b"collections\nCounter", b"torch\nSize", b"torch\ndevice", b"torch.nn.parameter\nParameter", b"os\nsystem",
    b"builtins\neval", b"torch.nn.functional\n__builtins__", b"torch\nload", b"torch\nTensor", b"torch\nfloat64",
    b"torch.nn.modules.container\nSequential", b"torch.serialization\n_get_layout", b"torch\nsparse_coo", b"posix\nx",
)  # fmt: skip
SNIPPETS = (
    b"N", b"\x88", b"\x89", b"(", b")", b"]", b"}", b"R", b"b", b"s", b"a", b"u", b"e", b"t", b"\x85", b"\x86", b"\x87",
    b"\x81", b"Q", b".", b"\x8f", b"0", b"2", b"1", b"o", b"\x82\x01", b"\x93", b"\x94", b"q\x00", b"h\x00", b"q\x01",
    b"h\x01", b"G\x7f\xf8\x00\x00\x00\x00\x00\x00", b"X\x07\x00\x00\x00storage", b"}b", b")R", b")\x81", b"\x85R",
)  # fmt: skip


def pickled(data: bytes, rng: random.Random) -> bytes:
    """Opcodes of a pickle taken out, doubled, swapped, put in, or given another argument."""
    if rng.random() < 0.15:
        return blind(data, rng)
    try:
        places = [place for _, _, place in pickletools.genops(data) if place is not None]
    except Exception:
        return blind(data, rng)
    codes = [data[a:b] for a, b in zip(places, [*places[1:], len(data)], strict=True)]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        place, kind = rng.randrange(len(codes)), rng.randrange(8)
        if kind == 0 and len(codes) > 1:
            del codes[place]
        elif kind == 1:
            codes.insert(place, rng.choice(codes))
        elif kind == 2:
            other = rng.randrange(len(codes))
            codes[place], codes[other] = codes[other], codes[place]
        elif kind == 3:
            codes.insert(place, rng.choice(SNIPPETS))
        elif kind == 4:
            codes.insert(place, b"c" + rng.choice(GLOBALS) + b"\n")
        elif kind == 5:
            codes[place] = _pickled_value(rng)
        else:
            codes[place] = _like(codes[place], rng)
    return b"".join(codes)


def _like(code: bytes, rng: random.Random) -> bytes:
    """An opcode of the same kind with another argument."""
    if code[:1] in b"KMJ\x8a":
        return _pickled_int(rng)
    if code[:1] == b"X":
        return _pickled_text(rng.choice(TEXTS))
    if code[:1] == b"c":
        return b"c" + rng.choice(GLOBALS) + b"\n"
    if code[:1] in b"hqjr":
        return code[:1] + bytes([rng.randrange(64)]) + code[2:]
    return rng.choice(SNIPPETS)


def _pickled_value(rng: random.Random) -> bytes:
    return _pickled_int(rng) if rng.random() < 0.5 else _pickled_text(rng.choice(TEXTS))


def _pickled_int(rng: random.Random) -> bytes:
    number = rng.choice(SIGNED)
    content = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def _pickled_text(text: str) -> bytes:
    return b"X" + struct.pack("<I", len(text.encode())) + text.encode()


def jsoned(data: bytes, rng: random.Random) -> bytes:
    """A value in JSON replaced, taken out, doubled, or wrapped; JSON inside a string is gone into."""
    if rng.random() < 0.15:
        return blind(data, rng)
    try:
        return json.dumps(_changed(json.loads(data), rng), separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        return blind(data, rng)


def _changed(value: object, rng: random.Random) -> object:
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        holders: list[tuple[dict | list, object]] = []
        pending = [value]
        while pending:
            one = pending.pop()
            keys = one.items() if isinstance(one, dict) else enumerate(one) if isinstance(one, list) else ()
            for key, inner in list(keys):
                holders.append((one, key))  # type: ignore[arg-type]
                pending.append(inner)
        if not holders:
            return copy.deepcopy(rng.choice(JSON_VALUES))
        _change_one(*rng.choice(holders), holders, rng)
    return value


def _change_one(holder: dict | list, key: object, holders: list, rng: random.Random) -> None:
    kind = rng.randrange(8)
    old = holder[key]  # type: ignore[index]
    if isinstance(old, str) and old[:1] == "{" and rng.random() < 0.8:
        holder[key] = jsoned(old.encode(), rng).decode("utf-8", "replace")  # type: ignore[index]
    elif kind == 0:
        del holder[key]  # type: ignore[arg-type]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(TEXTS)] = old
    elif kind == 2:
        other, place = rng.choice(holders)
        if place in other if isinstance(other, dict) else place < len(other):
            holder[key] = json.loads(json.dumps(other[place]))  # type: ignore[index]
    elif kind == 3:
        holder[key] = [old]  # type: ignore[index]
    elif kind == 4 and isinstance(old, (int, float)):
        holder[key] = rng.choice((old + 1, old - 1, old * 2, -old, old * 1.5, str(old), *SIGNED))  # type: ignore[index]
    else:
        holder[key] = copy.deepcopy(rng.choice(JSON_VALUES))  # type: ignore[index]


def safetensors(data: bytes, rng: random.Random) -> bytes:
    """The header of a safetensors file changed as JSON, its length right again; or the bytes behind it."""
    if rng.random() < 0.15 or len(data) < 9:
        return blind(data, rng)
    size = int.from_bytes(data[:8], "little")
    header = jsoned(data[8 : 8 + size], rng)
    rest = data[8 + size :] if rng.random() < 0.8 else blind(data[8 + size :], rng)
    length = len(header) if rng.random() < 0.95 else rng.choice(NUMBERS) % (1 << 64)
    return length.to_bytes(8, "little") + header + rest


def numpy_file(data: bytes, rng: random.Random) -> bytes:
    """The header of a .npy file with another shape or dtype, padded and counted as NumPy does."""
    if rng.random() < 0.3 or data[:6] != b"\x93NUMPY":
        return blind(data, rng)
    dtype = rng.choice(("<f4", "|u1", "<f8", "|O", "|S9", "<U4", "<M8[s]", "<c16", "<f2", "|b1", "|V8", "<i8", "x"))
    if rng.random() < 0.1:
        dtype = rng.choice(("[('a', '<f4')]", "('<f4', (1000000,))", "'" * 3, "__import__('os')"))
    else:
        dtype = repr(dtype)
    count = rng.randrange(5)
    shape = ", ".join(str(rng.choice((*SIGNED, 3, 4, 8))) for _ in range(count)) + "," * (count == 1)
    order = rng.choice(("False", "True", "None", "0"))
    head = f"{{'descr': {dtype}, 'fortran_order': {order}, 'shape': ({shape}), }}\n".encode()
    if rng.random() < 0.2:
        head = blind(head, rng)
    return data[:8] + struct.pack("<H", len(head)) + head + data[-256:]


def png(data: bytes, rng: random.Random) -> bytes:
    """Chunks of a PNG changed, taken out, doubled or swapped, with right lengths and checksums."""
    chunks, place = [], 8
    while place + 12 <= len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    if not chunks or rng.random() < 0.2:
        return blind(data, rng)
    at, kind = rng.randrange(len(chunks)), rng.randrange(5)
    name, content = chunks[at]
    if kind == 0:
        del chunks[at]
    elif kind == 1:
        chunks.insert(at, rng.choice(chunks))
    elif kind == 2:
        chunks[at] = (rng.choice((b"tEXt", b"zTXt", b"iTXt", b"acTL", b"fdAT", b"eXIf", b"PLTE", b"tRNS")), content)
    else:
        chunks[at] = (name, blind(content, rng))
    packed = (len(c).to_bytes(4, "big") + n + c + zlib.crc32(n + c).to_bytes(4, "big") for n, c in chunks)
    return data[:8] + b"".join(packed)


def jpeg(data: bytes, rng: random.Random) -> bytes:
    """Segments of a JPEG changed, taken out, doubled or swapped, with right lengths."""
    segments, place = [], 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != 0xDA:
        size = int.from_bytes(data[place + 2 : place + 4], "big")
        segments.append((data[place : place + 2], data[place + 4 : place + 2 + size]))
        place += 2 + size
    if not segments or rng.random() < 0.3:
        return blind(data, rng)
    at, kind = rng.randrange(len(segments)), rng.randrange(5)
    mark, content = segments[at]
    if kind == 0:
        del segments[at]
    elif kind == 1:
        segments.insert(at, rng.choice(segments))
    elif kind == 2:
        segments[at] = (bytes([0xFF, rng.randrange(0xC0, 0x100)]), content)
    else:
        segments[at] = (mark, blind(content, rng)[:65533])
    packed = (mark + (len(content) + 2).to_bytes(2, "big") + content for mark, content in segments)
    return data[:2] + b"".join(packed) + data[place:]


def tar(data: bytes, rng: random.Random) -> bytes:
    """A header of a tar file changed in one of its fields, with a right checksum; or blocks taken out or doubled."""
    places = [at for at in range(0, len(data), 512) if data[at + 257 : at + 262] == b"ustar"]
    if not places or rng.random() < 0.2:
        return blind(data, rng)
    at, new = rng.choice(places), bytearray(data)
    if rng.random() < 0.2:
        new[at:at] = data[rng.choice(places) :][: 512 * rng.randrange(1, 4)]
        return bytes(new)
    if rng.random() < 0.2:
        del new[at : at + 512]
        return bytes(new)
    start, size = rng.choice(((0, 100), (100, 8), (124, 12), (156, 1), (157, 100), (257, 8), (345, 155)))
    texts = (b"0" * 11, b"7" * 11, b"\x80" + b"\xff" * 11, b"-1", b"..//x.png", b"/etc/x.png", b"a\nb.png", b"%d=GNU")
    values = (*texts, *(bytes([kind]) for kind in b"0123456789gxLKSVD"), *(f"{one:o}".encode() for one in NUMBERS))
    new[at + start : at + start + size] = rng.choice(values)[:size].ljust(size, b"\0")
    new[at + 148 : at + 156] = b" " * 8
    new[at + 148 : at + 156] = b"%06o\0 " % (sum(new[at : at + 512]) & 0o777777)
    return bytes(new)
