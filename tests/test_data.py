"""Data: folders of images, arrays and factories as batches."""

from __future__ import annotations

import json
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

from bntools import ahead, arrays, data, images
from bntools.errors import BntoolsError


def picture(seed: int = 0, height: int = 12, width: int = 10, channels: int = 3) -> np.ndarray:
    """Random pixels, 8-bit."""
    shape = (height, width, channels)[: 3 if channels > 1 else 2]
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def folder(path, count: int = 6, **shape):
    """PNGs in two folders, two levels down."""
    for index in range(count):
        place = path / f"class{index % 2}" / "deep"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(index, **shape)).save(place / f"{index}.png")
    return path


def all_of(batches) -> np.ndarray:
    """All samples of all batches."""
    return np.concatenate(list(batches))


def sorted_rows(values: np.ndarray) -> np.ndarray:
    """The samples in an order that does not depend on theirs."""
    rows = values.reshape(len(values), -1)
    return rows[np.lexsort(rows.T)]


def test_images_of_one_size_are_taken_as_they_are(tmp_path):
    """Pixels of equal-sized images are x/255 in float32, as torchvision's ToTensor gives them, at any depth."""
    found = data.open(folder(tmp_path), batch_size=4)
    batches = list(found)
    expected = np.stack([torch.from_numpy(picture(i)).permute(2, 0, 1).float().div(255).numpy() for i in range(6)])
    assert [batch.shape for batch in batches] == [(4, 3, 12, 10), (2, 3, 12, 10)]
    assert all_of(batches).dtype == np.float32
    np.testing.assert_array_equal(sorted_rows(all_of(batches)), sorted_rows(expected))
    assert len(found) == 6
    assert found.description == "6 images 3x12x10; scaled to 0..1"
    assert found.spec["resized"] is None


@pytest.mark.parametrize(("height", "width"), [(40, 60), (61, 33), (20, 20), (33, 97)])
@pytest.mark.parametrize("size", [(24, 24), (30, 16)])
def test_resizing_is_torchvisions(height, width, size):
    """A resized image differs from torchvision's Resize and CenterCrop in no pixel."""
    import shim  # noqa: F401
    from torchvision.transforms import functional as tv

    image = Image.fromarray(picture(3, height, width))
    by_height = size[0] / height >= size[1] / width
    exact = [size[0], int(size[0] * width / height)] if by_height else [int(size[1] * height / width), size[1]]
    expected = tv.to_tensor(tv.center_crop(tv.resize(image, exact), list(size)))
    found = images._pixels(images._fitted(images._converted(image, 3), size), 3)
    np.testing.assert_array_equal(found, expected.numpy())


