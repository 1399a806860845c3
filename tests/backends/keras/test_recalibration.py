"""Recalibration of Keras models: exact on every kind of model, and nothing else moves."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import keras
import keras_nets as nets
import numpy as np
import pytest
from keras import layers as L

import bntools
from bntools import BntoolsError
from bntools.backends.keras import feeding, segments


@pytest.fixture(autouse=True)
def _apart(monkeypatch):
    """Small batches stay apart, so that each is a replica of its own."""
    monkeypatch.setattr(feeding, "TOGETHER", 1)


MODELS = [nets.residual_net, nets.nested_net, nets.written]


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("size", [1, 7, 64])
def test_exact_whatever_the_micro_batches(make, size):
    """Micro-batches of 1, 7 and 64 samples give the statistics that one batch of all data gives."""
    model = make()
    result = bntools.recalibrate(model, [nets.images()], check=False)
    whole = nets.stats(model)
    result = bntools.recalibrate(model, nets.cut(nets.images(), size))
    assert result.samples == 64
    assert result.residual < 1e-5
    np.testing.assert_allclose(nets.stats(model), whole, rtol=1e-5, atol=1e-5)


def test_against_numpy():
    """Mean and variance of a layer's input, computed by Keras and NumPy in float64, are what is stored."""
    model = nets.residual_net()
    bntools.recalibrate(model, nets.cut(nets.images(), 10))
    behind = keras.Model(model.inputs[0], model.get_layer("bn2").input)
    seen = np.float64(keras.ops.convert_to_numpy(behind(nets.images(), training=False))).reshape(-1, 6)
    bn2 = model.get_layer("bn2")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn2.moving_mean), seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn2.moving_variance), seen.var(0), rtol=1e-5)


def test_compiled_segments_agree_with_eager_ones(monkeypatch):
    """What runs compiled after some batches of one shape gives what eager code gives, to rounding."""
    model, data = nets.residual_net(), nets.cut(nets.images(), 4)
    monkeypatch.setattr(segments, "TRACE_AFTER", 10**9)
    bntools.recalibrate(model, data, check=False)
    eager = nets.stats(model)
    monkeypatch.setattr(segments, "TRACE_AFTER", 0)
    result = bntools.recalibrate(model, data)
    np.testing.assert_allclose(nets.stats(model), eager, rtol=1e-5, atol=1e-6)
    assert result.residual < 1e-5


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("method", ["precise", "ema"])
def test_other_methods(make, method):
    """PreciseBN and Keras's own moving average run as well, and leave larger residuals than the exact method."""
    model = make()
    exact = bntools.recalibrate(model, nets.cut(nets.images(), 8)).residual
    result = bntools.recalibrate(model, nets.cut(nets.images(), 8), method=method)
    assert result.residual > exact


def test_ema_is_what_fit_does():
    """The moving average of method="ema" is, to rounding, that of layers called with training=True."""
    model, twin = nets.residual_net(), nets.residual_net()
    twin.set_weights(model.get_weights())
    data = nets.cut(nets.images(), 16)
    bntools.recalibrate(model, data, method="ema", check=False)
    for batch in data:
        twin(batch, training=True)
    np.testing.assert_allclose(nets.stats(model), nets.stats(twin), rtol=1e-6)


@pytest.mark.parametrize("method", ["exact", "precise", "ema"])
def test_nothing_else_moves(method):
    """Weights, trainable flags, optimizer state, seeds, attributes and the call of each layer are as before."""
    model = nets.written()
    model.compile(optimizer="adam", loss="mse")
    model.fit(nets.images(8), np.zeros((8, 3)), verbose=0)
    model.bn1.trainable = False
    kept = model.kept
    others = {id(w) for n in (model.bn1, model.bn2) for w in (n.moving_mean, n.moving_variance)}
    before = [(w, np.array(w)) for w in [*model.variables, *model.optimizer.variables] if id(w) not in others]
    bntools.recalibrate(model, nets.cut(nets.images(), 16), method=method, layers="*")
    assert all(np.array_equal(np.array(w), value) for w, value in before)
    assert model.kept is kept
    assert [model.bn1.trainable, model.bn2.trainable, model.dropout.trainable] == [False, True, True]
    assert not any("call" in vars(layer) for layer in (model.bn1, model.bn2))
    assert model.bn2.trainable_variables


def test_frozen_layers_only_when_named():
    """A layer with trainable=False keeps its statistics unless layers= names it."""
    model = nets.residual_net()
    model.get_layer("bn2").trainable = False
    result = bntools.recalibrate(model, nets.cut(nets.images(), 16))
    assert [change.name for change in result.layers] == ["bn1", "bn3"]
    assert result.untouched["bn2"].startswith("frozen")
    result = bntools.recalibrate(model, nets.cut(nets.images(), 16), layers="bn2")
    assert [change.name for change in result.layers] == ["bn2"]
    assert result.residual < 1e-5


