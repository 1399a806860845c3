from itertools import pairwise

import keras
import numpy as np
import pytest
from keras import layers as kl

import bntools
from bntools.callbacks.keras import FreezeBatchNorm, MonitorBatchNorm, RecalibrateBatchNorm, StopOnNonFinite
from bntools.errors import BntoolsError

X = np.random.default_rng(0).normal(2, 3, (32, 4)).astype("float32")


def network(optimizer="sgd", **options):
    """Dense and BN, compiled."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([kl.Input((4,)), kl.Dense(3), kl.BatchNormalization(name="bn"), kl.Dense(1)])
    model.compile(optimizer, "mse", **options)
    return model


class Log(keras.callbacks.Callback):
    """What the moving mean was at the end of each epoch, and at the start of each validation's end."""

    def __init__(self):
        super().__init__()
        self.means, self.tested = [], []

    def mean(self):
        return np.array(keras.ops.convert_to_numpy(self.model.get_layer("bn").moving_mean))

    def on_epoch_end(self, epoch, logs=None):
        self.means.append(self.mean())

    def on_test_end(self, logs=None):
        self.tested.append(self.mean())


def fit(model, *callbacks, epochs=3, validate=True, **options):
    """Train with these callbacks."""
    data = {"validation_data": (X, X[:, :1])} if validate else {}
    model.fit(X, X[:, :1], epochs=epochs, verbose=0, callbacks=list(callbacks), **data, **options)


def test_freezing_takes_effect_at_its_epoch():
    """Two epochs move the statistics, in a step that was traced; the rest does not, and the handle undoes it."""
    model, log = network(), Log()
    callback = FreezeBatchNorm(after=2)
    fit(model, callback, log, epochs=4, validate=False)
    first, second, third, fourth = log.means
    assert not np.array_equal(first, second)
    np.testing.assert_array_equal(second, third)
    np.testing.assert_array_equal(second, fourth)
    bntools.assert_frozen(model)
    callback.frozen.undo()
    assert not bntools.inspect(model)[0].stats_frozen


def test_freezing_one_part_of_named_layers():
    """The parts and the layers go on to freeze; an epoch that never comes freezes nothing."""
    model = network()
    late, early = FreezeBatchNorm(after=9), FreezeBatchNorm(0, affine=False, layers="bn")
    fit(model, late, early, epochs=1, validate=False)
    assert late.frozen is None
    (layer,) = bntools.inspect(model)
    assert (layer.stats_frozen, layer.affine_frozen) == (True, False)


@pytest.mark.parametrize("after", [-1, 1.5, "2", True])
def test_no_number_of_epochs(after):
    """What is no number of epochs is refused at once."""
    with pytest.raises(BntoolsError, match="expected a number of epochs"):
        FreezeBatchNorm(after)


def exact_mean(model):
    """The mean of what the BN layer of a network gets."""
    return keras.ops.convert_to_numpy(model.layers[0](X)).astype(np.float64).mean(0)


def test_recalibration_before_each_validation_and_never_twice():
    """Validation sees the statistics of its weights; the last one counts for the end of training."""
    model, log = network(), Log()
    callback = RecalibrateBatchNorm([X[:20], X[20:]], check=True)
    fit(model, log, callback)
    assert [result.samples for result in callback.results] == [32, 32, 32]
    assert max(result.residual for result in callback.results) < 1e-5
    np.testing.assert_allclose(log.tested[-1], exact_mean(model), rtol=1e-5)
    np.testing.assert_array_equal(log.means[-1], log.tested[-1])
    model.evaluate(X, X[:, :1], verbose=0, callbacks=[callback])
    assert len(callback.results) == 3


def test_recalibration_at_the_end_only():
    """Without validation, or asked for it, statistics are measured once, when training is over."""
    model = network()
    callback = RecalibrateBatchNorm(X, before_validation=False, max_samples=32)
    fit(model, callback, epochs=2)
    assert len(callback.results) == 1
    np.testing.assert_allclose(bntools.inspect(model)[0].mean, exact_mean(model), rtol=1e-5)
    fit(model, callback, epochs=1, validate=False)
    assert len(callback.results) == 2
    silent = RecalibrateBatchNorm(X, at_end=False)
    fit(model, silent, epochs=1, validate=False)
    assert silent.results == []


