"""Model files of Keras: what survives, and what is refused."""

from __future__ import annotations

import io
import json
import shutil
import sys
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from keras import layers as L

import bntools
from bntools import backends
from bntools.backends.keras import contents, hdf5
from bntools.backends.keras.found import training_steps, write

X = np.random.default_rng(0).normal(size=(4, 6, 6, 3)).astype("float32")


def network() -> keras.Model:
    """Nested, shared, wrapped and frozen BN."""
    nested = keras.Sequential(
        [keras.Input((6, 6, 4)), keras.layers.Conv2D(4, 1), keras.layers.BatchNormalization(name="bn")], name="nested"
    )
    nested.layers[1].trainable = False
    inputs = keras.Input((6, 6, 3), name="image")
    shared = keras.layers.BatchNormalization(scale=False, momentum=0.9, moving_mean_initializer="ones", name="shared")
    x = shared(keras.layers.Conv2D(4, 3, padding="same")(inputs), training=False)
    x = keras.layers.Add()([shared(nested(x)), x])
    x = keras.layers.TimeDistributed(keras.layers.BatchNormalization(center=False, name="each"), name="rows")(x)
    return keras.Model(inputs, keras.layers.Dense(2)(keras.layers.Flatten()(x)), name="network")


@pytest.fixture(scope="module")
def trained() -> keras.Model:
    """The model with an optimizer that has made a step; tests leave it alone."""
    model = network()
    model.compile("adam", keras.losses.MeanSquaredError())
    model.train_on_batch(X, np.zeros((4, 2), "float32"))
    return model


@pytest.fixture(scope="module")
def shelf(trained, tmp_path_factory) -> Path:
    """A folder with the model in each form."""
    folder = tmp_path_factory.mktemp("shelf")
    for name in ("model.h5", "model.hdf5", "model.keras", "model.weights.h5"):
        bntools.save(trained, folder / name)
    return folder


@pytest.fixture
def kept(shelf, tmp_path):
    """Puts the model's file of this name into the folder of the test."""

    def keep(name: str) -> Path:
        return Path(shutil.copy(shelf / name, tmp_path / name))

    return keep


def output(model: keras.Model) -> np.ndarray:
    """What the model gives in inference."""
    return keras.ops.convert_to_numpy(model(X, training=False))


def rewritten(path: Path, member: str, change) -> Path:
    """Replace a member of an archive by what ``change`` makes of it."""
    with zipfile.ZipFile(path) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    held[member] = change(held[member])
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in held.items():
            archive.writestr(name, content)
    return path


def reconfigured(path: Path, change) -> Path:
    """Change the config in an archive, as a dict in place."""

    def changed(text: bytes) -> bytes:
        config = json.loads(text)
        change(config)
        return json.dumps(config).encode()

    return rewritten(path, "config.json", changed)


def moved(model: keras.Model) -> dict[str, np.ndarray]:
    """Give every BN layer other statistics and 7 updates; returns the means."""
    new = {layer.name: layer.mean + 0.25 for layer in bntools.inspect(model)}
    write(model, {layer.name: (new[layer.name], layer.var, 7) for layer in bntools.inspect(model)})
    return new


@pytest.mark.parametrize("name", ["model.keras", "model.h5", "model.hdf5"])
def test_round_trip(kept, name):
    """Statistics, updates, optimizer and compile config survive a load, a change and a save."""
    path = kept(name)
    model = bntools.load(path)
    before = [np.array(variable) for variable in model.optimizer.variables]
    means = moved(model)
    bntools.save(model, path.with_stem("again"))
    again = bntools.load(path.with_stem("again"))
    assert {layer.name: layer.updates for layer in bntools.inspect(again)} == dict.fromkeys(means, 7)
    assert all(np.allclose(layer.mean, means[layer.name], atol=1e-6) for layer in bntools.inspect(again))
    assert training_steps(again) == 1
    assert all(np.array_equal(old, new) for old, new in zip(before, again.optimizer.variables, strict=True))
    assert len(before) > 4
    np.testing.assert_array_equal(output(again), output(model))
    assert type(again.optimizer).__name__ == "Adam"