def test_failure_changes_nothing():
    """Data that raises or brings NaN in its last batch leaves every statistic bit by bit, and layers uncalled."""
    model = nets.residual_net()
    before = nets.stats(model)
    bad = nets.cut(nets.images(), 16)
    bad[-1] = bad[-1] * np.nan
    with pytest.raises(BntoolsError, match=r"batch 3 brings NaN or Inf to the input of layer 'bn1'"):
        bntools.recalibrate(model, bad)
    with pytest.raises(BntoolsError, match="the model failed on batch 1"):
        bntools.recalibrate(model, [nets.images(4), nets.images(4, channels=2)])
    assert np.array_equal(nets.stats(model), before)
    assert "call" not in vars(model.get_layer("bn1"))
    assert "_run_through_graph" not in vars(model)


def test_undo():
    """Undo brings every bit back, those of batch renormalization included."""
    inputs = L.Input((4,))
    model = keras.Model(inputs, L.BatchNormalization(renorm=True)(L.Dense(3)(inputs)))
    data = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)
    for _ in range(3):
        model(data, training=True)
    before = [np.array(w) for w in model.variables]
    result = bntools.recalibrate(model, [data[:20], data[20:]])
    assert result.residual < 1e-5
    result.undo()
    assert bntools.inspect(model)[0].updates is None, "as before: the model is not compiled, and nobody counts"
    assert all(np.array_equal(np.array(w), value) for w, value in zip(model.variables, before, strict=True))


def test_renorm_variables_agree():
    """All five statistics of a layer with renorm=True tell the same mean and standard deviation."""
    inputs = L.Input((4,))
    model = keras.Model(inputs, L.BatchNormalization(renorm=True, name="bn")(inputs))
    data = (np.random.default_rng(0).standard_normal((500, 4)) * [1, 2, 3, 4] + 5).astype(np.float32)
    bntools.recalibrate(model, [data])
    bn = model.get_layer("bn")
    std = np.sqrt(data.var(0) + bn.epsilon)
    for name, expected in (("moving_stddev", std), ("renorm_stddev", std), ("renorm_mean", data.mean(0))):
        np.testing.assert_allclose(keras.ops.convert_to_numpy(getattr(bn, name)), expected, rtol=1e-5)
    out = keras.ops.convert_to_numpy(model(data, training=True))
    np.testing.assert_allclose(out.std(0), 1, rtol=1e-3)  # r and d make no difference now


@pytest.mark.parametrize("after", [0, 10**9])
def test_masked_positions_do_not_count(after, monkeypatch):
    """Moments are those of the positions that a Masking layer leaves, also where what has no mask runs compiled."""
    monkeypatch.setattr(segments, "TRACE_AFTER", after)
    rng = np.random.default_rng(0)
    data, lengths = rng.standard_normal((30, 6, 3)).astype(np.float32) + 1, rng.integers(1, 7, 30)
    for sample, length in zip(data, lengths, strict=True):
        sample[length:] = 0
    model = keras.Sequential([L.Input((6, 3)), L.Masking(), L.BatchNormalization(name="bn"), L.LSTM(2)])
    result = bntools.recalibrate(model, nets.cut(data, 7), tolerance=10)
    valid = np.concatenate([sample[:length] for sample, length in zip(data, lengths, strict=True)])
    bn = model.get_layer("bn")
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn.moving_mean), valid.mean(0), rtol=1e-5)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn.moving_variance), valid.var(0), rtol=1e-5)
    assert result.residual < 1e-5


def test_time_distributed():
    """BN inside TimeDistributed is measured over all steps at once: what comes behind it sees the final statistics."""
    model = keras.Sequential(
        [
            L.Input((5, 8, 8, 2)),
            L.TimeDistributed(keras.Sequential([L.Conv2D(3, 3), L.BatchNormalization(name="inner")])),
            L.GlobalAveragePooling3D(),
            L.BatchNormalization(name="outer"),
        ]
    )
    data = np.random.default_rng(0).standard_normal((12, 5, 8, 8, 2)).astype(np.float32)
    result = bntools.recalibrate(model, nets.cut(data, 5))
    assert result.residual < 1e-5
    assert not result.notes
    plain = keras.ops.convert_to_numpy(model(data, training=False))  # Keras's own loop over steps
    np.testing.assert_allclose(plain.mean(0), 0, atol=1e-3)


