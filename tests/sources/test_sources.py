"""Wherever images lie, they are read alike."""

from __future__ import annotations

import json

import numpy as np
import picture_files as files
import pytest
from picture_files import all_of, expected, sorted_rows

from bntools import data, sources
from bntools.errors import BntoolsError

KINDS = ("folder", "tar", "parquet", "saved", "dataset", "stream")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """The images in every form."""
    path = tmp_path_factory.mktemp("forms")
    files.folder(path / "folder")
    files.tars(path / "tar")
    files.parquets(path / "parquet")
    files.dataset().save_to_disk(path / "saved")
    return path


@pytest.fixture(params=KINDS)
def source(request, place):
    """One form of the images."""
    if request.param in ("dataset", "stream"):
        found = files.dataset()
        return found if request.param == "dataset" else found.to_iterable_dataset()
    return place / request.param


def test_every_source_gives_the_same_pixels(source):
    """Each source gives all images, pixel by pixel, twice in the same order, and in one that the seed decides."""
    found = data.open(source, batch_size=7)
    assert found.spec["kind"] == "images"
    np.testing.assert_array_equal(sorted_rows(all_of(found)), expected())
    np.testing.assert_array_equal(all_of(found), all_of(found))
    assert not np.array_equal(all_of(found), all_of(data.open(source, batch_size=7, seed=1)))


def test_options_mean_the_same_everywhere(source):
    """Size, scaling, layout and a limit apply to each source alike."""
    options = {"size": (4, 4), "mean": (0.5,) * 3, "std": (2.0,) * 3, "layout": "NHWC"}
    found = all_of(data.open(source, max_samples=10, **options))
    assert found.shape == (10, 4, 4, 3)
    everything = sorted_rows(all_of(data.open(source, **options)))
    assert {row.tobytes() for row in found.reshape(10, -1)} <= {row.tobytes() for row in everything}


def test_shares_of_processes_make_up_the_whole(source):
    """The shares of three processes hold each image once, also where a limit is no multiple of them."""
    whole = all_of(data.open(source, max_samples=11))
    shares = [all_of(data.open(source, max_samples=11, shard=(rank, 3, 1))) for rank in range(3)]
    assert sorted(map(len, shares)) == [3, 4, 4]
    np.testing.assert_array_equal(sorted_rows(np.concatenate(shares)), sorted_rows(whole))


def test_data_begins_in_the_middle(source):
    """Batches behind the first samples are those that reading on would give."""
    found = data.open(source, batch_size=4)
    rest, passed = found.batches_after(12)
    assert passed == 3
    np.testing.assert_array_equal(all_of(rest), all_of(found)[12:])
    assert found.batches_after(13) is None


@pytest.mark.parametrize("kind", ["folder", "tar", "parquet", "saved"])
def test_a_spec_opens_each_again(place, kind):
    """A spec survives JSON, says what the source is, and opens the same images again."""
    found = data.open(place / kind, max_samples=9)
    spec = json.loads(json.dumps(found.spec))
    assert spec["container"] == ("dataset" if kind == "saved" else kind)
    np.testing.assert_array_equal(all_of(data.reopen(spec)), all_of(found))
    assert "9 images drawn from 24" in found.description


def test_an_object_cannot_be_opened_again():
    """The spec of a dataset that came as an object says what it was, and reopening it is refused."""
    with pytest.raises(BntoolsError, match=r"datasets.Dataset \w+: came as an object"):
        data.reopen(data.open(files.dataset()).spec)


def test_patterns(place, tmp_path, monkeypatch):
    """Braces and globs stand for shards, in order; a pattern that misses one, or fits several kinds, is refused."""
    monkeypatch.chdir(place)
    assert [str(path) for path in sources.find("tar/train-{000..002}.tar").paths] == [
        f"tar/train-00{i}.tar" for i in range(3)
    ]
    assert len(sources.find("tar/train-{000,002}.tar").paths) == 2
    for pattern in ("tar/*.tar", "t*r/train-{000..002}.tar"):
        np.testing.assert_array_equal(sorted_rows(all_of(data.open(pattern))), expected())
    assert sources.find("nowhere/x") is None
    for pattern, message in {
        "tar/train-{000..003}.tar": "no file tar/train-003.tar",
        "tar/*.tgz": "no file has such a name",
        "{tar/*.tar,parquet/*}": "stands for 5 files",
        "x{0..99999999}.tar": "more than 100,000 files",
    }.items():
        with pytest.raises(BntoolsError, match=message):
            data.open(pattern)


