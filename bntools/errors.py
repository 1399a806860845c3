"""The errors that bntools raises: one base class and its few children."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bntools.verification import Verification


class BntoolsError(Exception):
    """Something was refused or failed; the message says what was found, where, and what to do."""


class NotFrozenError(BntoolsError):
    """A layer that was expected to be frozen would still move in training."""


class VerificationError(BntoolsError):
    """Two models were expected to agree and do not; ``check`` holds the figures."""

    def __init__(self, message: str, check: Verification | None = None):
        super().__init__(message)
        self.check = check
