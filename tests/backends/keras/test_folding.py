"""Folding in Keras models as people write them: stories, the structure of the result, and reasons."""

from __future__ import annotations

import subprocess
import sys

import keras
import numpy as np
import pytest
from keras import layers as L
from keras_folding import batch, doubled, folds, outputs, randomized

import bntools


@pytest.fixture(autouse=True)
def _float64():
    with doubled():
        yield


def test_dense_with_an_activation_folds_forward():
    """Dense(relu), BN, Dense(softmax): the BN behind an activation goes into the layer that follows."""
    model = keras.Sequential(
        [keras.Input((8,)), L.Dense(6, activation="relu"), L.BatchNormalization(name="bn"), L.Dense(3, "softmax")]
    )
    folded = folds(randomized(model), batch(4, 8))
    assert folded.folded == ["bn"]
    assert type(folded.model) is keras.Sequential
    assert [type(layer).__name__ for layer in folded.model.layers] == ["Dense", "Dense"]


def two_stages(positive: bool) -> keras.Model:
    """Two convolutions with an activation inside, each with BN and max pooling behind it, and a head."""
    parts = [keras.Input((14, 14, 2))]
    for i, filters in enumerate((3, 4)):
        norm = L.BatchNormalization(name=f"bn{i}")
        parts += [L.Conv2D(filters, 3, activation="relu", name=f"conv{i}"), norm, L.MaxPooling2D()]
    return randomized(keras.Sequential([*parts, L.Flatten(), L.Dense(3, name="out")]), positive=positive)


def test_conv_relu_bn_pool_folds_forward():
    """Conv2D(relu), BN, MaxPooling2D twice, then Flatten and Dense: both go forward where the scale is positive."""
    assert folds(two_stages(positive=True), batch(2, 14, 14, 2)).folded == ["bn0", "bn1"]


def test_a_negative_scale_before_a_max_is_kept():
    """With a negative scale in one channel before max pooling, that layer stays and its reason says so."""
    model = two_stages(positive=True)
    gamma = model.get_layer("bn1").gamma
    gamma.assign([1.0, -0.5, 1.0, 1.0])
    kept = folds(model, batch(2, 14, 14, 2)).kept
    assert list(kept) == ["bn1"]
    assert "relu inside Conv2D 'conv1' stands between it and Conv2D 'conv1'" in kept["bn1"]
    assert "MaxPooling2D" in kept["bn1"]
    assert "channel 1 has -0." in kept["bn1"]


def test_three_blocks_and_a_head_fold_back():
    """Conv(same), BN, ReLU, MaxPool three times, then Dense, BN, ReLU, Dropout, Dense: all four fold backward."""
    parts = [keras.Input((16, 16, 3))]
    for i in range(3):
        conv = L.Conv2D(2 + i, 3, padding="same", name=f"conv{i}")
        parts += [conv, L.BatchNormalization(name=f"bn{i}"), L.ReLU(), L.MaxPooling2D()]
    parts += [L.Flatten(), L.Dense(5), L.BatchNormalization(name="bn3"), L.ReLU(), L.Dropout(0.5), L.Dense(3)]
    assert folds(randomized(keras.Sequential(parts)), batch(2, 16, 16, 3)).folded == ["bn0", "bn1", "bn2", "bn3"]


def siamese() -> keras.Model:
    """Two named inputs through one nested model with a shared head, two outputs as a dict."""
    left, right = keras.Input((6,), name="left"), keras.Input((6,), name="right")
    inner_input = keras.Input((6,), name="inside")
    hidden = L.BatchNormalization(name="bn")(L.Dense(5, use_bias=False, name="dense")(inner_input))
    inner = keras.Model(inner_input, L.ReLU()(hidden), name="tower")
    deep = keras.Sequential([keras.Input((5,)), L.Dense(4, name="dense"), L.BatchNormalization(name="bn")], name="deep")
    a, b = deep(inner(left)), deep(inner(right))
    joined = L.Concatenate(name="joined")([a, b])
    outs = {"sum": L.Add(name="sum")([a, b]), "all": L.Dense(2, name="all")(joined)}
    return randomized(keras.Model({"left": left, "right": right}, outs, name="siamese"))


