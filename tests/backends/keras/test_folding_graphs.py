"""Random Keras graphs folded: their function stays, and no BN layer is left that was built to be foldable."""

from __future__ import annotations

import keras
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from keras import layers as L
from keras import ops
from keras_folding import batch, doubled, folds, randomized

SEARCH = settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
CHANNELS = 4


@pytest.fixture(autouse=True)
def _float64():
    with doubled():
        yield


# Linear layers that keep (N, 6, 5, 4) as it is but for its values.
LINEAR = {
    "conv": lambda b: L.Conv2D(CHANNELS, (3, 2), padding="same", use_bias=b),
    "grouped": lambda b: L.Conv2D(CHANNELS, 3, padding="same", groups=2, use_bias=b),
    "dilated": lambda b: L.Conv2D(CHANNELS, (1, 2), padding="same", dilation_rate=2, use_bias=b),
    "depthwise": lambda b: L.DepthwiseConv2D(3, padding="same", use_bias=b),
    "separable": lambda b: L.SeparableConv2D(CHANNELS, 3, padding="same", depth_multiplier=2, use_bias=b),
    "transposed": lambda b: L.Conv2DTranspose(CHANNELS, 3, padding="same", use_bias=b),
    "dense": lambda b: L.Dense(CHANNELS, use_bias=b),
    "einsum": lambda b: L.EinsumDense("nhwx,xd->nhwd", (None, None, CHANNELS), bias_axes="d" if b else None),
    "steps": lambda b: L.TimeDistributed(L.Conv1D(CHANNELS, 3, padding="same", use_bias=b)),
}
# What lets a scale and shift pass on its way back.
PASSING = {
    "identity": lambda x: L.Identity()(x),
    "linear": lambda x: L.Activation("linear")(x),
    "dropout": lambda x: L.SpatialDropout2D(0.5)(L.GaussianNoise(1.0)(x)),
    "max": lambda x: L.MaxPooling2D(2, strides=1, padding="same")(x),
    "average": lambda x: L.AveragePooling2D(3, strides=1, padding="same")(x),
    "resized": lambda x: L.AveragePooling2D(2)(L.UpSampling2D(2)(x)),
    "there and back": lambda x: L.Permute((3, 1, 2))(L.Permute((2, 3, 1))(x)),
    "reshaped": lambda x: L.Reshape((6, 5, CHANNELS))(L.Reshape((30, CHANNELS))(x)),
    "transposed": lambda x: ops.transpose(ops.transpose(x, (0, 3, 1, 2)), (0, 2, 3, 1)),
    "squeezed": lambda x: ops.squeeze(ops.expand_dims(x, 1), 1),
    "times": lambda x: x * -1.5,
    "by": lambda x: x / 4.0,
    "copied": lambda x: ops.cast(ops.stop_gradient(x), "float64"),
}
BLOCK = st.tuples(
    st.sampled_from(sorted(LINEAR)),
    st.booleans(),
    st.lists(st.sampled_from(sorted(PASSING)), max_size=2),
    st.integers(1, 2),
    st.sampled_from(["relu", "relu", "fan-out", "residual", "joined"]),
    st.sampled_from(["plain", "again", "nested"]),
    st.tuples(st.booleans(), st.booleans()),
)


