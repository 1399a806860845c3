"""Pickles: what is admitted loads, and nothing in a hostile file is ever executed."""

from __future__ import annotations

import io
import os
import pickle
import pickletools
import subprocess
import sys
import zipfile
from contextlib import suppress
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bntools
from bntools import BntoolsError
from bntools.backends.torch import opcodes, pickles

PACKAGE = """
import enum, pathlib
from torch import nn

class Kind(enum.Enum):
    A = "a"
    B = "b"

class Net(nn.Module):
    def __init__(self, touch=None):
        super().__init__()
        self.bn = nn.BatchNorm1d(2)
        self.kind = Kind.B
        self.act = nn.functional.relu
        self.norm_layer = nn.BatchNorm1d
        if touch is not None:
            pathlib.Path(touch).touch()
    def forward(self, x):
        return self.act(self.bn(x))

class Toucher(nn.Module):
    def __new__(cls, *paths):
        for path in paths:
            pathlib.Path(path).touch()
        return super().__new__(cls)

def touch(path):
    pathlib.Path(path).touch()

class Plain:
    pass
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """An importable package with a model, an enum, and things that do harm when called."""
    name = "hostile_pkg"
    (tmp_path / f"{name}.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop(name, None)
    yield __import__(name)
    sys.modules.pop(name, None)


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def text(value: str) -> bytes:
    """The opcode that pushes a string."""
    return b"X" + len(value).to_bytes(4, "little") + value.encode()


def archive(path, content: bytes, name: str = "archive/data.pkl") -> None:
    """A file as torch.save lays it out, with these bytes as the pickle."""
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)
        file.writestr("archive/version", "3\n")
        file.writestr("archive/byteorder", "little")


def payloads(target: str, module):
    """Objects whose loading by an ordinary unpickler would create the file ``target``, by name."""
    touch = f"open({target!r}, 'w').close()"
    rebuild = torch._tensor._rebuild_from_type_v2  # admitted by PyTorch, and calls its first argument
    inner = io.BytesIO()
    torch.save(Calls(os.system, f"touch {target}"), inner)
    return {
        "os.system": Calls(os.system, f"touch {target}"),
        "subprocess": Calls(subprocess.check_call, ["touch", target]),
        "eval": Calls(eval, touch),
        "exec": Calls(exec, touch),
        "partial": Calls(partial(os.system, f"touch {target}")),
        "partial made": Calls(partial, os.system, f"touch {target}"),
        "getattr chain": b"\x80\x02cbuiltins\ngetattr\ncposix\n__dict__\nX\x03\x00\x00\x00get\x86R"
        b"X\x06\x00\x00\x00system\x85R" + text(f"touch {target}") + b"\x85R.",
        "pickle in a pickle": Calls(pickle.loads, pickle.dumps(Calls(os.system, f"touch {target}"))),
        "torch.load in a pickle": Calls(partial(torch.load, weights_only=False), io.BytesIO(inner.getvalue())),
        "open": Calls(open, target, "w"),
        "constructor": Calls(module.Net, target),
        "new": b"\x80\x02chostile_pkg\nToucher\n" + text(target) + b"\x85\x81.",
        "function": Calls(module.touch, target),
        "through tensor rebuilding": Calls(rebuild, module.Net, torch.Tensor, (target,), {}),
        "nested": {"model": [{"deep": (Calls(os.system, f"touch {target}"),)}]},
        "beside a model": {"model": module.Net(), "x": Calls(os.system, f"touch {target}")},
    }


LIBRARY_MODELS = ["resnet18", "mobilenet_v3_small", "densenet121", "timm resnet18", "timm efficientnet_b0"]
KINDS = [
    "os.system", "subprocess", "eval", "exec", "partial", "partial made", "getattr chain", "pickle in a pickle",
    "torch.load in a pickle", "open", "constructor", "new", "function", "through tensor rebuilding", "nested",
    "beside a model",
]  # fmt: skip


def write(path, payload, zipped: bool) -> None:
    """Save a payload as torch.save would, also one that only exists as bytes."""
    if not isinstance(payload, bytes):
        torch.save(payload, path, _use_new_zipfile_serialization=zipped)
    elif zipped:
        archive(path, payload)
    else:
        start = (torch.serialization.MAGIC_NUMBER, torch.serialization.PROTOCOL_VERSION, {})
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in start) + payload + pickle.dumps([], 2))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("zipped", [True, False])
def test_a_hostile_pickle_is_never_executed(tmp_path, package, kind, zipped):
    """No way to make loading create a file does so, in either format, even with its package admitted."""
    target = tmp_path / "created"
    payload = payloads(str(target), package)[kind]
    path = tmp_path / "model.pt"
    write(path, payload, zipped)
    with pytest.raises(BntoolsError):
        bntools.load(path, allow=("hostile_pkg", "posix", "os", "builtins", "subprocess", "functools"))
    assert not target.exists()
    with pytest.raises(BntoolsError):
        bntools.load(path)
    assert not target.exists()


@pytest.mark.parametrize("kind", sorted(set(KINDS) - {"partial made", "nested", "open"}))
def test_the_payloads_are_real(tmp_path, package, kind):
    """The ordinary unpickler does create the file: the test above cannot pass by harmless payloads."""
    target = tmp_path / "created"
    path = tmp_path / "model.pt"
    write(path, payloads(str(target), package)[kind], zipped=True)
    with suppress(AttributeError, TypeError):  # raised, if at all, after the harm is done
        torch.load(path, weights_only=False)
    assert target.exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (b"torch.nn.functional\nos.system", "not admitted|crafted|does not have"),
        (b"torch.nn.modules.conv.torch.os\nsystem", "no module|crafted"),
        (b"torch.nn\nfunctional.handle_torch_function", "crafted"),
        (b"torch.nn.functional\nimportlib", "only nn.Module"),
        (b"torch.nn.functional\nboolean_dispatch", "only nn.Module"),
        (b"torch.nn.functional\nhandle_torch_function", "only nn.Module"),
        (b"torch.nn.functional\n__builtins__", "only nn.Module"),
        (b"torch.nn.modules.module\nwarnings", "only nn.Module"),
        (b"torch.nn.init\nnormal_", "only nn.Module"),
        (b"torch.nn\nModule relu", "crafted"),
        (b"torchx.nn\nModule", "not admitted"),
        (b"os\nsystem", "not admitted"),
        (b"__builtin__\neval", "not admitted"),
    ],
)
def test_crafted_names_are_refused(tmp_path, name, message):
    """Attribute paths, modules beside the admitted ones, and functions that merely live there are refused by name."""
    path = tmp_path / "model.pt"
    archive(path, b"\x80\x02c" + name + b"\n.")
    with pytest.raises(BntoolsError, match=message):
        bntools.load(path, allow=("torch",) if name.startswith(b"torch.nn.modules.conv") else ())


def test_only_named_packages_are_imported(tmp_path, package):
    """Refusing a class does not import its module: importing alone can run code."""
    (tmp_path / "imports_me.py").write_text(f"open({str(tmp_path / 'created')!r}, 'w').close()\nclass Net: pass\n")
    archive(tmp_path / "model.pt", b"\x80\x02cimports_me\nNet\n)\x81}b.")
    with pytest.raises(BntoolsError, match=r"imports_me\.Net.*--allow imports_me"):
        bntools.load(tmp_path / "model.pt")
    assert not (tmp_path / "created").exists()


LOADING = """
import importlib.machinery, sys
class Elsewhere(importlib.machinery.PathFinder):
    '''As if timm were not installed: only the working folder has one.'''
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        places = [entry for entry in sys.path if "site-packages" not in entry] if name == "timm" else path
        return super().find_spec(name, places, target)
