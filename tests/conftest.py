"""What all tests share."""

from __future__ import annotations

import os
import signal
from contextlib import suppress

import pytest
import torch

# Commands take a GPU where there is one, and say so; what is tested here is what they do, and say, on the CPU.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

# CUDA builds of PyTorch bring Triton, which aborts the process where TensorFlow, from 2.20, was imported before it:
# https://github.com/tensorflow/tensorflow/issues/124205
with suppress(ModuleNotFoundError):
    import triton  # noqa: F401

# What takes longest of all files. Tests may run on several processes, a file on one: these start first, so that none of
# them runs on alone at the end.
LONG = (
    "test_torch_backend.py",
    "test_samples.py",
    "test_exporting.py",
    "test_folding_architectures.py",
    "test_recalibration.py",
    "test_freezing.py",
    "test_advice.py",
    "test_files.py",
    "test_pickles.py",
    "test_bad_input.py",
)


def pytest_collection_modifyitems(items):
    """Long files first, the others as they were."""
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models are faster on one thread, and tests may run beside each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c():
    """A shell that starts tests in the background has SIGINT ignored, here and in every process that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of which only the name is another one than the CPU's."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr("bntools.backends.torch.placing._checked", lambda device: device)
    monkeypatch.setattr(torch.nn.Module, "to", lambda module, device: module)
