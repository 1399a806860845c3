"""How much memory is free."""

from __future__ import annotations

import memory_bound
import numpy as np
import pytest

from bntools import memory


def test_a_container_leaves_less(tmp_path, monkeypatch):
    """What a control group leaves counts where it is less than what the machine has free."""
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory.left_in_container(tmp_path) == 600
    monkeypatch.setattr(memory, "left_in_container", lambda: 600)
    assert memory.available() == 600


def test_without_a_limit_the_machine_counts(tmp_path):
    """No control group, or one without a limit, leaves everything."""
    assert memory.left_in_container(tmp_path) == memory.UNLIMITED
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("400\n")
    assert memory.left_in_container(tmp_path) == memory.UNLIMITED
    assert 0 < memory.available() < memory.UNLIMITED


def test_a_bound_sees_what_its_block_takes():
    """Also beneath a higher peak from before."""
    np.ones(80 << 20)
    with pytest.raises(AssertionError, match="MiB were taken"), memory_bound.at_most(50 << 20):
        np.ones(60 << 20)
    with memory_bound.at_most(50 << 20):
        np.ones(1 << 20)
