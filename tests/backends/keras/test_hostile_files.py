"""Keras files that ask for what no file should: memory, other files, the network, and code."""

from __future__ import annotations

import io
import json
import sys
import warnings
import zipfile

import h5py
import keras
import memory_bound
import numpy as np
import pytest

import bntools
from bntools import BntoolsError
from bntools.backends import backend
from bntools.backends.keras import looking

LIMIT_BYTES = 512 << 20
EVENTS = ("os.system", "subprocess.Popen", "socket.connect", "socket.getaddrinfo", "os.exec", "os.posix_spawn")


class Watch:
    """An audit hook that notes what is run or asked of the network while it is on; it cannot be taken out."""

    def __init__(self):
        self.on, self.seen = False, []
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        looking_first = event in ("subprocess.Popen", "os.posix_spawn") and looking.__file__ in arguments[1]
        if self.on and ((event in EVENTS and not looking_first) or (event == "open" and "canary" in str(arguments[0]))):
            self.seen.append((event, arguments))


@pytest.fixture(scope="module")
def _watch():
    return Watch()


@pytest.fixture
def watch(_watch):
    """What happens in a test besides reading the file; nothing may."""
    _watch.seen.clear()
    _watch.on = True
    yield _watch
    _watch.on = False
    assert not _watch.seen


@pytest.fixture(scope="module")
def members(tmp_path_factory):
    """The members of a small .keras archive."""
    path = tmp_path_factory.mktemp("seed") / "model.keras"
    net = keras.Sequential(
        [keras.Input((3,)), keras.layers.Dense(2, name="dense"), keras.layers.BatchNormalization(name="bn")]
    )
    net.save(path)
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def written(path, members, **changed):
    """An archive with some members in place of those that were."""
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (members | changed).items():
            archive.writestr(name, content)
    return path


def layer(kind: str, module: str | None = "keras.layers", **config):
    """A layer as Keras writes it."""
    return {"module": module, "class_name": kind, "config": {"name": "odd", **config}, "registered_name": None}


def with_layer(path, members, extra):
    """The archive with this layer in place of the dense one."""
    config = json.loads(members["config.json"])
    config["config"]["layers"][1] = extra
    return written(path, members, **{"config.json": json.dumps(config)})


def function(name: str, module: str):
    """A function as a config names it."""
    return {"class_name": "function", "module": module, "config": name, "registered_name": name}