def test_nested_and_shared_models():
    """Inputs and outputs by name, nested models called twice: all folds, and names, structure and weights stay."""
    model = siamese()
    x = {"left": batch(3, 6), "right": batch(3, 6, seed=2)}
    folded = folds(model, x)
    assert folded.folded == ["tower.bn", "deep.bn"]
    new = folded.model
    assert list(new.output) == list(model.output) == ["sum", "all"]
    assert (new.name, list(new.input)) == ("siamese", ["left", "right"])
    assert {layer.name for layer in new.layers} == {layer.name for layer in model.layers}
    assert isinstance(new.get_layer("deep"), keras.Sequential)
    kernels = [keras.ops.convert_to_numpy(one.get_layer("all").kernel) for one in (new, model)]
    assert np.array_equal(*kernels)


def test_saves_and_loads_without_bntools(tmp_path):
    """What fold gives is written and read by Keras alone, in a process in which there is no bntools."""
    x = {"left": batch(3, 6), "right": batch(3, 6, seed=2)}
    new = bntools.fold(siamese(), x).model
    new.save(tmp_path / "new.keras")
    np.savez(tmp_path / "x.npz", **x)
    np.savez(
        tmp_path / "y.npz", **{key: keras.ops.convert_to_numpy(value) for key, value in new(x, training=False).items()}
    )
    code = (
        "import sys; sys.modules['bntools'] = None\n"
        "import keras, numpy as np\n"
        "y = keras.models.load_model('new.keras')(dict(np.load('x.npz')), training=False)\n"
        "pairs = [(keras.ops.convert_to_numpy(y[key]), value) for key, value in np.load('y.npz').items()]\n"
        "assert all(np.array_equal(*pair) for pair in pairs), pairs\n"
        "print('the same')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("the same\n"), done.stderr


def test_trainable_flags_and_seeds_survive():
    """Layers and variables that were frozen still are, the bias that a fold adds follows its kernel."""
    model = siamese()
    model.get_layer("tower").trainable = False
    model.get_layer("all").trainable = False
    new = bntools.fold(model, {"left": batch(3, 6), "right": batch(3, 6)}).model
    assert not new.get_layer("tower").get_layer("dense").bias.trainable
    assert not new.get_layer("all").trainable
    assert new.get_layer("deep").trainable
    assert [v.path for v in new.trainable_variables] == ["deep/dense/kernel", "deep/dense/bias"]


def test_the_layer_used_twice_with_two_norms_is_kept():
    """One convolution used twice, each time with another BN: neither folds, and both name the layer."""
    x = keras.Input((8, 3))
    conv = L.Conv1D(3, 3, padding="same", name="shared")
    y = L.ReLU()(L.BatchNormalization(name="one")(conv(x)))
    y = L.ReLU()(L.BatchNormalization(name="two")(conv(y)))
    kept = folds(randomized(keras.Model(x, y)), batch(2, 8, 3)).kept
    assert list(kept) == ["one", "two"]
    assert all("the weights of Conv1D 'shared' are also used by another call of it" in kept[name] for name in kept)


def test_what_others_read_is_kept():
    """A BN stays whose input is read elsewhere, is an output, or is the model's own input, and the reason says so."""
    x = keras.Input((8, 8, 3))
    seen = L.Conv2D(4, 3, name="seen")(x)
    a = L.BatchNormalization(name="fan")(seen)
    given = L.Conv2D(4, 3, name="given")(a)
    b = L.BatchNormalization(name="out")(given)
    first = L.ReLU()(L.BatchNormalization(name="first")(x))
    kept = folds(randomized(keras.Model(x, [L.ReLU()(b), given, L.ReLU()(seen), first])), batch(2, 8, 8, 3)).kept
    assert kept["first"].startswith("cannot go back: it reads an input of the model")
    assert "the output of Conv2D 'given' is an output of the model" in kept["out"]
    assert "fan" not in kept  # goes forward: valid padding


def test_padding_stops_a_shift_alone():
    """BN before a convolution that pads with zeros is kept; with padding="valid" it goes forward; a scale alone too."""

    def model(padding, shift):
        norm = L.BatchNormalization(center=False, name="bn")
        x = keras.Input((9, 9, 3))
        net = randomized(keras.Model(x, L.Conv2D(4, 3, padding=padding, name="conv")(norm(L.ReLU()(x)))))
        if not shift:
            norm.moving_mean.assign([0.0, 0.0, 0.0])
        return net

    x = batch(2, 9, 9, 3)
    assert "pads with zeros, which a shift would change" in folds(model("same", True), x).kept["bn"]
    assert folds(model("valid", True), x).folded == ["bn"]
    assert folds(model("same", False), x).folded == ["bn"]


@pytest.mark.parametrize(("size", "stays"), [(6, False), (7, True), (None, True)])
def test_same_padding_where_it_pads_nothing(size, stays):
    """padding="same" with strides pads only where the size asks for it; where the size is open, it may."""
    x = keras.Input((size, size, 3))
    y = L.Conv2D(4, 2, strides=2, padding="same")(L.BatchNormalization(name="bn")(L.ReLU()(x)))
    folded = folds(randomized(keras.Model(x, y)), batch(2, size or 6, size or 6, 3))
    assert ("bn" in folded.kept) is stays


def test_norms_fold_into_norms():
    """A BN behind a kept BN without scale and shift goes into it, which then has them."""
    x = keras.Input((5,))
    y = L.BatchNormalization(name="bare", scale=False, center=False)(x)
    y = L.BatchNormalization(name="behind")(y)
    folded = folds(randomized(keras.Model(x, y)), batch(4, 5))
    assert folded.folded == ["behind"]
    assert folded.model.get_layer("bare").get_config()["scale"] is True


def test_in_wrappers_and_code_it_is_kept():
    """BN inside TimeDistributed, in a layer of the user's own and of a class of its own stay, each with its reason."""

    class Block(L.Layer):
        def __init__(self, **options):
            super().__init__(**options)
            self.norm = L.BatchNormalization(name="norm")

        def call(self, x):
            return self.norm(x) * 2

    class Shifted(L.BatchNormalization):
        def call(self, x, training=None, mask=None):
            return super().call(x, training=training) + 1

    x = keras.Input((4, 5))
    y = L.TimeDistributed(L.BatchNormalization(name="norm"), name="steps")(L.Dense(5)(x))
    y = Shifted(name="shifted")(L.Dense(5)(Block(name="block")(L.Dense(5)(y))))
    kept = folds(randomized(keras.Model(x, y)), batch(2, 4, 5)).kept
    assert kept["steps.norm"] == "it is inside TimeDistributed 'steps', whose own code calls it"
    assert kept["block.norm"] == "it is inside Block 'block', whose own code calls it"
    assert kept["shifted"].startswith("its class Shifted has code of its own")


def test_a_subclassed_model_is_sent_to_onnx():
    """A model written in Python has no graph of layers: the error says that its fold is done on the ONNX graph."""

    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.dense, self.norm = L.Dense(3), L.BatchNormalization()

        def call(self, x):
            return self.norm(self.dense(x))

    net = Net()
    net(batch(2, 4))
    with pytest.raises(bntools.BntoolsError, match=r"\(Net\) is written in Python .* bntools.export\(model"):
        bntools.fold(net, batch(2, 4))


def test_a_functional_model_with_code_of_its_own_is_refused():
    """A functional model whose class overrides call computes something else than its graph."""

    class Twice(keras.Model):
        def call(self, x, training=None, mask=None):
            return 2 * super().call(x, training=training, mask=mask)

    x = keras.Input((4,))
    model = Twice(x, L.BatchNormalization()(L.Dense(3)(x)))
    with pytest.raises(bntools.BntoolsError, match=r"\(Twice\) is written in Python"):
        bntools.fold(model, batch(2, 4))


def test_the_class_of_a_functional_model_stays():
    """A class of the user's own with other training code is made again; its name is the model's."""

    class Trained(keras.Model):
        def train_step(self, data):
            return {}

    x = keras.Input((4,))
    folded = folds(randomized(Trained(x, L.BatchNormalization()(L.Dense(3)(x)), name="mine")), batch(2, 4))
    assert isinstance(folded.model, Trained)
    assert (folded.model.name, len(folded.kept)) == ("mine", 0)


def test_a_wrong_example_is_refused():
    """An example that the model does not take is one error that names the model."""
    model = two_stages(positive=True)
    with pytest.raises(bntools.BntoolsError, match=f"{model.name}.* does not run on the example"):
        bntools.fold(model, batch(2, 14, 14, 5))
    assert "_run_through_graph" not in vars(model._functional)


def test_a_layer_that_cannot_be_made_anew_is_named():
    """A layer without a full get_config stops the fold at once, with its name."""

    class Opaque(L.Layer):
        def __init__(self, function):
            super().__init__(name="opaque")
            self.function = function

        def call(self, x):
            return self.function(x)

    x = keras.Input((4,))
    model = keras.Model(x, L.BatchNormalization()(L.Dense(3)(Opaque(lambda v: v)(x))))
    with pytest.raises(bntools.BntoolsError, match="Opaque 'opaque' cannot be made anew from its configuration"):
        bntools.fold(model, batch(2, 4))


def test_locked_weights_are_named():
    """LoRA adapters and a kernel that two layers share keep a BN, and the reason says which."""
    x = keras.Input((4,))
    adapted, first, second = L.Dense(4, name="adapted"), L.Dense(4, name="first"), L.Dense(4, name="second")
    a = L.BatchNormalization(name="a")(adapted(x))
    b = L.BatchNormalization(name="b")(first(x))
    model = keras.Model(x, [a, b, second(x)])
    adapted.enable_lora(2)
    vars(second)["_kernel"] = first.kernel
    kept = folds(randomized(model), batch(2, 4)).kept
    assert "Dense 'adapted' cannot take it up: its kernel has LoRA adapters" in kept["a"]
    assert "Dense 'first' cannot take it up: its kernel is also a weight of 'second'" in kept["b"]


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="strings are TensorFlow's")
def test_other_layers_keep_their_state():
    """Layers with vocabularies, adapted statistics, seeds, Lambdas and functions of the user's survive as they are."""
    x, words = keras.Input((4,), name="x"), keras.Input((2,), dtype="string", name="words")
    normalize, lookup = L.Normalization(), L.StringLookup()
    normalize.adapt(batch(10, 4))
    lookup.adapt(["b", "a", "b"])
    embedded = L.Flatten()(L.Embedding(4, 3)(lookup(words)))
    y = L.Dense(3, activation=lambda v: v * keras.ops.tanh(v))(
        L.Lambda(lambda v: v + 1, output_shape=(4,))(normalize(x))
    )
    y = L.BatchNormalization(name="bn")(
        L.Dense(4, kernel_regularizer="l2")(L.Dropout(0.3)(L.Concatenate()([y, embedded])))
    )
    model = randomized(keras.Model([x, words], y))
    example = {"x": batch(2, 4), "words": np.array([["a", "b"], ["b", "?"]])}
    folded = bntools.fold(model, example)
    assert folded.folded == ["bn"]
    assert folded.check.error < 1e-12
    assert folded.model.get_layer(lookup.name).get_vocabulary() == ["[UNK]", "b", "a"]


