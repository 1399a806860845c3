"""Data files that claim far more than they hold: arrays and images, by a few bytes."""

from __future__ import annotations

import io
import os
import struct
import zipfile
import zlib

import memory_bound
import numpy as np
import pytest
from PIL import Image

from bntools import BntoolsError, data
from bntools.sources import parts

LIMIT_BYTES = 512 << 20


@pytest.fixture(autouse=True)
def _bounded():
    """No test here takes memory that it would not take for the bytes there are."""
    with memory_bound.at_most(LIMIT_BYTES):
        yield


def array(shape: str, descr: str = "'<f4'", content: bytes = bytes(64)) -> bytes:
    """A .npy file with this header."""
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


CLAIMS = {
    "a terabyte": array("(1099511627776,)"),
    "more than a number holds": array("(4611686018427387904, 16)"),
    "a negative size": array("(-4, 2)"),
    "nothing, endlessly": array("(1099511627776, 0)"),
    "elements of a gigabyte": array("(2,)", "('<f4', (268435456,))"),
    "texts of a gigabyte": array("(2,)", "'<U268435456'"),
    "objects": array("(2,)", "'|O'"),
    "an expression": array("(2,)", "__import__('os').system('touch canary')"),
    "a header of nothing but brackets": array("(" * 60_000),
}


@pytest.mark.parametrize("kind", CLAIMS)
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_arrays_that_claim_too_much(tmp_path, kind, suffix):
    """What a header claims is checked against the bytes that are there, in an archive too."""
    path = tmp_path / f"x{suffix}"
    if suffix == ".npy":
        path.write_bytes(CLAIMS[kind])
    else:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a.npy", CLAIMS[kind])
    with pytest.raises(BntoolsError) as caught:
        data.open(path)
    assert "allocate" not in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert [one.name for one in tmp_path.iterdir()] == [path.name]


def test_an_archive_that_unpacks_to_far_more(tmp_path):
    """An archive whose few bytes unpack to a great many is not unpacked; one that is just compressed well is."""
    path = tmp_path / "x.npz"
    np.savez_compressed(path, np.zeros((4, 1 << 20), np.uint8))
    assert data.open(path).samples == 4
    content = bytearray(path.read_bytes())
    place = content.index(b"PK\x01\x02") + 24
    content[place : place + 4] = struct.pack("<I", 1 << 30)
    path.write_bytes(content)
    with pytest.raises(BntoolsError, match="claims to unpack"):
        data.open(path)


def png(width: int, height: int, rows: int) -> bytes:
    """A grey PNG of this size, with so many rows of zeros in it."""
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes((width + 1) * rows), 9)),
        (b"IEND", b""),
    )
    packed = (
        struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        for kind, content in chunks
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


@pytest.mark.parametrize("sizes", [(9400, 9400, 1), (1 << 30, 1 << 30, 0), (9000, 9000, 9000)])
def test_images_that_claim_too_much(tmp_path, sizes):
    """An image of more pixels than its bytes can hold in earnest is skipped by name, and not decoded."""
    (tmp_path / "bomb.png").write_bytes(png(*sizes))
    with pytest.raises(BntoolsError, match=r"bomb\.png.*pixels"):
        data.open(tmp_path)
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "good.png")
    assert data.open(tmp_path).samples == 1


def test_large_images_that_are_honest(tmp_path):
    """A large flat picture, and a larger one with something in it, are read."""
    Image.new("L", (2500, 2500)).save(tmp_path / "flat.png")
    assert len(next(iter(data.open(tmp_path, size=(8, 8))))) == 1
    noise = np.random.default_rng(0).integers(0, 256, (3000, 3000), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, "JPEG", quality=40)
    (tmp_path / "noise.jpg").write_bytes(buffer.getvalue())
    assert data.open(tmp_path, size=(8, 8)).samples == 2


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_images_that_never_end(tmp_path, kind):
    """A pipe, or a link to a device, is skipped by name instead of being read for ever."""
    if kind == "pipe":
        os.mkfifo(tmp_path / "image.png")
    else:
        (tmp_path / "image.png").symlink_to("/dev/zero")
    with pytest.raises(BntoolsError, match=r"image\.png"):
        data.open(tmp_path)


@pytest.mark.parametrize("suffix", [".npy", ".npz", ".pt", ".safetensors"])
@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_arrays_that_never_end(tmp_path, kind, suffix):
    """A pipe or device in the place of a file of arrays is refused."""
    path = tmp_path / f"x{suffix}"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(BntoolsError):
        data.open(path)


def test_a_length_that_a_file_claims_is_not_made_room_for(tmp_path):
    """Readers of images ask for as many bytes as a chunk is said to have: they get what is there."""
    path = tmp_path / "a.png"
    path.write_bytes(b"0123456789")
    with parts.opened(path) as file, parts.Part(path, 2, 6, parts.stamp(file.fileno())).open() as part:
        assert file.read(4) + file.read(1 << 40) == b"0123456789"
        assert part.read(1 << 40) == b"234567"
        assert part.read(1 << 40) == b""
        part.seek(4)
        assert part.read() == b"67"
