"""Other batches made from one."""

from __future__ import annotations

from collections import UserDict, namedtuple

import numpy as np
import pytest
import torch

from bntools.resizing import mapped, redrawn, resized, shuffled


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_resized(samples):
    """A batch is resized by taking its samples again and again, along the axis of samples only."""
    batch = {"x": torch.arange(6).reshape(3, 2), "y": [np.arange(3)], "table": np.ones(7), "flag": True}
    made = resized(batch, samples)
    assert made["x"].tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]][:samples]
    assert made["y"][0].tolist() == [0, 1, 2, 0, 1][:samples]
    assert len(made["table"]) == 7
    assert made["flag"] is True


def test_containers():
    """Named tuples keep their type, and any mapping becomes a dict."""
    pair = namedtuple("pair", "x y")
    made = resized(UserDict(x=torch.arange(2), y=pair(np.arange(2), [np.ones(2)])), 1)
    assert type(made) is dict
    assert type(made["y"]) is pair
    assert made["y"].x.tolist() == [0]
    assert mapped(lambda value: value + 1, pair(1, (2, [3]))) == pair(2, (3, [4]))


def test_redrawn():
    """Floats get the same mean and spread in the same dtype, integers and flags another order; scalars stay."""
    batch = {"x": torch.randn(50, 40) * 3 + 5, "half": np.ones((9, 9), np.float16), "ids": torch.arange(100), "n": 3}
    batch["t"] = torch.tensor(2.0)
    made = redrawn(batch)
    assert made["x"].dtype == np.float32
    assert made["x"].mean() == pytest.approx(5, abs=0.3)
    assert made["x"].std() == pytest.approx(3, rel=0.1)
    assert np.isin(made["x"], batch["x"].numpy()).mean() < 0.01
    assert made["half"].dtype == np.float16
    assert made["half"].std() > 0.5
    assert made["ids"].tolist() != list(range(100))
    assert sorted(made["ids"].tolist()) == list(range(100))
    assert (made["n"], made["t"]) == (3, batch["t"])


def test_shuffled():
    """The values are the same in another order, also across samples."""
    batch = torch.arange(12.0).reshape(3, 4)
    made = shuffled((batch, "label"))
    assert made[0].shape == (3, 4)
    assert made[0].tolist() != batch.tolist()
    assert sorted(made[0].ravel()) == list(range(12))
    assert made[1] == "label"
