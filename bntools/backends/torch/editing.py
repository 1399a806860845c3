"""A module is worked on as it is: what a verb changes in it is changed at once."""

from __future__ import annotations

from torch import nn


def edit(model: nn.Module) -> nn.Module:
    """What a verb works on: the module itself."""
    return model


def commit(model: nn.Module) -> None:
    """Nothing is left to be stored."""


def handed(new: nn.Module, like: nn.Module) -> nn.Module:
    """A new model in the form in which the old one was given."""
    return new