@SEARCH
@given(st.lists(BLOCK, min_size=1, max_size=2), st.integers(0, 99))
def test_backward(blocks, seed):
    """BN behind a linear layer folds through whatever passes, in shared and nested models alike; else it is kept."""
    x = given_x = keras.Input((6, 5, CHANNELS))
    kept, outputs, positive = 0, [], []
    for kind, biased, between, chain, ending, call, affine in blocks:
        start = keras.Input((6, 5, CHANNELS))
        linear = LINEAR[kind](biased)
        y = linear(start)
        norms = [L.BatchNormalization(scale=affine[0], center=affine[1]) for _ in range(chain)]
        if ending == "fan-out":
            outputs.append(y)
            kept += chain
        if ending == "joined":
            y = L.Concatenate(axis=1)([y, L.Conv2D(CHANNELS, 1)(start)])
            y = L.Reshape((12, 5, CHANNELS))(y)
        else:
            for name in between:
                y = PASSING[name](y)
        for one in norms:
            y = one(y)
            positive += [one] if "max" in between else []
        if ending == "joined":
            y = y[:, :6]
        y = L.Add()([y, L.ReLU()(y)]) if ending == "residual" else L.ReLU()(y)
        if call == "nested" and ending != "fan-out":
            block = keras.Model(start, y)
            x = block(block(x))
        elif ending == "fan-out":
            block = keras.Model(start, [y, outputs.pop()])
            x, seen = block(x)
            outputs.append(seen)
        else:
            x = keras.Model(start, y)(x)
    model = randomized(keras.Model(given_x, [x, *outputs]), seed)
    for one in positive:
        if one.gamma is not None:
            one.gamma.assign(abs(one.gamma))
    folded = folds(model, batch(2, 6, 5, CHANNELS))
    assert len(folded.kept) <= kept, folded.kept
    assert all("is an output of the model" in reason for reason in folded.kept.values())


# What lets a scale and shift pass forward, from (N, 6, 6, 4) to any size.
ONWARD = {
    "max": lambda x: L.MaxPooling2D(2, padding="same")(x),
    "average": lambda x: L.AveragePooling2D(2, padding="same")(x),
    "cropped": lambda x: L.Cropping2D(((1, 0), (0, 1)))(x),
    "sliced": lambda x: x[:, 1:, ..., 1:3],
    "enlarged": lambda x: L.UpSampling2D((1, 2))(x),
    "dropped": lambda x: L.Dropout(0.5)(x),
    "padded": lambda x: ops.pad(x, ((0, 0), (1, 0), (0, 2), (0, 0)), mode="reflect"),
    "split": lambda x: ops.concatenate(ops.split(x, 2, axis=-1)[::-1], axis=-1),
}
TAKING = {
    "dense": lambda b: L.Dense(3, use_bias=b),
    "conv": lambda b: L.Conv2D(4, 2, use_bias=b),
    "grouped": lambda b: L.Conv2D(4, 2, groups=2, use_bias=b, strides=2),
    "depthwise": lambda b: L.DepthwiseConv2D(2, depth_multiplier=3, use_bias=b),
    "transposed": lambda b: L.Conv2DTranspose(3, 1, use_bias=b),
    "flattened": lambda b: keras.Sequential([L.Flatten(), L.Dense(3, use_bias=b)]),
    "pooled": lambda b: keras.Sequential([L.GlobalAveragePooling2D(), L.Dense(3, use_bias=b)]),
    "most": lambda b: keras.Sequential([L.GlobalMaxPooling2D(keepdims=True), L.Conv2D(2, 1, use_bias=b)]),
}


@SEARCH
@given(
    st.lists(st.sampled_from(sorted(ONWARD)), max_size=2),
    st.lists(st.tuples(st.sampled_from(sorted(TAKING)), st.booleans()), min_size=1, max_size=2),
    st.integers(1, 2),
    st.integers(0, 99),
)
def test_forward(between, takers, chain, seed):
    """BN behind an activation goes into all linear layers that follow, whatever lies between."""
    between = [name for i, name in enumerate(between) if name != "sliced" or i == len(between) - 1]
    takers = [("dense" if "sliced" in between and kind == "grouped" else kind, biased) for kind, biased in takers]
    x = keras.Input((6, 6, CHANNELS))
    y = L.Conv2D(CHANNELS, 1, activation="tanh")(x)
    for _ in range(chain):
        y = L.BatchNormalization()(y)
    for name in between:
        y = ONWARD[name](y)
    model = randomized(keras.Model(x, [L.ReLU()(TAKING[kind](biased)(y)) for kind, biased in takers]), seed, True)
    assert len(folds(model, batch(2, 6, 6, CHANNELS)).folded) == chain


