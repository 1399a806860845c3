"""Tar shards: what is a sample, and what hostile archives come to."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import picture_files as files
import pytest
from picture_files import all_of, expected, png, sorted_rows

from bntools import data
from bntools.errors import BntoolsError


def skipped(found) -> dict[str, str]:
    """Names and reasons of what was skipped."""
    return {bad["file"].rpartition(": ")[2]: bad["reason"] for bad in found.spec["skipped"]}


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_every_form_of_tar_is_read(tmp_path, form):
    """Members are found in all forms that Python writes, with long and foreign names, as tarfile finds them."""
    long = "d" * 90 + "/" + "e" * 90 + ".png"
    longer = f"ä/{'f' * 200}.png" if form != tarfile.USTAR_FORMAT else "g.png"
    path = files.tar(tmp_path / "a.tar", {long: png(0), longer: png(1), "b.txt": b"x"}, form)
    found = data.open(path)
    np.testing.assert_array_equal(sorted_rows(all_of(found)), expected(range(2)))
    stock = found._source.stock
    with tarfile.open(path) as archive:
        offsets = [one.offset_data for one in archive if one.name.endswith(".png")]
    assert list(stock._shards[0].offsets) == offsets
    assert found.description == "2 images in a tar file 3x6x5; scaled to 0..1; 1 other member ignored"


def test_samples_are_grouped_by_key(tmp_path):
    """Of a sample's members the image named by key and suffix alone is taken; names with more dots are images, too."""
    members = {"a/1.png": png(0), "a/1.seg.png": png(1), "a/1.json": b"{}", "a/2.seg.png": png(2), "a/2.png": png(3)}
    found = data.open(files.tar(tmp_path / "a.tar", members))
    np.testing.assert_array_equal(sorted_rows(all_of(found)), expected([0, 3]))
    assert "3 other members ignored" in found.description
    dotted = {f"photo.2024.0{i}.png": png(i) for i in range(5)}
    np.testing.assert_array_equal(
        sorted_rows(all_of(data.open(files.tar(tmp_path / "b.tar", dotted)))), expected(range(5))
    )
    hidden = {"._1.png": b"x", "1.png": png(0), "__MACOSX/1.png": b"x"}
    assert data.open(files.tar(tmp_path / "c.tar", hidden)).description == "1 image in a tar file 3x6x5; scaled to 0..1"


def test_hostile_members_are_skipped_by_name(tmp_path):
    """Links, devices, pipes, absolute paths and ways out are no images, whatever their name; nothing is written."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in {"link.png": tarfile.SYMTYPE, "hard.png": tarfile.LNKTYPE, "pipe.png": tarfile.FIFOTYPE,
                           "device.png": tarfile.CHRTYPE, "folder.png": tarfile.DIRTYPE}.items():  # fmt: skip
            one = tarfile.TarInfo(name)
            one.type, one.linkname = kind, "/etc/passwd"
            archive.addfile(one)
        for name in ("/etc/absolute.png", "../out.png", "good.png"):
            one = tarfile.TarInfo(name)
            one.size = len(png(0))
            archive.addfile(one, io.BytesIO(png(0)))
    before = sorted(tmp_path.iterdir())
    found = data.open(tmp_path / "a.tar")
    assert len(found) == len(all_of(found)) == 1
    assert skipped(found) == {
        "link.png": "a link, not an ordinary member",
        "hard.png": "a link, not an ordinary member",
        "pipe.png": "a pipe, not an ordinary member",
        "device.png": "a device, not an ordinary member",
        "/etc/absolute.png": "its path leads out of the archive",
        "../out.png": "its path leads out of the archive",
    }
    assert sorted(tmp_path.iterdir()) == before


def test_a_shard_cut_short_gives_what_is_whole(tmp_path):
    """A member that the end of the file cuts is skipped by name, and those before it are read."""
    path = files.tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(3)})
    with tarfile.open(path) as archive:
        last = archive.getmembers()[-1]
    whole = path.read_bytes()
    path.write_bytes(whole[: last.offset_data + 20])
    found = data.open(path)
    np.testing.assert_array_equal(sorted_rows(all_of(found)), expected(range(2)))
    assert skipped(found) == {"2.png": "the archive ends in the middle of it"}
    path.write_bytes(whole[: last.offset])  # between two members
    found = data.open(path)
    np.testing.assert_array_equal(sorted_rows(all_of(found)), expected(range(2)))
    assert found.skipped == 1
    assert "a.tar: it has no end: more may be missing" in found.description


def test_a_size_beyond_all_bounds(tmp_path):
    """A header that claims exabytes, in either notation, is that of a member cut short; nothing is allocated."""
    path = files.tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": png(1)})
    with tarfile.open(path) as archive:
        at = archive.getmembers()[1].offset
    for size in (b"\x80" + (1 << 80).to_bytes(11, "big"), b"77777777777\0"):
        block = bytearray(path.read_bytes())
        block[at + 124 : at + 136] = size
        block[at + 148 : at + 156] = b" " * 8
        block[at + 148 : at + 156] = b"%06o\0 " % sum(block[at : at + 512])
        path.write_bytes(block)
        assert skipped(data.open(path)) == {"1.png": "the archive ends in the middle of it"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda whole: b"hello " * 300, "no tar archive, but text"),
        (lambda whole: b"", "no tar archive, but an empty file"),
        (lambda whole: b"\x1f\x8b" + whole, "is compressed, so that nothing can be drawn"),
        (lambda whole: whole[:1024] + b"\xff" * 1024, "no tar header at byte 1,024: the archive is damaged"),
        (lambda whole: bytes(10240), "found nothing where images were expected"),
    ],
)
def test_what_is_no_tar(tmp_path, change, message):
    """Text, empty, compressed, damaged and image-free archives are refused in words."""
    path = files.tar(tmp_path / "a.tar", {"0.png": png(0)})
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(BntoolsError, match=message):
        data.open(path)


def test_extended_headers_are_bounded(tmp_path):
    """Sparse members and extended headers of absurd length are refused, and a broken pax record ends the header."""
    one = tarfile.TarInfo("0.png")
    one.size = len(png(0))
    one.pax_headers = {"comment": "x" * (2 << 20)}
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(one, io.BytesIO(png(0)))
    with pytest.raises(BntoolsError, match="an extended header of 2,097,"):
        data.open(path)
    sparse = tarfile.TarInfo("0.png")
    sparse.type = tarfile.GNUTYPE_SPARSE
    path.write_bytes(sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(BntoolsError, match=r"holds a sparse member \(0.png\)"):
        data.open(path)


def test_damaged_members_are_skipped(tmp_path):
    """A member that is no image is skipped with shard, name and reason."""
    path = files.tar(tmp_path / "a.tar", {"0.png": png(0), "1.png": b"none", "2.png": png(2)[:60]})
    found = data.open(path)
    assert len(all_of(found)) == 1
    assert "a.tar: 1.png: no image, but text" in found.description
    assert set(skipped(found)) == {"1.png", "2.png"}


def test_a_shard_that_changes_is_noticed(tmp_path):
    """A shard that is written again while it is read ends the reading with one error instead of other bytes."""
    path = files.tar(tmp_path / "a.tar", {f"{i}.png": png(i) for i in range(8)})
    found = data.open(path, batch_size=2)
    path.write_bytes(path.read_bytes() + bytes(512))
    with pytest.raises(BntoolsError, match="was changed while it was read"):
        all_of(found)