def test_updates_go_on(kept):
    """After bntools wrote 7 updates, training counts on from there, also when the file was loaded in between."""
    path = kept("model.keras")
    model = bntools.load(path)
    moved(model)
    bntools.save(model, path)
    again = bntools.load(path)
    again.train_on_batch(X, np.zeros((4, 2), "float32"))
    updates = {layer.name: layer.updates for layer in bntools.inspect(again)}
    assert updates == {"shared": 8, "nested.bn": 7, "rows.each": 8}


def test_keras_reads_what_bntools_wrote(kept):
    """The file needs no bntools."""
    path = kept("model.keras")
    model = bntools.load(path)
    moved(model)
    bntools.save(model, path)
    plain = keras.saving.load_model(path)
    assert plain.optimizer.iterations == 1
    assert type(plain).__name__ == "Functional"


def test_keras_to_h5_and_back(trained, kept):
    """The suffix decides which of the two forms is written."""
    path = kept("model.keras")
    bntools.save(bntools.load(path), path.with_suffix(".h5"))
    bntools.save(bntools.load(path.with_suffix(".h5")), path.with_stem("back"))
    back = bntools.load(path.with_stem("back"))
    np.testing.assert_array_equal(output(back), output(trained))
    assert type(back.optimizer).__name__ == "Adam"


def test_other_groups_of_an_h5_file_stay(kept):
    """What Keras does not know of in an .h5 file is there afterwards."""
    path = kept("model.h5")
    with h5py.File(path, "r+") as file:
        file["notes"] = [1, 2, 3]
        file.attrs["author"] = "someone"
    model = bntools.load(path)
    moved(model)
    bntools.save(model, path)
    with h5py.File(path) as file:
        assert file["notes"][:].tolist() == [1, 2, 3]
        assert file.attrs["author"] == "someone"


def test_changed_config_goes_into_an_h5_file(kept):
    """A layer that was frozen since is frozen in the file."""
    path = kept("model.h5")
    model = bntools.load(path)
    model.get_layer("shared").trainable = False
    bntools.save(model, path)
    records = {layer.name: layer for layer in bntools.inspect(bntools.load(path))}
    assert records["shared"].stats_frozen
    assert not records["rows.each"].stats_frozen