def test_order_and_sample_come_from_the_whole_folder(tmp_path):
    """A sample is the seed's draw from all files, not the first of them, and the order mixes the classes."""
    for index in range(200):
        place = tmp_path / f"class{index // 20:02d}"
        place.mkdir(exist_ok=True)
        Image.new("L", (2, 2), index).save(place / f"{index:03d}.png")
    drawn = data.open(tmp_path, max_samples=20)
    values = (all_of(drawn)[:, 0, 0, 0] * 255).round().astype(int)
    assert len(set(values)) == 20
    assert len(set(values // 20)) > 5
    np.testing.assert_array_equal(all_of(drawn), all_of(data.open(tmp_path, max_samples=20)))
    assert not np.array_equal(all_of(drawn), all_of(data.open(tmp_path, max_samples=20, seed=1)))
    everything = (all_of(data.open(tmp_path))[:, 0, 0, 0] * 255).round().astype(int)
    assert sorted(everything) == list(range(200))
    assert len(set(everything[:20] // 20)) > 5
    assert "20 images drawn from 200" in drawn.description


@pytest.mark.parametrize(
    ("mode", "pixel", "rgb"),
    [
        ("1", 1, (1, 1, 1)),
        ("L", 51, (0.2, 0.2, 0.2)),
        ("LA", (51, 10), (0.2, 0.2, 0.2)),
        ("RGB", (255, 51, 0), (1, 0.2, 0)),
        ("RGBA", (255, 51, 0, 7), (1, 0.2, 0)),
        ("I;16", 13107, (0.2, 0.2, 0.2)),
    ],
)
def test_modes(tmp_path, mode, pixel, rgb):
    """Every mode that PNG knows gives the colours it shows, 16-bit ones on the right scale; alpha is dropped."""
    Image.new(mode, (4, 4), pixel).save(tmp_path / "a.png")
    found = data.open(tmp_path, channels=3)
    np.testing.assert_allclose(all_of(found)[0, :, 0, 0], rgb, atol=1e-6)
    assert ("alpha dropped" in found.description) == (mode in ("RGBA", "LA"))


def test_sixteen_bits_keep_their_precision(tmp_path):
    """Neighbouring 16-bit values stay apart: nothing passes through 8 bits."""
    Image.fromarray(np.array([[1000, 1001]], dtype=np.uint16)).save(tmp_path / "a.png")
    np.testing.assert_allclose(all_of(data.open(tmp_path))[0, 0, 0], np.array([1000, 1001]) / 65535, rtol=1e-6)


def test_palette_and_cmyk(tmp_path):
    """Palette images give their palette's colours, with or without transparency, and CMYK is converted."""
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    palette.save(tmp_path / "p.png")
    palette.save(tmp_path / "q.png", transparency=0)
    np.testing.assert_array_equal(all_of(data.open(tmp_path))[:, :, 0, 0], [[1, 0, 0], [1, 0, 0]])
    (tmp_path / "cmyk").mkdir()
    Image.new("CMYK", (4, 4), (0, 255, 255, 0)).save(tmp_path / "cmyk" / "c.jpg", quality=100)
    red = all_of(data.open(tmp_path / "cmyk"))[0, :, 0, 0]
    assert red[0] > 0.95
    assert max(red[1:]) < 0.05


def test_animations_give_their_first_frame(tmp_path):
    """An animated image gives its first frame, and the description counts it."""
    frames = [Image.new("RGB", (4, 4), color) for color in ((255, 0, 0), (0, 255, 0))]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    found = data.open(tmp_path)
    np.testing.assert_allclose(all_of(found)[0, :, 0, 0], [1, 0, 0])
    assert "first frame of 1 animated" in found.description


def test_orientation_is_applied(tmp_path):
    """A photo that a camera stored turned is turned upright, and its size is that of the upright image."""
    turned = Image.fromarray(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40)
    exif = Image.Exif()
    exif[images.ORIENTATION] = 6
    turned.save(tmp_path / "a.png", exif=exif)
    found = data.open(tmp_path)
    assert found.spec["size"] == [3, 2]
    np.testing.assert_allclose(all_of(found)[0, 0] * 255, np.array([[120, 0], [160, 40], [200, 80]]), atol=1e-4)


def test_channels_follow_the_images_or_the_caller(tmp_path):
    """All-grey folders give one channel, mixed ones three, and the caller may say otherwise."""
    Image.new("L", (4, 4), 100).save(tmp_path / "a.png")
    assert next(iter(data.open(tmp_path))).shape == (1, 1, 4, 4)
    assert next(iter(data.open(tmp_path, channels=3))).shape == (1, 3, 4, 4)
    Image.new("RGB", (4, 4), (255, 0, 0)).save(tmp_path / "b.png")
    assert next(iter(data.open(tmp_path))).shape == (2, 3, 4, 4)
    assert next(iter(data.open(tmp_path, channels=1))).shape == (2, 1, 4, 4)
    with pytest.raises(BntoolsError, match="1 or 3 channels, not the 12"):
        data.open(tmp_path, channels=12)


def test_sizes_that_differ(tmp_path):
    """A common size is that of most images, else 224, else the median shorter side; the caller's wins."""
    for index, (height, width) in enumerate([(30, 40), (30, 40), (30, 40), (50, 60)]):
        Image.new("RGB", (width, height)).save(tmp_path / f"{index}.png")
    found = data.open(tmp_path)
    assert found.spec["size"] == [30, 40]
    assert "resized and centre-cropped from 2 sizes" in found.description
    Image.new("RGB", (70, 80)).save(tmp_path / "4.png")
    Image.new("RGB", (90, 80)).save(tmp_path / "5.png")
    assert data.open(tmp_path).spec["size"] == [40, 40]
    for index in range(10):
        Image.new("RGB", (300 + index, 310)).save(tmp_path / f"big{index}.png")
    assert data.open(tmp_path).spec["size"] == [224, 224]
    assert next(iter(data.open(tmp_path, size=(8, 16)))).shape[2:] == (8, 16)


def bad_files(path) -> None:
    """One good image among all kinds of bad ones."""
    Image.fromarray(picture(0, 64, 64)).save(path / "whole.jpg")
    whole = (path / "whole.jpg").read_bytes()
    (path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (path / "text.png").write_text("not an image")
    (path / "empty.png").write_bytes(b"")
    Image.new("F", (64, 64), 0.5).save(path / "float.tiff")
    (path / "gone.jpg").symlink_to(path / "nowhere.jpg")
    (path / "notes.txt").write_text("read me")
    (path / ".hidden.png").write_text("read me not")


def test_bad_files_are_skipped_and_named(tmp_path):
    """Truncated, empty, mislabelled, dangling and unusable images are skipped, each with its reason."""
    bad_files(tmp_path)
    found = data.open(tmp_path)
    assert len(next(iter(found))) == len(found) == 1
    reasons = {os.path.basename(bad["file"]): bad["reason"] for bad in found.spec["skipped"]}
    assert set(reasons) == {"cut.jpg", "text.png", "empty.png", "float.tiff", "gone.jpg"}
    assert reasons["text.png"] == "no image, but text"
    assert reasons["empty.png"] == "no image, but an empty file"
    assert "32-bit" in reasons["float.tiff"]
    assert "5 skipped" in found.description
    assert "1 other file ignored" in found.description


def test_damage_in_the_middle_is_found_while_reading(tmp_path):
    """A file whose damage only decoding shows is skipped then, and stands in the record afterwards."""
    folder(tmp_path, 5)
    path = tmp_path / "class0" / "deep" / "0.png"
    whole = bytearray(path.read_bytes())
    whole[60:90] = b"\0" * 30
    path.write_bytes(whole)
    found = data.open(tmp_path, batch_size=2)
    assert sum(map(len, found)) == 4
    assert len(found) == 4
    assert [os.path.basename(bad["file"]) for bad in found.spec["skipped"]] == ["0.png"]
    assert sum(map(len, found)) == 4
    assert len(found.spec["skipped"]) == 1


def test_nothing_to_read(tmp_path):
    """Missing, empty and image-free folders, and folders of unreadable images, are refused in words."""
    with pytest.raises(BntoolsError, match="no such file or folder"):
        data.open(tmp_path / "missing")
    with pytest.raises(BntoolsError, match="found nothing where images were expected"):
        data.open(tmp_path)
    (tmp_path / "a.csv").write_text("1,2")
    with pytest.raises(BntoolsError, match="only 1 other file"):
        data.open(tmp_path)
    with pytest.raises(BntoolsError, match="unknown kind of data file"):
        data.open(tmp_path / "a.csv")
    (tmp_path / "a.png").write_text("1,2")
    with pytest.raises(BntoolsError, match=r"its only image cannot be read: a.png: no image, but text"):
        data.open(tmp_path)


def test_all_damaged_in_the_middle(tmp_path):
    """A folder whose every image breaks in decoding is an error, not an empty iteration."""
    folder(tmp_path, 2)
    for path in tmp_path.rglob("*.png"):
        whole = bytearray(path.read_bytes())
        whole[60:90] = b"\0" * 30
        path.write_bytes(whole)
    with pytest.raises(BntoolsError, match="none of the 2 images can be read"):
        data.open(tmp_path)


def test_decompression_bombs_are_skipped(tmp_path, monkeypatch):
    """An image with absurdly many pixels is skipped with that reason and never decoded."""
    folder(tmp_path, 1)
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
    found = data.open(tmp_path)
    assert len(found) == 1
    assert "more pixels" in found.spec["skipped"][0]["reason"]


def test_loops_of_links_end(tmp_path):
    """A link back to the folder itself neither hangs nor doubles the images."""
    folder(tmp_path, 3)
    (tmp_path / "again").symlink_to(tmp_path)
    assert len(data.open(tmp_path)) == 3


def test_normalization_and_layout(tmp_path):
    """mean and std apply per channel after scaling, and NHWC holds the same numbers with channels last."""
    plain = all_of(data.open(folder(tmp_path)))
    mean, std = (0.5, 0.25, 0.125), (0.5, 2.0, 4.0)
    normalized = all_of(data.open(tmp_path, mean=mean, std=std))
    expected = (plain - np.float32(mean).reshape(3, 1, 1)) / np.float32(std).reshape(3, 1, 1)
    np.testing.assert_array_equal(normalized, expected)
    last = data.open(tmp_path, mean=mean, std=std, layout="NHWC")
    np.testing.assert_array_equal(all_of(last).transpose(0, 3, 1, 2), normalized)
    assert data.example(last.spec).shape == (2, 12, 10, 3)
    with pytest.raises(BntoolsError, match="2 numbers, but the data has 3 channels"):
        data.open(tmp_path, mean=(1, 2), std=(1, 2))


@pytest.mark.parametrize(
    "options",
    [{"batch_size": 0}, {"max_samples": 0}, {"layout": "HWC"}, {"size": (0, 4)}, {"mean": (1.0,)},
     {"mean": (1.0,), "std": (0.0,)}, {"mean": (1.0,), "std": (1.0, 2.0)}],
)  # fmt: skip
def test_senseless_options_are_refused(tmp_path, options):
    """Options that contradict each other or make no sense are refused before anything is read."""
    with pytest.raises(BntoolsError):
        data.open(folder(tmp_path, 1), **options)


def test_spec_reopens_and_imitates(tmp_path):
    """A spec survives JSON, opens the same data again, and gives random batches with its mean and range."""
    found = data.open(
        folder(tmp_path, 8, height=24, width=24), batch_size=3, max_samples=7, mean=(0.5,) * 3, std=(0.25,) * 3
    )
    spec = json.loads(json.dumps(found.spec))
    np.testing.assert_array_equal(all_of(data.reopen(spec)), all_of(found))
    like = data.example(spec, n=16, seed=3)
    assert like.shape == (16, 3, 24, 24)
    assert like.dtype == np.float32
    np.testing.assert_allclose(like.mean((0, 2, 3)), spec["measured"]["mean"], atol=0.1)
    assert like.min() >= min(spec["measured"]["min"])
    np.testing.assert_array_equal(like, data.example(spec, n=16, seed=3))


def test_arrays_are_taken_as_they_are(tmp_path):
    """Float and integer arrays keep their values and dtype, sampled from everywhere, also those on the disk."""
    floats = np.random.default_rng(0).normal(size=(50, 3, 4)).astype(np.float32)
    floats[3, 1, 1] = np.nan
    np.save(tmp_path / "a.npy", floats)
    found = data.open(tmp_path / "a.npy", batch_size=8)
    np.testing.assert_array_equal(sorted_rows(all_of(found)), sorted_rows(floats))
    assert json.loads(json.dumps(found.spec, allow_nan=False))["measured"]["shape"] == [3, 4]
    tokens = np.arange(60).reshape(20, 3)
    np.save(tmp_path / "t.npy", tokens)
    some = data.open(tmp_path / "t.npy", max_samples=5)
    assert all_of(some).dtype == tokens.dtype
    assert len(some) == 5
    assert set(all_of(some)[:, 0]) - set(tokens[:5, 0])
    assert some.description == "5 samples drawn from 20: int64 3"
    assert data.example(some.spec).dtype == tokens.dtype


def test_eight_bit_image_arrays_are_scaled(tmp_path):
    """uint8 arrays of rank 4 are scaled as images are, and the description says so; channels-last ones are refused."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 3, 5, 6), dtype=np.uint8)
    np.save(tmp_path / "a.npy", pixels)
    found = data.open(tmp_path / "a.npy", channels=3, mean=(0.5,) * 3, std=(2.0,) * 3)
    expected = (pixels.astype(np.float32) / np.float32(255) - np.float32(0.5)) / np.float32(2)
    np.testing.assert_array_equal(sorted_rows(all_of(found)), sorted_rows(expected))
    assert "scaled to 0..1" in found.description
    np.save(tmp_path / "b.npy", pixels.transpose(0, 2, 3, 1))
    with pytest.raises(BntoolsError, match="channels last"):
        data.open(tmp_path / "b.npy", channels=3)


def test_several_arrays_are_dict_batches(tmp_path):
    """An archive of several arrays of equal length yields dicts whose rows belong together."""
    ids = np.arange(10)
    np.savez(tmp_path / "a.npz", ids=ids, twice=np.stack([ids * 2, ids * 3], 1))
    found = data.open(tmp_path / "a.npz", batch_size=4)
    for batch in found:
        np.testing.assert_array_equal(batch["twice"], np.stack([batch["ids"] * 2, batch["ids"] * 3], 1))
    assert set(data.example(found.spec)) == {"ids", "twice"}
    np.savez(tmp_path / "one.npz", x=ids)
    assert sorted(np.concatenate(list(data.open(tmp_path / "one.npz")))) == list(range(10))


def test_tensors_in_files(tmp_path):
    """.pt holds a tensor, a tuple whose first is the input, or a dict; .safetensors arrays; bfloat16 as float32."""
    from safetensors.torch import save_file

    x = torch.arange(12.0).reshape(6, 2)
    for name, content in {"tensor": x, "tuple": (x, torch.arange(6)), "dict": {"a": x, "b": x + 1}}.items():
        torch.save(content, tmp_path / f"{name}.pt")
    for name in ("tensor", "tuple"):
        np.testing.assert_array_equal(sorted_rows(all_of(data.open(tmp_path / f"{name}.pt"))), x.numpy())
    batch = next(iter(data.open(tmp_path / "dict.pt")))
    np.testing.assert_array_equal(batch["b"], batch["a"] + 1)
    save_file({"x": x.bfloat16()}, tmp_path / "x.safetensors")
    found = all_of(data.open(tmp_path / "x.safetensors"))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(sorted_rows(found), x.numpy())
    torch.save(torch.nn.ReLU(), tmp_path / "model.pt")
    with pytest.raises(BntoolsError, match="holds a model where data was expected"):
        data.open(tmp_path / "model.pt")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (np.array([object()]), "no readable NumPy file"),
        (np.array(["a", "b"]), "expected an array of numbers"),
        (np.float32(3), "a single number"),
        (np.zeros((0, 3)), "is empty"),
    ],
)
def test_arrays_that_are_none(tmp_path, content, message):
    """Objects, strings, single numbers and empty arrays are refused in words."""
    np.save(tmp_path / "a.npy", content, allow_pickle=True)
    with pytest.raises(BntoolsError, match=message):
        data.open(tmp_path / "a.npy")


def test_damaged_archives(tmp_path):
    """A truncated array file, a text file of that name, and arrays of unequal length are refused."""
    np.save(tmp_path / "a.npy", np.zeros((100, 10)))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:500])
    (tmp_path / "b.npz").write_text("hello")
    np.savez(tmp_path / "c.npz", x=np.zeros(3), y=np.zeros(4))
    for name, message in {
        "a.npy": "no readable NumPy file .*ends before its last number",
        "b.npz": "text",
        "c.npz": "unequal length",
    }.items():
        with pytest.raises(BntoolsError, match=message):
            data.open(tmp_path / name)


def test_factories(tmp_path, monkeypatch):
    """A factory is called anew for each reading, its batches pass unchanged, and max_samples cuts them short."""
    (tmp_path / "feed_a.py").write_text(
        "import numpy as np\n"
        "def make():\n    return ((np.full((4, 2), i, np.float32), i) for i in range(5))\n"
        "def boom():\n    raise RuntimeError('no disk')\n"
        "def nothing():\n    return []\n"
        "once = iter([1])\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    found = data.open("feed_a:make")
    assert [batch[1] for batch in found] == [batch[1] for batch in found] == list(range(5))
    assert sum(len(batch[0]) for batch in data.open("feed_a:make", max_samples=6)) == 6
    assert data.example(found.spec).shape == (2, 2)
    with pytest.raises(TypeError):
        len(found)
    for name, message in {
        "feed_a:boom": "no disk", "feed_a:nothing": "yields no batches", "feed_a:once": "read only once",
        "feed_a:gone": "has no 'gone'", "feed_b:make": "no module 'feed_b'", "feed_a:": "expected package.module:name",
    }.items():  # fmt: skip
        with pytest.raises(BntoolsError, match=message):
            data.open(name)


def test_work_ahead_is_bounded_and_in_order():
    """Results come in order, and never are more begun than asked for ahead."""
    begun: list[int] = []

    def note(item: int) -> int:
        begun.append(item)
        return item

    for count, result in enumerate(ahead.in_order(note, range(50), 4), start=1):
        assert result == count - 1
        assert len(begun) <= count + 4
    assert sorted(begun) == list(range(50))


def test_no_thread_survives_its_consumer():
    """The threads are gone when the consumer stops early or a worker raised, whose error surfaces."""
    results = ahead.in_order(abs, range(100), 8)
    assert next(results) == 0
    results.close()
    with pytest.raises(ZeroDivisionError):
        list(ahead.in_order(lambda item: 1 // (3 - item), range(10), 4))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bntools-ahead")]


def test_a_folder_left_early_leaves_no_threads(tmp_path):
    """Dropping a half-read iterator over a folder ends its threads."""
    batches = iter(data.open(folder(tmp_path, 30), batch_size=2))
    next(batches)
    batches.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("bntools-ahead")]


def test_images_in_arrays_are_told_by_dtype_and_rank():
    """Only uint8 of rank 4 counts as images: bytes of other ranks are numbers like any others."""
    assert arrays.holds_images(np.zeros((1, 3, 4, 4), np.uint8))
    assert not arrays.holds_images(np.zeros((1, 3), np.uint8))
    assert not arrays.holds_images(np.zeros((1, 3, 4, 4), np.int64))


def damaged_inside(path) -> None:
    """Zeros in the middle of a PNG, which only decoding meets."""
    whole = bytearray(path.read_bytes())
    whole[60:90] = b"\0" * 30
    path.write_bytes(whole)


def test_a_run_of_damaged_files_ends_nothing(tmp_path):
    """A folder whose first images, more than are looked at in the beginning, are damaged is read all the same."""
    folder(tmp_path, 70)
    files = sorted(tmp_path.rglob("*.png"))
    good = files[np.random.default_rng(0).permutation(70)[-1]]
    for path in files:
        if path != good:
            damaged_inside(path)
    found = data.open(tmp_path)
    assert (found.samples, found.skipped) == (1, 69)
    assert sum(map(len, found)) == 1
    damaged_inside(good)
    with pytest.raises(BntoolsError, match=r"none of the 70 images can be read: .*; and 67 more"):
        data.open(tmp_path)


def test_late_damage_is_told_apart(tmp_path):
    """What reading finds damaged after the description is told with its names, and nothing if there is none."""
    folder(tmp_path, 70)
    files = sorted(tmp_path.rglob("*.png"))
    last = files[np.random.default_rng(0).permutation(70)[-1]]
    damaged_inside(last)
    found = data.open(tmp_path)
    assert found.damage(found.skipped) == ""
    assert sum(map(len, found)) == 69
    assert found.damage(0).startswith(f"70 found, 1 could not be decoded: {last.name}: ")


def test_conversions_are_said(tmp_path):
    """The description counts images taken from grey to RGB or back, and transparency of palettes as alpha."""
    Image.new("L", (4, 4), 100).save(tmp_path / "a.png")
    assert data.open(tmp_path, channels=3).description == "1 image 3x4x4; scaled to 0..1; 1 converted to RGB"
    assert data.open(tmp_path).description == "1 image 1x4x4; scaled to 0..1"
    assert (
        data.open(tmp_path, size=(2, 2)).description
        == "1 image 1x2x2, resized and centre-cropped from 4x4; scaled to 0..1"
    )
    Image.new("P", (4, 4)).save(tmp_path / "b.png", transparency=0)
    assert data.open(tmp_path).description == "2 images 3x4x4; scaled to 0..1; 1 converted to RGB; alpha dropped in 1"
    assert data.open(tmp_path, channels=1).spec["converted"] == 1


def test_arrays_with_channels_last(tmp_path):
    """With layout NHWC an array is normalized along its last axis, and the record says so."""
    array = np.arange(2 * 4 * 5 * 3, dtype=np.float32).reshape(2, 4, 5, 3)
    np.save(tmp_path / "a.npy", array)
    found = data.open(tmp_path / "a.npy", channels=3, layout="NHWC", mean=(1, 2, 3), std=(2, 2, 2))
    (batch,) = found
    np.testing.assert_allclose(batch, (array - np.array([1, 2, 3])) / 2)
    assert found.spec["channel_axis"] == 3
    assert len(found.spec["measured"]["mean"]) == 3


def test_raw_pixels(tmp_path):
    """Images of a folder, and arrays, that are named raw stay 8-bit numbers; a mean does not go with them."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (batch,) = data.open(tmp_path, raw=("",), layout="NHWC")
    assert batch.dtype == np.uint8
    np.testing.assert_array_equal(batch[0], pixels)
    np.savez(tmp_path / "b.npz", one=pixels[None], two=pixels[None])
    (named,) = data.open(tmp_path / "b.npz", raw=("two",))
    assert (named["one"].dtype, named["two"].dtype) == (np.float32, np.uint8)
    with pytest.raises(BntoolsError, match="are for floating-point inputs"):
        data.open(tmp_path, raw=("",), mean=(0,), std=(1,))
