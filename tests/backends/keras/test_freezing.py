import keras
import numpy as np
import pytest
from keras import layers as kl

import bntools
from bntools.backends.keras.frozen import FrozenBatchNormalization
from bntools.errors import BntoolsError, NotFrozenError

X = np.random.default_rng(0).normal(2, 3, (16, 4)).astype("float32")
STATS, AFFINE = {"moving_mean", "moving_variance"}, {"gamma", "beta"}


def array(variable):
    """A copy of a variable's values."""
    return np.array(keras.ops.convert_to_numpy(variable))


def network(optimizer="adam", eager=False, third=False):
    """BN layers ``a`` and ``b``, or a third one, in a compiled model; ``eager`` trains without a traced step."""
    keras.utils.set_random_seed(0)
    inputs = kl.Input((4,))
    hidden = kl.BatchNormalization(name="a")(kl.Dense(3)(inputs))
    hidden = kl.BatchNormalization(name="b")(hidden)
    hidden = kl.BatchNormalization(name="c")(kl.Dense(3)(hidden)) if third else hidden
    model = keras.Model(inputs, kl.Dense(1)(hidden))
    if optimizer is not None:
        model.compile(optimizer, "mse", run_eagerly=eager)
    return model


def train(model, epochs=1):
    """Train a while; returns the variables that moved, bit by bit, by the name of their layer."""
    held = {variable.path: (variable, array(variable)) for variable in model.variables}
    model.fit(X, X[:, :1], batch_size=16, epochs=epochs, verbose=0)
    moved: dict[str, set[str]] = {}
    for path, (variable, before) in held.items():
        if not np.array_equal(before, array(variable)):
            moved.setdefault(path.split("/")[-2], set()).add(path.split("/")[-1])
    return moved


def test_a_compiled_model_follows_freeze_and_undo():
    """What is frozen does not move by a bit in fit, all else does, in a model compiled and trained before."""
    model = network(third=True)
    assert train(model).keys() >= {"a", "b", "c"}
    handles = [
        bntools.freeze(model, layers="a"),
        bntools.freeze(model, layers="b", affine=False),
        bntools.freeze(model, layers="c", stats=False),
    ]
    moved = train(model)
    assert "a" not in moved
    assert (moved["b"], moved["c"]) == (AFFINE, STATS)
    assert {"kernel", "bias"} in moved.values()
    for handle in handles:
        handle.undo()
    moved = train(model)
    assert [moved[name] for name in "abc"] == [STATS | AFFINE] * 3


@pytest.mark.parametrize("parts", [{}, {"affine": False}, {"stats": False}], ids=["both", "stats", "affine"])
def test_the_records_say_what_is_frozen(parts):
    """inspect and assert_frozen tell both parts apart, and undo and unfreeze give all back."""
    model = network()
    stats, affine = parts.get("stats", True), parts.get("affine", True)
    with bntools.freeze(model, **parts):
        assert {(one.stats_frozen, one.affine_frozen) for one in bntools.inspect(model)} == {(stats, affine)}
        bntools.assert_frozen(model, stats=stats, affine=affine)
        if parts:
            with pytest.raises(NotFrozenError, match=r"a \((statistics|scale and shift)\)"):
                bntools.assert_frozen(model)
    bntools.freeze(model, **parts)
    bntools.unfreeze(model)
    for one in bntools.inspect(model):
        assert (one.stats_frozen, one.affine_frozen, one.kind) == (False, False, "BatchNormalization")


def test_statistics_alone_normalize_with_what_is_stored():
    """With frozen statistics, training mode gives what inference gives."""
    model = network(None)
    expected = array(model(X, training=False))
    bntools.freeze(model, affine=False)
    np.testing.assert_array_equal(array(model(X, training=True)), expected)
    bntools.unfreeze(model)
    assert np.abs(array(model(X, training=True)) - expected).max() > 0.1


