"""Several threads at once, in Keras: models apart do not notice each other."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import keras
import numpy as np
import pytest
from keras_nets import cut, images, residual_net, stats, written

import bntools
from bntools import BntoolsError


@pytest.mark.parametrize("make", [residual_net, written])
def test_models_apart_while_one_serves(make):
    """Copies recalibrated in two threads get bit by bit the same, and the model in a third answers as ever."""
    model, data = make(), cut(images(24), 8)
    expected = np.array(model(data[0], training=False))
    copies = []
    for _ in range(3):
        keras.utils.set_random_seed(1)
        copies.append(make())
        copies[-1].set_weights(model.get_weights())
    bntools.recalibrate(copies[0], data)
    done, answers = threading.Event(), []

    def serve() -> None:
        while not done.is_set():
            answers.append(np.array(model(data[0], training=False)))

    with ThreadPoolExecutor(3) as pool:
        serving = pool.submit(serve)
        try:
            list(pool.map(lambda one: bntools.recalibrate(one, data), copies[1:]))
        finally:
            done.set()
        serving.result()
    assert answers
    assert all(np.array_equal(one, expected) for one in answers)
    assert np.array_equal(stats(copies[1]), stats(copies[0]))
    assert np.array_equal(stats(copies[2]), stats(copies[0]))


def test_one_model_is_for_one_thread():
    """A second recalibration of a model that is under way is refused, and the first comes to its result."""
    model, expected, data = written(), written(), cut(images(16), 8)
    expected.set_weights(model.get_weights())
    bntools.recalibrate(expected, data)

    def refused() -> None:
        with pytest.raises(BntoolsError, match="in another thread"):
            bntools.recalibrate(model, data)

    def batches():
        with ThreadPoolExecutor(1) as pool:
            pool.submit(refused).result()
        yield from data

    bntools.recalibrate(model, batches(), check=False)
    assert np.array_equal(stats(model), stats(expected))