def test_compile_config_that_keras_cannot_read_back(tmp_path):
    """compile(loss="mse") makes an .h5 file that Keras 3 cannot load; bntools loads it, and the config stays in it."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="bn")])
    model.compile("adam", "mse", metrics=["mae", "mse"])
    model.train_on_batch(X[:, 0, 0], X[:, 0, 0])
    bntools.save(model, tmp_path / "model.h5")
    loaded = bntools.load(tmp_path / "model.h5")
    assert [layer.updates for layer in bntools.inspect(loaded)] == [1]
    moved(loaded)
    bntools.save(loaded, tmp_path / "model.h5")
    assert hdf5.steps(str(tmp_path / "model.h5")) == 1
    assert contents.read(str(tmp_path / "model.h5")).training
    assert [layer.updates for layer in bntools.inspect(bntools.load(tmp_path / "model.h5"))] == [7]


@pytest.mark.parametrize("given", ["model", "function"])
def test_weights_alone(trained, kept, tmp_path, given):
    """Weights need arch=, a model or a function, and are written back as weights."""
    kept("model.weights.h5")
    with pytest.raises(bntools.BntoolsError, match=r"weights without the model they belong to: pass arch="):
        bntools.load(tmp_path / "model.weights.h5")
    arch = trained if given == "model" else network
    model = bntools.load(tmp_path / "model.weights.h5", arch=arch)
    means = moved(model)
    bntools.save(model, tmp_path / "again.weights.h5")
    again = bntools.load(tmp_path / "again.weights.h5", arch=arch)
    assert all(np.allclose(layer.mean, means[layer.name], atol=1e-6) for layer in bntools.inspect(again))
    assert all(layer.updates == 7 for layer in bntools.inspect(again))
    assert not np.allclose(bntools.inspect(trained)[0].mean, means[bntools.inspect(trained)[0].name])


def test_recurrent_layers_of_keras_2():
    """The order of axes that Keras 2 noted is left out, where it is the only one of Keras 3."""
    assert hdf5.modernized({"cell": {}, "units": 2, "time_major": False}) == {"cell": {}, "units": 2}


def test_weights_of_another_model(kept, tmp_path):
    """Weights that do not fit the arch are refused."""
    kept("model.weights.h5")
    other = keras.Sequential([keras.Input((3,)), keras.layers.Dense(2)])
    with pytest.raises(bntools.BntoolsError, match="its weights do not fit the arch"):
        bntools.load(tmp_path / "model.weights.h5", arch=other)


def test_arch_for_a_whole_model(kept):
    """A whole model needs no arch=, and says so."""
    with pytest.raises(bntools.BntoolsError, match="holds a whole model, which needs no arch="):
        bntools.load(kept("model.keras"), arch=network)


def test_operations_cannot_be_in_an_h5_file(tmp_path):
    """Keras writes x * 2 into an .h5 file, but cannot read it back: refused."""
    inputs = keras.Input((3,))
    with pytest.raises(bntools.BntoolsError, match=r"model\.h5: Keras cannot read this model back from an \.h5 file"):
        bntools.save(keras.Model(inputs, keras.layers.BatchNormalization()(inputs) * 2), tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


def test_model_that_cannot_be_an_h5_file(tmp_path):
    """A model written in Python cannot be read back from .h5, and nothing is left behind."""

    class Own(keras.Model):
        def __init__(self):
            super().__init__()
            self.bn = keras.layers.BatchNormalization()

        def call(self, x):
            return self.bn(x)

    model = Own()
    model(X)
    with pytest.raises(bntools.BntoolsError, match=r"model\.h5: .* save it as \.keras"):
        bntools.save(model, tmp_path / "model.h5")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def package(tmp_path, monkeypatch) -> str:
    """A package of the working folder with a layer and a function of its own."""
    (tmp_path / "mine_of_keras").mkdir()
    (tmp_path / "mine_of_keras" / "__init__.py").write_text(
        "import keras\n\n\nclass Twice(keras.layers.Layer):\n    def call(self, x):\n        return 2 * x\n\n\n"
        "def thrice(x):\n    return 3 * x\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield "mine_of_keras"
    sys.modules.pop("mine_of_keras", None)


def test_custom_layer(package, tmp_path):
    """A class of one's own is refused by name, and admitted with its package."""
    from importlib import import_module

    twice = import_module(package).Twice
    bntools.save(keras.Sequential([keras.Input((3,)), twice(name="act")]), tmp_path / "model.keras")
    with pytest.raises(
        bntools.BntoolsError, match=r"the class mine_of_keras\.Twice \(in 'act'\).*--allow mine_of_keras"
    ):
        bntools.load(tmp_path / "model.keras")
    loaded = bntools.load(tmp_path / "model.keras", allow="mine_of_keras")
    np.testing.assert_array_equal(np.array(loaded(X[:, 0, 0])), 2 * X[:, 0, 0])


def test_custom_function(package, tmp_path):
    """A function in a Lambda layer is admitted with its package, whose name the file does not tell."""
    from importlib import import_module

    thrice = import_module(package).thrice
    layer = keras.layers.Lambda(thrice, output_shape=(3,), name="act")
    bntools.save(keras.Sequential([keras.Input((3,)), layer]), tmp_path / "model.keras")
    with pytest.raises(bntools.BntoolsError, match=r"the function thrice \(in 'act'\), not admitted"):
        bntools.load(tmp_path / "model.keras")
    loaded = bntools.load(tmp_path / "model.keras", allow="mine_of_keras")
    np.testing.assert_array_equal(np.array(loaded(X[:, 0, 0])), 3 * X[:, 0, 0])


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
def test_bytecode_is_never_run(tmp_path, name):
    """A Lambda of a lambda is refused, also where everything is allowed."""
    model = keras.Sequential([keras.Input((3,)), keras.layers.Lambda(lambda x: 2 * x, name="twice")])
    bntools.save(model, tmp_path / name)  # what is in memory anyway may be saved
    with pytest.raises(bntools.BntoolsError, match="its layer 'twice' holds Python bytecode"):
        bntools.load(tmp_path / name, allow=("lambda", "keras", "builtins"))


