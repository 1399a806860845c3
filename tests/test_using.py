"""A live model with other statistics for the length of a block."""

from __future__ import annotations

import gc
import weakref
from copy import deepcopy
from threading import Thread

import keras
import numpy as np
import onnx_files
import pytest
import torch
from keras import layers as L
from keras_nets import images, residual_net
from models import cnn
from torch import nn

import bntools
from bntools.stats import LayerStatistics, Statistics

BACKENDS = {"torch": cnn, "keras": residual_net}


def moved(stats: Statistics, by: float) -> Statistics:
    """The same statistics with all means and variances moved."""
    layers = [LayerStatistics(one.name, one.mean + by, one.var + by, one.eps, one.axis, 5, one.affine) for one in stats]
    return Statistics(tuple(layers), stats.framework, stats.weights)


def means(model) -> list[float]:
    """The first mean of each layer: 0 in a fresh model, and what it was moved by."""
    return [round(float(layer.mean[0]), 4) for layer in bntools.inspect(model)]


@pytest.fixture(params=list(BACKENDS))
def model(request):
    """A fresh model of each framework that runs by itself."""
    torch.manual_seed(0)
    keras.utils.set_random_seed(0)
    model = BACKENDS[request.param]()
    return model.eval() if isinstance(model, nn.Module) else model


@pytest.fixture
def uses(model):
    """Statistics moved by 1 and by 2, ready to be used in the model."""
    stats = bntools.statistics(model)
    return [bntools.use(model, moved(stats, by)) for by in (1.0, 2.0)]


def test_statistics_hold_inside_the_block(model, tmp_path):
    """Inside, the model is as if they had been applied, to the bit; behind it, as before. A file does as well."""
    theirs = moved(bntools.statistics(model), 1.5)
    bntools.save_stats(theirs, tmp_path / "site.safetensors")
    x = images(4) if isinstance(model, keras.Model) else torch.from_numpy(images(4).transpose(0, 3, 1, 2).copy())

    def output():
        return keras.ops.convert_to_numpy(model(x)) if isinstance(model, keras.Model) else model(x).detach().numpy()

    before = output()
    with bntools.apply(model, theirs):
        applied = output()
    assert np.abs(applied - before).max() > 0.01
    with bntools.use(model, tmp_path / "site.safetensors") as site:
        np.testing.assert_array_equal(output(), applied)
        assert len(site.layers) == len(bntools.inspect(model))
    np.testing.assert_array_equal(output(), before)


def test_blocks_nest(model, uses):
    """Each end gives back what was there at its beginning, also of one entered twice, and whatever is raised inside."""
    one, two = uses
    count = len(bntools.inspect(model))
    with one:
        with two:
            with one, pytest.raises(ZeroDivisionError), two:
                raise ZeroDivisionError
            assert means(model) == [2.0] * count
        assert means(model) == [1.0] * count
    assert means(model) == [0.0] * count


def test_blocks_that_end_out_of_order(model, uses):
    """Of two blocks that overlap, as in generators or threads, the last one to end leaves what was before both."""
    one, two = uses
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert set(means(model)) == {2.0}
    two.__exit__(None, None, None)
    assert set(means(model)) == {0.0}


def test_a_model_and_its_part_end_out_of_order():
    """Blocks of a model and of one of its submodules that overlap leave each layer what it had before both."""
    x, part = L.Input((4,)), keras.Sequential([L.Input((4,)), L.BatchNormalization(name="inner")])
    for whole, piece in (
        ((module := nn.Sequential(cnn(), nn.BatchNorm2d(4))), module[0]),
        (keras.Model(x, L.BatchNormalization(name="outer")(part(x))), part),
    ):
        count = len(bntools.inspect(piece))
        for first, second in ((whole, piece), (piece, whole)):
            one = bntools.use(first, moved(bntools.statistics(first), 1.0))
            two = bntools.use(second, moved(bntools.statistics(second), 2.0))
            one.__enter__()
            two.__enter__()
            one.__exit__(None, None, None)
            assert means(piece) == [2.0] * count
            assert means(whole).count(0.0) == (1 if first is whole else 0)
            two.__exit__(None, None, None)
            assert set(means(whole)) == {0.0}


def test_what_happens_to_statistics_inside_ends_with_the_block(model, uses):
    """Statistics that a block resets, or training moves, are gone behind it, and the next block begins anew."""
    one, _ = uses
    for _ in range(2):
        with one:
            assert set(means(model)) == {1.0}
            bntools.reset(model)
            assert set(means(model)) == {0.0}
    with bntools.use(model, moved(bntools.statistics(model), 0.0)):
        if isinstance(model, keras.Model):
            model(images(8), training=True)
        else:
            model.train()(torch.randn(8, 3, 8, 8) + 3)
        assert set(means(model)) != {0.0}
    assert set(means(model)) == {0.0}
    assert isinstance(model, keras.Model) or {one.updates for one in bntools.inspect(model)} == {0}


