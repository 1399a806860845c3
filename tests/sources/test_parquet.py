"""Parquet: which columns are data, and rows in a random order in little memory."""

from __future__ import annotations

import sys

import numpy as np
import picture_files as files
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from picture_files import all_of, expected, png, sorted_rows
from torch.utils.data import DataLoader, TensorDataset

import bntools
from bntools import data
from bntools.errors import BntoolsError
from bntools.sources import parquet


def write(path, **columns):
    """A Parquet file of these columns."""
    pq.write_table(pa.table(columns), path)
    return path


def numbers_of(found) -> list[int]:
    """The numbers of the rows in the order in which they are read."""
    return found._source.numbers.tolist()


def test_images_are_found_in_bytes(tmp_path):
    """A column of plain bytes holds images, of several the one called image, else the one that is named."""
    some = [png(i) for i in range(4)]
    assert len(data.open(write(tmp_path / "a.parquet", jpg=some, label=[0] * 4))) == 4
    found = data.open(write(tmp_path / "b.parquet", image=some, mask=some))
    assert found.description == (
        "4 images from the column 'image' of a Parquet file 3x6x5; scaled to 0..1; 1 other column ignored"
    )
    two = write(tmp_path / "c.parquet", left=some, right=some)
    with pytest.raises(BntoolsError, match=r"several columns may hold images \(left, right\): name one"):
        data.open(two)
    np.testing.assert_array_equal(sorted_rows(all_of(data.open(two, column="right"))), expected(range(4)))
    with pytest.raises(BntoolsError, match=r"has no column 'up'; it has left \(bytes\), right \(bytes\)"):
        data.open(two, column="up")


def test_numbers_are_arrays(tmp_path):
    """Columns of numbers and lists of one length are arrays with their dtypes; labels and words are left out."""
    x = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    lists = pa.FixedSizeListArray.from_arrays(pa.array(x.ravel()), 3)
    found = data.open(write(tmp_path / "a.parquet", x=lists, label=list(range(20)), word=["w"] * 20), batch_size=8)
    np.testing.assert_array_equal(sorted_rows(all_of(found)), sorted_rows(x))
    assert all_of(found).dtype == np.float32
    assert found.description == "20 samples: float32 3 from the column 'x' of a Parquet file"
    assert len(data.open(tmp_path / "a.parquet", column="label", max_samples=5)) == 5
    nested = write(tmp_path / "b.parquet", a=[[[1, 2], [3, 4]]] * 4, b=[0.5] * 4)
    (batch,) = data.open(nested)
    assert {name: (values.shape, str(values.dtype)) for name, values in batch.items()} == {
        "a": ((4, 2, 2), "int64"),
        "b": ((4,), "float64"),
    }


def test_eight_bit_images_in_lists_are_scaled(tmp_path):
    """Lists of bytes of rank 3 are images as in any array file: scaled to 0..1, and normalized."""
    pixels = np.stack([files.pixels(i).transpose(2, 0, 1) for i in range(3)])
    column = pa.array(pixels.tolist(), pa.list_(pa.list_(pa.list_(pa.uint8()))))
    found = data.open(write(tmp_path / "a.parquet", x=column), mean=(0.5,) * 3, std=(2.0,) * 3)
    np.testing.assert_allclose(sorted_rows(all_of(found)), (expected(range(3)) - 0.5) / 2, rtol=1e-6)


def test_what_is_no_data(tmp_path):
    """Columns without numbers, rows of unequal lengths, empty and damaged files are refused in words."""
    for name, columns, message in [
        ("words", {"word": ["a"]}, r"no column of images or numbers; found word \(string\)"),
        ("ragged", {"x": [[1, 2], [1]]}, r"row \d: the column 'x' has shape"),
        ("empty", {"x": pa.array([], pa.float32())}, "has no rows"),
        ("none", {"image": pa.array([], pa.binary())}, "found only 0|found nothing where images"),
    ]:
        with pytest.raises(BntoolsError, match=message):
            all_of(data.open(write(tmp_path / f"{name}.parquet", **columns)))
    (tmp_path / "text.parquet").write_text("hello")
    with pytest.raises(BntoolsError, match=r"text.parquet: no readable Parquet file"):
        data.open(tmp_path / "text.parquet")
    write(tmp_path / "other.parquet", y=[1.0])
    write(tmp_path / "words.parquet", x=[1.0])
    with pytest.raises(BntoolsError, match=r"words.parquet: has the column 'x', and .* has the column 'y'"):
        data.open(str(tmp_path / "{other,words}.parquet"))


def test_damaged_rows_are_skipped_by_name(tmp_path):
    """A row that holds no image, or nothing, is skipped with file and row."""
    rows = [
        {"bytes": png(0), "path": "/etc/passwd"},
        {"bytes": b"none", "path": None},
        {"bytes": None, "path": "x.png"},
        None,
    ]
    found = data.open(write(tmp_path / "a.parquet", image=rows))
    assert len(all_of(found)) == 1
    reasons = {bad["file"].rpartition(": ")[2]: bad["reason"] for bad in found.spec["skipped"]}
    nothing = "no image, but an empty file"
    assert reasons == {"row 1": "no image, but text", "row 2": nothing, "row 3": nothing}