@pytest.mark.parametrize("make", [lambda: L.Resizing(4, 5), lambda: L.UpSampling2D(2, interpolation="bicubic")])
def test_interpolation(make):
    """Resizing passes a scale and shift on; TensorFlow computes it in float32."""
    keras.config.set_dtype_policy("float32")
    x = keras.Input((6, 6, 3), dtype="float32")
    y = L.BatchNormalization()(make()(L.Conv2D(3, 1)(x)))
    y = L.Conv2D(2, 1)(make()(L.BatchNormalization()(L.ReLU()(y))))
    assert not folds(randomized(keras.Model(x, y)), batch(2, 6, 6, 3, dtype="float32")).kept


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("backward", [True, False])
def test_every_dimension(n, backward):
    """Convolutions, pooling, padding and cropping of one, two and three dimensions."""
    make = {name: getattr(L, name.replace("N", f"{n}")) for name in ("ConvND", "ConvNDTranspose", "MaxPoolingND")}
    make |= {name: getattr(L, name.replace("N", f"{n}")) for name in ("CroppingND", "ZeroPaddingND", "UpSamplingND")}
    x = keras.Input((*[7] * n, 3))
    y = make["ConvND"](4, 2, strides=2)(make["ZeroPaddingND"](1)(x))
    if backward:
        pool = make["MaxPoolingND"](2) if n < 3 else L.Dropout(0.5)  # TensorFlow has no MaxPool3D of float64
        y = L.BatchNormalization()(make["UpSamplingND"](2)(pool(y)))
        y = L.BatchNormalization()(make["ConvNDTranspose"](3, 2, strides=2, output_padding=1)(L.ReLU()(y)))
    else:
        y = L.BatchNormalization()(L.Activation("tanh")(y))
        y = make["ConvND"](3, 2)(make["CroppingND"](1)(make["UpSamplingND"](2)(y)))
        y = L.BatchNormalization()(L.ReLU()(y))
        y = make["ConvNDTranspose"](3, 1)(y)
    model = randomized(keras.Model(x, L.ReLU()(y)), positive=True)
    assert not folds(model, batch(2, *[7] * n, 3)).kept


@pytest.mark.parametrize("padding", ["valid", "causal"])
def test_causal_padding(padding):
    """A causal convolution sees zeros before the first step: a shift does not pass it, backward it folds."""
    x = keras.Input((7, 3))
    y = L.Conv1D(3, 2, padding=padding)(L.BatchNormalization(name="before")(L.ReLU()(x)))
    model = randomized(keras.Model(x, L.ReLU()(L.BatchNormalization(name="behind")(y))))
    assert list(folds(model, batch(2, 7, 3)).kept) == (["before"] if padding == "causal" else [])


def test_an_axis_that_is_not_the_last():
    """BN along axis 1 folds into what has its channels there; along one of equal length beside it, it is kept."""
    x = keras.Input((4, 4))
    turned = L.Permute((2, 1))(L.Dense(4, name="turned")(x))
    right = L.ReLU()(L.BatchNormalization(axis=1, name="right")(turned))
    wrong = L.ReLU()(L.BatchNormalization(axis=1, name="wrong")(L.Dense(4, name="d")(x)))
    back = L.Dense(3)(L.Permute((2, 1))(L.BatchNormalization(axis=-2, name="onward")(L.ReLU()(x))))
    kept = folds(randomized(keras.Model(x, [right, wrong, back])), batch(3, 4, 4)).kept
    assert list(kept) == ["wrong"]
    assert "Dense 'd' has its channels on axis 2, the layer on axis 1" in kept["wrong"]


def test_channels_first_in_what_moves_axes():
    """Flatten with channels first moves them last before it flattens, and global pooling leaves axis 1."""
    x = keras.Input((3, 4, 2))
    flat = L.Dense(3)(L.Flatten(data_format="channels_first")(L.BatchNormalization(axis=1)(L.ReLU()(x))))
    pooled = L.GlobalAveragePooling2D(data_format="channels_first")(L.BatchNormalization(axis=1)(L.ReLU()(x)))
    model = randomized(keras.Model(x, [flat, L.Dense(2)(pooled)]))
    assert not folds(model, batch(2, 3, 4, 2)).kept
