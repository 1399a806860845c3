from importlib import import_module

import keras
import numpy as np
import onnx
import pytest
from keras import layers as kl
from keras import ops

import bntools
from bntools.backends.keras import shipping, visible
from bntools.errors import BntoolsError
from bntools.graphfold import HIDDEN

TENSORFLOW = keras.backend.backend() == "tensorflow"
RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 8, 8, 3)).astype("float32")


def scattered(model):
    """The model with other weights and statistics than it began with, scales of both signs."""
    for variable in model.variables:
        if "seed" not in variable.path:
            sign = RNG.choice([-1, 1], variable.shape) if "gamma" in variable.path else 1
            variable.assign(RNG.uniform(0.5, 1.5, variable.shape) * sign)
    return model


def functional():
    """One BN that folds back, one that folds forward, one that stays between two activations; two outputs."""
    inputs = kl.Input((8, 8, 3), name="image")
    hidden = kl.ReLU()(kl.BatchNormalization(name="back")(kl.Conv2D(4, 3, padding="same", name="conv")(inputs)))
    hidden = kl.Activation("tanh")(kl.BatchNormalization(name="stays")(hidden))
    hidden = kl.BatchNormalization(name="forth")(kl.GlobalAveragePooling2D()(hidden))
    outputs = {"logits": kl.Dense(3, name="head")(hidden), "aux": [kl.Dense(2, name="side")(kl.Dropout(0.5)(hidden))]}
    return scattered(keras.Model(inputs, outputs))


class Written(keras.Model):
    """A model in Python code: BN of two ranks, one of them called twice, and a dict with a list in it."""

    def __init__(self, **options):
        super().__init__(**options)
        self.conv, self.first = kl.Conv2D(4, 3, use_bias=False), kl.BatchNormalization(name="first")
        self.dense, self.second = kl.Dense(5), kl.BatchNormalization(name="second")
        self.twice, self.head = kl.BatchNormalization(name="twice"), kl.Dense(2)

    def call(self, x, training=None):
        x = ops.relu(self.first(self.conv(x), training=training))
        x = ops.relu(self.second(self.dense(ops.mean(x, (1, 2))), training=training))
        x = ops.tanh(self.twice(ops.tanh(self.twice(x, training=training)), training=training))
        return {"z": self.head(x), "a": [x, x * 2]}


def written(**options):
    """The model above, built."""
    model = Written(**options)
    model(IMAGES)
    return scattered(model)


def shapes(path):
    """The inputs and outputs of a file by name, with their axes."""
    graph = onnx.load(path).graph
    dims = {one.name: one.type.tensor_type.shape.dim for one in (*graph.input, *graph.output)}
    return {name: [axis.dim_param or axis.dim_value for axis in axes] for name, axes in dims.items()}


def count(path, op="BatchNormalization"):
    """How many nodes of an operator a file has."""
    return sum(node.op_type == op for node in onnx.load(path).graph.node)


def test_a_functional_model(tmp_path):
    """BN folds in Keras; the file has Keras's names, a dynamic batch axis, and the BN that stays as one operator."""
    model, path = functional(), tmp_path / "model.onnx"
    before = model.get_weights()
    check = bntools.export(model, path, IMAGES)
    assert check.passed
    assert check.error < 1e-5
    assert (check.exporter, check.dynamic) == ("keras", True)
    assert check.folded == ["back", "forth"]
    assert check.kept.keys() == {"stays"}
    assert shapes(path) == {"image": ["batch", 8, 8, 3], "head": ["batch", 3], "side": ["batch", 2]}
    assert count(path) == 1
    assert count(path, "Dropout") == 0
    for old, new in zip(before, model.get_weights(), strict=True):
        np.testing.assert_array_equal(old, new)


def test_a_model_in_python_is_folded_on_the_graph(tmp_path):
    """The result names the model's own layers, folded and kept, and says where it was done."""
    model, path = written(), tmp_path / "model.onnx"
    check = bntools.export(model, path, IMAGES)
    assert check.error < 1e-5
    assert check.folded == ["first", "second"]
    assert check.kept.keys() == {"twice"}
    assert check.kept["twice"].startswith("of its 2 calls one cannot be folded: ")
    assert any("folded on the ONNX graph" in note for note in check.notes)
    assert shapes(path) == {"input": ["batch", 8, 8, 3], "a_0": ["batch", 5], "a_1": ["batch", 5], "z": ["batch", 2]}
    assert count(path) == 2
    assert bntools.verify(model, path, [IMAGES[:1], IMAGES]).passed


def test_layers_of_equal_values_are_told_apart(tmp_path):
    """Exporters merge equal constants, as those of fresh layers are: each layer keeps its name all the same."""
    model = Written()
    model(IMAGES)
    check = bntools.export(model, tmp_path / "model.onnx", IMAGES)
    assert check.folded == ["first", "second"]
    assert check.kept.keys() == {"twice"}