TEXT = {"class_name": "__lambda__", "config": {"code": "YQ==", "defaults": None, "closure": None}}
LAYERS = {
    "a function of os": layer("Lambda", function=function("system", "os"), arguments={"x": "touch canary"}),
    "a builtin": layer("Lambda", function=function("eval", "builtins")),
    "get_file": layer("Lambda", function=function("get_file", "keras.utils")),
    "get_file of src": layer("Lambda", function=function("get_file", "keras.src.utils.file_utils")),
    "bytecode": layer("Lambda", function=TEXT),
    "bytecode as an activation": layer("Activation", activation=TEXT),
    "a function as an activation": layer("Activation", activation=function("system", "os")),
    "get_file as a class": layer("get_file", "keras.utils", fname="canary", origin="http://127.0.0.1:9/x"),
    "a class of subprocess": layer("Popen", "subprocess", args=["touch", "canary"]),
    "a class of main": layer("Net", "__main__"),
    "a class of tests": layer("Watch", "tests.backends.keras.test_hostile_files"),
    "a registered name": {**layer("Dense", None), "registered_name": "evil>Dense"},
    "a module with dots": layer("layers.Dense", "keras"),
    "a private module": layer("TFSMLayer", filepath="canary", call_endpoint="serve"),
    "a torch module": layer("TorchModuleWrapper", module="gASVBQAAAAAAAABLAS4="),
    "a vocabulary at an address": layer("StringLookup", vocabulary="http://127.0.0.1:9/x"),
    "a vocabulary in a file": layer("StringLookup", vocabulary="canary.txt"),
    "a vocabulary of numbers in a file": layer("IntegerLookup", vocabulary="canary.txt"),
    "a vocabulary of words in a file": layer("TextVectorization", vocabulary="canary.txt"),
    "a terabyte of units": layer("Dense", units=1 << 38),
    "three gigabytes of units": layer("Dense", units=1 << 28),
    "a negative number of units": layer("Dense", units=-1),
    "a huge embedding": layer("Embedding", input_dim=1 << 30, output_dim=4),
    "an endless config": layer("Dense", units=[[[[[]]]]] * 50),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_that_asks_for_too_much(tmp_path, monkeypatch, members, watch, kind):
    """Functions, classes, files, addresses and memory that a layer's config names are refused before they are used."""
    monkeypatch.chdir(tmp_path)
    path = with_layer(tmp_path / "model.keras", members, LAYERS[kind])
    with memory_bound.at_most(LIMIT_BYTES), pytest.raises(BntoolsError) as caught:
        bntools.load(path)
    assert len(str(caught.value)) < 1500
    assert [one.name for one in tmp_path.iterdir()] == ["model.keras"]


def test_a_config_that_is_nested_without_end(tmp_path, members, watch):
    """Neither Python's nor Keras's recursion ends the process."""
    deep = "[" * 100_000 + "]" * 100_000
    for text in (deep, '{"class_name": "Sequential", "config": ' * 3000 + "{}" + "}" * 3000):
        with pytest.raises(BntoolsError):
            bntools.load(written(tmp_path / "model.keras", members, **{"config.json": text}))


def test_a_config_that_unpacks_to_far_more(tmp_path, members):
    """A config far larger than its file is not parsed: a byte of JSON may take a hundred in memory."""
    with zipfile.ZipFile(tmp_path / "model.keras", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | {"config.json": b"[" + b"[]," * (1 << 20) + b"[]]"}).items():
            archive.writestr(name, content)
    with pytest.raises(BntoolsError, match="claims to unpack"):
        bntools.load(tmp_path / "model.keras")


def bent(members, bend):
    """The weights of the archive after a change to the HDF5 file inside."""
    buffer = io.BytesIO(members["model.weights.h5"])
    with h5py.File(buffer, "r+") as file:
        bend(file)
    return buffer.getvalue()


def _replace(file, name, new):
    del file[name]
    file[name] = new


MEAN = "layers/batch_normalization/vars/2"


def _external(file):
    del file[MEAN]
    file.create_dataset(MEAN, (2,), "<f4", external=[("canary.bin", 0, 8)])


def _virtual(file):
    del file[MEAN]
    layout = h5py.VirtualLayout((2,), "<f4")
    layout[:] = h5py.VirtualSource("canary.h5", "x", (2,))
    file.create_virtual_dataset(MEAN, layout)


def _claimed(file):
    del file[MEAN]
    file.create_dataset(MEAN, (1 << 40,), "<f4", chunks=(1 << 20,))


def _compressed(file):
    del file[MEAN]
    file.create_dataset(MEAN, data=np.zeros(1 << 25, "<f4"), compression="gzip", compression_opts=1)


def _named_often(file):
    file["many"] = np.zeros(1 << 16, "<f4")
    for number in range(2000):
        file[f"many{number}"] = file["many"]


BENT = {
    "an external link": lambda file: _replace(file, MEAN, h5py.ExternalLink("canary.h5", "x")),
    "a soft link": lambda file: _replace(file, MEAN, h5py.SoftLink("/layers/dense/vars/0")),
    "a group that is an external link": lambda file: _replace(file, "layers", h5py.ExternalLink("canary.h5", "/")),
    "values in another file": _external,
    "values of another file": _virtual,
    "a claim of terabytes": _claimed,
    "zeros, compressed": _compressed,
    "a loop of groups": lambda file: file["layers"].__setitem__("again", file["/"]),
    "two loops of groups": lambda file: [file["layers"].__setitem__(name, file["layers"]) for name in ("a", "b")],
    "an array under many names": _named_often,
}


@pytest.mark.parametrize("kind", BENT)
@pytest.mark.parametrize("reading", ["load", "peek"])
def test_weights_that_lead_elsewhere(tmp_path, monkeypatch, members, watch, kind, reading):
    """Links, arrays in other files, and arrays larger than what is stored are refused, however the file is read."""
    monkeypatch.chdir(tmp_path)
    with h5py.File("other.h5", "w") as file:
        file["x"] = np.zeros(2, "<f4")
    path = written(tmp_path / "model.keras", members, **{"model.weights.h5": bent(members, BENT[kind])})
    with memory_bound.at_most(LIMIT_BYTES), pytest.raises(BntoolsError):
        bntools.load(path) if reading == "load" else backend("keras").peek(str(path))


@pytest.mark.parametrize("name", ["../canary", "/tmp/canary", "a/../../canary", "..\\canary", "assets/../../canary"])
def test_members_that_lead_out(tmp_path, members, watch, name):
    """A member whose name leads out of the archive is refused, and nothing is written there."""
    (tmp_path / "in").mkdir()
    path = written(tmp_path / "in" / "model.keras", members, **{name: b"x"})
    with pytest.raises(BntoolsError, match="leads out"):
        bntools.load(path)


@pytest.mark.parametrize("axis", [float("inf"), []])
def test_an_axis_that_is_none(tmp_path, members, axis):
    """A config whose numbers are none is left to Keras, which refuses it."""
    config = json.loads(members["config.json"])
    config["config"]["layers"][2]["config"]["axis"] = axis
    path = written(tmp_path / "model.keras", members, **{"config.json": json.dumps(config)})
    assert backend("keras").peek(str(path)) is None
    with pytest.raises(BntoolsError):
        bntools.load(path)


def test_members_that_stand_twice(tmp_path, members):
    """Of two configs the last one counts, for the check as for Keras."""
    hostile = json.loads(members["config.json"])
    hostile["config"]["layers"][1] = LAYERS["a builtin"]
    path = written(tmp_path / "model.keras", members)
    with zipfile.ZipFile(path, "a") as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        archive.writestr("config.json", json.dumps(hostile))
    with pytest.raises(BntoolsError, match="eval"):
        bntools.load(path)


def test_a_damaged_compressed_member(tmp_path, members):
    """What zlib says of damaged bytes is damage to the archive."""
    path = tmp_path / "model.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    whole = bytearray(path.read_bytes())
    start = 30 + len("metadata.json") if whole[30:].startswith(b"metadata.json") else 30 + len("config.json")
    whole[start : start + 8] = b"\xff" * 8
    path.write_bytes(whole)
    with pytest.raises(BntoolsError, match="damaged"):
        bntools.load(path)