def test_the_message_fits_every_framework():
    """assert_frozen names the layers, what moves, and what to call; it asks for no eval mode in Keras."""
    with pytest.raises(NotFrozenError, match=r"2 of 2 .*a \(statistics and scale and shift\)") as caught:
        bntools.assert_frozen(network(None))
    assert "bntools.freeze(model)" in str(caught.value)
    assert "train()" not in str(caught.value)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.SGD(0.01, momentum=0.9, use_ema=True),
        lambda: keras.optimizers.Nadam(0.01),
        lambda: keras.optimizers.Adafactor(0.01),
        lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.01)),
    ],
    ids=["sgd", "nadam", "adafactor", "loss scale"],
)
def test_an_optimizer_built_while_frozen_learns_of_the_rest(make):
    """What an optimizer gathered survives an undo, and what it never saw trains from then on."""
    model = network(make(), eager=True)
    handle = bntools.freeze(model, layers="a")
    assert "a" not in train(model, epochs=2)
    inner = getattr(model.optimizer, "inner_optimizer", model.optimizer)
    kernel = model.layers[1].kernel
    before, steps = held_for(inner, kernel), int(inner.iterations)
    assert any(np.any(value) for value in before)
    handle.undo()
    assert model.optimizer.built
    assert int(inner.iterations) == steps > 0
    for value, kept in zip(before, held_for(inner, kernel), strict=True):
        np.testing.assert_array_equal(value, kept)
    assert train(model)["a"] == STATS | AFFINE


def held_for(optimizer, variable):
    """What an optimizer holds for a variable: those of its own that are named after it or stand at its place."""
    place = [id(one) for one in optimizer._trainable_variables].index(id(variable))
    names = ("momentums", "_momentums", "_velocities", "_model_variables_moving_average", "_r", "_c")
    lists = [getattr(optimizer, name) for name in names if getattr(optimizer, name, None)]
    return [array(one[place]) for one in lists]


def test_an_average_of_weights_begins_at_the_weights():
    """A variable that an averaging optimizer gets to know late does not come in as an average of zero."""
    model = network(keras.optimizers.SGD(0.0, use_ema=True, ema_momentum=0.99), eager=True)
    with bntools.freeze(model, layers="a"):
        train(model)
    train(model)
    model.optimizer.finalize_variable_values(model.trainable_variables)
    np.testing.assert_allclose(array(model.get_layer("a").gamma), 1, atol=1e-6)


def test_freezes_are_counted():
    """Two holders of the same part: it moves when both have let go, in any order, however often each does."""
    model = network(None)
    first, second = bntools.freeze(model, layers="a"), bntools.freeze(model, layers="a", affine=False)
    layer = model.get_layer("a")
    first.undo()
    first.undo()
    assert states(model) == {"a": (True, False), "b": (False, False)}
    assert [v.trainable for v in (layer.gamma, layer.beta)] == [True, True]
    third = bntools.freeze(model, layers="a", stats=False)
    assert states(model)["a"] == (True, True)
    assert type(layer) is keras.layers.BatchNormalization
    second.undo()
    assert states(model)["a"] == (False, True)
    third.undo()
    assert states(model)["a"] == (False, False)
    assert type(layer) is keras.layers.BatchNormalization


def test_undo_gives_back_what_the_user_had_frozen():
    """A layer that was not trainable before is not trainable after; undo after unfreeze changes nothing."""
    model = network(None)
    model.get_layer("a").trainable = False
    model.get_layer("b").gamma.trainable = False
    handle = bntools.freeze(model)
    handle.undo()
    assert states(model) == {"a": (True, True), "b": (False, False)}
    assert not model.get_layer("b").gamma.trainable
    model.get_layer("b").trainable = False
    model.get_layer("b").beta.trainable = True
    handle = bntools.freeze(model, layers="b")
    assert states(model)["b"] == (True, True)
    handle.undo()
    assert model.get_layer("b").beta.trainable
    handle = bntools.freeze(model, stats=False)
    bntools.unfreeze(model)
    handle.undo()
    assert states(model) == {"a": (False, False), "b": (False, False)}


def states(model):
    """(statistics frozen, affine frozen) by layer name."""
    return {one.name: (one.stats_frozen, one.affine_frozen) for one in bntools.inspect(model)}


def test_trainable_on_the_model_wakes_both_parts_but_not_one():
    """``model.trainable = True`` means what it means in Keras; a part frozen alone stays."""
    model = network(None)
    bntools.freeze(model, layers="a")
    model.trainable = False  # Keras on TensorFlow passes over True where it is True already
    model.trainable = True
    assert states(model)["a"] == (False, False)
    bntools.unfreeze(model)
    bntools.freeze(model, layers="a", affine=False)
    bntools.freeze(model, layers="b", stats=False)
    model.trainable = False
    model.trainable = True
    assert states(model) == {"a": (True, False), "b": (False, True)}


