"""HTML that is built from elements, so that text is escaped unless it was built here itself.

Names of layers and files, reasons and notes come from anywhere: they are hostile until they are text.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from html import escape

# Characters that show nothing, reorder what stands beside them or cannot be encoded: shown by their number.
UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ud800-\udfff]")
EMPTY = frozenset({"br", "hr", "meta", "link", "path", "rect", "line", "circle"})


class Html(str):
    """Markup: goes into a page as it is."""

    __slots__ = ()


Content = Html | str | int | None


def text(value: str) -> Html:
    """Anything as text."""
    return Html(escape(UNSEEN.sub(lambda found: f"\\u{ord(found[0]):04x}", value)))


def joined(parts: Iterable[Content], between: str = "") -> Html:
    """Several parts one after the other; what is no markup yet is escaped."""
    return Html(text(between).join(_safe(part) for part in parts))


def tag(name: str, attributes: Mapping[str, str | bool] | None = None, *children: Content) -> Html:
    """An element; attributes that are True stand alone, those that are False are left out."""
    pairs = "".join(
        f" {key}" if value is True else f' {key}="{text(str(value))}"'
        for key, value in (attributes or {}).items()
        if value is not False
    )
    if name in EMPTY:
        return Html(f"<{name}{pairs}/>")
    return Html(f"<{name}{pairs}>{joined(children)}</{name}>")


def _safe(part: Content) -> str:
    if part is None:
        return ""
    return part if isinstance(part, Html) else text(str(part))
