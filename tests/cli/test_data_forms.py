"""Data on the command line that is neither a folder nor an array."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch


@pytest.fixture
def forms(desk):
    """The images of the desk as shards of tar, and as Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = sorted(Path("data").rglob("*.png"))
    Path("shards").mkdir()
    for shard, numbers in enumerate(np.array_split(np.arange(len(images)), 2)):
        with tarfile.open(f"shards/train-{shard:02}.tar", "w") as archive:
            for number in numbers.tolist():
                archive.add(images[number], f"{number:04}.png")
    rows = [{"bytes": path.read_bytes(), "path": path.name} for path in images]
    pq.write_table(pa.table({"image": rows, "other": [path.read_bytes() for path in images]}), "all.parquet")
    return desk


@pytest.mark.parametrize(
    "source", ["'shards/train-{00..01}.tar'", "shards", "all.parquet", "'*.parquet' --column other"]
)
def test_statistics_do_not_depend_on_the_form(run, forms, source):
    """Shards, a folder of them and Parquet give the statistics that a folder gives; the record says what they were."""
    assert run("recalibrate model.pt data/ -o folder.pt").status == 0
    done = run(f"recalibrate model.pt {source} -o form.pt")
    assert done.status == 0, done.err
    assert "40 images" in done.out
    record = json.loads(Path("form.json").read_text())["input"]
    assert record["container"] == ("parquet" if "parquet" in source else "tar")
    one, other = (torch.load(name, weights_only=False).state_dict() for name in ("folder.pt", "form.pt"))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)


def test_what_is_wrong_with_data_is_said_in_a_line(refused, forms):
    """A shard that is missing, one that is compressed, a column that is not there, and no images at all."""
    assert "there is no file shards/train-02.tar" in refused("recalibrate model.pt 'shards/train-{00..02}.tar'")
    assert "has no column 'x'; it has image (image), other (bytes)" in refused(
        "recalibrate model.pt all.parquet --column x"
    )
    assert "--column) is for Parquet files and datasets" in refused("inspect model.pt data/ --column image")
    assert "no file has such a name" in refused("recalibrate model.pt 'nothing-*.tar'")
    Path("b.tgz").write_bytes(b"\x1f\x8b\x08\x00")
    assert "is compressed" in refused("recalibrate model.pt b.tgz")
