"""What all tests share."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Small models are faster on one thread, and tests may run beside each other."""
    torch.set_num_threads(1)
