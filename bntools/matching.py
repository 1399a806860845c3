"""Which BN layer of one model is which of another's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np

from bntools.digests import digest
from bntools.errors import BntoolsError
from bntools.layer import BatchNorm

NAMED = 3
Pairs = dict[str, str]


@dataclass(frozen=True)
class Match:
    """Pairs of layer names, of the one model and the other, and in words how they were found."""

    pairs: Pairs
    how: str


def match(a: list[BatchNorm], b: list[BatchNorm], mapping: Mapping[str, str] | None = None) -> Match:
    """Pair the layers of two models.

    ``mapping`` gives names in ``b`` by names in ``a``, or globs with as many ``*`` on both sides, which stand for
    the same text: ``{"backbone.*": "net.*"}``. Layers that it leaves out keep their names.

    Without it, and where no name is in both, layers are told by what else is unambiguous: a prefix that all names of
    one side have, scale and shift that only one layer on either side has, or at last their order, where features agree
    one by one. How it was done is in the result. Raises BntoolsError where nothing tells.
    """
    mine, theirs = [layer.name for layer in a], [layer.name for layer in b]
    if mapping:
        return Match(_mapped(mine, theirs, mapping), "by --map")
    if common := {name: name for name in mine if name in set(theirs)}:
        return Match(common, "by name")
    if not mine or not theirs:
        return Match({}, "not at all: one of them has no BN layers")
    found = _by_prefix(mine, theirs) or _by_affine(a, b) or _by_order(a, b)
    if found is None:
        raise BntoolsError(
            f"no BN layer has the same name in both ({_some(mine)}; and {_some(theirs)}), and order and features do "
            f"not tell which is which: give --map OLD=NEW (mapping=)"
        )
    return found


def _mapped(mine: list[str], theirs: list[str], mapping: Mapping[str, str]) -> Pairs:
    pairs: Pairs = {}
    for old, new in mapping.items():
        if old.count("*") != new.count("*"):
            raise BntoolsError(f"the mapping {old}={new}: expected as many * on both sides")
        pattern = re.compile("(.*)".join(map(re.escape, old.split("*"))))
        hits = {name: hit for name in mine if (hit := pattern.fullmatch(name))}
        if not hits:
            raise BntoolsError(
                f"the mapping {old}={new}: no layer of the first model is called {old}{_close(old, mine)}"
            )
        for name, hit in hits.items():
            pieces = iter(hit.groups())
            target = re.sub(r"\*", lambda _: next(pieces), new)  # noqa: B023
            if target not in theirs:
                raise BntoolsError(
                    f"the mapping {old}={new}: {name} would be {target}, and the second model has no such layer"
                    f"{_close(target, theirs)}"
                )
            pairs[name] = target
    pairs |= {name: name for name in mine if name not in pairs and name in theirs and name not in pairs.values()}
    twice = [name for name in pairs.values() if list(pairs.values()).count(name) > 1]
    if twice:
        sources = ", ".join(name for name, target in pairs.items() if target == twice[0])
        raise BntoolsError(f"the mapping gives {twice[0]} to several layers: {sources}")
    return {name: pairs[name] for name in mine if name in pairs}


def _by_prefix(mine: list[str], theirs: list[str]) -> Match | None:
    """Where the names are the same but for something before all of those on one side."""
    for one, other, flipped in ((mine, theirs, False), (theirs, mine, True)):
        parts = one[0].split(".")
        for count in range(1, len(parts)):
            prefix = ".".join(parts[:count]) + "."
            if all(name.startswith(prefix) for name in one) and {n.removeprefix(prefix) for n in one} & set(other):
                pairs = {n: n.removeprefix(prefix) for n in one if n.removeprefix(prefix) in other}
                pairs = {new: old for old, new in pairs.items()} if flipped else pairs
                return Match(pairs, f"by name, but for the prefix {prefix!r}")
    return None


def _by_affine(a: list[BatchNorm], b: list[BatchNorm]) -> Match | None:
    """Where scale and shift, which an export keeps, are those of one layer alone, for each of them on one side."""
    mine, theirs = _by_digest(a), _by_digest(b)
    pairs = {mine[key]: theirs[key] for key in mine if key in theirs}
    if not pairs or len(pairs) < min(len(a), len(b)):
        return None
    return Match(pairs, "by their scale and shift, which are the same in both")


def _by_digest(layers: list[BatchNorm]) -> dict[str, str]:
    found: dict[str, list[str]] = {}
    for layer in layers:
        if layer.scale is not None and layer.shift is not None and np.ptp(layer.scale) + np.ptp(layer.shift) > 0:
            key = digest(np.concatenate([layer.scale, layer.shift]).astype("<f4").tobytes())
            found.setdefault(key, []).append(layer.name)
    return {key: names[0] for key, names in found.items() if len(names) == 1}


def _by_order(a: list[BatchNorm], b: list[BatchNorm]) -> Match | None:
    if [layer.features for layer in a] != [layer.features for layer in b]:
        return None
    pairs = {one.name: other.name for one, other in zip(a, b, strict=True)}
    return Match(pairs, "by their order, in which their features agree: a guess, which --map replaces")


def _some(names: list[str]) -> str:
    return ", ".join(names[:NAMED]) + (", ..." if len(names) > NAMED else "")


def _close(name: str, names: list[str]) -> str:
    close = get_close_matches(name, names, n=NAMED, cutoff=0.3) or names[:NAMED]
    return f": did you mean {', '.join(close)}?" if close else ""
