"""Reports: a diagnosis, a recalibration, a fold, an export or a verification as one HTML file."""

from __future__ import annotations

import os
from collections.abc import Mapping

from bntools.diagnosis.records import Diagnosis
from bntools.errors import BntoolsError
from bntools.exporting import Exported
from bntools.files import atomic_write
from bntools.folding import Folded
from bntools.recalibrated import Recalibration
from bntools.trial import Verification

Reported = Diagnosis | Recalibration | Folded | Verification


def report(
    result: Reported, path: str | os.PathLike[str], *, title: str = "", about: Mapping[str, str] | None = None
) -> None:
    """Write what a verb returned as an HTML file that any browser opens, reads aloud and prints.

    The one file holds everything: it asks no network for anything, also where it is opened later. It is there as a
    whole or not at all, and replaces a file of that name.

    Args:
        result: from ``inspect(model, batches)``, ``recalibrate``, ``fold``, ``export`` or ``verify``; the ``check`` of
            a VerificationError too.
        path: the file to write, ending in ``.html``.
        title: stands at the top; empty for that of its kind.
        about: facts that stand under it, by what they are: ``{"model": "model.pt"}``.

    Raises BntoolsError for another result or suffix, and where the file cannot be written; it is then as before.

        bntools.report(bntools.inspect(model, batches), "report.html")
    """
    if os.path.splitext(path)[1].lower() not in (".html", ".htm"):
        raise BntoolsError(f"{os.fspath(path)}: expected a name that ends in .html")
    written = rendered(result, title, about or {})
    with atomic_write(path) as temporary:
        temporary.write_text(written, encoding="utf-8")


def rendered(result: Reported, title: str = "", about: Mapping[str, str] | None = None) -> str:
    """The same file as text."""
    from bntools.reports import diagnosis, folding, recalibration, verification

    facts = about or {}
    match result:
        case Diagnosis():
            return diagnosis.report(result, title, facts)
        case Recalibration():
            return recalibration.report(result, title, facts)
        case Folded() | Exported():
            return folding.report(result, title, facts)
        case Verification():
            return verification.report(result, title, facts)
    raise BntoolsError(
        f"there is no report on a {type(result).__name__}: expected what inspect(model, batches), recalibrate, fold, "
        "export or verify returned"
    )
