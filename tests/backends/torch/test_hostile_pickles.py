"""Pickles that no careless reading survives: in time, memory and stack, and by what stands in the place of methods."""

from __future__ import annotations

import io
import pickletools
import struct
import sys
import time
import zipfile

import memory_bound
import pytest
import torch
from torch import nn

import bntools
from bntools import BntoolsError, data
from bntools.backends import backend
from bntools.backends.torch import pickles

LIMIT_S = 5
LIMIT_BYTES = 512 << 20
SIXTEEN = bytes(16)  # what the one storage of an archive holds
PACKAGE = """
from torch import nn
class Net(nn.Module):
    def __new__(cls, *given):
        if given:
            open({target!r}, "w").close()
        return super().__new__(cls)
    def __init__(self, *given):
        open({target!r}, "w").close()
        super().__init__()
"""


@pytest.fixture
def target(tmp_path, monkeypatch):
    """A file that the constructor of ``hostile_module.Net`` creates."""
    (tmp_path / "hostile_module.py").write_text(PACKAGE.format(target=str(tmp_path / "created")))
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("hostile_module", None)
    yield tmp_path / "created"
    sys.modules.pop("hostile_module", None)


def archive(path, content: bytes) -> None:
    """A file as torch.save lays it out, with these bytes as the pickle."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", content)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")
        file.writestr("archive/data/0", SIXTEEN)


def old_format(path, content: bytes, storages: bytes = b"\x80\x02].") -> None:
    """A file in the format from before PyTorch 1.6."""
    start = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}."
    path.write_bytes(start + content + storages)


def text(value: str) -> bytes:
    """The opcode that pushes a text."""
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    """The opcode that pushes a whole number."""
    content = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(content)]) + content


def named(name: str) -> bytes:
    """The opcode that pushes what a module has under a name."""
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def tensor(count: int, size: int, stride: int, offset: int = 0, more: bytes = b"") -> bytes:
    """A float32 tensor of one axis on the storage 0, said to be of ``count`` numbers."""
    storage = b"(" + text("storage") + named("torch.FloatStorage") + text("0") + text("cpu") + number(count)
    shape = number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89" + named("collections.OrderedDict")
    return named("torch._utils._rebuild_tensor_v2") + b"(" + storage + more + b"tQ" + shape + b")RtR"


def state(value: bytes) -> bytes:
    """A state dict of a BN layer whose mean and variance are this value."""
    return b"\x80\x02}(" + text("bn.running_mean") + value + text("bn.running_var") + value + b"u."


def doubled(value: bytes, times: int, pair: bytes) -> bytes:
    """A value twice in the next, and so on; ``pair`` makes one of the two that lie on the stack."""
    rounds = (b"h" + bytes([n]) + b"h" + bytes([n]) + pair + b"q" + bytes([n + 1]) for n in range(times))
    return value + b"q\x00" + b"".join(rounds)


def module(attributes: bytes, children: bytes = b"", name: str = "torch.nn.modules.container.Sequential") -> bytes:
    """A module created empty and filled, with these attributes and children besides."""
    empty = b"".join(text(f"_{kind}") + b"}" for kind in ("parameters", "buffers"))
    return named(name) + b")\x81}(" + empty + text("_modules") + b"}(" + children + b"u" + attributes + b"ub"


def family(times: int) -> bytes:
    """Modules that hold the module before twice."""
    content = module(b"") + b"q\x00"
    for n in range(times):
        both = text("a") + b"h" + bytes([n]) + text("b") + b"h" + bytes([n])
        content += module(b"", both) + b"q" + bytes([n + 1])
    return content


DEEP = b"N" + b"\x85" * 120_000
WIDE = b"(" + b"N" * 20_000 + b"tq\x00"
BOMBS = {
    "a tuple 120,000 deep as a key": b"\x80\x02}" + DEEP + b"Ns.",
    "a tuple of 2 to the 60 as a key": b"\x80\x02}" + doubled(b"N", 60, b"\x86") + b"Ns.",
    "a wide tuple as many keys": b"\x80\x02" + WIDE + b"}(" + b"h\x00N" * 300 + b"u.",
    "a wide tuple in many sets": b"\x80\x02" + WIDE + named("builtins.set") + b"q\x01"
     + b"h\x01h\x00\x85R" * 300 + b".",
    "lists that calls share": b"\x80\x02]q\x00(" + b"]" * 3_000 + b"e" + named("torch.Size") + b"q\x01"
    + b"h\x01h\x00\x85R" * 3_000 + b".",
    "a bytearray of a terabyte": b"\x80\x02" + named("builtins.bytearray") + number(1 << 40) + b"\x85R.",
    "one number repeated": state(tensor(4, 1 << 28, 0)),
    "a storage beyond its record": state(tensor(1 << 28, 1 << 28, 1)),
    "a tensor beyond its storage": state(tensor(4, 1 << 28, 1)),
    "a negative stride": state(tensor(4, 4, -1, 3)),
    "a negative offset": state(tensor(4, 4, 1, -4)),
    "a size beyond all numbers": state(tensor(4, 1 << 62, 1 << 62)),
    "modules by the billion": b"\x80\x02" + family(40) + b".",
    "a module in itself": b"\x80\x02" + module(b"") + b"q\x00}" + text("_modules") + b"}" + text("a") + b"h\x00ssb.",
    "a string of 4 GiB": b"\x80\x02X\xff\xff\xff\xffabc.",
    "a frame": b"\x80\x02\x95" + b"\xff" * 7 + b"\x00N.",
    "an extension code": b"\x80\x02\x82\x01.",
    "a name from the stack": b"\x80\x02" + text("os") + text("system") + b"\x93.",
    "an object made with keywords": b"\x80\x02" + named("torch.nn.modules.linear.Linear") + b")}\x92.",
    "copyreg": b"\x80\x02" + named("copyreg._reconstructor") + named("torch.nn.modules.linear.Identity")
    + named("builtins.object") + b"N\x87R.",
    "a persistent id of another kind": b"\x80\x02(" + text("module") + named("os.system") + b"tQ.",
    "a persistent id that is a text": b"\x80\x02" + text("storage") + b"Q.",
}  # fmt: skip


@pytest.mark.parametrize("kind", BOMBS)
@pytest.mark.parametrize("form", [archive, old_format])
def test_bombs_end_in_words(tmp_path, kind, form):
    """A few kilobytes take neither minutes, nor gigabytes, nor the stack: they are refused, by every way of reading."""
    path = tmp_path / "model.pt"
    form(path, BOMBS[kind])
    began = time.monotonic()
    with memory_bound.at_most(LIMIT_BYTES):
        for reading in (
            lambda: bntools.load(path, arch=lambda: nn.BatchNorm1d(4)),
            lambda: backend("torch").described(path),
        ):
            with pytest.raises(BntoolsError) as caught:
                reading()
            assert len(str(caught.value)) < 2000
            assert "MemoryError" not in str(caught.value)
        with pytest.raises(BntoolsError):
            data.open(path)
    assert time.monotonic() - began < LIMIT_S


def test_a_bomb_behind_the_object(tmp_path):
    """A file of the old format ends with a list of its storages, a pickle like the others."""
    path = tmp_path / "model.pt"
    torch.save({"w": torch.ones(2)}, path, _use_new_zipfile_serialization=False)
    with path.open("rb") as file:
        for _ in range(4):
            pickletools.dis(file, io.StringIO())
        before = file.tell()
    path.write_bytes(path.read_bytes()[:before] + BOMBS["a string of 4 GiB"])
    for reading in (lambda: bntools.load(path, arch=lambda: nn.BatchNorm1d(4)), lambda: data.open(path)):
        with pytest.raises(BntoolsError, match="expected 4294967295 bytes"):
            reading()


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")  # of PyTorch 2.15, where it loads
@pytest.mark.parametrize("odd", ["meta", "sparse"])
def test_tensors_without_numbers(tmp_path, odd):
    """Tensors that hold no plain numbers are no statistics, no data, and no weights of a module."""
    made = {
        "meta": lambda: torch.ones(4, device="meta"),
        "sparse": lambda: torch.ones(4).to_sparse(),
    }[odd]()
    model = nn.BatchNorm1d(4)
    model.running_mean = made
    torch.save(model, tmp_path / "model.pt")
    torch.save({"bn.running_mean": made, "bn.running_var": made}, tmp_path / "state.pt")
    torch.save(made, tmp_path / "data.pt")
    with pytest.raises(BntoolsError, match="no numbers in memory"):
        bntools.load(tmp_path / "model.pt")
    assert backend("torch").described(tmp_path / "state.pt") == []
    with pytest.raises(BntoolsError, match="where data was expected"):
        data.open(tmp_path / "data.pt")


CLASS = named("hostile_module.Net")
SNARES = {
    "state_dict": b"\x80\x02" + module(text("state_dict") + CLASS) + b".",
    "__reduce_ex__": b"\x80\x02" + module(text("__reduce_ex__") + CLASS) + b".",
    "an instance": b"\x80\x02" + module(text("forward") + module(b"", name="hostile_module.Net")) + b".",
    "in slots": b"\x80\x02" + module(b"")[:-2] + b"u}" + text("eval") + CLASS + b"s\x86b.",
    "a hook": b"\x80\x02" + module(text("_state_dict_hooks") + b"}K\x01" + CLASS + b"s") + b".",
    "a parameter": b"\x80\x02" + named("torch.nn.modules.linear.Identity") + b")\x81}(" + text("_parameters")
    + b"}" + text("x") + module(text("detach") + CLASS, name="hostile_module.Net") + b"s"
    + text("_buffers") + b"}" + text("_modules") + b"}ub.",
    "items": b"\x80\x02" + named("collections.OrderedDict") + b")R}" + text("items") + CLASS + b"sb.",
    "beside a model": b"\x80\x02}(" + text("model") + module(b"") + text("x") + module(text("train") + CLASS) + b"u.",
    "a result": b"\x80\x02" + module(b"") + b"q\x00}" + text("eval") + CLASS + b"sb.",
}  # fmt: skip


@pytest.mark.parametrize("kind", SNARES)
def test_no_attribute_takes_the_place_of_a_method(tmp_path, target, kind):
    """A class of an admitted package is not called because a file puts it where bntools, or PyTorch, calls a method."""
    path = tmp_path / "model.pt"
    archive(path, SNARES[kind])
    with pytest.raises(BntoolsError):
        bntools.inspect(bntools.load(path, allow="hostile_module"))
    assert not target.exists()


def test_the_snares_are_real(tmp_path, target):
    """PyTorch alone loads such a module, and calls the constructor when it is asked for its state."""
    import hostile_module

    archive(tmp_path / "model.pt", SNARES["state_dict"])
    with torch.serialization.safe_globals([nn.Sequential, hostile_module.Net]):
        torch.load(tmp_path / "model.pt", weights_only=True).state_dict()
    assert target.exists()


def test_attributes_that_hide_no_call(tmp_path):
    """A text or number under the name of a method, as detectors keep their ``type``, is no harm."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    model.type, model.half = "head", False
    torch.save(model, tmp_path / "model.pt")
    assert bntools.load(tmp_path / "model.pt").type == "head"