def test_shared_layer_pools_its_calls():
    """A BN layer that is called twice pools both inputs, and the result says so."""
    bn, a, b = L.BatchNormalization(name="shared"), L.Input((3,)), L.Input((3,))
    model = keras.Model([a, b], L.Add()([bn(a), bn(b)]))
    data = np.random.default_rng(0).standard_normal((2, 50, 3)).astype(np.float32) + 1
    result = bntools.recalibrate(model, [((data[0], data[1]), None)])
    expected = data.reshape(-1, 3).mean(0)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn.moving_mean), expected, rtol=1e-5)
    assert "called more than once" in result.notes[0]


def test_bn_in_the_cell_of_a_recurrent_layer():
    """Each direction of a Bidirectional has its BN layer, which pools all steps, each of them once."""

    @keras.saving.register_keras_serializable()
    class Cell(L.Layer):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.state_size, self.bn = 3, L.BatchNormalization(name="bn")

        def build(self, shape):
            self.bn.build(shape)

        def call(self, x, states, training=None):
            return self.bn(x, training=training), states

    model = keras.Sequential([L.Input((5, 3)), L.Bidirectional(L.RNN(Cell(name="cell")), name="both")])
    data = (np.random.default_rng(0).standard_normal((20, 5, 3)) * 2 + 1).astype(np.float32)
    result = bntools.recalibrate(model, nets.cut(data, 6))
    assert [layer.name.partition(".")[0] for layer in result.layers] == ["both", "both"]
    for layer in bntools.inspect(model):
        np.testing.assert_allclose(layer.mean, data.mean((0, 1)), rtol=1e-5)
        np.testing.assert_allclose(layer.var, data.var((0, 1)), rtol=1e-5)
    assert "called more than once" in result.notes[0]
    assert not model.layers[0].forward_layer.unroll


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_any_axis(axis):
    """The channels may lie on any axis."""
    model = keras.Sequential([L.Input((4, 5, 6)), L.BatchNormalization(axis=axis, name="bn")])
    data = (np.random.default_rng(0).standard_normal((20, 4, 5, 6)) * 2 + 1).astype(np.float32)
    assert bntools.recalibrate(model, nets.cut(data, 6)).residual < 1e-5
    others = tuple(i for i in range(4) if i != axis % 4)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.layers[0].moving_mean), data.mean(others), rtol=1e-4)


def test_mixed_precision():
    """Under mixed_float16 the float32 statistics are those of what the layer sees in float16."""
    inputs = L.Input((12, 12, 3))
    y = L.Conv2D(4, 3, dtype="mixed_float16")(inputs)
    y = L.BatchNormalization(dtype="mixed_float16", name="bn1")(y)
    y = L.Conv2D(4, 3, dtype="mixed_float16")(L.ReLU(dtype="mixed_float16")(y))
    model = keras.Model(inputs, L.BatchNormalization(dtype="mixed_float16", name="bn2")(y))
    result = bntools.recalibrate(model, nets.cut(nets.images(), 16))
    assert result.residual < 2e-3
    assert {layer.after.dtype for layer in result.layers} == {"float32"}


def test_variance_that_does_not_fit():
    """A variance above 65504 in a float16 layer is refused, and nothing is changed."""
    model = keras.Sequential([L.Input((3,)), L.BatchNormalization(dtype="float16", name="bn")])
    before = nets.stats(model)
    with pytest.raises(BntoolsError, match=r"layer 'bn': a variance of .* does not fit the float16"):
        bntools.recalibrate(model, [np.random.default_rng(0).standard_normal((99, 3)) * 1000])
    assert np.array_equal(nets.stats(model), before)


def test_never_built():
    """A model without variables is refused, with what to do."""
    model = keras.Sequential([L.Dense(3), L.BatchNormalization()])
    with pytest.raises(BntoolsError, match=r"never built.*call it on one batch first"):
        bntools.recalibrate(model, [np.zeros((4, 2))])


def test_forward_of_the_users_own():
    """forward= gets each batch whole, as the data gave it."""
    model = nets.residual_net()
    data = [(x, {"extra": 1}) for x in nets.cut(nets.images(), 16)]
    bntools.recalibrate(model, data, forward=lambda m, batch: m(batch[0] * batch[1]["extra"], training=False))
    own = nets.stats(model)
    bntools.recalibrate(model, nets.cut(nets.images(), 16))
    np.testing.assert_allclose(own, nets.stats(model), rtol=1e-5, atol=1e-6)


def test_prior_tolerance_and_virtual_batches():
    """prior= blends, tolerance= stops early, and a small memory= gives several virtual batches: as for PyTorch."""
    model = nets.residual_net()
    data = nets.cut(nets.images(512), 16)
    result = bntools.recalibrate(model, data, tolerance=0.3)
    assert result.samples < 512
    assert result.standard_error <= 0.3
    assert bntools.recalibrate(model, data, memory=400_000, check=False).virtual_batches > 1
    before = model.get_layer("bn1").moving_mean.numpy()
    bntools.recalibrate(model, nets.cut(nets.images(512, seed=1) + 9, 16), prior=512, check=False)
    measured = model.get_layer("bn1").moving_mean.numpy()
    bntools.recalibrate(model, nets.cut(nets.images(512, seed=1) + 9, 16), check=False)
    np.testing.assert_allclose(measured, (before + model.get_layer("bn1").moving_mean.numpy()) / 2, rtol=1e-4)


