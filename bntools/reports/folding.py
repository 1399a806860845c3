"""The report of a fold or an export: the network's BN layers as they stand, which are gone and why others are not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from bntools import words
from bntools.exporting import Exported
from bntools.folding import Folded
from bntools.reports import verification
from bntools.reports.markup import Content, Html, joined, tag
from bntools.reports.page import Section, Verdict, name, page, reasons, tiles

OPERATOR = re.compile(r"/BatchNormalization(_\d+)?$")  # what exporters append to the name of the module
INTO = 3  # weights that are named; a layer after a concatenation has one in each branch


def report(result: Folded | Exported, title: str, about: Mapping[str, str]) -> str:
    """The page of a fold, or of an export, which folds too."""
    exported = isinstance(result, Exported)
    check = result if isinstance(result, Exported) else result.check
    total = len(result.folded) + len(result.kept)
    facts: dict[str, Content] = {"BN layers folded": f"{len(result.folded):,} of {total:,}"}
    facts["kept, each with its reason"] = f"{len(result.kept):,}"
    if isinstance(result, Exported):
        facts["exporter"] = result.exporter
        facts["batch size of the file"] = "any" if result.dynamic else "fixed"
    headline = f"{'Exported: ' if exported else ''}folded {len(result.folded)} of {words.counted(total, 'BN layer')}"
    tone = ("act" if result.kept else "good") if check.passed else "bad"
    body = joined([tag("p", None, verification.sentence(check)), tiles({**facts, **verification.figures(check)})])
    sections = [_network(result), _kept(result), *verification.sections(check)]
    verdict = Verdict(tone, headline[0].upper() + headline[1:], body)
    return page(title or ("BN export" if exported else "BN fold"), about, verdict, [one for one in sections if one])


def _network(result: Folded | Exported) -> Section | None:
    names = list(result.into) or [*result.folded, *result.kept]
    if not names:
        return None
    groups: list[tuple[str, list[str]]] = []
    for one in names:
        parent = _split(one)[0]
        if not groups or groups[-1][0] != parent:
            groups.append((parent, []))
        groups[-1][1].append(one)
    rows = (tag("li", None, _heading(parent), _norms(having, parent, result)) for parent, having in groups)
    explanation = (
        "The BN layers in the order in which they stand in the model, block by block. A filled one is part of the "
        "weights it names; a dashed one is still there, and says why."
    )
    return Section("network", "The network", explanation, tag("ol", {"class": "net"}, *rows))


def _heading(parent: str) -> Html:
    return tag("h3", None, name(parent, words.shortened(parent, 60)) if parent else "top level")


def _norms(having: Sequence[str], parent: str, result: Folded | Exported) -> Html:
    return tag("div", {"class": "norms"}, *(_norm(one, parent, result) for one in having))


def _norm(one: str, parent: str, result: Folded | Exported) -> Html:
    short = tag("strong", None, name(one, words.shortened(_split(one)[1], 40)))
    if one in result.kept:
        why = tag("span", {"class": "why"}, f"kept: {result.kept[one]}")
        return tag("div", {"class": "norm kept"}, short, why)
    said = _places(result.into.get(one, ()), parent)
    into = tag("span", {"class": "into"}, f" {said}") if said else None
    return tag("div", {"class": "norm folded"}, short, into)


def _places(places: Sequence[str], parent: str) -> str:
    """Which weights took the layer up, by their names within the block."""
    if not places:
        return ""
    short = [words.shortened(place.removeprefix(f"{parent}.") if parent else place, 40) for place in places[:INTO]]
    more = f" and {len(places) - INTO} more" if len(places) > INTO else ""
    return f"into {', '.join(short)}{more}"


def _split(full: str) -> tuple[str, str]:
    """The block a layer stands in, and its own name there."""
    bare = OPERATOR.sub("", full)
    at = max(bare.rfind("."), bare.rfind("/"))
    return (bare[:at].strip("/"), bare[at + 1 :]) if at > 0 else ("", bare.strip("/") or full)


def _kept(result: Folded | Exported) -> Section | None:
    if not result.kept:
        return None
    return Section(
        "kept", "Why layers were kept", "Each reason once, with the layers it holds for.", reasons(result.kept)
    )