class Mixed(keras.layers.BatchNormalization):
    """A subclass that does more than BN."""

    def call(self, inputs, training=None, mask=None):
        return super().call(inputs, training=training) * 2


class Odd(keras.Model):
    """BN over three and five axes, channels first, and a subclass."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = kl.Conv1D(4, 2), kl.BatchNormalization(name="norm1")
        # PyTorch's tracer cannot write the memory format that Keras asks for around a Conv3D.
        self.conv3 = kl.Conv3D(2, 2) if TENSORFLOW else kl.Dense(2)
        self.norm3 = kl.BatchNormalization(name="norm3")
        self.first, self.own = kl.BatchNormalization(axis=1, name="first"), Mixed(name="own")

    def call(self, x):
        one = self.norm1(self.conv1(x))
        three = self.norm3(self.conv3(ops.reshape(x, (-1, 2, 2, 2, 3))))
        return three, self.own(self.first(ops.transpose(one, (0, 2, 1))))


def test_other_ranks_and_subclasses(tmp_path):
    """BN over any number of axes verifies; what is not BN alone is exported as its author wrote it, and said."""
    model, x = Odd(), RNG.normal(size=(3, 8, 3)).astype("float32")
    model(x)
    check = bntools.export(scattered(model), tmp_path / "model.onnx", x)
    assert check.error < 1e-5
    assert check.folded == ["norm1", "norm3", "first"]
    assert "does not show it as one operator" in check.kept["own"]
    assert list(shapes(tmp_path / "model.onnx")) == ["input", "output_0", "output_1"]


def test_several_inputs(tmp_path):
    """Inputs by name, in a dict, or as a list that only has places, of models of every kind."""
    left, right = RNG.normal(size=(4, 3)).astype("float32"), RNG.normal(size=(4, 2)).astype("float32")
    a, b = kl.Input((3,), name="a"), kl.Input((2,), name="b")
    model = keras.Model({"a": a, "b": b}, kl.BatchNormalization()(kl.Concatenate()([b, a])))
    bntools.export(scattered(model), tmp_path / "dict.onnx", {"a": left, "b": right})
    assert list(shapes(tmp_path / "dict.onnx"))[:2] == ["a", "b"]

    class Listed(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = kl.BatchNormalization()

        def call(self, xs):
            return self.norm(ops.concatenate(xs, -1))

    class Named(Listed):
        def call(self, u, v=None):
            return self.norm(ops.concatenate([u, v], -1))

    model = Listed()
    model([left, right])
    bntools.export(scattered(model), tmp_path / "list.onnx", ([left, right],))
    assert list(shapes(tmp_path / "list.onnx"))[:2] == ["input_0", "input_1"]
    model = Named()
    model(left, v=right)
    bntools.export(scattered(model), tmp_path / "named.onnx", {"u": left, "v": right})
    assert list(shapes(tmp_path / "named.onnx"))[:2] == ["u", "v"]


def test_more_outputs_than_digits(tmp_path):
    """Outputs without names stay in their order, also the tenth and those behind it."""

    class Many(keras.Model):
        def __init__(self):
            super().__init__()
            self.norm = kl.BatchNormalization()

        def call(self, x):
            x = self.norm(x)
            return [x * float(i) for i in range(11)]

    model, x = Many(), RNG.normal(size=(2, 3)).astype("float32")
    model(x)
    check = bntools.export(scattered(model), tmp_path / "model.onnx", x)
    assert [output.name for output in check.outputs][:2] == ["output[0]", "output[1]"]
    assert list(shapes(tmp_path / "model.onnx"))[-2:] == ["output_09", "output_10"]


@pytest.mark.parametrize("policy", ["mixed_float16", "float16"])
def test_half_precision(tmp_path, policy):
    """A model that computes in float16 verifies at what its rounding allows."""
    model = keras.Sequential([kl.Input((8, 8, 3)), kl.Conv2D(4, 3, dtype=policy), kl.BatchNormalization(dtype=policy)])
    check = bntools.export(scattered(model), tmp_path / "model.onnx", IMAGES)
    assert check.passed
    assert len(check.folded) == 1
    assert check.error < check.tolerance == pytest.approx(2e-2)


def test_bfloat16_is_refused(tmp_path):
    """ONNX Runtime's CPU has no bfloat16: which layer asks for it is said, and what to do; nothing is written."""
    model = keras.Sequential([kl.Input((3,)), kl.Dense(2, dtype="mixed_bfloat16", name="half")])
    with pytest.raises(BntoolsError, match=r"layer 'half' computes in bfloat16.*policy 'float32'"):
        bntools.export(model, tmp_path / "model.onnx", np.ones((2, 3), "float32"))
    assert list(tmp_path.iterdir()) == []