def test_functions_that_are_no_part_of_a_model(kept):
    """A config that names a function of keras.utils is refused before Keras sees it."""

    def hostile(config):
        layer = config["config"]["layers"][1]["config"]
        layer["activation"] = {"module": "keras.utils", "class_name": "function", "config": "get_file"}

    with pytest.raises(bntools.BntoolsError, match=r"keras\.utils\.get_file .*which is no part of any model"):
        bntools.load(reconfigured(kept("model.keras"), hostile))


def test_modules_are_not_imported_for_a_file(kept, tmp_path, monkeypatch):
    """A module that a file names is not imported unless it was allowed."""
    (tmp_path / "trap_of_keras.py").write_text("raise SystemExit")
    monkeypatch.syspath_prepend(tmp_path)

    def hostile(config):
        config["config"]["layers"][1] |= {"module": "trap_of_keras", "registered_name": "Conv2D"}

    with pytest.raises(bntools.BntoolsError, match=r"trap_of_keras\.Conv2D"):
        bntools.load(reconfigured(kept("model.keras"), hostile))
    assert "trap_of_keras" not in sys.modules


def test_entries_that_lead_out(kept):
    """An archive with an entry above its root is refused."""
    path = kept("model.keras")
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("../../outside", "x")
    with pytest.raises(bntools.BntoolsError, match=r"its entry '\.\./\.\./outside' leads out of the archive"):
        bntools.load(path)


def test_archive_that_unpacks_to_far_more(kept):
    """A decompression bomb is refused unread."""
    path = kept("model.keras")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("assets/zeros", bytes(80 << 20))
    with pytest.raises(bntools.BntoolsError, match=r"claims to unpack from .* which no model does"):
        bntools.load(path)


def test_array_that_claims_to_be_huge(kept):
    """An HDF5 array that was never written, yet has a shape of terabytes, is refused unread."""
    path = kept("model.h5")
    with h5py.File(path, "r+") as file:
        file["model_weights"].create_dataset("bomb", (1 << 40,), "f4")
    with pytest.raises(bntools.BntoolsError, match=r"claims to unpack from .* which no model does"):
        bntools.load(path)


@pytest.mark.parametrize("link", [h5py.SoftLink("/model_weights"), h5py.ExternalLink("other.h5", "/")])
def test_links_out_of_a_file(kept, link):
    """A link in an HDF5 file is refused."""
    path = kept("model.h5")
    with h5py.File(path, "r+") as file:
        file["model_weights"]["elsewhere"] = link
    with pytest.raises(bntools.BntoolsError, match=r"model_weights/elsewhere is a link"):
        bntools.load(path)


@pytest.mark.parametrize("name", ["model.keras", "model.h5"])
@pytest.mark.parametrize("share", [0.2, 0.9, 0.999])
def test_truncated(kept, name, share):
    """A file that was cut off is named as damaged."""
    path = kept(name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
    with pytest.raises(bntools.BntoolsError, match=r"damaged or truncated"):
        bntools.load(path)


def test_damage_in_the_middle(kept):
    """Weights whose checksum is wrong are not loaded."""
    path = kept("model.keras")
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 255
    path.write_bytes(data)
    with pytest.raises(bntools.BntoolsError, match=r"model\.keras: "):
        bntools.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:100], "damaged: its config.json is no JSON"),
        (lambda text: b"[1]", "its config.json holds a list, expected a JSON object"),
        (lambda text: b'{"a":' * 100_000, "config.json is no JSON"),
        (lambda text: b"{}", "cannot load it|holds a dict"),
        (lambda text: text.replace(b'"Conv2D"', b'"Conv2E"'), "cannot load it"),
    ],
)
def test_config_that_is_none(kept, change, message):
    """A config that is damaged or names what Keras does not have is refused in a line."""
    with pytest.raises(bntools.BntoolsError, match=message) as caught:
        bntools.load(rewritten(kept("model.keras"), "config.json", change))
    assert len(str(caught.value)) < 700


