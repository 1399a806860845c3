"""Model files of PyTorch: every form is loaded, and written back in kind."""

from __future__ import annotations

import copy
import json
import tarfile
from collections import OrderedDict

import models
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import bntools
from bntools import BntoolsError
from bntools.backends.torch import weights


@pytest.fixture
def model():
    """A small CNN with statistics of its own."""
    torch.manual_seed(3)
    made = models.cnn()
    made(torch.randn(8, 3, 8, 8) * 2 + 1)
    return made.eval()


def shift(model) -> None:
    """Change the statistics of the first BN, in place, as recalibration does."""
    model[1].running_mean.add_(1)


def assert_same(a, b) -> None:
    """Equal structure, types and bits."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert (a.dtype, a.stride()) == (b.dtype, b.stride())
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for left, right in zip(a, b, strict=True):
            assert_same(left, right)
    else:
        assert a == b


def test_whole_module(tmp_path, model):
    """A module pickled whole comes back with its modes, and is written back whole with what changed."""
    model[1].train()
    torch.save(model, tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt")
    assert [m.training for m in loaded.modules()] == [m.training for m in model.modules()]
    shift(loaded)
    bntools.save(loaded, tmp_path / "b.pt")
    again = torch.load(tmp_path / "b.pt", weights_only=False)
    assert torch.equal(again[1].running_mean, model[1].running_mean + 1)
    assert torch.equal(again[0].weight, model[0].weight)


def trained(model):
    """A checkpoint as training scripts write it, with optimizer, schedule and settings."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.randn(4, 3, 8, 8)).sum().backward()
    optimizer.step()
    return {
        "epoch": 12,
        "state_dict": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "best": {"accuracy": 0.91, "history": [0.1, 0.5, 0.91]},
        "rng": torch.get_rng_state(),
    }


def test_checkpoint_keeps_its_other_entries(tmp_path, model):
    """Of a checkpoint nothing changes but the statistics that changed: order, types, bits and metadata stay."""
    before = trained(model)
    torch.save(before, tmp_path / "a.ckpt")
    loaded = bntools.load(tmp_path / "a.ckpt", arch=models.cnn)
    bntools.save(loaded, tmp_path / "same.ckpt")
    assert_same(torch.load(tmp_path / "same.ckpt"), torch.load(tmp_path / "a.ckpt"))
    shift(loaded)
    bntools.save(loaded, tmp_path / "b.ckpt")
    after = torch.load(tmp_path / "b.ckpt")
    assert after["state_dict"]._metadata == before["state_dict"]._metadata
    changed = [key for key, value in after["state_dict"].items() if not torch.equal(value, before["state_dict"][key])]
    assert changed == ["1.running_mean"]
    after["state_dict"]["1.running_mean"] = before["state_dict"]["1.running_mean"]
    assert_same(after, torch.load(tmp_path / "a.ckpt"))