NONSENSE = [("momentum", -1e9), ("momentum", "0.1"), ("eps", None), ("num_features", "x")]


@pytest.mark.parametrize(("name", "value"), NONSENSE)
def test_layers_that_are_described_by_nonsense(tmp_path, name, value):
    """What no layer can have as momentum, eps or number of channels is damage, found when the file is read."""
    model = nn.Sequential(nn.BatchNorm1d(2))
    model[0].num_batches_tracked.fill_(1000)
    setattr(model[0], name, value)
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(BntoolsError, match="damaged"):
        bntools.load(tmp_path / "model.pt")


@pytest.mark.parametrize(("place", "value"), [(8, b"\xff\xff"), (42, b"\xff" * 4), (46, b"\xff\xfe")])
def test_archives_that_make_zipfile_stumble(tmp_path, place, value):
    """A table of contents that no archive can have is damage, in whatever way zipfile says so."""
    archive(tmp_path / "model.pt", b"\x80\x02}.")
    whole = (tmp_path / "model.pt").read_bytes()
    start = whole.index(b"PK\x01\x02") + place
    (tmp_path / "model.pt").write_bytes(whole[:start] + value + whole[start + len(value) :])
    with pytest.raises(BntoolsError, match="damaged"):
        bntools.load(tmp_path / "model.pt")