@pytest.mark.parametrize("after", [0, 10**9])
def test_losses_of_layers_do_not_pile_up(after, monkeypatch):
    """What activity regularizers add while replicas run, compiled or not, never reaches the loss of fit."""
    monkeypatch.setattr(segments, "TRACE_AFTER", after)
    inputs = L.Input((4,))
    model = keras.Model(inputs, L.BatchNormalization()(L.Dense(3, activity_regularizer="l2")(inputs)))
    bntools.recalibrate(model, nets.cut(np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32), 8))
    assert not model.losses
    model.compile(optimizer="sgd", loss="mse")
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)


@pytest.mark.parametrize("batches", [2, 40])
def test_a_mask_given_as_an_argument(batches):
    """A mask that the graph hands to BN counts, however many batches there are."""
    x, mask = L.Input((5, 3)), L.Input((5,), dtype="bool")
    bn = L.BatchNormalization()
    model = keras.Model([x, mask], L.GlobalAveragePooling1D()(bn(x, mask=mask)))
    rng = np.random.default_rng(0)
    data, valid = rng.standard_normal((80, 5, 3)).astype(np.float32), rng.random((80, 5)) < 0.5
    data[~valid] += 100
    step = 80 // batches
    bntools.recalibrate(model, [((data[i : i + step], valid[i : i + step]),) for i in range(0, 80, step)])
    np.testing.assert_allclose(keras.ops.convert_to_numpy(bn.moving_mean), data[valid].mean(0), atol=1e-5)


@pytest.mark.parametrize("batches", [2, 20])
def test_a_backbone_called_in_both_modes(batches):
    """What was compiled for training=False is not used where a model calls the same backbone with training=True."""

    class Both(keras.Model):
        def __init__(self):
            super().__init__()
            inputs = L.Input((4,))
            self.backbone = keras.Model(inputs, L.Dropout(0.5, seed=0)(L.Activation("linear")(inputs)))
            self.bn1, self.bn2 = L.BatchNormalization(), L.BatchNormalization()

        def call(self, x):
            return self.bn1(self.backbone(x, training=False)), self.bn2(self.backbone(x, training=True))

    model = Both()
    data = np.full((400, 4), 10, np.float32)
    model(data[:2])
    bntools.recalibrate(model, nets.cut(data, 400 // batches), check=False)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.bn1.moving_variance), 0, atol=1e-6)
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.bn2.moving_variance), 100, rtol=0.02)


def test_activations_of_the_users_own_are_never_compiled():
    """A Python function as an activation may decide by values: it runs eagerly, for every batch."""

    def gate(x):
        return x * 2 if float(keras.ops.max(x)) > 5 else x

    inputs = L.Input((3,))
    model = keras.Model(inputs, L.BatchNormalization(name="bn")(L.Activation(gate)(L.Identity()(inputs))), name="gated")
    data = np.ones((40, 3), np.float32)
    data[20:] = 9
    bntools.recalibrate(model, nets.cut(data, 2))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(model.get_layer("bn").moving_mean), 9.5, rtol=1e-5)


def test_states_of_stateful_layers():
    """What a stateful recurrent layer remembers is as before."""
    model = keras.Sequential([L.Input((5, 3), batch_size=4), L.LSTM(2, stateful=True), L.BatchNormalization()])
    bntools.recalibrate(model, nets.cut(np.random.default_rng(0).standard_normal((12, 5, 3)).astype(np.float32), 4))
    assert not any(np.any(keras.ops.convert_to_numpy(state)) for state in model.layers[0].states)


def test_two_threads():
    """Two models recalibrated at once in two threads get the statistics that each gets alone."""
    models, data = [nets.residual_net(), nets.residual_net()], nets.cut(nets.images(), 4)
    expected = []
    for model in models:
        bntools.recalibrate(model, data, check=False)
        expected.append(nets.stats(model))
        bntools.reset(model)
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(lambda model: bntools.recalibrate(model, data), models))
    for model, result, stats in zip(models, results, expected, strict=True):
        np.testing.assert_allclose(nets.stats(model), stats, rtol=1e-5, atol=1e-6)
        assert result.residual < 1e-5
    if keras.backend.backend() == "tensorflow":
        tf = pytest.importorskip("tensorflow")
        assert not tf.config.functions_run_eagerly()
