"""Small honest files of every kind that bntools reads, from which the fuzzer's inputs are made."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def files(reader: str, folder: Path) -> list[tuple[str, bytes]]:
    """The seeds of a reader as pairs of suffix and content; ``folder`` is one to write in."""
    return MADE[reader](folder)


def net() -> Any:
    """A small nn.Module, the same each time; also the arch of state dicts."""
    import torch
    from torch import nn

    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.ReLU())


def _saved(value: Any, **options: Any) -> bytes:
    import torch

    buffer = io.BytesIO()
    torch.save(value, buffer, **options)
    return buffer.getvalue()


def _pt(folder: Path) -> list[tuple[str, bytes]]:
    import torch
    from torch import nn

    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3}
    nested = nn.ModuleDict({"a": net(), "b": nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5))})
    legacy = {"_use_new_zipfile_serialization": False}
    contents = (
        _saved(model), _saved(nested), _saved(model.state_dict()), _saved(checkpoint), _saved(torch.ones(4, 2)),
        _saved({"x": torch.ones(3, 2), "y": (torch.zeros(3), [1, "a", 2.5])}),
        _saved(model.state_dict(), **legacy), _saved(model, **legacy),
    )  # fmt: skip
    return [(".pt", content) for content in contents]


def _pt2(folder: Path) -> list[tuple[str, bytes]]:
    import torch

    buffer = io.BytesIO()
    torch.export.save(torch.export.export(net().eval(), (torch.ones(2, 1, 3, 3),)), buffer)
    return [(".pt2", buffer.getvalue())]


def _safetensors(folder: Path) -> list[tuple[str, bytes]]:
    import torch
    from safetensors.torch import save

    state = net().state_dict()
    halves = {name: value.to(torch.bfloat16) for name, value in state.items()}
    contents = save(state, {"format": "pt"}), save(halves), save({"x": torch.ones(3, 2)}), save({})
    return [(".safetensors", content) for content in contents]


def _stats(folder: Path) -> list[tuple[str, bytes]]:
    import bntools

    path = folder / "seed.safetensors"
    bntools.save_stats(net(), path)
    return [(".safetensors", path.read_bytes())]


def _keras(folder: Path) -> list[tuple[str, bytes]]:
    import keras

    keras.utils.set_random_seed(0)
    inputs = keras.Input((4, 4, 2))
    inner = keras.Sequential([keras.Input((4, 4, 2)), keras.layers.BatchNormalization(name="inside")], name="part")
    x = keras.layers.BatchNormalization(name="bn")(keras.layers.Conv2D(2, 1, name="conv")(inputs))
    model = keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(inner(x))))
    model.compile("sgd", "mse")
    found = []
    for suffix in (".keras", ".h5", ".weights.h5"):
        path = folder / f"seed{suffix}"
        model.save_weights(path) if "weights" in suffix else model.save(path)
        found.append((suffix, path.read_bytes()))
    return found


def _onnx(folder: Path) -> list[tuple[str, bytes]]:
    import onnx
    import onnx_files

    found = []
    for name, external in (("plain", False), ("outside", True)):
        path = onnx_files.keep(onnx_files.small(), folder / f"{name}.onnx", external)
        found.append((".onnx", path.read_bytes()))
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("Constant", [], ["n"], value_ints=[3]),
            onnx.helper.make_node("ConstantOfShape", ["n"], ["zeros"]),
            onnx.helper.make_node("Expand", ["one", "n"], ["ones"]),
            onnx.helper.make_node("BatchNormalization", ["x", "ones", "zeros", "zeros", "ones"], ["y"], name="bn"),
        ],
        "computed",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", 3])],
        [onnx.helper.make_tensor_value_info("y", 1, ["N", 3])],
        [onnx.numpy_helper.from_array(np.ones(1, np.float32), "one")],
    )
    return [*found, (".onnx", onnx.helper.make_model(graph).SerializeToString())]


def _images(folder: Path) -> list[tuple[str, bytes]]:
    from PIL import Image

    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (9, 7, 3), dtype=np.uint8)
    colour = Image.fromarray(pixels)
    grey16 = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
    kinds: list[tuple[Any, str, str, dict[str, Any]]] = [
        (colour, "PNG", ".png", {}),
        (colour.convert("RGBA"), "PNG", ".png", {}),
        (colour.convert("P"), "PNG", ".png", {"transparency": 3}),
        (grey16, "PNG", ".png", {}),
        (colour, "JPEG", ".jpg", {"exif": _turned()}),
        (colour, "JPEG", ".jpg", {"progressive": True}),
        (colour.convert("CMYK"), "JPEG", ".jpg", {}),
        (colour, "GIF", ".gif", {"save_all": True, "append_images": [colour.rotate(90)]}),
        (colour, "WEBP", ".webp", {}),
        (colour, "BMP", ".bmp", {}),
        (colour, "TIFF", ".tif", {"compression": "tiff_lzw"}),
        (colour, "TIFF", ".tif", {}),
        (colour, "PPM", ".ppm", {}),
    ]
    found = []
    for image, form, suffix, options in kinds:
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        found.append((suffix, buffer.getvalue()))
    return found


def _turned() -> Any:
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


def _arrays(folder: Path) -> list[tuple[str, bytes]]:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    images = np.zeros((2, 3, 4, 4), np.uint8)
    found = []
    for array in (values, images):
        buffer = io.BytesIO()
        np.save(buffer, array)
        found.append((".npy", buffer.getvalue()))
    for writer in (np.savez, np.savez_compressed):
        buffer = io.BytesIO()
        writer(buffer, a=values, b=values.astype(np.int64))
        found.append((".npz", buffer.getvalue()))
    return found


def _tar(folder: Path) -> list[tuple[str, bytes]]:
    found = []
    pictures = _images(folder)[:6]
    for form in (tarfile.USTAR_FORMAT, tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w", format=form) as archive:
            for number, (suffix, content) in enumerate(pictures):
                for name, held in ((f"a/{number:03}{suffix}", content), (f"a/{number:03}.txt", b"7")):
                    member = tarfile.TarInfo(name if number else f"{'long/' * 30}{name}")
                    member.size = len(held)
                    archive.addfile(member, io.BytesIO(held))
        found.append((".tar", buffer.getvalue()))
    return found


def _parquet(folder: Path) -> list[tuple[str, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pictures = [content for _, content in _images(folder)[:5]]
    tables = (
        pa.table({"image": [{"bytes": content, "path": "x.png"} for content in pictures], "label": list(range(5))}),
        pa.table({"image": pictures}),
        pa.table({"x": pa.array([[1.0, 2.0]] * 6, pa.list_(pa.float32(), 2)), "y": [1.5] * 6}),
    )
    found = []
    for table in tables:
        for compression in ("none", "snappy"):
            buffer = io.BytesIO()
            pq.write_table(table, buffer, compression=compression, row_group_size=3)
            found.append((".parquet", buffer.getvalue()))
    return found


MADE = {
    "pt": _pt,
    "pt2": _pt2,
    "safetensors": _safetensors,
    "stats": _stats,
    "keras": _keras,
    "onnx": _onnx,
    "images": _images,
    "arrays": _arrays,
    "tar": _tar,
    "parquet": _parquet,
}
