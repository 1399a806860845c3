"""Files of statistics: read by others, and refused where they are damaged or crafted."""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import safetensors.numpy
import torch
from models import cnn

import bntools
from bntools.stats import LayerStatistics, Statistics


@pytest.fixture
def written(tmp_path):
    """A file of statistics of a small module, and its bytes."""
    path = tmp_path / "site.safetensors"
    bntools.save_stats(cnn(), path)
    return path, path.read_bytes()


def crafted(written, change) -> bytes:
    """The file with a changed header: ``change(header, facts)`` edits both in place."""
    _, data = written
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    facts = json.loads(header["__metadata__"]["bntools.statistics"])
    change(header, facts)
    header["__metadata__"]["bntools.statistics"] = json.dumps(facts)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def test_the_safetensors_package_reads_it(written):
    """The file is one of safetensors, its tensors called as in a state dict, which it loads into."""
    path, _ = written
    tensors = safetensors.numpy.load_file(path)
    assert {name: array.dtype.name for name, array in tensors.items()} == {
        f"{layer}.{kind}": "float32" for layer in "14" for kind in ("running_mean", "running_var")
    }
    values = {name: torch.from_numpy(array) for name, array in tensors.items()}
    assert not cnn().load_state_dict(values, strict=False).unexpected_keys


def test_float64_stays_exact(tmp_path):
    """Numbers that float32 does not hold come back as they are."""
    layers = (LayerStatistics("bn", np.array([0.1, 1e300]), np.array([1.0, 2.0]), 1e-5, 1),)
    bntools.save_stats(Statistics(layers, "torch", "abc"), tmp_path / "s.safetensors")
    assert bntools.load_stats(tmp_path / "s.safetensors")["bn"].mean.tolist() == [0.1, 1e300]
    assert safetensors.numpy.load_file(tmp_path / "s.safetensors")["bn.running_var"].dtype == np.float32


def test_what_could_not_be_read_is_not_written():
    """A number of samples that is none is refused where the statistics are taken; a NumPy integer is one."""
    assert type(bntools.statistics(cnn(), samples=np.int64(5)).samples) is int
    for wrong in (-1, 2.5):
        with pytest.raises(bntools.BntoolsError, match="found samples="):
            bntools.statistics(cnn(), samples=wrong)
    with pytest.raises(bntools.BntoolsError, match=r"found '\\x1b\[2J'"):
        bntools.statistics(cnn(), note="\x1b[2J")


def test_every_truncation_is_refused(written):
    """A file cut off anywhere is refused as one line that names it."""
    path, data = written
    for length in (*range(0, len(data), 5), len(data) - 1):
        path.write_bytes(data[:length])
        with pytest.raises(bntools.BntoolsError, match=r"site\.safetensors: ") as refused:
            bntools.load_stats(path)
        assert "\n" not in str(refused.value)


def test_no_damaged_byte_surfaces_as_anything_else(written):
    """Whatever byte is changed, the file is read or refused; nothing else is raised."""
    path, data = written
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        damaged[generator.integers(len(data))] = generator.integers(256)
        path.write_bytes(damaged)
        try:
            bntools.load_stats(path)
        except bntools.BntoolsError:
            refused += 1
    assert refused > 50


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda h, f: h["1.running_mean"].update(dtype="I64"), "is of dtype 'I64'"),
        (lambda h, f: h["1.running_mean"].update(shape=[2, 2]), "damaged"),
        (lambda h, f: h["1.running_mean"].update(shape=[2**61]), "does not lie where"),
        (lambda h, f: h["1.running_mean"].update(data_offsets=[4, 24]), "does not lie where"),
        (lambda h, f: h.pop("1.running_var"), "damaged"),
        (lambda h, f: h.update({"9.running_var": h.pop("1.running_var")}), "it lacks '1.running_var'"),
        (lambda h, f: f["layers"].pop(), "belongs to no layer"),
        (lambda h, f: f["layers"].append(f["layers"][0]), "it lacks '1.running_mean'"),
        (lambda h, f: f["layers"][0].update(eps=-1), "other types"),
        (lambda h, f: f["layers"][0].update(updates="many"), "other types"),
        (lambda h, f: f.update(format=2), "in format 2"),
        (lambda h, f: f["layers"][0].update(eps=1e300), "other types"),
        (lambda h, f: f.update(samples=-1), "found samples=-1"),
        (lambda h, f: f.update(note="\x1b[2J"), r"found '\\x1b\[2J'"),
        (lambda h, f: f["versions"].update({"torch": "\ud800"}), r"found '\\ud800'"),
        (lambda h, f: f.update(versions=[]), "damaged"),
        (lambda h, f: f.pop("weights"), "it lacks 'weights'"),
    ],
)
def test_crafted_headers_are_refused(written, change, message):
    """What a header claims is checked before it is believed."""
    path, _ = written
    path.write_bytes(crafted(written, change))
    with pytest.raises(bntools.BntoolsError, match=message):
        bntools.load_stats(path)


def test_bytes_of_no_tensor_and_names_that_stand_twice_are_refused(written):
    """Two readers could take such a file for different things."""
    path, data = written
    path.write_bytes(data + b"more")
    with pytest.raises(bntools.BntoolsError, match="4 bytes belong to no tensor"):
        bntools.load_stats(path)
    length = int.from_bytes(data[:8], "little")
    text = b'{"1.running_mean":{},' + data[9 : 8 + length]
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(bntools.BntoolsError, match="a name stands in it twice"):
        bntools.load_stats(path)


def test_crafted_numbers_are_refused(written):
    """NaN and a negative variance are no statistics, whoever wrote the file."""
    path, data = written
    for value, message in ((np.nan, "not finite"), (-1, "negative variance")):
        path.write_bytes(data[:-4] + np.float32(value).tobytes())
        with pytest.raises(bntools.BntoolsError, match=message):
            bntools.load_stats(path)


def test_other_files_are_refused(written, tmp_path):
    """A missing file, a folder, a model's weights, text, and a huge header are told apart."""
    path, data = written
    weights = tmp_path / "weights.safetensors"
    safetensors.numpy.save_file({"a": np.zeros(3)}, weights)
    for place, content, message in (
        (tmp_path / "none.safetensors", None, "no such file"),
        (tmp_path, None, "is a folder"),
        (weights, None, "of 1 tensors, not of statistics"),
        (path, b"hello, this is text", "found text"),
        (path, (1 << 60).to_bytes(8, "little") + data[8:], "truncated or damaged"),
        (path, (70000).to_bytes(8, "little") + b'{"a":' * 14000, "damaged"),
    ):
        if content is not None:
            place.write_bytes(content)
        with pytest.raises(bntools.BntoolsError, match=message):
            bntools.load_stats(place)
    os.mkfifo(tmp_path / "pipe.safetensors")
    with pytest.raises(bntools.BntoolsError, match="is a device or a pipe"):
        bntools.load_stats(tmp_path / "pipe.safetensors")
    with pytest.raises(bntools.BntoolsError, match="expected that suffix"):
        bntools.save_stats(cnn(), tmp_path / "site.pt")
    with pytest.raises(bntools.BntoolsError, match="found a dict where statistics were expected"):
        bntools.apply(cnn(), {})