def test_renorm_and_frozen_layers_fold_by_their_stored_statistics():
    """In inference, renorm and freezing change nothing: such layers fold like any other."""
    x = keras.Input((4,))
    y = L.BatchNormalization(renorm=True, name="renorm")(L.Dense(4)(x))
    y = L.BatchNormalization(name="frozen")(L.Dense(4)(L.ReLU()(y)))
    model = randomized(keras.Model(x, y))
    bntools.freeze(model, affine=False, layers="frozen")
    assert folds(model, batch(3, 4)).folded == ["renorm", "frozen"]


def test_layers_selects():
    """layers= names what is folded; the rest is kept, and says why."""
    folded = folds(two_stages(positive=True), batch(2, 14, 14, 2), layers="bn0")
    assert (folded.folded, folded.kept) == (["bn0"], {"bn1": "not selected by layers="})


def test_masks_pass():
    """A mask that reached the layers behind a BN still does."""
    x = keras.Input((5, 3))
    y = L.BatchNormalization(name="bn")(L.Dense(4)(L.Masking()(x)))
    model = randomized(keras.Model(x, L.GlobalAveragePooling1D()(y)))
    example = batch(2, 5, 3)
    example[:, 3:] = 0
    folded = bntools.fold(model, example)
    assert folded.folded == ["bn"]
    assert np.abs(outputs(folded.model, example)[0] - outputs(model, example)[0]).max() < 1e-6


