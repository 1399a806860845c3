"""The verb convert: BN layers give way to another normalization, for training that BN does not suit."""

from __future__ import annotations

from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

from bntools import backends
from bntools.batches import count
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm, Selection, select

TARGETS = ("batchnorm", "frozen", "groupnorm")
MOST_GROUPS = 32  # the default of Wu and He (2018)
FEWEST_CHANNELS = 8  # in a group: with fewer, a group of a small map is normalized by few values

NEW = "The model is a new one, its parameters are new objects: make the optimizer for it afterwards"
NOTES = {
    "batchnorm": (
        "Preserved: statistics, scale and shift, eps, momentum, modes, flags, hooks and names, so outputs in eval mode "
        "stay. Not preserved: in training on several processes each now normalizes with its own batch's statistics",
        f"{NEW}; the old one's state fits, for the parameters are the same ones in the same order",
    ),
    "frozen": (
        "Preserved: outputs in eval mode, to rounding, now also in training. Not preserved: statistics, scale and "
        "shift have become two buffers 'scale' and 'shift' that nothing trains, so inspect and recalibrate find no BN "
        "there. A state dict loads into a model that was converted the same way; a pickled model needs bntools to load",
        NEW,
    ),
    "groupnorm": (
        "Preserved: scale and shift with their names, as a start for training, eps, modes and hooks. Not preserved: "
        "the outputs, also in eval mode, for each sample is now normalized by itself; the running statistics are gone. "
        "Train the model, at any batch size, before it is used",
        f"{NEW}; the old one's state fits where scale and shift are parameters, in the same order",
    ),
}


@dataclass(frozen=True)
class Conversion:
    """What ``convert`` gives.

    ``model`` is the new model, ``converted`` names the layers that are another kind in it, ``kept`` the others, each
    with its reason. ``groups`` is the number of groups of each layer that became a GroupNorm. ``notes`` say what is
    preserved and what is not.
    """

    model: Any
    converted: list[str]
    kept: dict[str, str]
    groups: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = f"converted {len(self.converted)} of {len(self.converted) + len(self.kept)} BN layers"
        reasons = "".join(f"\n  {name}: {reason}" for name, reason in self.kept.items())
        return f"{count}, kept {len(self.kept)}:{reasons}" if self.kept else count


def convert(
    model: Any, to: str, *, layers: Selection = None, groups: int | None = None, example: Any = None
) -> Conversion:
    """A new model in which BN layers are another normalization.

    ``to="batchnorm"``: SyncBatchNorm back to BatchNorm, with statistics, affine, modes, flags, device, dtype and hooks.
    ``to="frozen"``: BN to a fixed scale and shift per channel, which computes in training what eval mode computed.
    ``to="groupnorm"``: BN to GroupNorm (Wu and He 2018), for training on small batches. The number of groups is the
    largest that divides the channels, up to 32, with at least 8 channels in each, else 1; ``groups`` overrides it.

    The model stays as it is. Each layer keeps its place and name; scale and shift of a layer that has some remain
    parameters (but for "frozen"). ``notes`` of the result state what is preserved and what is not.

    Args:
        model: a torch.nn.Module.
        layers: names, globs or a predicate on BatchNorm; None for all layers.
        example: for "batchnorm", one batch as the model takes it: it shows which layers are BatchNorm1d, 2d or 3d.
            Without it, the convolution or dense layer before each tells; a wrong guess raises when the model runs.

    Raises BntoolsError for models of other frameworks, for ``groups`` that do not divide a layer's channels, and for
    a model that cannot be copied.

        small = bntools.convert(model, "groupnorm").model
    """
    if to not in TARGETS:
        raise BntoolsError(f"found to={to!r}, expected one of {', '.join(TARGETS)}")
    backend = backends.of(model)
    if not hasattr(backend, "convert"):
        raise BntoolsError(
            f"found a {type(model).__name__} where a torch.nn.Module was expected: convert puts other modules in the "
            f"places of BN layers, which Keras models and ONNX files have baked into their graphs. Build the model "
            f"with the other normalization; bntools.freeze and bntools.fold serve all frameworks"
        )
    if example is not None and not count(example):
        raise BntoolsError("the example holds no samples")
    found = backend.layers(model)
    chosen = select(found, layers, backends.absence(model))
    numbers = _groups(chosen, to, groups)
    new, reasons = backend.convert(model, to, [layer.name for layer in chosen], groups=numbers, example=example)
    names = {layer.name for layer in chosen}
    kept = {one.name: reasons.get(one.name, "not selected by layers=") for one in found if one.name not in names}
    kept |= reasons
    converted = [layer.name for layer in chosen if layer.name not in kept]
    return Conversion(
        new,
        converted,
        {layer.name: kept[layer.name] for layer in found if layer.name in kept},
        {name: numbers[name] for name in converted if name in numbers},
        list(NOTES[to]) if converted else [],
    )


def _groups(chosen: list[BatchNorm], to: str, groups: int | None) -> dict[str, int]:
    """The number of groups of each layer that is to be a GroupNorm."""
    if to != "groupnorm":
        if groups is not None:
            raise BntoolsError(f"found groups={groups!r} with to={to!r}: only 'groupnorm' has groups")
        return {}
    if groups is None:
        return {layer.name: groups_for(layer.features) for layer in chosen if layer.initialized}
    if not isinstance(groups, Integral) or isinstance(groups, bool) or groups < 1:
        raise BntoolsError(f"found groups={groups!r}, expected a number of groups, 1 or more")
    for layer in chosen:
        if layer.features % groups:
            raise BntoolsError(
                f"layer {layer.name!r}: its {layer.features} channels must be divisible by groups (={groups}); leave "
                f"groups= out, or name the layers that it fits in layers="
            )
    return {layer.name: int(groups) for layer in chosen}


def groups_for(channels: int) -> int:
    """The largest divisor of ``channels``, up to 32, that leaves at least 8 channels to a group; else 1."""
    fits = (n for n in range(MOST_GROUPS, 0, -1) if channels % n == 0 and channels // n >= FEWEST_CHANNELS)
    return next(fits, 1)
