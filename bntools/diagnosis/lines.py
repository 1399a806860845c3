"""The lines that do what is advised: of Python, and of the command line with MODEL and DATA for the two files."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from bntools.diagnosis.records import Diagnosis

Lines = tuple[str, str]


def recalibrating(diagnosis: Diagnosis, names: Sequence[str] = (), prior: int = 0) -> Lines:
    """New statistics for the layers that were measured, or for those named, blended with a prior."""
    layers = _layers(diagnosis, names)
    blended = f", prior={prior}" if prior else ""
    options = [*(["--prior", str(prior)] if prior else []), *(part for name in layers for part in ("--layers", name))]
    command = shlex.join(["bntools", "recalibrate", "MODEL", "DATA", *options])
    return f"bntools.recalibrate(model, batches{blended}{_argument(layers)})", command


def resetting(diagnosis: Diagnosis, names: Sequence[str] = ()) -> Lines:
    """Nothing of the stored statistics stays; on the command line recalibration alone sees to that."""
    line, command = recalibrating(diagnosis, names)
    return f"bntools.reset(model{_argument(_layers(diagnosis, names))}); {line}", command


def separating() -> Lines:
    """Statistics for each domain."""
    line = "sites = bntools.bank(model, domains)  # and later: with bntools.use(model, sites[name])"
    return line, "bntools recalibrate MODEL DATA --per-domain"


def following(diagnosis: Diagnosis, memory: int) -> Lines:
    """Statistics that follow the data with a memory of so many samples; only modules of PyTorch adapt live."""
    if diagnosis.framework not in ("keras", "onnx"):
        return f'bntools.adapt(model, prior={max(1, memory // 10)}, layers="*", half_life={memory})', ""
    command = f"bntools recalibrate MODEL DATA --prior {memory}"
    return f"bntools.recalibrate(model, latest, prior={memory})  # now and then, on the latest batches", command


def freezing(diagnosis: Diagnosis) -> str:
    """What keeps the statistics while a model trains; an ONNX file does not train."""
    return "" if diagnosis.framework == "onnx" else "bntools.freeze(model, affine=False)"


def replacing(diagnosis: Diagnosis, names: Sequence[str]) -> str:
    """Modules of PyTorch can be converted; for others the code that builds the model is to be changed."""
    if diagnosis.framework in ("keras", "onnx"):
        return "keras.layers.GroupNormalization() instead of BatchNormalization() where the model is built"
    which = "" if len(names) == len(diagnosis) else f", layers={list(names)!r}"
    return f'model = bntools.convert(model, "groupnorm"{which}).model'


def _layers(diagnosis: Diagnosis, names: Sequence[str]) -> list[str]:
    """The layers to name: none where all are meant and none is frozen, for then ``layers=`` is not needed."""
    if names and len(names) < len(diagnosis):
        return list(names)
    if any(reason.startswith("not selected") for reason in diagnosis.untouched.values()):
        return [one.name for one in diagnosis]
    return ["*"] if any(one.layer.stats_frozen for one in diagnosis) else []


def _argument(layers: Sequence[str]) -> str:
    return "" if not layers else ', layers="*"' if layers == ["*"] else f", layers={list(layers)!r}"
