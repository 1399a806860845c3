"""Datasets of Hugging Face: as objects, saved, streamed, and from a factory."""

from __future__ import annotations

import subprocess
import sys

import datasets
import numpy as np
import picture_files as files
import pytest
from picture_files import all_of, expected, sorted_rows

from bntools import data
from bntools.errors import BntoolsError


def numbers() -> datasets.Dataset:
    """Rows of numbers, a label and a word."""
    features = datasets.Features(
        {"x": datasets.Array2D((2, 2), "float32"), "n": datasets.Value("int64"), "label": datasets.ClassLabel(2),
         "word": datasets.Value("string")}
    )  # fmt: skip
    rows = {"x": [[[i, 1], [2, 3]] for i in range(9)], "n": list(range(9)), "label": [0] * 9, "word": ["w"] * 9}
    return datasets.Dataset.from_dict(rows, features=features)


@pytest.mark.parametrize("form", [None, "torch", "numpy"])
def test_formats_make_no_difference_to_images(form):
    """Images are read from their bytes, whatever the format of the dataset makes of them."""
    found = data.open(files.dataset().with_format(form))
    np.testing.assert_array_equal(sorted_rows(all_of(found)), expected())
    assert (
        found.description
        == "24 images from the column 'image' of a dataset 3x6x5; scaled to 0..1; 1 other column ignored"
    )


@pytest.mark.parametrize("form", [None, "torch"])
def test_numbers_are_arrays(form):
    """Columns of numbers are arrays by name, labels and words left out, in every format."""
    (batch,) = data.open(numbers().with_format(form))
    assert {name: (values.shape, str(values.dtype)) for name, values in batch.items()} == {
        "x": ((9, 2, 2), "float32"),
        "n": ((9,), "int64"),
    }
    np.testing.assert_array_equal(batch["x"][:, 0, 0], batch["n"])
    assert next(iter(data.open(numbers(), column="x"))).shape == (9, 2, 2)


def test_a_transform_of_the_users_own_is_obeyed():
    """What a transform makes of rows is what is read: arrays as they are, images as images."""
    ready = files.dataset().with_transform(
        lambda rows: {"pixel_values": [np.asarray(one, np.float32).transpose(2, 0, 1) for one in rows["image"]]}
    )
    np.testing.assert_allclose(sorted_rows(all_of(data.open(ready))), expected() * 255, rtol=1e-6)
    turned = files.dataset().with_transform(lambda rows: {"image": [one.rotate(180) for one in rows["image"]]})
    images = all_of(data.open(turned))[:, :, ::-1, ::-1]
    np.testing.assert_array_equal(sorted_rows(np.ascontiguousarray(images)), expected())
    broken = files.dataset().with_transform(lambda rows: {"x": [1 // 0 for _ in rows["image"]]})
    with pytest.raises(BntoolsError, match="the dataset raised ZeroDivisionError"):
        data.open(broken)


def test_streams():
    """A streamed dataset is shuffled by the library and cut short by a limit; nobody knows how long it is."""
    stream = files.dataset().to_iterable_dataset()
    found = data.open(stream, batch_size=5)
    assert found.samples is None
    assert found.description.startswith("a stream of images from the column 'image' of a streamed dataset")
    assert len(all_of(data.open(stream, max_samples=7))) == 7
    decoded = datasets.IterableDataset.from_generator(lambda: iter(files.dataset()))
    np.testing.assert_array_equal(sorted_rows(all_of(data.open(decoded))), expected())
    with pytest.raises(TypeError):
        len(found)


def test_splits():
    """A dict of one split is that split; of several one has to be given, and empty ones are refused."""
    assert len(data.open(datasets.DatasetDict({"train": files.dataset(4)}))) == 4
    with pytest.raises(BntoolsError, match="holds the splits train, test: give one of them"):
        data.open(datasets.DatasetDict({"train": files.dataset(4), "test": files.dataset(4)}))
    with pytest.raises(BntoolsError, match="the dataset has no rows"):
        data.open(files.dataset(4).select([]))


def test_images_in_files(tmp_path):
    """A dataset that refers to files, as of an image folder, reads them; one that is gone is skipped by name."""
    folder = files.folder(tmp_path / "a", 4)
    features = datasets.Features({"image": datasets.Image()})
    found = datasets.Dataset.from_dict({"image": [str(path) for path in sorted(folder.iterdir())]}, features=features)
    np.testing.assert_array_equal(sorted_rows(all_of(data.open(found))), expected(range(4)))
    (folder / "000.png").unlink()
    assert data.open(found).spec["skipped"][0]["file"] == str(folder / "000.png")


def test_a_factory_may_return_a_dataset(tmp_path, monkeypatch):
    """A function that returns a dataset stands for its rows, is called once, and obeys size and scaling."""
    (tmp_path / "feed_hf.py").write_text(
        "import picture_files\ncalls = []\n"
        "def make():\n    calls.append(1)\n    return picture_files.dataset(6)\n"
        "def batches():\n    calls.append(1)\n    return [[[1.0]]]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = data.open("feed_hf:make", size=(4, 4))
    assert all_of(found).shape == (6, 3, 4, 4)
    import feed_hf

    assert len(feed_hf.calls) == 1
    assert len(data.reopen(found.spec)) == 6
    with pytest.raises(BntoolsError, match="size, mean, std, preprocess and column are for images and arrays"):
        data.open("feed_hf:batches", size=(4, 4))


def test_saved_datasets(tmp_path):
    """A folder that save_to_disk wrote is that dataset; a damaged one is refused in words."""
    files.dataset(5).save_to_disk(tmp_path / "a")
    assert len(data.open(tmp_path / "a")) == 5
    datasets.DatasetDict({"train": files.dataset(3), "test": files.dataset(4)}).save_to_disk(tmp_path / "b")
    assert len(data.open(tmp_path / "b" / "test")) == 4
    next((tmp_path / "a").glob("*.arrow")).write_bytes(b"none")
    with pytest.raises(BntoolsError, match="a: no readable dataset"):
        data.open(tmp_path / "a")


def test_nothing_is_imported_for_those_who_have_none(tmp_path):
    """Reading a folder imports neither datasets nor pyarrow."""
    files.folder(tmp_path / "a", 2)
    code = f"import sys; from bntools import data; list(data.open({str(tmp_path / 'a')!r})); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert not {"datasets", "pyarrow", "torch"} & set(modules)
