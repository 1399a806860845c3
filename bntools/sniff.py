"""What a file is, by its first bytes: for error messages about files that are not what they are named."""

from __future__ import annotations

import os
import zipfile
from typing import IO

MAGIC = (
    (b"\x89PNG\r\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF8", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file (Keras writes those)"),
    (b"\x1f\x8b", "gzip-compressed data: unpack it first"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x7fELF", "a compiled program"),
    (b"\x80", "a pickle"),
)
LOOKED_AT = 512  # bytes; a tar archive says what it is at 257


def describe(path: str | os.PathLike[str]) -> str:
    """A few words on what the file seems to be, with an article: ``a PNG image``, ``text``."""
    with open(path, "rb") as file:
        return described(file.read(LOOKED_AT))


def described(start: bytes) -> str:
    """The same of the first LOOKED_AT bytes of a file."""
    if not start:
        return "an empty file"
    for magic, name in MAGIC:
        if start.startswith(magic):
            return name
    if start[257:262] == b"ustar":
        return "a tar archive: unpack it first"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer, not the file itself: run git lfs pull"
    return "text" if _is_text(start) else "bytes of no known kind"


def is_zip(file: str | IO[bytes]) -> bool:
    """Whether a file is a zip archive that could be read. zipfile's own test raises for some that are damaged."""
    try:
        return zipfile.is_zipfile(file)
    except zipfile.BadZipFile:
        return False


def _is_text(start: bytes) -> bool:
    try:
        text = start.decode("utf-8")
    except UnicodeDecodeError as error:
        return error.start > LOOKED_AT - 4 and error.reason == "unexpected end of data"
    return all(character.isprintable() or character in "\n\r\t" for character in text)
