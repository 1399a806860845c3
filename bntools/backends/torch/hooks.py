"""Hooks that bntools puts on a model for a while."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from bntools.errors import BntoolsError


class Hook:
    """A hook on one module. In a copy of the module it does nothing, and pickling it is refused in these words."""

    def __init__(self, call: Callable[..., None], refusal: str):
        self._call = call
        self.refusal = refusal

    def __call__(self, module: nn.Module, *args: Any) -> None:
        """Pass on what the hook is told."""
        self._call(module, *args)

    def __deepcopy__(self, memo: Any) -> Any:
        return _nothing

    def __reduce__(self) -> Any:
        raise BntoolsError(self.refusal)


def _nothing(*_: Any) -> None:
    """What a copied hook does."""
