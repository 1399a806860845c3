"""The verb inspect: what a model's BN layers hold, what is wrong with them, and how well they fit data."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, overload

from bntools import backends
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, Selection

if TYPE_CHECKING:
    from bntools.diagnosis.records import Diagnosis
    from bntools.measurement import Progress


@overload
def inspect(model: Any) -> list[BatchNorm]: ...


@overload
def inspect(
    model: Any,
    batches: Iterable[Any],
    *,
    layers: Selection = None,
    forward: Callable[[Any, Any], Any] | None = None,
    memory: int | None = None,
    max_samples: int | None = None,
    batch_size: int | None = None,
    histograms: Selection = (),
    alternatives: bool = True,
    domains: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Diagnosis: ...


def inspect(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    layers: Selection = None,
    forward: Callable[[Any, Any], Any] | None = None,
    memory: int | None = None,
    max_samples: int | None = None,
    batch_size: int | None = None,
    histograms: Selection = (),
    alternatives: bool = True,
    domains: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> list[BatchNorm] | Diagnosis:
    """The record of every BN layer of a model, in the order in which it defines them; with data, a diagnosis.

    Without ``batches``: the arrays of a record are copies: changing them changes nothing in the model. A model without
    BN layers gives an empty list. Raises BntoolsError for what is not a model, and for options without data.

    With ``batches``, as in ``recalibrate``: what exact recalibration would store is measured and compared with what
    is stored, layer by layer; so are the outputs of eval and train mode on up to 256 samples. The model is left as it
    was, whatever happens. ``layers`` chooses, frozen ones too; of the others each keeps what it has. ``forward``,
    ``memory``, ``max_samples`` and ``progress`` are those of ``recalibrate``. ``batch_size`` is that of the training
    to come, which the advice takes into account. ``histograms`` names layers whose input is wanted as a histogram.
    ``alternatives=False`` leaves out how the data would fit under other ways of preprocessing images. ``domains``
    maps names to batches, parts of the data that are compared with one another.

    Raises BntoolsError for data that is empty, raises or is not finite, and for a model that raises.

        for layer in bntools.inspect(model):
            print(layer.name, layer.features, layer.problems)
        found = bntools.inspect(model, loader)
        print(found.advice[0].action, found.advice[0].reason, found.worst()[0].name)
    """
    if batches is None:
        _check_alone(layers, forward, memory, max_samples, batch_size, histograms, domains, progress)
        return backends.of(model).layers(model)
    from bntools.diagnosis.measuring import diagnose

    return diagnose(
        model,
        batches,
        layers=layers,
        forward=forward,
        memory=memory,
        max_samples=max_samples,
        batch_size=batch_size,
        wanted=histograms,
        alternatives=alternatives,
        parts=domains,
        progress=progress,
    )


def _check_alone(*options: Any) -> None:
    if any(option is not None and option != () for option in options):
        raise BntoolsError("found options of a diagnosis without data: inspect(model, batches, ...)")
