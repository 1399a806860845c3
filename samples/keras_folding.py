"""BN in Keras models as people write them: which layers fold, into what, and why the others stay."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import tempfile
from pathlib import Path

import keras
import numpy as np
import torch
from keras import layers
from torch import nn

import bntools


def after_the_activation() -> keras.Model:
    """Dense(relu), BN, Dense(softmax): BN cannot go back behind the activation, it can go forward."""
    return keras.Sequential(
        [
            layers.Input((20,)),
            layers.Dense(64, "relu"),
            layers.BatchNormalization(name="bn"),
            layers.Dense(10, "softmax"),
        ]
    )


def before_the_pooling() -> keras.Model:
    """Convolutions with an activation inside, each followed by BN and max-pooling; no padding."""
    return keras.Sequential(
        [
            layers.Input((28, 28, 1)),
            layers.Conv2D(32, 3, activation="relu"),
            layers.BatchNormalization(name="bn1"),
            layers.MaxPooling2D(),
            layers.Conv2D(64, 3, activation="relu"),
            layers.BatchNormalization(name="bn2"),
            layers.MaxPooling2D(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def with_options_of_their_own() -> keras.Model:
    """BN with initializers of its own, without scale, without shift, and over channels that come first."""
    normal = keras.initializers.RandomNormal(0.5, 0.1, seed=0)
    return keras.Sequential(
        [
            layers.Input((12, 12, 3)),
            layers.Conv2D(8, 3),
            layers.BatchNormalization(
                momentum=0.9, epsilon=1e-5, beta_initializer=normal, gamma_initializer=normal, name="own"
            ),
            layers.ReLU(),
            layers.Conv2D(8, 3),
            layers.BatchNormalization(scale=False, name="no_scale"),
            layers.Flatten(),
            layers.Dense(6),
            layers.BatchNormalization(center=False, name="no_shift"),
            layers.Reshape((2, 3)),
            layers.Permute((2, 1)),
            layers.BatchNormalization(axis=1, name="axis_1"),
            layers.ReLU(),
        ]
    )


def three_blocks() -> keras.Model:
    """Conv, BN, ReLU, pooling three times, then a dense head with BN and dropout; images of 32 x 32 pixels."""
    parts: list[keras.Layer] = [layers.Input((32, 32, 3))]
    for width in (16, 32, 64):
        parts += [layers.Conv2D(width, 3, padding="same"), layers.BatchNormalization(), layers.ReLU()]
        parts += [layers.MaxPooling2D()] if width < 64 else []
    parts += [layers.Flatten(), layers.Dense(128), layers.BatchNormalization(), layers.ReLU(), layers.Dropout(0.5)]
    return keras.Sequential([*parts, layers.Dense(10)])


def three_blocks_in_torch() -> nn.Module:
    """The same in PyTorch."""
    parts: list[nn.Module] = []
    for inside, width in ((3, 16), (16, 32), (32, 64)):
        parts += [nn.Conv2d(inside, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if width < 64 else []
    head = [nn.Flatten(), nn.Linear(64 * 8 * 8, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Dropout(0.5)]
    return nn.Sequential(*parts, *head, nn.Linear(128, 10)).eval()


def main() -> None:
    """Fold and export each of them, and print what came of it."""
    keras.utils.set_random_seed(0)
    draw = np.random.default_rng(0).standard_normal

    def images(*shape: int) -> np.ndarray:
        return draw((16, *shape)).astype("float32")

    for make, example in ((after_the_activation, images(20)), (before_the_pooling, images(28, 28, 1))):
        model = make()
        bntools.recalibrate(model, example)
        print(f"{make.__name__}: {(folded := bntools.fold(model, example))} (error {folded.check.error:.0e})")
        assert not folded.kept

    model = before_the_pooling()
    bntools.recalibrate(model, images(28, 28, 1))
    model.get_layer("bn1").gamma.assign([-1.0] + [1.0] * 31)
    print(f"with a negative scale in channel 0: {(folded := bntools.fold(model, images(28, 28, 1)))}")
    assert list(folded.kept) == ["bn1"]

    model = with_options_of_their_own()
    bntools.recalibrate(model, images(12, 12, 3))
    for layer in bntools.inspect(model):
        affine = [name for name in ("scale", "shift") if getattr(layer, name) is not None]
        print(
            f"  {layer.name}: axis {layer.axis}, eps {layer.eps:g}, momentum {layer.momentum:g}, {' and '.join(affine)}"
        )
    print(f"BN with options of their own: {(folded := bntools.fold(model, images(12, 12, 3)))}")
    assert {"own", "no_scale", "no_shift"} <= set(folded.folded)

    with tempfile.TemporaryDirectory() as folder:
        for model, example in (
            (three_blocks(), images(32, 32, 3)[:4]),
            (three_blocks_in_torch(), images(3, 32, 32)[:4]),
        ):
            bntools.recalibrate(model, [example])
            check = bntools.export(model, Path(folder, "model.onnx"), example)
            kind = type(model).__module__.partition(".")[0]
            print(f"three blocks in {kind}: folded {len(check.folded)} of 4, exported: {check}")
            assert len(check.folded) == 4
            assert check.passed


if __name__ == "__main__":
    torch.manual_seed(0)
    main()