def test_file_of_a_newer_keras(kept):
    """Where loading fails and the file is newer than the Keras that is installed, the error says so."""
    path = rewritten(kept("model.keras"), "metadata.json", lambda _: b'{"keras_version": "3.99.0"}')
    assert bntools.load(path)
    path = rewritten(path, "config.json", lambda text: text.replace(b'"Conv2D"', b'"Conv2E"'))
    with pytest.raises(bntools.BntoolsError, match=r"written by Keras 3\.99\.0 \(pip install --upgrade keras\)"):
        bntools.load(path)


def test_archive_of_keras_2(kept):
    """A .keras archive of Keras 2 is refused with what to do."""
    path = rewritten(kept("model.keras"), "metadata.json", lambda _: b'{"keras_version": "2.15.0"}')
    with pytest.raises(bntools.BntoolsError, match=r"archive of Keras 2\.15\.0.*save it as \.h5"):
        bntools.load(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("model.keras", b"\x89PNG\r\n\x1a\n", "found a PNG image where a .keras archive was expected"),
        ("model.keras", b"\x89HDF\r\n\x1a\n" + bytes(600), "an HDF5 file .*rename it to .h5"),
        ("model.h5", b"PK\x03\x04" + bytes(50), "found a zip archive where a Keras model was expected"),
        ("model.h5", b"hello", "found text where a Keras model was expected"),
    ],
)
def test_other_files(tmp_path, name, content, message):
    """What is no model of Keras is called what it is."""
    (tmp_path / name).write_bytes(content)
    with pytest.raises(bntools.BntoolsError, match=message):
        bntools.load(tmp_path / name)


def test_zip_and_hdf5_that_are_no_models(tmp_path):
    """Archives of something else are refused by what they hold."""
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("readme.txt", "x")
    with pytest.raises(bntools.BntoolsError, match=r"a zip archive, but no Keras model: it holds readme\.txt"):
        bntools.load(tmp_path / "model.keras")
    with h5py.File(tmp_path / "model.h5", "w") as file:
        file["table"] = [1]
    with pytest.raises(bntools.BntoolsError, match=r"no model or weights that Keras wrote \(it holds table\)"):
        bntools.load(tmp_path / "model.h5")


def test_notes_of_others_are_left_alone(kept):
    """A comment that is not bntools's is no error."""
    path = kept("model.keras")
    with zipfile.ZipFile(path, "a") as archive:
        archive.comment = b"made by hand"
    assert contents.read(str(path)).updates == {}
    assert backends.of_path(path).load(str(path))


def test_window_onto_an_archive(kept):
    """Weights read where they lie are those that zipfile unpacks."""
    path = kept("model.keras")
    with zipfile.ZipFile(path) as archive, h5py.File(io.BytesIO(archive.read("model.weights.h5"))) as unpacked:
        expected = unpacked["layers/conv2d/vars/0"][()]
    with contents.weights(str(path)) as file:
        np.testing.assert_array_equal(file["layers/conv2d/vars/0"][()], expected)


def test_optimizer_state_of_layers_frozen_later(tmp_path):
    """An optimizer built before layers were frozen keeps the state of all variables through load and save."""
    inputs = L.Input((3,))
    model = keras.Model(inputs, L.Dense(1)(L.BatchNormalization(name="bn")(L.Dense(4)(inputs))))
    model.compile("adam", "mse")
    x = np.random.default_rng(0).standard_normal((32, 3))
    model.fit(x, x[:, :1], verbose=0)
    bntools.freeze(model)
    model.save(tmp_path / "frozen.keras")
    before = [keras.ops.convert_to_numpy(variable) for variable in model.optimizer.variables]
    bntools.save(bntools.load(tmp_path / "frozen.keras"), tmp_path / "again.keras")
    after = bntools.load(tmp_path / "again.keras").optimizer.variables
    assert len(after) == len(before) > 10
    for variable, value in zip(after, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(variable), value)
