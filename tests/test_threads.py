"""Several threads at once: models apart do not notice each other, and one model is for one thread at a time."""

from __future__ import annotations

import copy
import sys
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_files
import pytest
import torch
from models import cnn
from torch import nn

import bntools
from bntools import BntoolsError
from bntools.alone import alone


@pytest.fixture(autouse=True)
def _often_interrupted():
    """Threads take turns a thousand times more often than they do by default."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(5e-6)
    yield
    sys.setswitchinterval(before)


def at_once(*jobs: Callable[[], Any]) -> list[Any]:
    """What each job returned, or raised; all begin together, each in a thread."""
    barrier, results = threading.Barrier(len(jobs)), [None] * len(jobs)

    def run(place: int) -> None:
        barrier.wait()
        try:
            results[place] = jobs[place]()
        except BntoolsError as error:
            results[place] = error

    threads = [threading.Thread(target=run, args=(place,)) for place in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def net(seed: int) -> nn.Module:
    """A network of random weights that only the seed decides."""
    torch.manual_seed(seed)
    return cnn()


def stats(model: Any) -> np.ndarray:
    """All statistics of a model in one array."""
    return np.concatenate([values for layer in bntools.inspect(model) for values in layer.stats])


def images(seed: int = 0) -> list[torch.Tensor]:
    """Batches of random images."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(4, 3, 12, 12, generator=generator) * 2 + 1 for _ in range(6)]


@pytest.mark.parametrize("method", ["exact", "precise", "ema"])
def test_models_apart_on_the_same_data(method):
    """Models recalibrated in threads, on one list of batches, get bit by bit what they get one after the other."""
    data, expected = images(), []
    for seed in range(3):
        model = net(seed)
        bntools.recalibrate(model, data, method=method)
        expected.append(stats(model))
    models = [net(seed) for seed in range(3)]
    at_once(*(lambda model=model: bntools.recalibrate(model, data, method=method) for model in models))
    for model, one in zip(models, expected, strict=True):
        assert np.array_equal(stats(model), one)
        assert all(module.training and "forward" not in vars(module) for module in model.modules())
    assert not torch.nn.modules.module._global_forward_hooks


def test_onnx_models_apart():
    """ONNX models in threads get bit by bit what they get one after the other."""
    data = [onnx_files.images(seed=seed) for seed in range(3)]
    expected = onnx_files.small()
    bntools.recalibrate(expected, data)
    models = [onnx_files.small() for _ in range(2)]
    at_once(*(lambda model=model: bntools.recalibrate(model, data) for model in models))
    assert all(np.array_equal(stats(model), stats(expected)) for model in models)


def test_a_model_serves_while_its_copy_is_recalibrated():
    """All that a model answers in one thread, with and without gradients, is as ever while copies are recalibrated."""
    model, data = net(0).eval(), images()
    with torch.no_grad():
        expected = model(data[0])
    done, answers = threading.Event(), []

    def serve() -> None:
        while not done.is_set() or not answers:
            recorded = model(data[0])
            with torch.inference_mode():
                answers.append((recorded.detach(), model(data[0]), recorded.requires_grad, torch.is_grad_enabled()))

    def recalibrate() -> None:
        try:
            for _ in range(4):
                bntools.recalibrate(copy.deepcopy(model), data)
        finally:
            done.set()

    assert at_once(serve, recalibrate) == [None, None]
    assert all(torch.equal(one, expected) and torch.equal(two, expected) for one, two, _, _ in answers)
    assert {recorded for _, _, recorded, _ in answers} == {True}
    assert {enabled for _, _, _, enabled in answers} == {False}  # in inference mode


