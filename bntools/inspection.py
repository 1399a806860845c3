"""The verb inspect: what a model's BN layers hold, and what is wrong with them."""

from __future__ import annotations

from typing import Any

from bntools import backends
from bntools.layer import BatchNorm


def inspect(model: Any) -> list[BatchNorm]:
    """The record of every BN layer of a model, in the order in which the model defines them.

    The arrays of a record are copies: changing them changes nothing in the model. A model without
    BN layers gives an empty list. Raises BntoolsError for what is not a model.

        for layer in bntools.inspect(model):
            print(layer.name, layer.features, layer.problems)
    """
    return backends.of(model).layers(model)