sys.meta_path[:] = [Elsewhere if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
import os, bntools
for allow in ((), ("timm",)):
    try:
        model = bntools.load("model.pt", allow=allow)
    except bntools.BntoolsError as error:
        print(error)
    else:
        print("loaded", type(model).__module__)
    print("executed:", os.path.exists("created"))
"""


@pytest.mark.parametrize("how", ["python -c", "script", "python -m"])
def test_nothing_is_imported_from_the_working_folder_unasked(tmp_path, how):
    """A timm that lies beside the model is not run, however Python was started, unless the user allows timm."""
    (tmp_path / "timm").mkdir()
    source = f"open({str(tmp_path / 'created')!r}, 'w').close()\nfrom torch import nn\nclass Net(nn.Module): pass\n"
    (tmp_path / "timm" / "__init__.py").write_text(source)
    archive(tmp_path / "model.pt", b"\x80\x02ctimm\nNet\n)\x81}X\x08\x00\x00\x00_modules}sb.")
    elsewhere = tmp_path / "scripts"
    elsewhere.mkdir()
    for folder in (tmp_path, elsewhere):
        (folder / "loading.py").write_text(LOADING)
    started = {
        "python -c": ["-c", LOADING],
        "script": [str(elsewhere / "loading.py")],
        "python -m": ["-m", "loading"],
    }[how]

    done = subprocess.run([sys.executable, *started], cwd=tmp_path, capture_output=True, text=True, check=True)
    refused, before, *_, after = done.stdout.splitlines()
    assert "there is no module 'timm' on the import path outside the working folder" in refused
    assert (before, after) == ("executed: False", "executed: True")


def test_all_names_that_are_not_admitted_are_named(tmp_path, package):
    """The error lists every class and what would admit them; with that, the model loads."""
    path = tmp_path / "model.pt"
    torch.save(package.Net(), path)
    with pytest.raises(BntoolsError) as caught:
        bntools.load(path)
    for part in ("hostile_pkg.Net", "hostile_pkg.Kind", "allow=('hostile_pkg',)", "--allow hostile_pkg", "--arch"):
        assert part in str(caught.value)
    for allow in (("hostile_pkg",), "hostile_pkg"):
        model = bntools.load(path, allow=allow)
        assert model.kind is package.Kind.B
        assert model.act is F.relu
        assert model.norm_layer is nn.BatchNorm1d
    with pytest.raises(BntoolsError, match="not admitted"):
        bntools.load(path, allow=("hostile",))


@pytest.mark.parametrize("zipped", [True, False])
def test_every_refused_name_is_named(tmp_path, package, zipped):
    """Builtins and classes together are all named, in both formats; what is admitted anyway is not."""
    system = Calls(getattr, Calls(__import__, "os"), "system")
    write(tmp_path / "model.pt", {"a": system, "b": package.Net(), "c": torch.ones(2)}, zipped)
    with pytest.raises(BntoolsError) as caught:
        bntools.load(tmp_path / "model.pt")
    for name in ("builtins.getattr", "builtins.__import__", "hostile_pkg.Net", "hostile_pkg.Kind"):
        assert name in str(caught.value)
    assert "_rebuild_tensor_v2" not in str(caught.value)


def test_plain_classes_are_never_admitted(tmp_path, package):
    """Naming a package admits its modules and enums, not any other class of it, and says so."""
    model = package.Net()
    model.extra = package.Plain()
    torch.save(model, tmp_path / "model.pt")
    with pytest.raises(BntoolsError, match=r"holds hostile_pkg\.Plain: only nn\.Module classes"):
        bntools.load(tmp_path / "model.pt", allow=("hostile_pkg",))


def test_a_class_that_is_gone(tmp_path, package):
    """A class that the installed version does not have is named, with what to do."""
    torch.save(package.Net(), tmp_path / "model.pt")
    del package.Net
    with pytest.raises(BntoolsError, match=r"needs hostile_pkg\.Net, which hostile_pkg .* does not have"):
        bntools.load(tmp_path / "model.pt", allow=("hostile_pkg",))


def test_enums_are_looked_up_and_not_rewritten(tmp_path, package):
    """A pickle may look an enum member up, but not give it other state or make new members."""
    member = b"chostile_pkg\nKind\nX\x01\x00\x00\x00a\x85R"
    for tail in (b"}X\x06\x00\x00\x00_name_X\x01\x00\x00\x00bsb.", None):
        content = b"\x80\x02" + member + tail if tail else b"\x80\x02chostile_pkg\nKind\n)\x81."
        archive(tmp_path / "model.pt", content)
        with pytest.raises(BntoolsError, match=r"would call hostile_pkg\.Kind"):
            bntools.load(tmp_path / "model.pt", allow=("hostile_pkg",))
    assert package.Kind.A.name == "A"


def test_functionals_are_carried_and_not_called(tmp_path):
    """Functions of torch.nn.functional load as values, also those written in C++; calling one is refused."""
    model = nn.Sequential(nn.Linear(2, 2))
    model.first, model.second = F.gelu, F.leaky_relu
    torch.save(model, tmp_path / "model.pt")
    loaded = bntools.load(tmp_path / "model.pt")
    assert loaded.first is F.gelu
    assert loaded.second is F.leaky_relu
    torch.save(Calls(F.relu, torch.ones(2)), tmp_path / "called.pt")
    with pytest.raises(BntoolsError, match=r"would call torch\.nn\.functional\.relu"):
        bntools.load(tmp_path / "called.pt")


def test_a_frozen_model_loads(tmp_path):
    """What freeze leaves on a layer is admitted too, and the layer is still frozen after loading."""
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    bntools.freeze(model)
    bntools.save(model, tmp_path / "model.pt")
    loaded = bntools.load(tmp_path / "model.pt").train()
    bntools.assert_frozen(loaded)
    bntools.unfreeze(loaded)
    assert loaded.train()[1].training


@pytest.mark.parametrize("name", LIBRARY_MODELS)
def test_models_of_the_libraries_load_whole(tmp_path, name):
    """Models of torchvision and timm that were pickled whole load without anything being named."""
    import shim  # noqa: F401

    if name.startswith("timm "):
        import timm

        model = timm.create_model(name.removeprefix("timm "))
    else:
        import torchvision

        model = getattr(torchvision.models, name)()
    model.eval()
    torch.save(model, tmp_path / "model.pt")
    loaded = bntools.load(tmp_path / "model.pt")
    images = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))


def test_bombs_are_refused(tmp_path):
    """An archive that would unpack to far more than it is, is refused before it is read."""
    with zipfile.ZipFile(tmp_path / "model.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", b"\x80\x02}.")
        file.writestr("archive/data/0", bytes(200 << 20))
    with pytest.raises(BntoolsError, match="claims to unpack"):
        bntools.load(tmp_path / "model.pt")


def test_other_pickle_protocols(tmp_path):
    """A model saved with another pickle protocol cannot be read safely, and the error says how to save it."""
    torch.save(nn.Linear(2, 2), tmp_path / "model.pt", pickle_protocol=4)
    with pytest.raises(BntoolsError, match=r"pickle_protocol other than 2.*torch\.save"):
        bntools.load(tmp_path / "model.pt")


def test_old_format(tmp_path):
    """State dicts from before PyTorch 1.6 load; whole modules of that time are refused with the remedy."""
    model = nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "state.pt", _use_new_zipfile_serialization=False)
    loaded = bntools.load(tmp_path / "state.pt", arch=lambda: nn.Linear(2, 2))
    assert torch.equal(loaded.weight, model.weight)
    torch.save(model, tmp_path / "whole.pt", _use_new_zipfile_serialization=False)
    with pytest.raises(BntoolsError, match=r"before PyTorch 1\.6"):
        bntools.load(tmp_path / "whole.pt")


@pytest.mark.parametrize("cut", [1, 10, 100, 400])
def test_truncated_files(tmp_path, cut):
    """A file that ends too early is called damaged, wherever it ends."""
    torch.save(nn.Linear(8, 8), tmp_path / "model.pt")
    whole = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(whole[:-cut])
    with pytest.raises(BntoolsError, match=r"damaged|truncated"):
        bntools.load(tmp_path / "model.pt")


def test_every_damaged_byte_is_an_error_or_a_model(tmp_path):
    """Flipping any byte of the pickle gives a BntoolsError or loads, and never another exception."""
    buffer = io.BytesIO()
    torch.save(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), buffer)
    with zipfile.ZipFile(buffer) as file:
        content = file.read("archive/data.pkl")
        others = {name: file.read(name) for name in file.namelist() if name != "archive/data.pkl"}
    outcomes = {"loaded": 0, "refused": 0}
    for position in range(0, len(content), 3):
        damaged = content[:position] + bytes([content[position] ^ 0x15]) + content[position + 1 :]
        with zipfile.ZipFile(tmp_path / "model.pt", "w") as file:
            file.writestr("archive/data.pkl", damaged)
            for name, value in others.items():
                file.writestr(name, value)
        try:
            bntools.load(tmp_path / "model.pt")
        except BntoolsError:
            outcomes["refused"] += 1
        else:
            outcomes["loaded"] += 1
    assert outcomes["refused"] > 100
    assert outcomes["loaded"] > 10


def test_the_scan_sees_through_the_memo():
    """A class put into the memo and taken out again is still known when it is called or passed."""
    scan = opcodes.scan(b"\x80\x02cpkg\nNet\nq\x010h\x01)R.".replace(b"0h", b"h"))
    assert scan.called == {("pkg", "Net")}
    scan = opcodes.scan(b"\x80\x02ctorch\nf\n]q\x01cpkg\nNet\na\x85R.")
    assert scan.passed == {("pkg", "Net")}
    scan = opcodes.scan(b"\x80\x02cpkg\nf\n)R)R.")
    assert scan.calls_computed


@pytest.mark.parametrize("opcode", ["INST", "OBJ", "NEWOBJ_EX", "STACK_GLOBAL", "EXT1", "DUP"])
def test_the_scan_knows_no_other_ways_to_call(opcode):
    """Opcodes that the restricted unpickler does not have are refused rather than passed over."""
    code = next(o.code for o in pickletools.opcodes if o.name == opcode).encode("latin-1")
    with pytest.raises(opcodes.Unreadable, match=opcode):
        opcodes.scan(b"\x80\x02(" + b"N" + code + (b"os\nsystem\n" if opcode == "INST" else b"\x01") + b".")


def test_honest_models_hold_no_suspicious_use():
    """In a pickled module classes are instantiated empty and filled, never called or passed to a call."""
    buffer = io.BytesIO()
    torch.save(nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)), buffer)
    with zipfile.ZipFile(buffer) as file:
        scan = opcodes.scan(file.read("archive/data.pkl"))
    modules = {name for name in scan.names if name[0].startswith("torch.nn.modules")}
    assert len(modules) == 3
    assert modules <= scan.created
    assert not modules & (scan.called | scan.passed | scan.created_with_arguments | scan.refilled)
    assert pickles.is_class(nn.Conv2d)