@pytest.mark.parametrize("prefix", ["", "module.", "model.", "_orig_mod.", "module._orig_mod.", "net.backbone."])
@pytest.mark.parametrize("entry", [(), ("model",), ("model_state_dict",), ("net",), ("ema", "state_dict"), ("custom",)])
def test_prefixes_and_entries(tmp_path, model, prefix, entry):
    """A state dict is found under any usual entry, fits under any common prefix, and is written back with both."""
    holds = OrderedDict((prefix + key, value) for key, value in model.state_dict().items())
    for key in reversed(entry):
        holds = {"epoch": 3, key: holds}
    torch.save(holds, tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt", arch=models.cnn)
    assert_same(OrderedDict(loaded.state_dict()), OrderedDict(model.state_dict()))
    shift(loaded)
    bntools.save(loaded, tmp_path / "b.pt")
    after = torch.load(tmp_path / "b.pt")
    for key in entry:
        assert after["epoch"] == 3
        after = after[key]
    assert list(after) == [prefix + key for key in model.state_dict()]
    assert torch.equal(after[prefix + "1.running_mean"], model[1].running_mean + 1)


def test_a_compiled_part_inside(tmp_path, model):
    """The name that torch.compile puts inside a key is taken off for the model and kept in the file."""
    state = {key.replace("1.", "1._orig_mod.", 1): value for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    bntools.save(bntools.load(tmp_path / "a.pt", arch=models.cnn), tmp_path / "b.pt")
    assert list(torch.load(tmp_path / "b.pt")) == list(state)


def test_averaged_models(tmp_path, model):
    """The state dict of stochastic weight averaging loads, and its own counter is written back."""
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    torch.save(averaged.state_dict(), tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt", arch=models.cnn)
    bntools.save(loaded, tmp_path / "b.pt")
    assert_same(torch.load(tmp_path / "b.pt"), torch.load(tmp_path / "a.pt"))


def test_checkpoint_with_a_whole_model(tmp_path, model):
    """A model pickled whole in a checkpoint is found and put back beside the same other entries."""
    torch.save({"epoch": 4, "model": model, "scores": [1, 2]}, tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt")
    shift(loaded)
    bntools.save(loaded, tmp_path / "b.pt")
    after = torch.load(tmp_path / "b.pt", weights_only=False)
    assert list(after) == ["epoch", "model", "scores"]
    assert after["epoch"] == 4
    assert torch.equal(after["model"][1].running_mean, model[1].running_mean + 1)


def test_which_of_several(tmp_path, model):
    """The usual names come before others and before averages; unusual names alone are ambiguous, and listed."""
    other = copy.deepcopy(model)
    shift(other)
    torch.save({"ema": other.state_dict(), "model": model.state_dict()}, tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt", arch=models.cnn)
    assert torch.equal(loaded[1].running_mean, model[1].running_mean)
    torch.save({"student": other.state_dict(), "teacher": model.state_dict()}, tmp_path / "b.pt")
    with pytest.raises(BntoolsError, match=r"several entries could be the model \(student, teacher\)"):
        bntools.load(tmp_path / "b.pt", arch=models.cnn)


def test_old_checkpoints_without_counters(tmp_path, model):
    """A checkpoint without num_batches_tracked loads and is written back without it, with or without metadata."""
    state = model.state_dict()
    for key in [key for key in state if key.endswith("num_batches_tracked")]:
        del state[key]
    for name, holds in {"meta.pt": state, "plain.pt": dict(state)}.items():
        torch.save(holds, tmp_path / name)
        bntools.save(bntools.load(tmp_path / name, arch=models.cnn), tmp_path / f"b-{name}")
        assert_same(torch.load(tmp_path / f"b-{name}"), torch.load(tmp_path / name))


def test_half_precision_files_stay_half(tmp_path, model):
    """A file of float16 weights is written back in float16, and a value that does not fit is refused."""
    state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
    torch.save(state, tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt", arch=models.cnn)
    assert loaded[0].weight.dtype == torch.float32
    shift(loaded)
    bntools.save(loaded, tmp_path / "b.pt")
    after = torch.load(tmp_path / "b.pt")
    assert {k: v.dtype for k, v in after.items()} == {k: v.dtype for k, v in state.items()}
    assert torch.equal(after["0.weight"], state["0.weight"])
    loaded[1].running_var.fill_(1e6)
    with pytest.raises(BntoolsError, match=r"'1\.running_var' has values that do not fit"):
        bntools.save(loaded, tmp_path / "b.pt")
    assert_same(torch.load(tmp_path / "b.pt"), after)


def test_safetensors(tmp_path, model):
    """A safetensors file loads with arch, and keeps its keys and metadata when written back."""
    save_file(model.state_dict(), tmp_path / "a.safetensors", metadata={"format": "pt", "author": "someone"})
    loaded = bntools.load(tmp_path / "a.safetensors", arch=models.cnn)
    shift(loaded)
    bntools.save(loaded, tmp_path / "b.safetensors")
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "author": "someone"}
    before, after = (load_file(tmp_path / f"{name}.safetensors") for name in "ab")
    assert list(before) == list(after)
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["1.running_mean"]


def tied():
    """A model whose two linear layers share one weight."""
    made = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4))
    made[2].weight = made[0].weight
    return made


def test_tied_weights(tmp_path):
    """Tied weights that safetensors keeps once load, and a checkpoint's shared storage stays shared."""
    model = tied()
    once = {key: value for key, value in model.state_dict().items() if key != "2.weight"}
    save_file(once, tmp_path / "a.safetensors")
    loaded = bntools.load(tmp_path / "a.safetensors", arch=tied)
    assert torch.equal(loaded[2].weight, model[0].weight)
    bntools.save(loaded, tmp_path / "b.safetensors")
    assert set(load_file(tmp_path / "b.safetensors")) == set(once)
    torch.save(model.state_dict(), tmp_path / "a.pt")
    bntools.save(bntools.load(tmp_path / "a.pt", arch=tied), tmp_path / "b.pt")
    after = torch.load(tmp_path / "b.pt")
    assert after["0.weight"].data_ptr() == after["2.weight"].data_ptr()
    bntools.save(model, tmp_path / "c.safetensors")
    assert torch.equal(load_file(tmp_path / "c.safetensors")["2.weight"], model[0].weight)


def test_suffix_decides_where_there_is_no_origin(tmp_path, model):
    """A model made in memory is pickled whole as .pt and .pth, and a state dict as .safetensors."""
    for suffix in (".pt", ".pth"):
        bntools.save(model, tmp_path / f"a{suffix}")
        assert torch.equal(bntools.load(tmp_path / f"a{suffix}")[0].weight, model[0].weight)
    bntools.save(model, tmp_path / "a.safetensors")
    assert set(load_file(tmp_path / "a.safetensors")) == set(model.state_dict())
    with pytest.raises(BntoolsError, match=r"only a model loaded from a \.pt2 file"):
        bntools.save(model, tmp_path / "a.pt2")
    converted = bntools.load(tmp_path / "a.safetensors", arch=models.cnn)
    bntools.save(converted, tmp_path / "whole.pt")
    assert isinstance(bntools.load(tmp_path / "whole.pt"), nn.Sequential)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own
@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, lambda model: model])
def test_wrapped_models_are_saved(tmp_path, model, wrap):
    """A compiled or data-parallel model is saved as a file that loads to the same statistics."""
    bntools.save(wrap(model), tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt")
    np.testing.assert_array_equal(bntools.inspect(loaded)[0].mean, bntools.inspect(model)[0].mean)


@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_folded_models_are_not_saved_as_state_dicts(tmp_path, model, name):
    """A state dict of a model whose structure changed would not load again, so it is refused with the remedy."""
    (torch.save if name.endswith(".pt") else save_file)(model.state_dict(), tmp_path / name)
    loaded = bntools.load(tmp_path / name, arch=models.cnn)
    before = (tmp_path / name).read_bytes()
    loaded[0].bias = nn.Parameter(torch.zeros(5))
    with pytest.raises(BntoolsError, match=r"with new 0\.bias; folded\?.*torch\.save\(model, path\), or export"):
        bntools.save(loaded, tmp_path / name)
    loaded[0].bias = None
    loaded[1] = nn.Identity()
    with pytest.raises(BntoolsError, match=r"without 1\.bias, 1\.num_batches_tracked"):
        bntools.save(loaded, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before


def test_state_dict_without_arch(tmp_path, model):
    """Without arch= the error says how many tensors there are, the first keys, and what to pass."""
    torch.save(model.state_dict(), tmp_path / "a.pt")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    for name in ("a.pt", "a.safetensors"):
        with pytest.raises(BntoolsError, match=r"a state dict of \d+ tensors \(.*arch='package\.module:factory'"):
            bntools.load(tmp_path / name)


def test_state_dict_that_does_not_fit(tmp_path, model):
    """Keys that are missing, unexpected or of another shape are named, and so is their number."""
    state = model.state_dict()
    wrong = {
        "the file lacks 8.bias": {k: v for k, v in state.items() if k != "8.bias"},
        "the model has no extra.weight": {**state, "extra.weight": torch.zeros(2)},
        r"8\.weight is \(4, 9\), expected \(4, 7\)": {**state, "8.weight": torch.zeros(4, 9)},
        "the file lacks 0.weight, 1.bias, 1.running_mean, 1.running_var and": {"something.else": torch.zeros(2)},
    }
    for message, holds in wrong.items():
        torch.save(holds, tmp_path / "a.pt")
        with pytest.raises(BntoolsError, match=message):
            bntools.load(tmp_path / "a.pt", arch=models.cnn)


def test_arch_may_be_a_model(tmp_path, model):
    """A model given as arch is copied, not changed."""
    torch.save(model.state_dict(), tmp_path / "a.pt")
    template = models.cnn()
    before = template[0].weight.clone()
    loaded = bntools.load(tmp_path / "a.pt", arch=template)
    assert torch.equal(template[0].weight, before)
    assert torch.equal(loaded[0].weight, model[0].weight)
    torch.save(model, tmp_path / "whole.pt")
    with pytest.raises(BntoolsError, match="holds a whole model, which needs no arch="):
        bntools.load(tmp_path / "whole.pt", arch=template)


@pytest.mark.parametrize(
    ("holds", "message"),
    [
        (torch.zeros(3, 4), r"a tensor of shape \(3, 4\), no model"),
        ([1, 2, 3], "a list of 3, no model"),
        ("hello", "a str, no model"),
        ({"epoch": 3, "loss": 0.5}, "a dict with epoch, loss, but no model"),
        ({}, "a dict with nothing"),
        ({"optimizer": {"a": torch.zeros(2)}}, "no model and no state dict"),
    ],
)
def test_files_without_a_model(tmp_path, holds, message):
    """A file that holds something else says what it holds."""
    torch.save(holds, tmp_path / "a.pt")
    with pytest.raises(BntoolsError, match=message):
        bntools.load(tmp_path / "a.pt")


def other_files(path):
    """Files of other kinds that someone named as a model."""
    (path / "text.pt").write_text("not a model\n")
    (path / "random.pt").write_bytes(np.random.default_rng(0).bytes(5000))
    (path / "json.safetensors").write_text(json.dumps({"a": 1}))
    Image.new("RGB", (4, 4)).save(path / "png.pt", format="PNG")
    with tarfile.open(path / "tar.pt", "w") as archive:
        archive.add(path / "text.pt", "text")
    (path / "lfs.pt").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    (path / "pickle.pt").write_bytes(b"\x80\x04N.")
    with safe_zip(path / "zip.pt") as archive:
        archive.writestr("readme.txt", "hello")


def safe_zip(path):
    """An empty zip archive to write to."""
    import zipfile

    return zipfile.ZipFile(path, "w")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("text.pt", "found text"),
        ("random.pt", "found bytes of no known kind"),
        ("json.safetensors", "found text"),
        ("png.pt", "found a PNG image"),
        ("tar.pt", "found a tar archive: unpack it first"),
        ("lfs.pt", "git lfs pull"),
        ("pickle.pt", "a pickle that torch.save did not write"),
        ("zip.pt", "a zip archive, but no model"),
    ],
)
def test_files_of_other_kinds(tmp_path, name, message):
    """A file that is no model is called what it is."""
    other_files(tmp_path)
    with pytest.raises(BntoolsError, match=message):
        bntools.load(tmp_path / name)


def test_damaged_safetensors(tmp_path, model):
    """A truncated safetensors file is called that."""
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    whole = (tmp_path / "a.safetensors").read_bytes()
    for cut in (1, len(whole) // 2, len(whole) - 12):
        (tmp_path / "a.safetensors").write_bytes(whole[:-cut])
        with pytest.raises(BntoolsError, match="damaged or truncated safetensors file"):
            bntools.load(tmp_path / "a.safetensors", arch=models.cnn)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # PyTorch deprecates TorchScript
def test_torchscript_is_refused(tmp_path, model):
    """A TorchScript archive is called that, with what to do instead."""
    torch.jit.trace(model, torch.randn(1, 3, 8, 8)).save(str(tmp_path / "a.pt"))
    with pytest.raises(BntoolsError, match=r"a TorchScript archive.*load the nn\.Module it was made"):
        bntools.load(tmp_path / "a.pt")


def test_what_cannot_be_pickled(tmp_path, model):
    """A model that cannot be pickled whole is refused with the alternative, and no file appears."""
    model.extra = lambda x: x
    with pytest.raises(BntoolsError, match=r"cannot be pickled whole.*as \.safetensors"):
        bntools.save(model, tmp_path / "a.pt")
    assert not list(tmp_path.iterdir())


def test_a_damaged_module_tree(tmp_path):
    """A pickled module whose insides are not modules is called damaged, not passed on."""
    model = nn.Sequential(nn.Linear(2, 2))
    model._modules["0"] = 3
    torch.save(model, tmp_path / "a.pt")
    with pytest.raises(BntoolsError, match="the model in it is damaged"):
        bntools.load(tmp_path / "a.pt")


def test_lazy_models_take_a_state_dict(tmp_path):
    """An arch with layers that are not initialized yet takes their shapes from the file."""
    state = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).state_dict()
    torch.save(state, tmp_path / "a.pt")
    loaded = bntools.load(tmp_path / "a.pt", arch=lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d()))
    assert torch.equal(loaded[0].weight, state["0.weight"])
    assert weights.is_state_dict(state)