def test_which_folders_hold_shards(tmp_path):
    """A folder of tars or Parquet files and text is one of shards, beside images or folders it is one of images."""
    files.tars(tmp_path / "a")
    (tmp_path / "a" / "README.md").write_text("shards")
    assert sources.find(tmp_path / "a").kind == "tar"
    (tmp_path / "a" / "0.png").write_bytes(files.png(0))
    assert sources.find(tmp_path / "a").kind == "folder"
    assert data.open(tmp_path / "a").description == "1 image 3x6x5; scaled to 0..1; 4 other files ignored"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "x.tar").touch()
    (tmp_path / "b" / "x.parquet").touch()
    with pytest.raises(BntoolsError, match="tar files and Parquet files"):
        data.open(tmp_path / "b")


def test_what_is_no_source(tmp_path):
    """Addresses, missing files, and a column where there are none are refused in words."""
    with pytest.raises(BntoolsError, match="an address; data is read from this machine"):
        data.open("https://example.org/train.tar")
    with pytest.raises(BntoolsError, match="no such file or folder; expected a folder of images, tar"):
        data.open(tmp_path / "missing")
    with pytest.raises(BntoolsError, match=r"column= \(--column\) is for Parquet files and datasets"):
        data.open(files.folder(tmp_path / "a", 2), column="image")


def test_a_sample_of_many_decides_the_size(tmp_path, monkeypatch):
    """Where there are more images than heads are looked at, those decide, and decoding tells the rest."""
    from bntools.sources import folders

    monkeypatch.setattr(folders.Files, "heads", 10)
    files.folder(tmp_path / "a")
    order = np.random.default_rng(0).permutation(24)
    (tmp_path / "a" / f"{order[20]:03}.png").write_text("none")
    found = data.open(tmp_path / "a", batch_size=8)
    assert found.description == "24 images 3x6x5; scaled to 0..1 (judged by the first 10)"
    assert len(all_of(found)) == len(found) == 23
    assert found.damage(0).startswith("24 found, 1 could not be decoded: ")
    assert len(all_of(data.open(tmp_path / "a", max_samples=15))) == 15


def test_sizes_beyond_the_sample_are_counted(tmp_path, monkeypatch):
    """An image of another size behind those that were looked at is resized, and said once it was seen."""
    from PIL import Image

    from bntools.sources import folders

    monkeypatch.setattr(folders.Files, "heads", 70)
    files.folder(tmp_path / "a", 80)
    last = np.random.default_rng(0).permutation(80)[-1]
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / f"{last:03}.png")
    found = data.open(tmp_path / "a")
    assert found.description == "80 images 3x6x5; scaled to 0..1 (judged by the first 70)"
    assert all_of(found).shape == (80, 3, 6, 5)
    assert "resized and centre-cropped from 2 sizes" in found.description


def test_a_pipe_in_a_folder_does_not_hang(tmp_path):
    """What is no regular file is skipped by name instead of being waited for."""
    import os

    files.folder(tmp_path / "a", 2)
    os.mkfifo(tmp_path / "a" / "pipe.png")
    assert data.open(tmp_path / "a").spec["skipped"][0]["reason"] == "no regular file"


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    """A subfolder that must not be read is skipped by name, not silently."""
    import os

    files.folder(tmp_path / "a" / "open", 2)
    (tmp_path / "a" / "shut").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = data.open(tmp_path / "a")
    assert len(found) == len(all_of(found)) == 2
    assert "1 skipped (shut: this folder cannot be listed: Permission denied)" in found.description


def test_names_are_compact():
    """Many names take their bytes and some ten more each, and come back as they were."""
    from bntools.sources.names import Names

    names = [f"n{i:08}/ä\udcff{i}.jpg" for i in range(1000)]
    packed = Names(names)
    assert [packed[i] for i in range(1000)] == names
    size = len(packed._bytes) + packed._ends.itemsize * len(packed)
    assert size == sum(len(name.encode("utf-8", "surrogateescape")) + 8 for name in names)


def test_a_path_goes_straight_into_a_verb(place):
    """recalibrate, inspect and verify read a path or a dataset as the model takes it, to the same statistics."""
    import torch

    import bntools

    torch.manual_seed(0)
    models = [torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    grey = data.open(place / "folder", channels=1)
    bntools.recalibrate(models[0], grey)
    result = bntools.recalibrate(models[1], files.dataset())
    assert result.samples == 24
    torch.testing.assert_close(models[0][1].running_var, models[1][1].running_var, rtol=1e-6, atol=0)
    assert bntools.inspect(models[0], str(place / "tar"), alternatives=False).samples == 24
    assert bntools.verify(models[0], models[1], place / "parquet", tolerance=1e-4).passed
