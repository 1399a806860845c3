"""Several processes that recalibrate one model together; here they are threads, but for the last test."""

import copy
import json
import os
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import models
import numpy as np
import pytest
import torch
from peers import together
from torch import nn

import bntools
from bntools import data
from bntools.errors import BntoolsError
from bntools.processes import Group, PeerError

X = torch.randn(37, 3, 9, 9, generator=torch.Generator().manual_seed(0)) * 2 + 1
WORKER = Path(__file__).with_name("worker.py")


def net():
    """The same model each time."""
    torch.manual_seed(1)
    return models.cnn()


def shares(x, sizes, batch=4):
    """Batches for each process, which may have none."""
    return [list(part.split(batch)) if len(part) else [] for part in torch.split(x, sizes)]


def recalibrated(model, parts, **options):
    """Models and results of all ranks, each on its part; what one raises is raised."""
    copies = [copy.deepcopy(model) for _ in parts]
    results = together(
        len(parts), lambda group: bntools.recalibrate(copies[group.rank], parts[group.rank], group=group, **options)
    )
    for result in results:
        if isinstance(result, Exception):
            raise result
    return copies, results


def stats(model):
    """All statistics of a model in one array."""
    return np.concatenate([np.concatenate(layer.stats) for layer in bntools.inspect(model)])


def check_same(copies, results):
    """To the bit on every rank."""
    for model, result in zip(copies[1:], results[1:], strict=True):
        assert np.array_equal(stats(model), stats(copies[0]))
        for name in ("samples", "residual", "standard_error", "virtual_batches", "convergence", "notes", "untouched"):
            assert getattr(result, name) == getattr(results[0], name)
        assert [layer.drift for layer in result.layers] == [layer.drift for layer in results[0].layers]


@pytest.mark.parametrize("sizes", [[37], [20, 17], [1, 30, 0, 6], [0, 37]])
def test_statistics_are_those_of_one_process(sizes):
    """However many processes there are and however uneven their shares; the residual is that of all data."""
    one = net()
    alone = bntools.recalibrate(one, X.split(5))
    copies, results = recalibrated(net(), shares(X, sizes))
    check_same(copies, results)
    np.testing.assert_allclose(stats(copies[0]), stats(one), rtol=1e-6, atol=1e-6)
    assert results[0].samples == alone.samples == 37
    assert results[0].residual < 1e-6


@pytest.mark.parametrize("kind", [models.Branches, models.Exits])
def test_replicas_part_ways_across_processes(kind):
    """One process has only samples that take the block, another none of them: as if one process had all."""
    torch.manual_seed(0)
    x = torch.randn(24, 3)
    x = x[x[:, 0].argsort()]
    one = kind()
    bntools.recalibrate(one, x.split(1))
    copies, results = recalibrated(kind(), shares(x, [9, 3, 12], batch=1))
    check_same(copies, results)
    np.testing.assert_allclose(stats(copies[0]), stats(one), rtol=1e-5, atol=1e-6)