def test_jax_is_refused_once(tmp_path, monkeypatch):
    """From where neither exporter can export, that is said once, before anything runs."""
    model = functional()
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(BntoolsError) as caught:
        bntools.export(model, tmp_path / "model.onnx", IMAGES)
    assert str(caught.value).startswith("Keras runs on jax, from where BN cannot be exported as it is: save the model")
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not TENSORFLOW, reason="Keras has text layers on TensorFlow alone")
def test_strings_are_refused(tmp_path):
    """A model that begins with text is to be exported behind its text layers."""
    text = kl.TextVectorization(vocabulary=["a", "b"], output_sequence_length=3)
    model = keras.Sequential([kl.Input((1,), dtype="string"), text, kl.Embedding(4, 2), kl.BatchNormalization()])
    with pytest.raises(BntoolsError, match=r"holds strings.*behind its text layers"):
        bntools.export(model, tmp_path / "model.onnx", np.array([["a b"], ["b"]], dtype=object))


def test_an_opset(tmp_path):
    """The opset asked for is the file's; one that the exporter does not know is said."""
    model = keras.Sequential([kl.Input((3,)), kl.Dense(2)])
    bntools.export(model, tmp_path / "model.onnx", np.ones((2, 3), "float32"), opset=13)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == 13
    with pytest.raises(
        BntoolsError, match="Opset 99 is not supported" if TENSORFLOW else "Unsupported onnx_opset_version: 99"
    ):
        bntools.export(model, tmp_path / "other.onnx", np.ones((2, 3), "float32"), opset=99)


def test_the_second_exporter_serves(tmp_path, monkeypatch):
    """Where the first fails, the next one writes the file; BN that nobody sees any more is said to be kept."""

    def broken(*_, **__):
        raise RuntimeError("no such operator")

    monkeypatch.setattr(visible if TENSORFLOW else import_module("bntools.backends.keras.scripted"), "_fused", broken)
    check = bntools.export(written(), tmp_path / "model.onnx", IMAGES)
    assert check.exporter == "keras-plain"
    assert any("keras exporter, dynamic batch size: the keras exporter fails" in note for note in check.notes)
    assert check.folded == []
    assert set(check.kept.values()) == {HIDDEN}
    assert any("exported without folding" in note for note in check.notes)


def test_exporting_leaves_no_trace(tmp_path, capfd):
    """Nothing is printed, the layers' calls and tf2onnx's rules are as before, and an error is one line."""
    from tf2onnx.optimizer.back_to_back_optimizer import _func_map

    rules, model = dict(_func_map), written()
    shipping.export(model, IMAGES, tmp_path / "raw.onnx", exporter="keras")
    assert _func_map == rules
    assert all("call" not in vars(layer) for layer in model.layers)
    assert capfd.readouterr() == ("", "")
    assert shapes(tmp_path / "raw.onnx")["input"] == [3, 8, 8, 3]
    assert count(tmp_path / "raw.onnx") == 4


def test_zeros_before_max_pooling(tmp_path):
    """ONNX Runtime fuses padding with zeros into max-pooling, which pads with minus infinity: the file keeps it off.

    https://github.com/microsoft/onnxruntime/pull/18136
    """
    model = keras.Sequential(
        [kl.Input((8, 8, 3)), kl.Conv2D(4, 1), kl.BatchNormalization(), kl.ZeroPadding2D(1), kl.MaxPooling2D(3, 2)]
    )
    model.layers[1].beta.assign([-50.0] * 4)
    assert ops.convert_to_numpy(model(IMAGES)).max() == 0
    check = bntools.export(model, tmp_path / "model.onnx", IMAGES)
    assert check.passed
    assert check.error < 1e-5
    assert count(tmp_path / "model.onnx", "Pad") == 1


def test_tensors_beside_the_variables(tmp_path):
    """The mean and variance of a Normalization layer are constants of the file, not inputs; the layer keeps them."""
    first = kl.Normalization(mean=[0.5, 1.0, 2.0], variance=[1.0, 2.0, 4.0])
    model = keras.Sequential([kl.Input((8, 8, 3)), first, kl.Conv2D(4, 3), kl.BatchNormalization()])
    before = type(first.mean)
    check = bntools.export(scattered(model), tmp_path / "model.onnx", IMAGES)
    assert check.exporter == "keras"
    assert check.error < 1e-5
    assert len(shapes(tmp_path / "model.onnx")) == 2
    assert type(first.mean) is before


class Deciding(keras.Model):
    """A model whose code branches on what it computes."""

    def __init__(self):
        super().__init__()
        self.norm = kl.BatchNormalization()

    def call(self, x):
        x = self.norm(x)
        return x if ops.sum(x) > -1e6 else -x


@pytest.mark.skipif(TENSORFLOW, reason="there a branch becomes part of the file")
def test_a_trace_that_would_freeze_a_decision_is_refused(tmp_path):
    """Of a model that reads a computed value into Python, no file is written, and the place is named."""
    model, x = Deciding(), RNG.normal(size=(4, 3)).astype("float32")
    model(x)
    with pytest.raises(BntoolsError, match=r"reads a computed value into Python at test_shipping\.py:\d+"):
        bntools.export(model, tmp_path / "model.onnx", x)
    assert list(tmp_path.iterdir()) == []
