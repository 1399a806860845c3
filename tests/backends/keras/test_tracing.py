import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers as kl

import bntools
from bntools import backends
from bntools.errors import BntoolsError

RNG = np.random.default_rng(0)
X = RNG.normal(size=(4, 3)).astype("float32")


def nested():
    """A model that calls an inner one twice, with two outputs."""
    inner = keras.Sequential([kl.Input((3,)), kl.Dense(3, name="d"), kl.BatchNormalization(name="bn")], name="inner")
    inputs = kl.Input((3,))
    hidden = inner(inner(inputs))
    return keras.Model(inputs, [kl.Dense(1, name="one")(hidden), kl.Dropout(0.9, name="two")(hidden)])


def runner(model):
    """The one way to run a Keras model."""
    (found,) = backends.of(model).runners(model)
    return found


def test_a_model_runs_in_inference_mode():
    """Outputs come by name, dropout and batch statistics are off, and nothing is counted."""
    model = nested()
    one = runner(model)
    first, second = one.run(X), one.run(X)
    assert (one.framework, one.provider, one.dtype, one.optimization) == ("keras", "cpu", "float32", None)
    assert list(first) == ["one", "two"]
    np.testing.assert_array_equal(first["two"], second["two"])
    np.testing.assert_array_equal(bntools.inspect(model)[0].mean, np.zeros(3))


def test_a_trace_names_layers_by_their_paths():
    """Inner layers and second calls have names; those called once are the modules that another model may share."""
    model = nested()
    trace = runner(model).trace(X)
    assert trace.points[:4] == ("inner.d", "inner.bn", "inner", "inner.d (call 2)")
    assert dict(trace.modules) == {"one": "one", "two": "two"}
    values = trace.read(["inner.bn (call 2)", "one"])
    assert {name: value.shape for name, value in values.items()} == {"inner.bn (call 2)": (4, 3), "one": (4, 1)}
    np.testing.assert_allclose(values["one"], runner(model).run(X)["one"], rtol=1e-6)
    assert "call" not in vars(model.get_layer("inner"))


def test_the_first_difference_is_named():
    """Two models that part at an inner layer are said to part there, on a tf.data.Dataset too."""
    model, other = nested(), nested()
    other.set_weights(model.get_weights())
    data = tf.data.Dataset.from_tensor_slices(X).batch(2)
    assert bntools.verify(model, other, data).error == 0
    other.get_layer("inner").get_layer("bn").moving_mean.assign([1, 0, 0])
    check = bntools.verify(model, other, data)
    assert not check.passed
    assert check.samples == 4
    assert check.divergence.name == "inner.bn"


def test_the_dtype_is_that_of_computation():
    """Under mixed_float16 the variables are float32 and rounding is that of float16."""
    half = keras.Sequential([kl.Input((3,)), kl.Dense(2, dtype="mixed_float16")])
    assert half.variables[0].dtype == "float32"
    assert runner(half).dtype == "float16"


def test_what_the_model_refuses_is_one_line():
    """A batch that does not fit is told with the model, the shape, and what Keras says."""
    with pytest.raises(
        BntoolsError, match=r"fails on the batch \(\(2, 5\)\): ValueError: .*and the batch has shape"
    ) as caught:
        runner(nested()).run(np.zeros((2, 5), "float32"))
    assert "\n" not in str(caught.value)
    with pytest.raises(BntoolsError, match=f"runs where Keras's {keras.backend.backend()} back end puts it"):
        backends.of(nested()).runners(nested(), ["cuda"])


class Loop(keras.Model):
    """A layer inside a compiled function."""

    def __init__(self):
        super().__init__()
        self.dense = kl.Dense(2, name="dense")

    @tf.function
    def inner(self, x):
        return self.dense(x)

    def call(self, x):
        return self.inner(x)


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="tf.function takes TensorFlow's tensors")
def test_compiled_functions_are_looked_into():
    """What tf.function compiles runs as Python while it is watched."""
    model = Loop()
    model(X)
    trace = runner(model).trace(X)
    assert trace.read(trace.points)["dense"].shape == (4, 2)


def counterparts():
    """The same network in PyTorch, channels first, and in Keras, channels last."""
    module = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4, eps=1e-3), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
    )
    module[1].running_mean.uniform_(-1, 1)
    module.eval()
    model = keras.Sequential(
        [kl.Input((8, 8, 3)), kl.Conv2D(4, 3), kl.BatchNormalization(), kl.GlobalAveragePooling2D()]
    )
    kernel, bias = (parameter.detach().numpy() for parameter in module[0].parameters())
    model.layers[0].set_weights([kernel.transpose(2, 3, 1, 0), bias])
    norm = module[1]
    values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    model.layers[1].set_weights([value.detach().numpy() for value in values])
    return module, model


IMAGES = RNG.normal(size=(4, 8, 8, 3)).astype("float32")


@pytest.mark.parametrize("turned", [False, True])
def test_a_module_and_a_keras_model_are_compared(turned):
    """Channels-last data go into the Keras model as they are, and by forward= into the module, on either side."""
    pair = counterparts()[::-1] if turned else counterparts()

    def permuted(module, batch):
        return module(torch.from_numpy(batch).permute(0, 3, 1, 2))

    check = bntools.verify(*pair, [IMAGES], forward=permuted)
    assert check.passed
    assert check.error < 1e-5
    with pytest.raises(BntoolsError, match=r"Sequential fails on the batch \(\(4, 8, 8, 3\)\).*expected .*channels"):
        bntools.verify(*pair, [IMAGES])
