"""What to do about a model's BN statistics, and why, from what a diagnosis measured."""

from __future__ import annotations

from bntools.diagnosed import Advice, Diagnosis


def of(diagnosis: Diagnosis, *, batch_size: int | None = None) -> list[Advice]:
    """What to do, first what to do first; ``batch_size`` is that of the training to come."""
    return []
