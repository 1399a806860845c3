"""What ``inspect(model, batches)`` found: how the data differs from what the BN layers have stored, and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from bntools.layer import BatchNorm
from bntools.words import counted


@dataclass(frozen=True)
class ChannelDrift:
    """One channel of a layer that drifts.

    ``mean`` is the measured mean minus the stored one, in stored standard deviations; ``ratio`` the measured standard
    deviation over the stored one; ``kl`` the divergence of the measured Gaussian from the stored one, in nats.
    """

    channel: int
    mean: float
    ratio: float
    kl: float


@dataclass(frozen=True, eq=False)
class LayerDrift:
    """How far the statistics of the data are from those that a layer has stored.

    ``layer`` is as stored; ``mean`` and ``var``, float64 of shape (features,), are what ``recalibrate`` would store.
    ``drift`` is the distance between the two: the largest over the channels of ``mean_shift`` (in stored standard
    deviations) and of ``abs(std_ratio - 1)``, both of shape (features,). ``kl``, of shape (features,), is the
    divergence of the measured Gaussian from the stored one, in nats. ``standard_error`` is that of the measured mean in
    the worst channel, in stored standard deviations, with samples as units: values within one sample are not
    independent. ``remaining_error`` is the same in measured standard deviations: by how much the mean that
    ``recalibrate`` stores may be off, in what the layer then divides by. ``dead`` names channels whose values do not
    vary. ``gap`` is the share of the whole model's difference between eval mode's output and that with the data's own
    statistics that goes back when this layer alone is given its measured statistics; None where it was not taken.
    ``histogram`` holds edges (bins + 1,) and counts (bins,) of what eval mode brings to the layer, normalized by its
    stored statistics; None where it was not asked for. ``calls`` is how often a forward pass calls the layer,
    ``call_gap`` how far the statistics of its calls, each for itself, are from those of all calls together, in standard
    deviations of the latter (``domains.halves`` measures both).
    """

    layer: BatchNorm
    mean: np.ndarray
    var: np.ndarray
    drift: float
    mean_shift: np.ndarray
    std_ratio: np.ndarray
    kl: np.ndarray
    standard_error: float
    dead: list[int] = field(default_factory=list)
    gap: float | None = None
    histogram: tuple[np.ndarray, np.ndarray] | None = None
    calls: int = 1
    call_gap: float = 0.0
    remaining_error: float = 0.0

    @property
    def name(self) -> str:
        """The layer's name."""
        return self.layer.name

    def leading(self, most: int = 5) -> list[ChannelDrift]:
        """The channels that drift the most: the first one's shift or ratio is the layer's ``drift``."""
        distance = np.maximum(np.abs(self.mean_shift), np.abs(self.std_ratio - 1))
        order = np.argsort(-np.nan_to_num(distance, nan=np.inf), kind="stable")[:most]
        return [ChannelDrift(int(c), *(float(a[c]) for a in (self.mean_shift, self.std_ratio, self.kl))) for c in order]


@dataclass(frozen=True)
class ModeGap:
    """Eval mode's output against train mode's at one batch size; ``batch_size`` None is all samples in one batch.

    ``error`` is scale-relative, ``max|a - b| / max|a|``; ``agreement`` the share of samples whose largest output is
    the same one, None for outputs that are no scores.
    """

    batch_size: int | None
    error: float
    agreement: float | None


@dataclass(frozen=True)
class Advice:
    """What to do, and why.

    ``action`` is one of ``"leave"``, ``"recalibrate"``, ``"freeze"``, ``"adapt"``, ``"reset"`` (and recalibrate),
    ``"replace"`` (the BN layers by another normalization), ``"preprocess"`` (the data otherwise) and ``"separate"``
    (the domains in the data). ``reason`` is a sentence with the figures that decided, ``how`` the line of Python that
    does it, and ``command`` that of the command line, with MODEL and DATA for the two files; both may be empty.
    ``figures`` are the same numbers by name, for programs.
    """

    action: str
    reason: str
    how: str = ""
    figures: dict[str, float] = field(default_factory=dict)
    command: str = ""


@dataclass(frozen=True)
class Preprocessing:
    """How well the data fits what the first BN layer has stored, under one way of preprocessing.

    ``drift`` is that of the first layer under it; ``given`` tells whether the data came that way. ``how`` is the line
    of Python that brings ``images``, a NumPy array of the data as it came, there.
    """

    name: str
    drift: float
    given: bool = False
    how: str = ""


@dataclass(frozen=True)
class Domain:
    """One part of the data, a subfolder for one: its number of samples, and how far its statistics are from all data's.

    ``drift`` is the largest over the layers of the root mean square over a layer's channels, in standard deviations of
    all data; ``noise`` what parts of that size, drawn at random, would show there. ``look`` and ``look_noise`` are the
    same for the first layer alone: classes differ in what deep layers look for, cameras and sites in the first already.
    """

    name: str
    samples: int
    drift: float
    noise: float
    look: float = 0.0
    look_noise: float = 0.0


@dataclass(frozen=True)
class Diagnosis:
    """What ``inspect(model, batches)`` returns: a sequence of its ``layers``, in model order, and what they tell.

    ``modes`` compare eval and train mode; ``alone`` is the largest scale-relative difference between the eval-mode
    output of a sample by itself and in a batch (0 up to rounding, None where it was not taken). ``convergence`` is how
    the standard error of the worst channel's mean, in measured standard deviations, fell with the number of samples: at
    the end it is the largest ``remaining_error``, but for layers that a sample does not reach exactly once.
    ``halves`` are the first and the second half of the data, in the order in which it came, as domains: do its
    statistics move as it goes? ``advice`` begins with what to do first. ``untouched`` gives the reason for each layer
    that was not measured. ``notes`` are sentences worth reading. ``framework`` is the model's: torch, keras or onnx.
    """

    samples: int
    layers: list[LayerDrift]
    advice: list[Advice]
    modes: list[ModeGap] = field(default_factory=list)
    alone: float | None = None
    preprocessing: list[Preprocessing] = field(default_factory=list)
    domains: list[Domain] = field(default_factory=list)
    halves: list[Domain] = field(default_factory=list)
    convergence: list[tuple[int, float]] = field(default_factory=list)
    untouched: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    framework: str = ""

    def __str__(self) -> str:
        layers = f"{counted(len(self), 'BN layer')} measured on {counted(self.samples, 'sample')}"
        return "\n".join([layers, *(f"{one.action}: {one.reason}" for one in self.advice)])

    def __iter__(self) -> Iterator[LayerDrift]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def __getitem__(self, index: int) -> LayerDrift:
        return self.layers[index]

    def worst(self) -> list[LayerDrift]:
        """The layers, those that drift the most first."""
        return sorted(self.layers, key=lambda one: -one.drift)
