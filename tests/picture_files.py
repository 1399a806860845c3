"""The same few images as a folder, tar shards, Parquet files and a dataset of Hugging Face."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

COUNT = 24


def pixels(number: int) -> np.ndarray:
    """Random pixels of 8 bits, 6x5."""
    return np.random.default_rng(number).integers(0, 256, (6, 5, 3), dtype=np.uint8)


def png(number: int) -> bytes:
    """The same as a file."""
    file = io.BytesIO()
    Image.fromarray(pixels(number)).save(file, "PNG")
    return file.getvalue()


def folder(path: Path, count: int = COUNT) -> Path:
    """Images in a folder."""
    path.mkdir(parents=True)
    for number in range(count):
        (path / f"{number:03}.png").write_bytes(png(number))
    return path


def tar(path: Path, members: dict[str, bytes], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar file of these members."""
    with tarfile.open(path, "w", format=form) as archive:
        for name, content in members.items():
            one = tarfile.TarInfo(name)
            one.size = len(content)
            archive.addfile(one, io.BytesIO(content))
    return path


def tars(path: Path, shards: int = 3) -> Path:
    """Images and their labels in shards, as WebDataset writes them."""
    path.mkdir(parents=True)
    for shard, numbers in enumerate(np.array_split(np.arange(COUNT), shards)):
        members = {}
        for number in numbers.tolist():
            members |= {f"x/{number:03}.png": png(number), f"x/{number:03}.cls": b"1"}
        tar(path / f"train-{shard:03}.tar", members)
    return path


def parquets(path: Path, files: int = 2, group: int = 5) -> Path:
    """Images and their labels in Parquet files, as Hugging Face writes them."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.mkdir(parents=True)
    for file, numbers in enumerate(np.array_split(np.arange(COUNT), files)):
        rows = [{"bytes": png(number), "path": f"{number:03}.png"} for number in numbers.tolist()]
        table = pa.table({"image": rows, "label": numbers % 2})
        pq.write_table(table, path / f"{file}.parquet", row_group_size=group)
    return path


def dataset(count: int = COUNT):
    """A datasets.Dataset of the images and labels."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(2)})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(count)], "label": [i % 2 for i in range(count)]}
    return datasets.Dataset.from_dict(rows, features=features)


def all_of(batches) -> np.ndarray:
    """All samples of all batches."""
    return np.concatenate(list(batches))


def sorted_rows(values: np.ndarray) -> np.ndarray:
    """The samples in an order that does not depend on theirs."""
    rows = values.reshape(len(values), -1)
    return rows[np.lexsort(rows.T)]


def expected(numbers=range(COUNT)) -> np.ndarray:
    """The images as batches have them, sorted."""
    return sorted_rows(np.stack([pixels(i).transpose(2, 0, 1) for i in numbers]).astype(np.float32) / np.float32(255))