def test_mixed_precision():
    """Layers that compute in float16 fold; their weights stay in float32, and the policy stays."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy("mixed_float16")
    x = keras.Input((6,), dtype="float32")
    y = L.BatchNormalization(name="bn")(L.Dense(5, name="dense")(x))
    model = randomized(keras.Model(x, L.Dense(2, dtype="float32")(L.ReLU()(y))))
    keras.config.set_dtype_policy(before)
    folded = bntools.fold(model, batch(4, 6, dtype="float32"))
    assert folded.folded == ["bn"]
    dense = folded.model.get_layer("dense")
    assert (dense.dtype_policy.name, keras.backend.standardize_dtype(dense.kernel.dtype)) == (
        "mixed_float16",
        "float32",
    )


def test_a_weight_that_does_not_fit_is_undone():
    """A fold whose weight would overflow float16 is undone, and the reason gives the number."""
    x = keras.Input((3,), dtype="float16")
    model = keras.Model(x, L.BatchNormalization(name="bn", dtype="float16")(L.Dense(2, dtype="float16", name="d")(x)))
    model.get_layer("d").kernel.assign(np.full((3, 2), 1000.0))
    model.get_layer("bn").gamma.assign([100.0, 100.0])
    kept = bntools.fold(model, batch(2, 3, dtype="float16") * 1e-3).kept
    assert kept["bn"].startswith("undone: Dense 'd': a kernel of")
    assert kept["bn"].endswith("does not fit float16")


def test_only_norms():
    """A Sequential of which nothing is left stays a model; BN alone in a nested model goes into what follows."""
    inner = keras.Sequential([keras.Input((4,)), L.BatchNormalization(name="bn")], name="inner")
    x = keras.Input((4,))
    model = randomized(keras.Model(x, L.Dense(2)(inner(L.ReLU()(x)))))
    assert folds(model, batch(2, 4)).folded == ["inner.bn"]


@pytest.mark.parametrize("how", ["layer", "operation"])
def test_nothing_moves_across_a_cast(how):
    """BN in float32 behind a layer in float16 stays: its scale could leave the range of float16."""
    inputs = L.Input((3,))
    y = L.Dense(2, dtype="mixed_float16")(inputs)
    y = keras.ops.cast(y, "float32") if how == "operation" else y
    model = keras.Model(inputs, L.BatchNormalization(dtype="float32", name="bn")(y))
    reason = bntools.fold(model, np.ones((2, 3), np.float32)).kept["bn"]
    assert "cast" in reason.lower()
