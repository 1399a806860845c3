"""Exported programs: BN layers under their old names, written back, and nothing hostile executed."""

from __future__ import annotations

import copy
import io
import json
import warnings
import zipfile
from contextlib import suppress

import models
import numpy as np
import pytest
import torch
from torch import nn

import bntools
from bntools import BntoolsError
from bntools.backends.torch import archives
from bntools.backends.torch.running import eval_mode


def exported(model, path, batch=4, dynamic=True, decompose=False):
    """Export a model of images, with any batch size, and save it."""
    shapes = ({0: torch.export.Dim.DYNAMIC},) if dynamic else None
    with warnings.catch_warnings():
        # PyTorch 2.13 warns of its own use of a deprecated class when it saves.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        program = torch.export.export(model, (images(batch),), dynamic_shapes=shapes)
        torch.export.save(program.run_decompositions() if decompose else program, path)
    return path


def images(count: int) -> torch.Tensor:
    """Random images (count, 3, 8, 8)."""
    return torch.randn(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 + 1


@pytest.fixture
def model():
    """A small CNN with statistics of its own, a BN without affine parameters, and dropout."""
    torch.manual_seed(3)
    made = models.cnn()
    made.insert(3, nn.Conv2d(5, 5, 1))
    made.insert(4, nn.BatchNorm2d(5, affine=False, momentum=0.3, eps=1e-3))
    made.insert(5, nn.Dropout(0.5))
    made(images(8))
    return made.eval()


@pytest.mark.parametrize(("train", "decompose"), [(False, False), (False, True), (True, False)])
def test_layers_are_those_of_the_model(tmp_path, model, train, decompose):
    """A program's BN layers have the names, records and eval-mode outputs of the model that was exported."""
    path = exported(model.train(train), tmp_path / "a.pt2", decompose=decompose)
    loaded = bntools.load(path)
    for mine, theirs in zip(bntools.inspect(loaded), bntools.inspect(model), strict=True):
        for key in ("name", "kind", "eps", "momentum"):
            assert getattr(mine, key) == getattr(theirs, key)
        for key in ("mean", "var", "scale", "shift"):
            np.testing.assert_array_equal(getattr(mine, key), getattr(theirs, key))
    before = {key: value.clone() for key, value in loaded.state_dict().items()}
    with eval_mode(loaded), eval_mode(model):
        np.testing.assert_allclose(loaded(images(5)), model(images(5)), rtol=1e-5, atol=1e-6)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, before[key]), f"{key} moved in eval mode"


def test_train_and_eval_switch(tmp_path, model):
    """train() and eval() work on the loaded program, as on any module."""
    loaded = bntools.load(exported(model, tmp_path / "a.pt2")).train()
    loaded(images(8))
    assert int(loaded.get_submodule("1").num_batches_tracked) == int(model[1].num_batches_tracked) + 1
    assert not torch.equal(loaded.get_submodule("1").running_mean, model[1].running_mean)
    assert not loaded.eval().get_submodule("1").training


