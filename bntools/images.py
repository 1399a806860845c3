"""Reading one image: what kind it is, and its pixels as an array of the wanted channels and size.

The pixels are those that torchvision's usual loader and transforms give: alpha is dropped as by
``convert("RGB")``, 8-bit values are divided by 255 in float32 (``ToTensor``), resizing is bilinear with
antialiasing and cropping is central (``Resize``, ``CenterCrop``). Pillow's faster decoding of JPEGs at a
fraction of their size (``Image.draft``) is not used: measured on fine-grained images brought down
from 1600x1200 to 224, it changed the standard deviation of the pixels by 2.5 %.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from bntools import sniff

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm", ".pbm", ".pnm"}
)
GREY = ("1", "L", "LA", "La", "I;16", "I;16B", "I;16L", "I;16N", "I")
SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
RGB = ("RGB", "RGBA", "RGBa", "RGBX", "P", "PA")
WITH_ALPHA = ("RGBA", "LA", "La", "RGBa", "PA")
ORIENTATION = 0x0112  # the EXIF tag; values 5 to 8 swap height and width
TAILS = {"JPEG": b"\xff\xd9", "PNG": b"IEND", "GIF": b"\x3b"}  # how a complete file of the format ends


@dataclass(frozen=True)
class Header:
    """What the head of an image file says: (height, width) as displayed, Pillow's mode, whether it moves and has alpha.

    Alpha is transparency of any kind, a palette's too; it is dropped.
    """

    size: tuple[int, int]
    mode: str
    animated: bool
    alpha: bool

    @property
    def grey(self) -> bool:
        """Whether the image has one channel."""
        return self.mode in GREY

    def converted(self, channels: int) -> bool:
        """Whether reading it as 1 or 3 channels takes it from grey to colours, from colours to grey, or from CMYK."""
        return not self.grey if channels == 1 else self.mode not in RGB


@dataclass(frozen=True)
class Unreadable:
    """A file that gives no pixels, and why."""

    path: Path
    reason: str


def header(path: Path) -> Header | Unreadable:
    """Look at a file without decoding it, except where its end is missing."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as image:
                complete = _ends_as_it_should(path, image.format)
                width, height = image.size
                # Asking a PNG without the tag for it would decode the whole image.
                tagged = image.format != "PNG" or "exif" in image.info
                turned = tagged and image.getexif().get(ORIENTATION, 1) in (5, 6, 7, 8)
                found = Header(
                    (width, height) if turned else (height, width),
                    image.mode,
                    animated=bool(getattr(image, "is_animated", 0)),
                    alpha=image.mode in WITH_ALPHA or "transparency" in image.info,
                )
                if reason := _unreadable_mode(image):
                    return Unreadable(path, reason)
                if not complete:
                    image.load()
                return found
    except Exception as error:
        # Pillow's decoders raise nearly anything for a crafted or damaged file; the reason is kept and reported.
        return Unreadable(path, _reason(path, error))


def decode(path: Path, channels: int, size: tuple[int, int]) -> np.ndarray | Unreadable:
    """The pixels of an image, float32 in 0..1, shape (channels, height, width); the first frame if it moves.

    The image is scaled to cover ``size`` (height, width) and the middle is cut out; an image of that
    size is taken as it is.
    """
    try:
        with Image.open(path) as image:
            if reason := _unreadable_mode(image):
                return Unreadable(path, reason)
            ImageOps.exif_transpose(image, in_place=True)
            return _pixels(_fitted(_converted(image, channels), size), channels)
    except Exception as error:
        # As above: one bad file does not end the run, it is skipped by name.
        return Unreadable(path, _reason(path, error))


def _converted(image: Image.Image, channels: int) -> Image.Image:
    """8-bit grey or RGB; 16-bit grey becomes float32 in 0..255, so that no precision is lost in resizing."""
    if image.mode in SIXTEEN_BIT:
        return Image.fromarray(np.asarray(image, dtype=np.float32) * np.float32(255 / 65535))
    wanted = "L" if channels == 1 else "RGB"
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == wanted else image.convert(wanted)


def _fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Scaled to cover (height, width), rounding as torchvision's Resize and CenterCrop do."""
    height, width = size
    if (image.height, image.width) == size:
        return image
    if height * image.width >= width * image.height:
        scaled = (max(width, int(height * image.width / image.height)), height)
    else:
        scaled = (width, max(height, int(width * image.height / image.width)))
    if scaled != image.size:
        image = image.resize(scaled, Image.Resampling.BILINEAR)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
    values = np.divide(np.asarray(image), np.float32(255), dtype=np.float32)
    if values.ndim == 2:
        return np.repeat(values[None], channels, axis=0)
    return np.ascontiguousarray(values.transpose(2, 0, 1))


def _unreadable_mode(image: Image.Image) -> str | None:
    if image.mode == "F" or (image.mode == "I" and image.format != "PNG"):
        return f"its pixels ({image.mode}, 32-bit) have no known range; save it with 8 or 16 bits, or as .npy"
    if not image.width or not image.height:
        return "it has no pixels"
    return None


def _ends_as_it_should(path: Path, kind: str | None) -> bool:
    """A cheap look for truncation. A file that does not end as usual is decoded to be sure."""
    tail = TAILS.get(kind or "")
    if tail is None:
        return True
    with open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 16))
        return tail in file.read()


def _reason(path: Path, error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return f"no image, but {sniff.describe(path)}"
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        return f"more pixels than an image should have ({error})"
    return str(error).splitlines()[0] if str(error) else type(error).__name__