def test_a_fit_that_raised_leaves_no_fit_behind():
    """evaluate with the callback of a fit that failed recalibrates nothing."""

    class Stop(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            raise KeyboardInterrupt

    model = network()
    callback = RecalibrateBatchNorm(X)
    with pytest.raises(KeyboardInterrupt):
        fit(model, callback, Stop())
    model.evaluate(X, X[:, :1], verbose=0, callbacks=[callback])
    assert callback.results == []


def test_frozen_statistics_are_left_alone():
    """Where both callbacks meet, nothing is measured once all are frozen, and a warning says so."""
    model = network()
    callback = RecalibrateBatchNorm(X)
    with pytest.warns(UserWarning, match="all BN layers are frozen"):
        fit(model, FreezeBatchNorm(after=1), callback)
    assert len(callback.results) == 1


def test_data_that_can_be_read_once_is_refused():
    """A generator would be empty at the second validation: what to give instead is said before training."""
    with pytest.raises(BntoolsError, match=r"generator, which can be read only once.*tf\.data\.Dataset"):
        RecalibrateBatchNorm(batch for batch in [X])


class Means(keras.callbacks.Callback):
    """The moving mean at the beginning, and after each batch."""

    def on_train_begin(self, logs=None):
        self.means = [self.mean()]

    def on_train_batch_end(self, batch, logs=None):
        self.means.append(self.mean())

    def mean(self):
        return np.array(keras.ops.convert_to_numpy(self.model.get_layer("bn").moving_mean))


def test_freezing_after_some_batches():
    """Counted over epochs, also where several run between two calls of a callback."""
    several = [(2, 6)] if keras.backend.backend() == "tensorflow" else []
    for together, moving in [(1, 5), *several]:
        model, log = network(steps_per_execution=together), Means()
        fit(model, FreezeBatchNorm(5, unit="steps"), log, epochs=2, validate=False, batch_size=8)
        changed = [not np.array_equal(a, b) for a, b in pairwise(log.means)]
        assert sum(changed) * together == moving
        assert changed == sorted(changed, reverse=True)


class Exact(Log):
    """What the moving mean is while a validation runs, and what it should be."""

    def on_test_end(self, logs=None):
        pass

    def on_test_batch_end(self, batch, logs=None):
        self.tested.append((self.mean(), exact_mean(self.model)))


def test_averaged_weights_get_statistics_of_their_own():
    """Those of use_ema at the end, where fit puts them in; behind SwapEMAWeights before each validation as well."""
    for swap in ([], [keras.callbacks.SwapEMAWeights()]):
        model, log = network(keras.optimizers.SGD(0.05, use_ema=True, ema_momentum=0.9)), Exact()
        callback = RecalibrateBatchNorm(X)
        fit(model, *swap, callback, log, epochs=2)
        assert len(callback.results) == 3 - len(swap)  # without the swap, what was validated is not what is left
        for mean, expected in log.tested:
            np.testing.assert_allclose(mean, expected, rtol=1e-5)
        np.testing.assert_allclose(bntools.inspect(model)[0].mean, exact_mean(model), rtol=1e-5)


def test_statistics_that_are_not_finite_stop_the_fit():
    """The layer and the batch are named, counted over the epochs of fit; the rest is not trained."""

    class Break(keras.callbacks.Callback):
        def on_epoch_begin(self, epoch, logs=None):
            if epoch == 1:
                self.model.layers[0].bias.assign([np.nan, 0.0, 0.0])

    model, log = network(), Log()
    with pytest.raises(BntoolsError, match=r"layer 'bn': NaN or Inf .* after step 5"):
        fit(model, Break(), StopOnNonFinite(), log, batch_size=8)
    assert len(log.means) == 1


def test_the_monitor_writes_for_tensorboard(tmp_path):
    """A summary file of TensorFlow has the figures of every third batch; a function may take them instead."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    seen = []
    monitors = [MonitorBatchNorm(tmp_path, every=3), MonitorBatchNorm(lambda *given: seen.append(given), every=3)]
    fit(network(), *monitors, epochs=2, validate=False, batch_size=8)
    events = EventAccumulator(str(tmp_path)).Reload()
    names = ["bn/bn/drift", "bn/bn/mean", "bn/bn/variance", "bn/drift"]
    assert sorted(events.Tags()["tensors"]) == names
    assert [event.step for event in events.Tensors("bn/drift")] == [3, 6] == [step for _, step in seen]
    assert sorted(seen[0][0]) == names
