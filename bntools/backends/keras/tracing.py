"""Running a Keras model for a comparison, and reading what its layers give."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import keras
from keras import tree

from bntools.backends.keras import slopes
from bntools.backends.keras.feeding import canonical
from bntools.backends.keras.naming import named
from bntools.backends.keras.running import Forward, call, invoke, predict, to_numpy
from bntools.backends.keras.state import attributes_set, eagerly, variables_kept
from bntools.batches import shapes_of
from bntools.errors import BntoolsError
from bntools.noise import brief
from bntools.runner import Outputs, Runner, Trace, least_precise


def runners(model: keras.Model, providers: Sequence[str] = ("cpu",), forward: Forward | None = None) -> list[Runner]:
    """The way to run a Keras model: with ``training=False``, where its variables are, without TF32.

    And compiled, as ``predict`` runs it, where TensorFlow is known to make something else of such a model then. Raises
    BntoolsError where another provider than "cpu" is asked for: providers are ONNX Runtime's.
    """
    if list([providers] if isinstance(providers, str) else providers) != ["cpu"]:
        raise BntoolsError(
            f"providers={tuple(providers)!r} was asked for, but a Keras model runs where Keras's "
            f"{keras.backend.backend()} back end puts it: export it and verify the file"
        )
    layers = named(model).values()
    dtypes = {one.compute_dtype for one in layers if one.variables} | {v.dtype for v in model.variables}
    runner = Runner(
        name=type(model).__name__,
        framework="keras",
        provider=_device(model),
        optimization=None,
        dtype=least_precise({keras.backend.standardize_dtype(dtype) for dtype in dtypes}),
        run=partial(_run, model, forward),
        trace=partial(trace, model, forward),
        class_axis=-1,
    )
    if forward is not None or not slopes.may_lose(model):
        return [runner]
    return [runner, replace(runner, run=partial(_run, model, _compiled), where=slopes.LOST)]


def _compiled(model: Any, batch: Any) -> Any:
    import tensorflow as tf

    inputs = tree.map_structure(tf.constant, canonical(model, batch))
    return tf.function(partial(invoke, model), autograph=False)(inputs)


def _device(model: Any) -> str:
    """What computes: ``cpu``, ``cuda`` or another kind of device, by where the first variable is."""
    where = [str(getattr(variable.value, "device", "cpu")) for variable in model.variables]
    kind = where[0].rpartition("device:")[2].split(":")[0].lower() if where else "cpu"
    return {"gpu": "cuda"}.get(kind, kind)


def _run(model: Any, forward: Forward | None, batch: Any) -> Outputs:
    try:
        with full_precision():
            return predict(model, batch, forward)
    except BntoolsError:
        raise
    except Exception as error:  # whatever the model's own code raises, or TensorFlow of a shape that does not fit
        raise BntoolsError(
            f"{type(model).__name__} {model.name!r} fails on the batch ({shapes_of(batch)}): "
            f"{type(error).__name__}: {brief(error)}"
        ) from error


def trace(model: Any, forward: Forward | None, batch: Any) -> Trace:
    """The outputs of the layers, in the order in which they finish; names are their paths.

    A second call of a layer is named ``path (call 2)``. A layer that runs inside a compiled loop has no output to
    read, and is left out. Variables that the model counts or draws in are as before.
    """
    order: list[str] = []
    _watch(model, forward, batch, lambda name, _: order.append(name))
    calls = Counter(name.split(" (call ")[0] for name in order)

    def read(points: Sequence[str]) -> Outputs:
        wanted, outputs = set(points), {}

        def take(name: str, output: Any) -> None:
            if name in wanted:
                outputs[name] = to_numpy(output)

        _watch(model, forward, batch, take)
        return outputs

    return Trace(tuple(order), {name: name for name in order if calls[name] == 1}, read)


def _watch(model: Any, forward: Forward | None, batch: Any, see: Callable[[str, Any], None]) -> None:
    """Run the model; ``see`` gets the name of each call of a layer, and its first output, as it finishes."""
    calls: Counter[str] = Counter()

    def watched(path: str, usual: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = usual(*args, **kwargs)
        values = [value for value in tree.flatten(output) if _readable(value)]
        if values:
            calls[path] += 1
            see(path if calls[path] == 1 else f"{path} (call {calls[path]})", values[0])
        return output

    layers = [(path, layer) for path, layer in named(model).items() if not isinstance(layer, keras.layers.InputLayer)]
    stops = [(layer, "call", partial(watched, path, layer.call)) for path, layer in layers]
    try:
        with eagerly(), variables_kept(model, set()), full_precision(), attributes_set(stops):
            call(model, batch, forward)
    except Exception as error:  # whatever the model's own code raises
        raise BntoolsError(
            f"{type(model).__name__} {model.name!r} cannot be watched layer by layer: "
            f"{type(error).__name__}: {brief(error)}"
        ) from error


def _readable(value: Any) -> bool:
    """Whether a value is a tensor that holds numbers now, and not one that stands for them in a graph."""
    return keras.ops.is_tensor(value) and (hasattr(value, "numpy") or hasattr(value, "__array__"))


@contextmanager
def full_precision() -> Iterator[None]:
    """Products in full float32 on a GPU: TF32 would be measured as if the models differed."""
    if keras.backend.backend() != "tensorflow":
        yield
        return
    import tensorflow as tf

    before = tf.config.experimental.tensor_float_32_execution_enabled()
    tf.config.experimental.enable_tensor_float_32_execution(False)
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(before)