def test_recalibrate_and_write_back(tmp_path, model):
    """Recalibrated statistics of a program equal those of the model, and are in the saved program."""
    batches = list(images(32).split(8))
    loaded = bntools.load(exported(model, tmp_path / "a.pt2"))
    reference = copy.deepcopy(model)
    bntools.recalibrate(reference, batches)
    result = bntools.recalibrate(loaded, batches)
    assert result.residual < 1e-5
    bntools.save(loaded, tmp_path / "b.pt2")
    again = bntools.load(tmp_path / "b.pt2")
    for mine, theirs in zip(bntools.inspect(again), bntools.inspect(reference), strict=True):
        np.testing.assert_allclose(mine.mean, theirs.mean, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(mine.var, theirs.var, rtol=1e-5)
    plain = torch.export.load(tmp_path / "b.pt2").module()
    with torch.no_grad():
        np.testing.assert_allclose(plain(images(5)), reference.eval()(images(5)), rtol=1e-4, atol=1e-5)


def test_freeze_and_reset_work(tmp_path, model):
    """A program's layers freeze and reset as any others do."""
    loaded = bntools.load(exported(model, tmp_path / "a.pt2"))
    with bntools.freeze(loaded):
        bntools.assert_frozen(loaded.train())
    assert bntools.reset(loaded) == ["1", "4", "7"]
    assert float(loaded.get_submodule("1").running_mean.abs().max()) == 0


def test_values_that_were_replaced_are_saved(tmp_path, model):
    """A model that no longer shares its tensors with the program is saved with its own values."""
    loaded = bntools.load(exported(model, tmp_path / "a.pt2"))
    loaded.double()
    loaded.get_submodule("1").running_mean = torch.full((5,), 7.0, dtype=torch.float64)
    bntools.save(loaded, tmp_path / "b.pt2")
    assert bntools.inspect(bntools.load(tmp_path / "b.pt2"))[0].mean.tolist() == [7.0] * 5


def test_one_layer_called_twice(tmp_path):
    """A BN that the program calls twice is one layer."""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(torch.relu(self.bn(x)))

    loaded = bntools.load(exported(Twice().eval(), tmp_path / "a.pt2"))
    assert [layer.name for layer in bntools.inspect(loaded)] == ["bn"]


def test_statistics_beside_other_tensors(tmp_path):
    """Where the statistics share their module with more than a BN, the layer gets a name below it."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.ones(3, 1, 1) * 2)
            self.register_buffer("running_mean", torch.ones(3))
            self.register_buffer("running_var", torch.ones(3) * 4)

        def forward(self, x):
            return self.gain * nn.functional.batch_norm(x, self.running_mean, self.running_var)

    model = nn.Sequential(Own()).eval()
    loaded = bntools.load(exported(model, tmp_path / "a.pt2"))
    names = [layer.name for layer in bntools.inspect(loaded)]
    assert "0.batch_norm" in names
    loaded.get_submodule("0.batch_norm").running_mean.fill_(5)
    bntools.save(loaded, tmp_path / "b.pt2")
    assert torch.export.load(tmp_path / "b.pt2").state_dict["0.running_mean"].tolist() == [5, 5, 5]


def test_fixed_batch_sizes_are_said(tmp_path, model):
    """A batch that does not fit the sizes of the program is refused in words."""
    loaded = bntools.load(exported(model, tmp_path / "a.pt2", dynamic=False))
    loaded(images(4))
    with pytest.raises(BntoolsError, match=r"shape \(5, 3, 8, 8\) does not fit the sizes.*dynamic_shapes=") as caught:
        loaded(images(5))
    assert "give batches of 4: --batch-size 4 / batch_size=4" in str(caught.value)
    with pytest.raises(BntoolsError, match=r"shape \(4, 3, 9, 9\) does not fit .*use such batches"):
        loaded(torch.ones(4, 3, 9, 9))


def test_decomposed_training_programs_are_refused(tmp_path, model):
    """A program that updates its own statistics cannot be switched to eval mode, and is refused."""
    with pytest.raises(BntoolsError, match=r"exported in train mode and decomposed.*model\.eval\(\)"):
        bntools.load(exported(model.train(), tmp_path / "a.pt2", decompose=True))


def test_other_forms_are_refused(tmp_path, model):
    """A program is saved as .pt2 only, needs no arch, and not after its structure changed."""
    path = exported(model, tmp_path / "a.pt2")
    loaded = bntools.load(path)
    with pytest.raises(BntoolsError, match=r"can only be saved as \.pt2"):
        bntools.save(loaded, tmp_path / "a.pt")
    with pytest.raises(BntoolsError, match="needs no arch="):
        bntools.load(path, arch=models.cnn)
    loaded.get_submodule("1").running_mean = None
    with pytest.raises(BntoolsError, match=r"no longer has 1\.running_mean"):
        bntools.save(loaded, tmp_path / "b.pt2")
    assert not (tmp_path / "b.pt2").exists()


@pytest.mark.parametrize("suffix", [".pt2", ".pt", ".safetensors"])
def test_folded_programs_have_no_form_to_save(tmp_path, model, suffix):
    """A folded program folds without a warning, is refused in every PyTorch form alike, and exports to ONNX."""
    loaded = bntools.load(exported(model, tmp_path / "a.pt2"))
    folded = bntools.fold(loaded, images(4)).model
    with pytest.raises(BntoolsError, match=r"folded or copied has no PyTorch form.*bntools\.export, --export"):
        bntools.save(folded, tmp_path / f"b{suffix}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt2"]


@pytest.mark.parametrize("cut", [30, 2000])
def test_truncated_programs(tmp_path, model, cut):
    """A program file that ends too early is called damaged."""
    path = exported(model, tmp_path / "a.pt2")
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(BntoolsError, match="damaged"):
        bntools.load(path)


def rewritten(path, change, method=zipfile.ZIP_STORED) -> None:
    """Apply ``change(name, content)`` to each record of a program file; None as name adds records."""
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    root = next(iter(records)).split("/")[0]
    records = {name: change(name.removeprefix(root + "/"), content) for name, content in records.items()}
    records |= {f"{root}/{name}": content for name, content in (change(None, b"") or {}).items()}
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in records.items():
            archive.writestr(name, content)


def in_program(path, old: str, new: str) -> None:
    """Replace text in a program's JSON."""

    def change(name, content):
        if name != "models/model.json":
            return content
        assert old in content.decode()
        return content.decode().replace(old, new).encode()

    rewritten(path, change)


class Calls:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def hostile_inputs(path, target):
    """Sample inputs that are a hostile pickle: PyTorch falls back to the full unpickler for them."""
    import os

    torch.save(Calls(os.system, f"touch {target}"), path.parent / "evil")
    evil = (path.parent / "evil").read_bytes()
    rewritten(path, lambda name, content: evil if name == "data/sample_inputs/model.pt" else content)


def hostile_weight(path, target):
    """A weight that claims to be pickled, and is hostile."""
    import os

    torch.save(Calls(os.system, f"touch {target}"), path.parent / "evil")
    evil = (path.parent / "evil").read_bytes()

    def change(name, content):
        if name == "data/weights/model_weights_config.json":
            config = json.loads(content)
            config["config"]["0.weight"]["use_pickle"] = True
            return json.dumps(config).encode()
        return evil if name == "data/weights/weight_0" else content

    rewritten(path, change)


def hostile_operator(path, target):
    """An operator that is a dotted path to os.system."""
    in_program(path, "torch.ops.aten.relu.default", "torch.serialization.os.system")


def hostile_expression(path, target):
    """A size that is an expression for sympify to evaluate."""
    in_program(path, '"expr_str": "', f'"expr_str": "open({str(target)!r},chr(119)) or ')


def hostile_name(path, target):
    """A buffer whose name would end its string in the generated source."""
    in_program(path, "1.running_mean", "1.x') or open('created','w') or ('")


def hostile_guard(path, target):
    """A guard, which becomes Python source."""
    in_program(path, '"guards_code": []', f'"guards_code": ["open({str(target)!r}, chr(119))"]')


def hostile_library(path, target):
    """Compiled code for AOTInductor."""
    rewritten(path, lambda name, content: {"data/aotinductor/model/x.so": b"\x7fELF"} if name is None else content)


@pytest.mark.parametrize(
    "attack",
    [
        hostile_inputs, hostile_weight, hostile_operator, hostile_expression, hostile_name, hostile_guard,
        hostile_library,
    ],
)  # fmt: skip
def test_hostile_programs_are_never_executed(tmp_path, model, monkeypatch, attack):
    """No part of a program file that could become code does: each attack is refused and creates no file."""
    monkeypatch.chdir(tmp_path)
    path = exported(model, tmp_path / "a.pt2")
    bntools.load(path)
    attack(path, tmp_path / "created")
    with pytest.raises(BntoolsError, match="not loaded, because"):
        bntools.load(path)
    assert not (tmp_path / "created").exists()


def test_bombs_in_programs(tmp_path, model):
    """A pickle in a program that takes the stack, and JSON far larger than its file, are refused unread."""
    deep = io.BytesIO()
    with zipfile.ZipFile(deep, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}N" + b"\x85" * 120_000 + b"Ns.")
        archive.writestr("a/version", "3\n")
    path = exported(model, tmp_path / "a.pt2")
    rewritten(path, lambda name, content: deep.getvalue() if name == "data/sample_inputs/model.pt" else content)
    with pytest.raises(BntoolsError, match="deep"):
        bntools.load(path)
    text = b"[" + b"[]," * (1 << 20) + b"[]]"
    path = exported(model, tmp_path / "b.pt2")
    rewritten(path, lambda name, content: text if name == "models/model.json" else content, zipfile.ZIP_DEFLATED)
    with pytest.raises(BntoolsError, match="claims to unpack"):
        bntools.load(path)


@pytest.mark.filterwarnings("ignore::Warning")  # whatever PyTorch says while it is being attacked
@pytest.mark.parametrize("attack", [hostile_inputs, hostile_weight, hostile_expression])
def test_the_attacks_are_real(tmp_path, model, attack):
    """torch.export.load alone does create the file: the test above cannot pass by harmless attacks."""
    path = exported(model, tmp_path / "a.pt2")
    attack(path, tmp_path / "created")
    with suppress(Exception):  # whatever it raises after the harm is done
        torch.export.load(path)
    assert (tmp_path / "created").exists()


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("2*s0 + 1", True),
        ("Max(1, s0)", True),
        ("Add(Symbol('s31', positive=True, integer=True), Integer(1))", True),
        ("Max(1, 'open(1)')", False),
        ("L['x'].size()[2] == 8", True),
        ("((s0 - 1)//2) + 1", True),
        ("__import__('os').system('x')", False),
        ("s0.__class__", False),
        ("open('x')", False),
        ("(lambda: 1)()", False),
        ("[x for x in y]", False),
        ("Max(1, *x)", False),
        ("f'{x}'", False),
        ("s0 +", False),
    ],
)
def test_expressions(text, safe):
    """Only arithmetic on sizes counts as harmless."""
    assert archives.harmless(text) is safe


@pytest.mark.parametrize(
    ("target", "known"),
    [
        ("torch.ops.aten.conv2d.default", True),
        ("_operator.getitem", True),
        ("math.trunc", True),
        ("torch.ops.higher_order.cond", True),
        ("torch.ops.aten.from_file.default", False),
        ("torch.ops.load_library", False),
        ("torch.ops.aten.__class__.default", False),
        ("torch.hub.os.system", False),
        ("_operator.methodcaller", False),
        ("torch.ops.nowhere.op.default", False),
    ],
)
def test_operators(target, known):
    """Registered operators and arithmetic are known; what touches files, and any other path, is not."""
    assert (not list(archives._target_problems(target))) is known