def test_an_end_of_an_archive_alone(tmp_path):
    """PyTorch's reader looks for the table of such a file before its beginning, and says so with an OSError."""
    (tmp_path / "model.pt").write_bytes(b"PK\x05\x06" + bytes(4093))
    with pytest.raises(BntoolsError, match=r"model\.pt"):
        backend("torch").described(tmp_path / "model.pt")
    with pytest.raises(BntoolsError, match="damaged"):
        pickles.read(str(tmp_path / "model.pt"))


def test_a_table_of_several_disks(tmp_path):
    """zipfile's own question whether a file is an archive raises for one that goes over several disks."""
    archive(tmp_path / "model.pt", b"\x80\x02}.")
    whole = (tmp_path / "model.pt").read_bytes()
    end = whole.index(b"PK\x05\x06")
    (tmp_path / "model.pt").write_bytes(whole[:end] + b"PK\x06\x07" + b"\xff" * 16 + whole[end:])
    with pytest.raises(BntoolsError, match="damaged"):
        bntools.load(tmp_path / "model.pt")


def test_a_pickle_that_unpacks_to_megabytes(tmp_path):
    """A pickle that is far larger than its file is not walked through."""
    archive(tmp_path / "model.pt", b"\x80\x02" + b"N" * (8 << 20) + b".")
    with pytest.raises(BntoolsError, match="claims to unpack"):
        bntools.load(tmp_path / "model.pt")


def test_a_counter_that_never_was(tmp_path):
    """A negative number of updates, as a damaged state dict may have it, tells nothing of what is left of the start."""
    state = nn.BatchNorm1d(2).state_dict()
    state["num_batches_tracked"].fill_(-(1 << 62))
    torch.save(state, tmp_path / "state.pt")
    (layer,) = bntools.inspect(bntools.load(tmp_path / "state.pt", arch=lambda: nn.BatchNorm1d(2)))
    assert layer.initial_share is None