def test_memory_and_tolerance_are_shared():
    """Virtual batches come in step, also where one process has room for less or comes to its end first."""
    check_same(*recalibrated(net(), shares(X, [30, 7]), memory=20_000))
    x = torch.randn(900, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    copies, results = recalibrated(net(), shares(x, [880, 20]), tolerance=0.05)
    check_same(copies, results)
    assert results[0].standard_error < 0.05
    assert results[0].samples < 400
    assert results[0].virtual_batches == 1
    assert recalibrated(net(), shares(X, [30, 7]), max_samples=9)[1][0].samples == 9


def test_precise_pools_over_processes():
    """The same mini-batches give the same pool, whoever has them."""
    one = net()
    bntools.recalibrate(one, X.split(4), method="precise")
    copies, results = recalibrated(net(), shares(X, [16, 21]), method="precise")
    check_same(copies, results)
    np.testing.assert_allclose(stats(copies[0]), stats(one), rtol=1e-6, atol=1e-6)


def test_statistics_that_differ_are_those_of_rank_0():
    """As they do in a training: a prior and an undo are those of the first, on all."""
    copies = [net(), net()]
    copies[0][1].running_mean.fill_(6.0)
    parts = shares(X, [20, 17])
    results = together(
        2, lambda group: bntools.recalibrate(copies[group.rank], parts[group.rank], prior=10**9, group=group)
    )
    check_same(copies, results)
    assert (copies[1][1].running_mean > 5.9).all()
    results[1].undo()
    assert (copies[1][1].running_mean == 6).all()


def failing(parts, models=None, **options):
    """What each rank raises; no statistics have moved."""
    copies = models or [net() for _ in parts]
    before = [stats(model) for model in copies]
    errors = together(
        len(parts), lambda group: bntools.recalibrate(copies[group.rank], parts[group.rank], group=group, **options)
    )
    assert all(isinstance(error, BntoolsError) for error in errors), errors
    assert all(np.array_equal(stats(model), was) for model, was in zip(copies, before, strict=True))
    return errors


def test_an_error_of_one_process_ends_all():
    """Wherever it happens: the others name the rank and say what it said."""

    def breaks():
        yield X[:4]
        raise OSError("the disk is gone")

    for bad, message in (([X[:4] * torch.nan], "batch 0 brings NaN"), (breaks(), "data raised"), (3, "found a int")):
        errors = failing([[X[4:8]], bad, []])
        assert [type(error) for error in errors] == [PeerError, BntoolsError, PeerError]
        assert message in str(errors[1])
        assert str(errors[0]).startswith("rank 1 of 3 has failed: ")
        assert message in str(errors[2])


def test_different_models_and_arguments_are_refused():
    """Before anything is measured, in the same words everywhere."""
    other = net()
    other[0].weight.data[0] += 1
    for models_, options, message in (
        ([net(), other], {}, r"rank 1 of 2 and rank 0 differ in weights \("),
        ([net(), nn.Sequential(nn.BatchNorm2d(3))], {}, "differ in BN layers, weights, layers="),
        ([net(), net()], {"method": "ema"}, "method='ema' is a moving average over batches"),
        ([nn.Sequential(nn.SyncBatchNorm(3)), nn.Sequential(nn.SyncBatchNorm(3))], {"method": "precise"}, "SyncBatch"),
    ):
        errors = failing(shares(X, [20, 17]), models_, **options)
        assert str(errors[0]) == str(errors[1])
        with pytest.raises(BntoolsError, match=message):
            raise errors[0]


def test_a_share_that_several_have_is_noticed():
    """The same data on each process moves no statistics, but must not count for prior, tolerance and max_samples."""
    one = net()
    bntools.recalibrate(one, X.split(5))
    copies, results = recalibrated(net(), [X.split(5), X.split(5)])
    check_same(copies, results)
    np.testing.assert_allclose(stats(copies[0]), stats(one), rtol=1e-6, atol=1e-6)
    assert "ranks 0, 1 of 2 begin with the same batch" in results[0].notes[0]
    for options in ({"prior": 5}, {"tolerance": 0.5}, {"max_samples": 10}):
        errors = failing([X.split(5), X.split(5)], **options)
        assert f"{next(iter(options))}= counts each sample once" in str(errors[1])


def test_samples_that_a_sampler_repeats_are_said():
    """A DistributedSampler gives every process as many."""
    from torch.utils.data import DataLoader, DistributedSampler

    def loader(rank):
        return DataLoader(X, batch_size=5, sampler=DistributedSampler(X, 2, rank, shuffle=False))

    _, results = recalibrated(net(), [loader(0), loader(1)])
    assert results[0].samples == 38
    assert results[0].notes == [
        "the DistributedSampler hands out 1 of the samples twice, so that all processes have as many"
    ]


def test_a_group_has_to_be_one():
    """Anything but a process group is refused."""
    assert Group().gather(3) == [3]
    with pytest.raises(BntoolsError, match=r"group='gloo', expected a torch\.distributed\.ProcessGroup"):
        bntools.recalibrate(net(), [X], group="gloo")


def factory():
    """Batches of two samples."""
    return (np.full((2, 3), index, np.float32) for index in range(7))


def test_data_is_dealt_from_one_order(tmp_path):
    """Each sample goes to one process, whole batches where they belong together; all describe the whole data."""
    from PIL import Image

    np.save(tmp_path / "x.npy", np.arange(22, dtype=np.float32).reshape(11, 2))
    for index in range(11):
        Image.fromarray(np.full((4, 4, 3), index, np.uint8)).save(tmp_path / f"{index}.png")
    for source in (tmp_path / "x.npy", tmp_path, "test_processes:factory"):
        whole = data.open(source, batch_size=2)
        for count, together_ in ((3, 1), (2, 2), (12, 1)):
            shares_ = [data.open(source, batch_size=2, shard=(rank, count, together_)) for rank in range(count)]
            dealt = [batch for share in shares_ for batch in share]
            found = sorted(row.tobytes() for batch in dealt for row in batch)
            assert found == sorted(row.tobytes() for batch in whole for row in batch)
            assert all(share.spec == whole.spec for share in shares_)
            assert all(share.description == whole.description for share in shares_)
            assert together_ == 1 or sum(len(batch) == 2 for batch in dealt) >= 5
    with pytest.raises(BntoolsError, match=r"expected \(rank, count, together\)"):
        data.open(tmp_path, shard=(3, 3, 1))


def drawn_anew():
    """Batches that are others each time."""
    return iter(X[torch.randperm(len(X))].split(5))


def test_an_order_that_is_another_on_each_process_is_refused():
    """Shares of different orders have samples in common, and lack others."""
    opened = [data.open("test_processes:factory", shard=(rank, 2, 1)) for rank in range(2)]
    assert recalibrated(nn.Sequential(nn.BatchNorm1d(3)), opened)[1][0].samples == 14
    errors = failing([data.open("test_processes:drawn_anew", shard=(rank, 2, 1)) for rank in range(2)])
    assert str(errors[0]).startswith("test_processes:drawn_anew: begins with other samples on rank 1 of 2 than on rank")
    assert str(errors[1]) == str(errors[0])


def test_batches_of_bfloat16_are_told_apart():
    """NumPy has no such numbers."""
    _, results = recalibrated(net().bfloat16(), [[X[:9].bfloat16()], [X[:9].bfloat16()]])
    assert "begin with the same batch" in results[0].notes[0]


def free_port():
    """A port on which nobody listens now."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_processes_of_gloo(tmp_path):
    """Three real ones: in DistributedDataParallel, with one absent, on the command line, and one that dies."""
    torch.save(net(), tmp_path / "model.pt")
    np.save(tmp_path / "x.npy", X.numpy())
    bad = X.numpy().copy()
    bad[np.random.default_rng(0).permutation(len(bad))[1]] = np.nan  # the second of the order: rank 1's first
    np.save(tmp_path / "bad.npy", bad)
    ports = [str(free_port()) for _ in range(5)]
    with subprocess.Popen([sys.executable, WORKER, "3", *ports], cwd=tmp_path, start_new_session=True) as worker:
        try:
            worker.wait(timeout=240)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(worker.pid, signal.SIGKILL)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(3)]
    one = net()
    bntools.recalibrate(one, X.split(5))
    for found in said:
        assert found["ddp"] == said[0]["ddp"]
        np.testing.assert_allclose(found["ddp"], stats(one), rtol=1e-6, atol=1e-6)
    assert [found["absent"] for found in said[:2]] == [
        "rank 2 of 3 did not call within 1 s: every process of the group has to call, also one that has no data"
    ] * 2
    assert "came late" in said[2]["absent"]
    assert [found["cli"] for found in said] == [0, 0, 0]
    assert [bool(found["cli out"]) for found in said] == [True, False, False]
    np.testing.assert_allclose(stats(bntools.load(tmp_path / "three.pt")), stats(one), rtol=1e-6, atol=1e-6)
    assert json.loads((tmp_path / "three.json").read_text())["processes"] == 3
    assert [found["bad"] for found in said] == [1, 1, 1]
    assert [found["bad err"].startswith("bntools: batch 0 brings NaN") for found in said] == [False, True, False]
    assert [found["usage"] for found in said] == [2, 2, 2]
    assert [bool(found["usage err"]) for found in said] == [True, False, False]
    assert not list(tmp_path.glob("*bad.*pt*"))
    assert [found["device"] for found in said] == [1, 1, 1]
    assert sum(found["device err"].startswith("bntools: found device 'cuda:77'") for found in said) == 1
    assert [found["dead"] for found in said] == [
        "rank 2 of 3 has died (killed, or out of memory?): nothing was changed"
    ] * 2 + [""]