def test_the_order_is_random_within_a_window(tmp_path, monkeypatch):
    """Row groups come in a random order, mixed as far as a window of bytes reaches, each read once."""
    path = files.parquets(tmp_path / "a", files=2, group=4)
    found = data.open(path)
    assert numbers_of(found) != sorted(numbers_of(found))
    assert sorted(numbers_of(found)) == list(range(24))
    assert max(abs(a - b) for a, b in zip(numbers_of(found), sorted(numbers_of(found)), strict=True)) > 8
    monkeypatch.setattr(parquet, "WINDOW", 600)  # some four images
    small = data.open(path, batch_size=5)
    assert sorted(numbers_of(small)) == list(range(24))
    groups = [number // 4 for number in numbers_of(small)]
    assert len({tuple(sorted(groups[i : i + 8])) for i in range(0, 24, 8)}) > 1
    np.testing.assert_array_equal(sorted_rows(all_of(small)), expected())
    reads = []
    taken = pq.ParquetFile.iter_batches
    monkeypatch.setattr(
        pq.ParquetFile, "iter_batches", lambda self, *a, **k: reads.append(k["row_groups"]) or taken(self, *a, **k)
    )
    all_of(small)
    assert len(reads) == 6
    rest, _ = small.batches_after(15)
    np.testing.assert_array_equal(all_of(rest), all_of(small)[15:])


def test_a_sample_is_drawn_from_all_rows(tmp_path, monkeypatch):
    """A limit draws from every part of the files, not from the first row groups."""
    monkeypatch.setattr(parquet, "WINDOW", 1)
    path = write(tmp_path / "a.parquet", x=list(range(10_000)))
    drawn = np.sort(all_of(data.open(path, max_samples=50)))
    assert len(set(drawn)) == 50
    assert drawn[5] < 3000 < 7000 < drawn[-5]


def test_a_tolerance_says_whether_its_samples_stand_for_all(tmp_path, monkeypatch):
    """Rows sorted by value: those of one window know their own mean well, and a note says that it may be no other's."""
    x = np.repeat(np.arange(8.0, dtype=np.float32), 64) + np.random.default_rng(0).normal(size=512).astype(np.float32)
    path = tmp_path / "sorted.parquet"
    pq.write_table(pa.table({"x": pa.FixedSizeListArray.from_arrays(pa.array(x), 1)}), path, row_group_size=64)

    def notes(source, **options):
        return bntools.recalibrate(torch.nn.BatchNorm1d(1), source, check=False, tolerance=0.2, **options).notes

    assert notes(path) == []
    monkeypatch.setattr(parquet, "WINDOW", 600)
    (note,) = notes(path)
    assert note.startswith("the tolerance was judged by the first 64 samples as they come")
    assert notes(path, max_samples=100) == []
    assert notes([x[:, None]]) == []
    loaders = [DataLoader(TensorDataset(torch.tensor(x[:, None])), 64, shuffle=shuffle) for shuffle in (False, True)]
    assert [len(notes(loader)) for loader in loaders] == [1, 0]


def test_little_of_a_large_row_group_is_held(tmp_path, monkeypatch):
    """One row group of any size is read in pieces: no more rows are held than a window takes."""
    monkeypatch.setattr(parquet, "WINDOW", 10 * 8)
    path = write(tmp_path / "a.parquet", x=np.random.default_rng(0).normal(size=500))
    found = data.open(path, batch_size=1)
    numbers = np.array(numbers_of(found))
    assert np.abs(numbers - np.arange(500)).max() <= 10
    assert len(np.unique(np.sign(np.diff(numbers)))) == 2


def test_without_pyarrow(tmp_path, monkeypatch):
    """Without pyarrow there is one sentence that says what to install."""
    path = files.parquets(tmp_path / "a")
    for name in ("pyarrow", "pyarrow.parquet", "bntools.sources.parquet"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "bntools.sources.parquet")
    with pytest.raises(BntoolsError, match=r"needs the package 'pyarrow.*: pip install 'bntools\[parquet\]'"):
        data.open(path)


def test_names_that_are_no_text(tmp_path):
    """A column name in the footer that is not UTF-8 is damage, wherever it stands."""
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"pixels": pa.array([[1.0, 2.0]] * 4, pa.list_(pa.float32(), 2))}), path)
    whole = path.read_bytes()
    places = [at for at in range(len(whole)) if whole.startswith(b"pixels", at)]
    assert len(places) > 1
    refused = 0
    for at in places:
        path.write_bytes(whole[:at] + b"\xff" + whole[at + 1 :])
        try:
            data.open(path)
        except BntoolsError:
            refused += 1
    assert refused


def test_metadata_at_which_pyarrow_gives_up(tmp_path):
    """A schema that contradicts the statistics of a column is refused; asked for that column, pyarrow 26 aborts."""
    path = write(tmp_path / "x.parquet", x=[1.0, 2.0])
    whole = path.read_bytes()
    optional, required = (b"\x25" + kind + b"\x18\x01x" for kind in (b"\x02", b"\x00"))  # in Thrift's compact protocol
    assert whole.count(optional) == 1
    path.write_bytes(whole.replace(optional, required))
    with pytest.raises(BntoolsError, match="Parquet"):
        data.open(path)
