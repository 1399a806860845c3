"""A BN layer of which only the statistics, or only scale and shift, are frozen."""

from __future__ import annotations

from typing import Any

import keras

from bntools.errors import BntoolsError

PARTS = ("stats", "affine")
Base: Any = keras.layers.BatchNormalization


@keras.saving.register_keras_serializable(package="bntools")
class FrozenBatchNormalization(Base):
    """``keras.layers.BatchNormalization`` that keeps one of its two parts while the other trains.

    Keras couples both in ``trainable``. ``frozen="stats"`` normalizes with the stored statistics in training as well,
    and they do not move; ``frozen="affine"`` keeps gamma and beta, also when a model around it is set to
    ``trainable = True``. It saves, reloads and clones like the layer that it stands for; a process that loads it
    imports bntools first, as ``bntools.load`` does.

    Raises BntoolsError where ``frozen`` is neither.
    """

    def __init__(self, *args: Any, frozen: str = "stats", **kwargs: Any):
        if frozen not in PARTS:
            raise BntoolsError(f"frozen={frozen!r}: expected one of {', '.join(map(repr, PARTS))}")
        super().__init__(*args, **kwargs)
        self.frozen = frozen

    def add_weight(self, *args: Any, **kwargs: Any) -> Any:
        """A variable as the base class makes it, one that stays where scale and shift are frozen."""
        variable = super().add_weight(*args, **kwargs)
        if self.frozen == "affine":
            variable.trainable = False
        return variable

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize, with the stored statistics if those are frozen."""
        return super().call(inputs, training=False if self.frozen == "stats" else training, mask=mask)

    def get_config(self) -> dict[str, Any]:
        """The base class's, and which part is frozen."""
        return {**super().get_config(), "frozen": self.frozen}

    @property
    def trainable(self) -> bool:
        """Whether the part that is not frozen trains."""
        return Base.trainable.fget(self)

    @trainable.setter
    def trainable(self, value: bool) -> None:
        Base.trainable.fset(self, value)
        if vars(self).get("frozen") == "affine":
            keep_affine(self)


def keep_affine(layer: Any) -> None:
    """Let no optimizer see the scale and shift of a layer."""
    for variable in (layer.gamma, layer.beta):
        if variable is not None:
            variable.trainable = False