@pytest.mark.parametrize("verb", ["recalibrate", "reset", "freeze", "apply", "verify", "part"])
def test_one_model_is_for_one_thread(verb):
    """While a model is recalibrated a second verb on it, or on a part of it, is refused in words, and harms nothing."""
    model, data, expected, refusals = net(0), images(), net(0), []
    others = {
        "recalibrate": lambda: bntools.recalibrate(model, data[3:]),
        "reset": lambda: bntools.reset(model),
        "freeze": lambda: bntools.freeze(model),
        "apply": lambda: bntools.apply(model, bntools.statistics(net(0))),
        "verify": lambda: bntools.verify(model, net(1), data[:1]),
        "part": lambda: bntools.recalibrate(model[0:3], data[3:]),
    }
    bntools.recalibrate(expected, data)

    def batches():
        yield data[0]
        refusals.extend(at_once(others[verb]))
        yield from data[1:]

    bntools.recalibrate(model, batches(), check=False)
    assert "bntools is at work on this model, or on a part of it, in another thread" in str(refusals[0])
    assert np.array_equal(stats(model), stats(expected))
    assert all(module.training for module in model.modules())
    others[verb]()  # and now it may


def test_one_onnx_model_is_for_one_thread():
    """A second recalibration of an ONNX model that is under way is refused."""
    model, data, refusals = onnx_files.small(), [onnx_files.images()], []

    def batches():
        refusals.extend(at_once(lambda: bntools.recalibrate(model, data)))
        yield from data

    bntools.recalibrate(model, batches(), check=False)
    assert isinstance(refusals[0], BntoolsError)


def test_a_model_that_serves_while_it_is_recalibrated_says_so():
    """A forward pass of the very model in another thread raises, instead of using half of the new statistics."""
    model, data, raised = net(0), images(), []

    def batches():
        yield data[0]
        raised.extend(at_once(lambda: model(data[0])))
        yield data[1]

    bntools.recalibrate(model, batches(), check=False)
    assert "run the model itself elsewhere (copy.deepcopy) while it is recalibrated" in str(raised[0])


def taken(part: int) -> Any:
    """What another thread hears that wants this part: None, or that somebody has it."""

    def take() -> None:
        with alone({part}):
            pass

    return at_once(take)[0]


def test_a_part_is_free_again_whatever_happened():
    """After a verb that raises, and after one inside another, other threads may have the model."""
    model = net(0)
    with pytest.raises(BntoolsError, match="no samples"):
        bntools.recalibrate(model, [])
    assert at_once(lambda: bntools.recalibrate(model, [torch.ones(2, 3, 12, 12)]).samples) == [2]
    with alone({1, 2}):
        with alone({2, 3}):
            assert isinstance(taken(3), BntoolsError)
        assert taken(3) is None
        assert isinstance(taken(2), BntoolsError)
    assert taken(2) is None


def test_a_part_is_free_again_where_letting_go_was_interrupted():
    """Ctrl-C on the way out of a block: nothing of it has run, and the block is gone."""
    block = alone({1, 2})
    block.__enter__()
    assert isinstance(taken(2), BntoolsError)
    del block
    assert taken(2) is None


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.randn(3, 12, 12, generator=torch.Generator().manual_seed(index))


class Loader(torch.utils.data.DataLoader):
    """One at a time forks its workers: two forks at once are refused by filelock, where something has imported that."""

    forking = threading.Lock()

    def __iter__(self):
        with self.forking:
            return super().__iter__()


# from Python 3.12 on; the loader forks where its iterator is made
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_forked_workers_of_a_loader():
    """Batches from forked worker processes, in two threads at once, give what the loader without workers gives."""
    loaders = [Loader(Rows(), batch_size=4, num_workers=workers) for workers in (2, 2, 0)]
    models = [net(0) for _ in loaders]
    jobs = [lambda pair=pair: bntools.recalibrate(*pair) for pair in zip(models[:2], loaders[:2], strict=True)]
    assert [getattr(result, "samples", result) for result in at_once(*jobs)] == [12, 12]
    bntools.recalibrate(models[2], loaders[2])
    assert np.array_equal(stats(models[0]), stats(models[2]))
    assert np.array_equal(stats(models[1]), stats(models[2]))