def test_a_beginning_that_fails_changes_nothing(model, uses, monkeypatch):
    """An interrupt while statistics are put in leaves those of before."""
    one, _ = uses
    put, failing = type(one._live).put, [True]

    def interrupted(live, values):
        put(live, values)
        if failing and failing.pop():
            raise KeyboardInterrupt

    monkeypatch.setattr(type(one._live), "put", interrupted)
    with pytest.raises(KeyboardInterrupt), one:
        raise AssertionError("never reached")
    assert set(means(model)) == {0.0}
    with one:
        assert set(means(model)) == {1.0}
    assert set(means(model)) == {0.0}


def test_threads_see_one_model(model, uses):
    """The statistics are the model's: what one thread uses, another sees, and overlapping blocks leave nothing."""
    one, two = uses
    seen = []
    with one:
        thread = Thread(target=lambda: seen.append(means(model)))
        thread.start()
        thread.join()
    assert set(seen[0]) == {1.0}

    def often(use):
        for _ in range(30):
            with use:
                pass

    threads = [Thread(target=often, args=(use,)) for use in (one, two, one)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(means(model)) == {0.0}


def test_what_does_not_fit_is_refused(model):
    """Other weights are refused before the block, unless that is meant."""
    stats = moved(bntools.statistics(model), 1.0)
    foreign = Statistics(stats.layers, stats.framework, "0123456789abcdef")
    with pytest.raises(bntools.BntoolsError, match="weights outside of BN"):
        bntools.use(model, foreign)
    with bntools.use(model, foreign, strict=False):
        assert set(means(model)) == {1.0}


def test_onnx_models_are_refused():
    """A session keeps its numbers: the message says what to do instead."""
    model = onnx_files.small()
    with pytest.raises(bntools.BntoolsError, match="a session on each"):
        bntools.use(model, bntools.statistics(model))


def test_wrapped_and_compiled_modules():
    """DataParallel and compiled code compute with the statistics in use, without compiling anew."""
    torch.compiler.reset()  # after some compilations of nn.Sequential, other tests' too, it would run as it is
    model = cnn().eval()
    x = torch.randn(2, 3, 8, 8)
    compiled_for = []

    def backend(graph, inputs):
        compiled_for.append(graph)
        return graph.forward

    compiled, parallel = torch.compile(model, backend=backend), nn.DataParallel(model)
    before = compiled(x)
    use = bntools.use(compiled, moved(bntools.statistics(parallel), 1.0))
    with use, torch.no_grad():
        expected = model(x)
        assert not torch.equal(expected, before)
        torch.testing.assert_close(parallel(x), expected, rtol=0, atol=0)
    with use:
        torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(compiled(x), before)
    assert len(compiled_for) == 1


def test_buffers_stay_the_same_tensors_and_may_be_replaced():
    """A captured graph holds on to tensors: they stay. A module that changes its dtype inside keeps its own."""
    model = cnn()
    stats = bntools.statistics(model)
    held = model[1].running_mean
    with bntools.use(model, moved(stats, 1.0)):
        assert model[1].running_mean is held
        assert held[0] == 1
        model.double()
    assert model[1].running_mean.dtype == torch.float64
    assert set(means(model)) == {0.0}


def test_a_layer_that_was_replaced_is_told():
    """Statistics put into a layer that the model has no more would show nowhere."""
    model = cnn()
    use = bntools.use(model, moved(bntools.statistics(model), 1.0))
    model[0] = torch.compile(model[0], backend="eager")
    with use:
        assert set(means(model)) == {1.0}
    model[1] = deepcopy(model[1])
    with pytest.raises(bntools.BntoolsError, match="layer '1' was replaced in the model"), use:
        pass
    assert set(means(model)) == {0.0}


def test_backward_belongs_into_the_block():
    """Gradients are those of the statistics in use; behind the block autograd refuses instead of being wrong."""
    model = cnn().eval()
    x = torch.randn(2, 3, 8, 8)
    use = bntools.use(model, moved(bntools.statistics(model), 1.0))
    with use:
        model(x).sum().backward()
        loss = model(x).sum()
    assert model[0].weight.grad is not None
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_compiled_keras_functions_see_it():
    """``predict``, traced before, computes with the statistics in use; so do the further variables of renorm."""
    model = keras.Sequential([L.Input((4,)), L.Dense(3), L.BatchNormalization(renorm=True, name="bn")])
    x = np.random.default_rng(0).normal(size=(4, 4)).astype("f")
    before = model.predict(x, verbose=0)
    layer = model.get_layer("bn")
    with bntools.use(model, moved(bntools.statistics(model), 1.0)):
        np.testing.assert_allclose(
            model.predict(x, verbose=0), (before * np.sqrt(1.001) - 1) / np.sqrt(2.001), atol=1e-5
        )
        np.testing.assert_allclose(layer.renorm_stddev.numpy(), np.sqrt(2.001), rtol=1e-6)
    np.testing.assert_array_equal(model.predict(x, verbose=0), before)
    np.testing.assert_array_equal(layer.renorm_stddev.numpy(), 1)


def test_nothing_keeps_a_model_alive():
    """A model that nobody refers to any more goes, although it was used."""
    model = cnn()
    with bntools.use(model, bntools.statistics(model)):
        pass
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
