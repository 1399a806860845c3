"""What BN does in a Keras model's training mode and in inference: batches of one, batch sizes, and momentum."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import bntools


def network(momentum: float) -> keras.Model:
    """A small CNN with one BN layer."""
    keras.utils.set_random_seed(0)
    return keras.Sequential(
        [
            layers.Input((16, 16, 3)),
            layers.Conv2D(16, 3),
            layers.BatchNormalization(momentum=momentum, name="bn"),
            layers.ReLU(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(10),
        ]
    )


def moved(model: keras.Model, images: np.ndarray, batch_size: int, training: bool) -> float:
    """How far the first image's output is from the one in a batch of all images, relative to its largest value."""
    weights = model.get_weights()
    few, whole = (model(images[:n], training=training)[0] for n in (batch_size, len(images)))
    model.set_weights(weights)  # training=True moves the statistics
    few, whole = (keras.ops.convert_to_numpy(output) for output in (few, whole))
    return float(np.abs(few - whole).max() / np.abs(whole).max())


def main() -> None:
    """Print the change of one image's output with its batch, then what two momenta make of a stream of batches."""
    generator = np.random.default_rng(0)
    images = generator.standard_normal((256, 16, 16, 3)) * np.linspace(0.2, 3, 256)[:, None, None, None]
    images = generator.permutation(images + 1).astype("float32")

    model = network(0.99)
    print("batch   training=True   training=False")
    for batch_size in (1, 2, 8, 10, 32, 100):
        inference = moved(model, images, batch_size, training=False)
        print(f"{batch_size:5d}   {moved(model, images, batch_size, training=True):13.1e}   {inference:14.1e}")
        assert inference < 1e-5, "in inference an image must not depend on its batch"
    assert moved(model, images, 1, training=True) > 0.1, "in training a single image normalizes by itself"

    # Keras's momentum is the weight of the old value: 0.9 remembers ten batches, 0.1 little more than the last one.
    after = (4, 8, 16, 31, 32)
    print("\ndrift of the stored statistics from those of all images, after so many batches of 8")
    print("momentum   " + "  ".join(f"{number:5d}" for number in after))
    for momentum in (0.99, 0.9, 0.1):
        model, drifts = network(momentum), []
        for number in range(1, 33):
            model(images[8 * (number - 1) : 8 * number], training=True)
            if number in after:
                result = bntools.recalibrate(model, images, check=False)
                drifts.append(result.layers[0].drift)
                result.undo()
        print(f"{momentum:8g}   " + "  ".join(f"{drift:5.2f}" for drift in drifts))
    print("0.99 is stale: it still holds its initial value. 0.1 is volatile: it follows every batch.")


if __name__ == "__main__":
    main()
