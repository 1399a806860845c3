"""A model measured on another device than its own, and in the precision in which it will run."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from models import cnn
from onnx_files import small

import bntools
from bntools import BntoolsError
from bntools.backends.torch.exported import FROM_FILE
from bntools.placing import placed


def images():
    """Two batches of images."""
    return list(np.random.default_rng(0).normal(3, 2, (2, 8, 3, 9, 9)).astype(np.float32))


def same(a, b):
    """Whether two models have the same tensors."""
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize(("asked", "name"), [(None, "cuda:1"), ("cuda:0", "cuda:0")])
def test_a_double_is_measured_and_the_model_gets_its_statistics(gpu, asked, name):
    """The model's own tensors stay what and where they are; only their values change, and only at the end."""
    torch.manual_seed(0)
    model, expected = cnn(), cnn()
    expected.load_state_dict(model.state_dict())
    bntools.recalibrate(expected, images())
    tensors = {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}
    with placed(model, asked) as there:
        bntools.recalibrate(there.model, images())
        assert there.record == {"device": name, "autocast": None}
        assert not same(model, expected)
    assert same(model, expected)
    assert tensors == {key: id(value) for key, value in model.state_dict(keep_vars=True).items()}


def test_a_block_that_fails_leaves_the_model_as_it_was(gpu):
    """What was measured until then is thrown away."""
    torch.manual_seed(0)
    model, before = cnn(), cnn()
    before.load_state_dict(model.state_dict())

    def fails():
        with placed(model) as there:
            bntools.recalibrate(there.model, images())
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert same(model, before)


def test_on_its_own_device_the_model_itself_is_measured():
    """No copy is made for nothing."""
    model = cnn()
    with placed(model, "cpu", "bfloat16") as there:
        assert there.model is model
        assert torch.is_autocast_enabled("cpu")
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("device", ["meta", "cuda:7", "nonsense"])
def test_a_device_that_cannot_compute_is_refused(device):
    """The message says what was found and which there are."""
    if torch.cuda.is_available() and torch.cuda.device_count() > 7:
        pytest.skip("there are so many")
    with pytest.raises(BntoolsError, match=rf"found device '{device}'.* expected one of cpu"), placed(cnn(), device):
        pass


def test_autocast_that_a_device_does_not_know_is_refused(monkeypatch):
    """PyTorch warns and goes on without; bntools does not."""

    def unknown(kind, dtype):
        raise UserWarning("In CPU autocast, but the target dtype is not supported.")

    monkeypatch.setattr(torch, "autocast", unknown)
    with (
        pytest.raises(BntoolsError, match="autocast to float16 on cpu: In CPU autocast"),
        placed(cnn(), "cpu", "float16"),
    ):
        pass


def test_a_model_that_cannot_be_moved_is_refused(gpu, monkeypatch):
    """Out of memory, say: in one line, and the model stays where it is."""

    def full(module, device):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")

    monkeypatch.setattr(torch.nn.Module, "to", full)
    with pytest.raises(BntoolsError, match=r"cannot be moved to cuda:1: CUDA out of memory\.$"), placed(cnn()):
        pass


def test_a_program_of_torch_export_stays_on_its_device(gpu):
    """What its graph creates is created where it was exported; a GPU is not chosen for it, and one named is refused."""
    model = cnn()
    model.meta = {FROM_FILE: True}
    with placed(model) as there:
        assert (there.model is model, there.device) == (True, "cpu")
    with pytest.raises(BntoolsError, match="it computes on cpu"), placed(model, "cuda:0"):
        pass


def test_models_of_other_frameworks_are_left_where_they_are():
    """ONNX Runtime and Keras choose themselves; to ask for a device is refused."""
    model = small()
    with placed(model) as there:
        assert (there.model is model, there.record) == (True, {})
    with pytest.raises(BntoolsError, match="not of PyTorch: leave both out"), placed(model, "cpu"):
        pass
