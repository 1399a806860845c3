"""The frame of a report: one HTML file that needs nothing else, and the parts that all kinds of reports are made of."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from pathlib import Path

from bntools import __version__
from bntools.reports.markup import Content, Html, joined, tag, text


@dataclass(frozen=True)
class Section:
    """One part of a page: ``explanation`` says in a sentence or two what is shown and what to look for."""

    anchor: str
    title: str
    explanation: Content
    body: Html


@dataclass(frozen=True)
class Verdict:
    """What a page begins with: ``tone`` is "good", "act", "bad" or "plain"; ``body`` says why and what to do."""

    tone: str
    headline: str
    body: Html


def page(title: str, about: Mapping[str, str], verdict: Verdict, sections: Sequence[Section]) -> str:
    """The whole file. ``about`` are facts by name, such as the model's file, that stand under the title."""
    facts = {**about, "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M}, bntools {__version__}"}
    head = joined(
        [
            tag("meta", {"charset": "utf-8"}),
            tag("meta", {"http-equiv": "Content-Security-Policy", "content": _policy()}),
            tag("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
            tag("meta", {"name": "color-scheme", "content": "light dark"}),
            tag("link", {"rel": "icon", "href": "data:,"}),
            tag("title", None, title),
            tag("style", None, Html(_asset("page.css"))),
        ]
    )
    body = joined(
        [
            tag("header", None, tag("h1", None, title), _facts(facts)),
            tag(
                "main",
                None,
                tag("section", {"class": f"verdict {verdict.tone}"}, tag("h2", None, verdict.headline), verdict.body),
                _contents(sections) if len(sections) > 2 else None,
                *(_section(one) for one in sections),
            ),
            tag("script", None, Html(_asset("page.js"))),
        ]
    )
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{body}</body></html>\n'


def _policy() -> str:
    """No network at all, and no script but the page's own: not even one that a layer's name would smuggle in."""
    digest = base64.b64encode(hashlib.sha256(_asset("page.js").encode()).digest()).decode()
    return f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


@cache
def _asset(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _facts(facts: Mapping[str, str]) -> Html:
    pairs = (tag("div", None, tag("dt", None, key), tag("dd", None, value)) for key, value in facts.items())
    return tag("dl", {"class": "facts"}, *pairs)


def _contents(sections: Sequence[Section]) -> Html:
    links = (tag("a", {"href": f"#{one.anchor}"}, one.title) for one in sections)
    return tag("nav", {"aria-label": "Contents"}, *links)


def _section(one: Section) -> Html:
    explanation = tag("p", {"class": "explanation"}, one.explanation) if one.explanation else None
    return tag("section", {"id": one.anchor}, tag("h2", None, one.title), explanation, one.body)


def code(command: str) -> Html:
    """Something to type, which the page's script gives a button to copy it."""
    block = tag("pre", {"class": "how", "tabindex": "0"}, tag("code", None, command))
    return tag("div", {"class": "command"}, block)


def name(full: str, shown: str | None = None) -> Html:
    """The name of a layer, output or file."""
    title: dict[str, str | bool] = {"class": "name"}
    return tag("bdi", title if shown in (None, full) else {**title, "title": full}, shown or full)


def tiles(figures: Mapping[str, Content]) -> Html:
    """The few figures that matter most, by what they are."""
    pairs = (tag("div", None, tag("dt", None, key), tag("dd", None, value)) for key, value in figures.items())
    return tag("dl", {"class": "tiles"}, *pairs)


def table(caption: str, headers: Sequence[str], rows: Sequence[Sequence[Content]]) -> Html:
    """A table that scrolls inside itself; the first column names the rows."""
    heads = tag("tr", None, *(tag("th", {"scope": "col"}, header) for header in headers))
    lines = (
        tag("tr", None, tag("th", {"scope": "row"}, row[0]), *(tag("td", None, cell) for cell in row[1:]))
        for row in rows
    )
    inside = tag("table", None, tag("thead", None, heads), tag("tbody", None, *lines))
    return tag("div", {"class": "scroll", "role": "region", "aria-label": caption, "tabindex": "0"}, inside)


def listed(items: Sequence[Content]) -> Html:
    """Sentences one below the other."""
    return tag("ul", {"class": "plain"}, *(tag("li", None, item) for item in items))


def reasons(by_name: Mapping[str, str]) -> Html:
    """Layers by the reason they share: a reason is read once, however many have it."""
    names: dict[str, list[str]] = {}
    for one, reason in by_name.items():
        names.setdefault(reason, []).append(one)
    items = (
        joined([joined([name(one) for one in having], ", "), text(": "), reason]) for reason, having in names.items()
    )
    return listed(list(items))


def remarks(untouched: Mapping[str, str], notes: Sequence[str]) -> list[Section]:
    """The sections that end a report: which layers were left out, and what else is worth reading."""
    found = []
    if notes:
        found.append(Section("notes", "Notes", None, listed(list(notes))))
    if untouched:
        explanation = "Layers that were left as they are, by the reason."
        found.append(Section("untouched", "Left out", explanation, reasons(untouched)))
    return found
