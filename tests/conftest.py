"""What all tests share."""

from __future__ import annotations

import signal

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models are faster on one thread, and tests may run beside each other."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _ctrl_c():
    """A shell that starts tests in the background has SIGINT ignored, here and in every process that tests start."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
