"""Why a Keras model's output changes with the number of epochs, although its loss does not any more.

After few updates at Keras's momentum of 0.99 the moving statistics still hold much of the 0 and 1 they started with.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from keras import layers

import bntools


def trained(features: np.ndarray, target: np.ndarray, epochs: int, initial: tuple[float, float]) -> keras.Model:
    """Dense, BN, Dense, trained for some epochs; moving mean and variance start at ``initial``."""
    keras.utils.set_random_seed(0)
    mean, variance = (keras.initializers.Constant(value) for value in initial)
    model = keras.Sequential(
        [
            layers.Input((10,)),
            layers.Dense(32),
            layers.BatchNormalization(
                momentum=0.99, moving_mean_initializer=mean, moving_variance_initializer=variance, name="bn"
            ),
            layers.Dense(1),
        ]
    )
    model.compile(optimizer=keras.optimizers.Adam(0.01), loss="mse")
    model.fit(features, target, epochs=epochs, batch_size=50, verbose=0)
    return model


def gap(model: keras.Model, features: np.ndarray) -> float:
    """How far ``predict`` is from ``model(x, training=True)``, relative to the spread of the output."""
    predicted = model.predict(features, verbose=0)
    weights = model.get_weights()
    in_fit = keras.ops.convert_to_numpy(model(features, training=True))
    model.set_weights(weights)  # training=True has moved the statistics
    return float(np.abs(predicted - in_fit).mean() / in_fit.std())


def main() -> None:
    """Print, after 5 and 50 epochs, what is left of the initial value, and the gap before and after recalibration."""
    generator = np.random.default_rng(0)
    features = (generator.standard_normal((500, 10)) * 4 + 6).astype("float32")
    target = features[:, :1] - features[:, 1:2]
    print("epochs  started at   left  gap at the output  drift of bn  gap after recalibrate  residual")
    for epochs, initial in ((5, (0, 1)), (50, (0, 1)), (5, (0.5, 0.5))):
        model = trained(features, target, epochs, initial)
        (layer,) = bntools.inspect(model)
        before = gap(model, features)
        result = bntools.recalibrate(model, features)
        after = gap(model, features)
        print(
            f"{epochs:6d}  {initial[0]:3g} and {initial[1]:3g}  {layer.initial_share:4.0%}  {before:17.1%}"
            f"  {result.layers[0].drift:11.2f}  {after:21.1e}  {result.residual:8.0e}"
        )
        for problem in layer.problems:
            print(f"        inspect: {problem}")
        assert after < 1e-4 < before


if __name__ == "__main__":
    main()
