"""A pretrained Keras model meets images that its statistics do not fit: which layer misbehaves, and what puts it right.

The activations behind each BN layer are written for TensorBoard as well: ``tensorboard --logdir FOLDER`` shows, under
Histograms, those of the training camera's digits beside those of the new camera's.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tempfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from keras import layers

import bntools
from bntools.cli import digits


def pretrained(images: np.ndarray, labels: np.ndarray) -> keras.Model:
    """A small CNN, trained on the digits of one camera."""
    keras.utils.set_random_seed(0)
    parts: list[keras.Layer] = [layers.Input((8, 8, 1))]
    for number, width in enumerate((16, 32), 1):
        parts += [layers.Conv2D(width, 3, padding="same"), layers.BatchNormalization(momentum=0.9, name=f"bn{number}")]
        parts += [layers.ReLU(), layers.MaxPooling2D()]
    model = keras.Sequential([*parts, layers.Flatten(), layers.Dense(10)])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(0.01), loss, metrics=["accuracy"])
    model.fit(images, labels, batch_size=50, epochs=10, verbose=0)
    model.optimizer.learning_rate = 0.001  # for what comes
    return model


def taken(ink: np.ndarray, camera: str | None = None) -> np.ndarray:
    """Images (n, 8, 8, 1) float32 as a camera takes them."""
    return digits.inputs(digits.seen(ink, camera)).transpose(0, 2, 3, 1)


def accuracy(model: keras.Model, images: np.ndarray, labels: np.ndarray) -> float:
    """Share of images that the model reads right."""
    return float((model.predict(images, verbose=0).argmax(axis=1) == labels).mean())


def activations(model: keras.Model, images: np.ndarray, folder: Path) -> dict[str, np.ndarray]:
    """What each BN layer gives in inference, channel by channel, (samples, channels); written for TensorBoard."""
    names = [layer.name for layer in bntools.inspect(model)]
    values = keras.Model(model.inputs, [model.get_layer(name).output for name in names]).predict(images, verbose=0)
    with tf.summary.create_file_writer(str(folder)).as_default():
        for name, value in zip(names, values, strict=True):
            tf.summary.histogram(f"{name} output", value, step=0)
    return {name: value.reshape(-1, value.shape[-1]) for name, value in zip(names, values, strict=True)}


def astray(model: keras.Model, values: dict[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """By layer: the worst channel's mean and least spread before scale and shift, 0 and 1 where statistics fit."""
    found = {}
    for layer in bntools.inspect(model):
        plain = (values[layer.name] - layer.shift) / layer.scale
        found[layer.name] = float(np.abs(plain.mean(axis=0)).max()), float(plain.std(axis=0).min())
    return found


def main(folder: Path) -> None:
    """Print what each camera makes of the layers, then the accuracy at the new camera after each remedy."""
    found = digits.load()
    labels, rest = found.labels, found.held_out_labels
    old, new, held_out = taken(found.ink), taken(found.ink, "contrast"), taken(found.held_out_ink, "contrast")
    model = pretrained(old, labels)
    weights = model.get_weights()

    own = accuracy(model, taken(found.held_out_ink), rest)
    print(
        f"held-out digits read right: {own:.1%} at its own camera, {accuracy(model, held_out, rest):.1%} at the new one"
    )

    seen = {name: astray(model, activations(model, x, folder / name)) for name, x in (("own", old), ("new", new))}
    drifts = bntools.recalibrate(model, new, check=False)
    drifts.undo()
    print("\nbefore scale and shift, where statistics that fit give mean 0 and spread 1, the worst channel has")
    print("layer   own camera: mean, spread   new camera: mean, spread   drift")
    for layer in drifts.layers:
        (mean, spread), (new_mean, new_spread) = seen["own"][layer.name], seen["new"][layer.name]
        print(f"{layer.name:5s}  {mean:16.2f}{spread:8.2f}  {new_mean:17.2f}{new_spread:8.2f}  {layer.drift:8.2f}")
        assert new_spread < spread
    print(f"TensorBoard's histograms: {len(list(folder.glob('*/events*')))} files of {', '.join(seen['new'])}")

    print("\nheld-out digits of the new camera, after one of these (fine-tuning: 200 labelled digits, one epoch)")
    few = slice(0, 200)
    with bntools.freeze(model):
        before = [layer.mean for layer in bntools.inspect(model)]
        model.fit(new[few], labels[few], batch_size=50, epochs=1, verbose=0)
        bntools.assert_frozen(model)
        stayed = all(np.array_equal(a, b.mean) for a, b in zip(before, bntools.inspect(model), strict=True))
    print(f"  fine-tuning with BN frozen (its statistics unchanged: {stayed})   {accuracy(model, held_out, rest):6.1%}")
    assert stayed, "frozen statistics must not move"

    model.set_weights(weights)
    result = bntools.recalibrate(model, new)
    after = accuracy(model, held_out, rest)
    print(f"  recalibrating, which needs no labels (residual {result.residual:.0e})        {after:6.1%}")

    with bntools.freeze(model):
        model.fit(new[few], labels[few], batch_size=50, epochs=1, verbose=0)
    print(f"  recalibrating, then fine-tuning with BN frozen                  {accuracy(model, held_out, rest):6.1%}")
    assert after > 0.9


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:  # for TensorBoard, a folder that stays
        main(Path(scratch))