def test_unfreeze_opens_a_model_that_is_not_trainable():
    """Frozen by ``model.trainable = False``, a BN layer trains after unfreeze, and nothing else."""
    model = network(eager=True)
    model.trainable = False
    bntools.unfreeze(model, layers="a")
    assert train(model) == {"a": STATS | AFFINE}


@pytest.mark.parametrize("suffix", ["keras", "h5"])
@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file")
def test_a_frozen_model_reloads_frozen(tmp_path, suffix):
    """Saved and loaded, or cloned, a part that was frozen is; what a file says is undone by unfreeze."""
    model = network(None)
    bntools.freeze(model, layers="a", affine=False)
    bntools.freeze(model, layers="b", stats=False)
    model.save(tmp_path / f"model.{suffix}")
    loaded = keras.models.load_model(tmp_path / f"model.{suffix}")
    expected = {"a": (True, False), "b": (False, True)}
    assert states(loaded) == states(keras.models.clone_model(model)) == expected
    handle = bntools.freeze(loaded)
    assert set(states(loaded).values()) == {(True, True)}
    handle.undo()
    assert states(loaded) == expected
    loaded.compile("sgd", "mse", run_eagerly=True)
    moved = train(loaded)
    assert (moved["a"], moved["b"]) == (AFFINE, STATS)
    bntools.unfreeze(loaded)
    assert [type(loaded.get_layer(name)) for name in "ab"] == [keras.layers.BatchNormalization] * 2


def test_nested_models_follow():
    """BN of a model inside the one given is frozen, and the inner model's own fit obeys too."""
    backbone = network()
    assert train(backbone)["a"] == STATS | AFFINE
    outer = keras.Sequential([kl.Input((4,)), backbone, kl.Dense(1)])
    outer.compile("adam", "mse", run_eagerly=True)
    handle = bntools.freeze(outer)
    assert not {"a", "b"} & train(outer).keys()
    assert not {"a", "b"} & train(backbone).keys()
    handle.undo()
    assert train(outer)["a"] == STATS | AFFINE


def test_a_shared_layer_and_one_in_a_wrapper_are_frozen():
    """What a wrapper holds, and what is called twice, is one layer to freeze."""
    inputs = kl.Input((5, 4))
    shared = kl.BatchNormalization(name="shared")
    model = keras.Model(inputs, kl.TimeDistributed(kl.BatchNormalization(name="in"))(shared(shared(inputs))))
    handle = bntools.freeze(model, affine=False)
    expected = array(model(np.ones((2, 5, 4)), training=False))
    np.testing.assert_array_equal(array(model(np.ones((2, 5, 4)), training=True)), expected)
    assert len(handle.layers) == 2


@keras.saving.register_keras_serializable(package="tests")
class Scaled(keras.layers.BatchNormalization):
    pass


def test_one_part_of_a_subclass_is_refused():
    """A user's subclass may do more in its call: both parts freeze, one alone is refused, and nothing is frozen."""
    model = keras.Sequential([kl.Input((4,)), kl.BatchNormalization(name="plain"), Scaled(name="own")])
    with pytest.raises(BntoolsError, match="layer 'own' is a Scaled, whose statistics and affine"):
        bntools.freeze(model, affine=False)
    assert set(states(model).values()) == {(False, False)}
    bntools.freeze(model)
    assert set(states(model).values()) == {(True, True)}


def test_a_layer_is_frozen_before_it_is_built():
    """Scale and shift that come into being later are frozen as well."""
    model = keras.Sequential([kl.BatchNormalization(name="a")])
    bntools.freeze(model, stats=False)
    model.build((None, 4))
    assert states(model) == {"a": (False, True)}
    assert model.trainable_variables == []


def test_an_unknown_part_is_refused():
    """A layer can freeze its statistics or its affine parameters, and nothing else."""
    with pytest.raises(BntoolsError, match="frozen='all': expected one of 'stats', 'affine'"):
        FrozenBatchNormalization(frozen="all")
