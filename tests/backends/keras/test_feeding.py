"""Data as Keras users have it: datasets, arrays, generators, several inputs; and data that never ends or ends early."""

from __future__ import annotations

import itertools

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import layers as L

import bntools
from bntools import BntoolsError
from bntools.backends.keras import feeding


class Pairs(keras.utils.PyDataset):
    """Images and labels by index, as Keras's own example has it; ``batches=None`` never ends."""

    def __init__(self, batches, size=16):
        super().__init__()
        self.cut, self.batches, self.size = nets.cut(nets.images(), size), batches, size

    @property
    def num_batches(self):
        return self.batches

    def __getitem__(self, index):
        return self.cut[index % len(self.cut)], np.zeros(self.size)


def dataset(batches: int | None = 4):
    """Images and labels as a tf.data.Dataset; ``batches=None`` never ends."""
    tf = pytest.importorskip("tensorflow")
    data = tf.data.Dataset.from_tensor_slices((nets.images(), np.zeros(64))).batch(16)
    return data if batches else data.repeat()


SOURCES = {
    "PyDataset": lambda: Pairs(4),
    "tf.data": dataset,
    "array": nets.images,
    "list of pairs": lambda: [(batch, 0, 1) for batch in nets.cut(nets.images(), 20)],
    "generator": lambda: (batch for batch in nets.cut(nets.images(), 20)),
    "dict": lambda: [{"pixels": batch} for batch in nets.cut(nets.images(), 20)],
    "float64": lambda: nets.cut(nets.images().astype(np.float64), 20),
}


@pytest.mark.parametrize("kind", SOURCES)
def test_every_source(kind):
    """Each way to give the same images gives the same statistics."""
    inputs = L.Input((12, 12, 3), name="pixels")
    model = keras.Model(inputs, L.BatchNormalization(name="bn")(L.Conv2D(3, 3, kernel_initializer="ones")(inputs)))
    result = bntools.recalibrate(model, SOURCES[kind]())
    assert result.samples == 64
    got = nets.stats(model)
    bntools.recalibrate(model, [nets.images()])
    np.testing.assert_allclose(got, nets.stats(model), rtol=1e-5)


ENDLESS = {
    "PyDataset": lambda: Pairs(None),
    "tf.data": lambda: dataset(None),
    "cycle": lambda: itertools.cycle(nets.cut(nets.images(), 16)),
    "generator": lambda: (nets.images(16) for _ in iter(int, 1)),
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_data_that_never_ends(kind, monkeypatch):
    """A limit is asked for, nothing is changed; with one it is kept."""
    monkeypatch.setattr(feeding, "ENDLESS", 100)
    model = nets.residual_net()
    before = nets.stats(model)
    with pytest.raises(BntoolsError, match=r"end.*say how many samples to use, with max_samples="):
        bntools.recalibrate(model, ENDLESS[kind]())
    assert np.array_equal(nets.stats(model), before)
    assert bntools.recalibrate(model, ENDLESS[kind](), max_samples=24).samples == 24


def test_data_that_ends_early():
    """Data with fewer batches than it announces is refused, and nothing is changed."""

    class Short:
        def __len__(self):
            return 9

        def __iter__(self):
            return iter(nets.cut(nets.images(), 16))

    model = nets.residual_net()
    before = nets.stats(model)
    with pytest.raises(BntoolsError, match="the data ended after 4 batches, although it has 9 by its own account"):
        bntools.recalibrate(model, Short())
    with pytest.raises(BntoolsError, match="holds no samples"):
        bntools.recalibrate(model, iter([]))
    assert np.array_equal(nets.stats(model), before)


@pytest.mark.parametrize("how", ["tuple", "names", "dict model"])
def test_several_inputs(how):
    """Several inputs come as a tuple beside the labels, or by name; a model of a dict of inputs takes a dict."""
    a, b = L.Input((3,), name="a"), L.Input((2,), name="b")
    given = {"a": a, "b": b} if how == "dict model" else [a, b]
    model = keras.Model(given, L.BatchNormalization(name="bn")(L.Concatenate()([a, b])))
    left, right = np.random.default_rng(0).standard_normal((2, 40, 3))
    right = right[:, :2]
    pair = ((left, right), np.zeros(40)) if how == "tuple" else {"a": left, "b": right}
    result = bntools.recalibrate(model, [pair])
    assert (result.samples, result.residual < 1e-5) == (40, True)
    np.testing.assert_allclose(model.get_layer("bn").moving_mean[3:], right.mean(0), atol=1e-6)


def test_inputs_of_a_model_written_in_python():
    """A dict goes to the parameters of call, a tuple to a call that takes several tensors in one."""

    class Two(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = L.BatchNormalization()

        def call(self, left, right):
            return self.bn(left + right)

    class Pair(Two):
        def call(self, both):
            return self.bn(both[0] + both[1])

    x = np.random.default_rng(0).standard_normal((2, 30, 3)).astype(np.float32)
    two, pair = Two(), Pair()
    two(x[0], x[1])
    pair([x[0], x[1]])
    bntools.recalibrate(two, [{"left": x[0], "right": x[1]}])
    bntools.recalibrate(pair, [((x[0], x[1]), None)])
    np.testing.assert_allclose(nets.stats(two), nets.stats(pair))
    np.testing.assert_allclose(two.bn.moving_mean, x.sum(0).mean(0), rtol=1e-5, atol=1e-6)


def test_shape_that_does_not_fit():
    """Data of another shape than the model's is one line that names the batch."""
    model = nets.residual_net()
    with pytest.raises(
        BntoolsError,
        match=r"the model failed on batch 0: ValueError: the model .* takes .* at its input .*and the batch has shape",
    ):
        bntools.recalibrate(model, [nets.images(channels=4)])


def test_small_batches_come_together():
    """Batches are joined up to 64 samples and 16 MiB, and messages tell which they were; odd ones stay apart."""
    model = nets.residual_net()
    fed = feeding.feed(model, [*nets.cut(nets.images(), 20), nets.images(2).astype(np.float64)], joined=True)
    found = [(len(batch), fed.place) for batch in fed]
    assert found == [(64, "0 to 3"), (2, 4)]
    large = [np.zeros((4, 1024, 1024, 1), np.float32)] * 3
    assert [len(batch) for batch in feeding.feed(model, large, joined=True)] == [4, 4, 4]
    assert [len(batch) for batch in feeding.feed(nets.written(), nets.cut(nets.images(), 20), joined=True)] == [
        20,
        20,
        20,
        4,
    ]


def test_data_that_raises_is_counted_as_the_user_counts():
    """Of batches that come together, a failure of the data still tells how many were read."""

    def images():
        yield from nets.cut(nets.images(), 16)[:3]
        raise ValueError("no fourth file")

    with pytest.raises(BntoolsError, match="the data raised after 3 batches: ValueError: no fourth file"):
        bntools.recalibrate(nets.residual_net(), images())


def test_two_keras_models_read_the_data_once():
    """verify feeds both models from one reading: a generator is enough."""
    model = nets.residual_net()
    twin = keras.models.clone_model(model)
    twin.set_weights(model.get_weights())
    check = bntools.verify(model, twin, (batch for batch in nets.cut(nets.images(), 16)))
    assert (check.passed, check.samples) == (True, 64)
