"""The toolkit for batch-normalization statistics, from fine-tuning to deployment."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from bntools.errors import BntoolsError, NotFrozenError, VerificationError

if TYPE_CHECKING:
    from bntools.adapting import adapt
    from bntools.applying import apply
    from bntools.banking import bank
    from bntools.conversion import convert
    from bntools.diffing import diff
    from bntools.exporting import export
    from bntools.files import load, save
    from bntools.folding import fold
    from bntools.freezing import assert_frozen, freeze, reset, unfreeze
    from bntools.inference import to_inference
    from bntools.inspection import inspect
    from bntools.layer import BatchNorm
    from bntools.moments import Moments
    from bntools.monitoring import watch
    from bntools.recalibration import recalibrate
    from bntools.reports import report
    from bntools.statfiles import load_stats, save_stats
    from bntools.stats import Statistics, statistics
    from bntools.using import use
    from bntools.verification import verify

__version__ = "0.1.0"

_HOME = {
    "BatchNorm": "layer",
    "Moments": "moments",
    "load": "files",
    "save": "files",
    "inspect": "inspection",
    "freeze": "freezing",
    "unfreeze": "freezing",
    "assert_frozen": "freezing",
    "reset": "freezing",
    "recalibrate": "recalibration",
    "to_inference": "inference",
    "fold": "folding",
    "convert": "conversion",
    "adapt": "adapting",
    "watch": "monitoring",
    "export": "exporting",
    "verify": "verification",
    "report": "reports",
    "Statistics": "stats",
    "statistics": "stats",
    "save_stats": "statfiles",
    "load_stats": "statfiles",
    "apply": "applying",
    "use": "using",
    "bank": "banking",
    "diff": "diffing",
}

__all__ = [
    "BatchNorm",
    "BntoolsError",
    "Moments",
    "NotFrozenError",
    "Statistics",
    "VerificationError",
    "adapt",
    "apply",
    "assert_frozen",
    "bank",
    "convert",
    "diff",
    "export",
    "fold",
    "freeze",
    "inspect",
    "load",
    "load_stats",
    "recalibrate",
    "report",
    "reset",
    "save",
    "save_stats",
    "statistics",
    "to_inference",
    "unfreeze",
    "use",
    "verify",
    "watch",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"bntools.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
