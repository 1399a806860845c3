"""Keeps what was measured: results.json, and from it the tables of RESULTS.md and of the README.

Each part stands in results.json with its own date, machine and versions, so that parts can be run one at a time.
``python tests/benchmarks/record.py`` writes the tables again. Architectures of Keras come one at a time as well:
``python tests/benchmarks/keras_architectures.py NAME ... | python tests/benchmarks/record.py keras_architectures``.
"""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

from measure import Row

HERE = Path(__file__).parent
RESULTS, TABLES, README = HERE / "results.json", HERE / "RESULTS.md", HERE.parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: written by make bench -->", "<!-- end of benchmarks -->"
PACKAGES = (
    *("torch", "torchvision", "timm", "tensorflow", "keras", "onnx", "onnxruntime", "onnxscript", "onnxsim"),
    *("onnxslim", "fvcore", "numpy"),
)


def keep(part: str, rows: Iterable[Row], about: str, packages: Iterable[str] = ()) -> None:
    """Replace one part's rows by these, measured now and here, and write the tables.

    Named are the versions of ``packages``, or of what this process has imported.
    """
    results = load()
    results[part] = {
        "about": about,
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{os.cpu_count()} cores ({_processor()}), Python {platform.python_version()}",
        "versions": {name: metadata.version(name) for name in packages or PACKAGES if name in sys.modules or packages},
        "rows": [asdict(row) for row in rows],
    }
    _replace(RESULTS, json.dumps(results, indent=1) + "\n")
    write()


def load() -> dict[str, Any]:
    """What was measured last of each part."""
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def write() -> None:
    """The tables of RESULTS.md and of the README, from results.json."""
    from summary import lines

    results = load()
    head = "# Benchmarks\n\nWritten by `make bench`; `python tests/benchmarks NAME` measures one part anew.\n"
    head += "Ratios are of medians taken in turns in one run.\n"
    _replace(TABLES, head + "".join(_section(part, found) for part, found in results.items()))
    text = README.read_text()
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    if pattern.search(text):
        table = "\n".join([BEGIN, "", *lines(results), "", *provenance(results), "", END])
        _replace(README, pattern.sub(lambda _: table, text))


def provenance(results: dict[str, Any]) -> list[str]:
    """On which machines and with which versions, in words; several where parts were run apart."""
    machines = dict.fromkeys(part["machine"] for part in results.values())
    versions: dict[str, dict[str, None]] = {}
    for part in results.values():
        for name, version in part["versions"].items():
            versions.setdefault(name, {})[version] = None
    named = ", ".join(f"{name} {' and '.join(found)}" for name, found in versions.items())
    return [f"Machine: {'; '.join(machines)}. Versions: {named}."]


def _section(part: str, found: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    where = f"`python tests/benchmarks {part}`, {found['date']}, {found['machine']}, {versions}."
    rows = [Row(**row) for row in found["rows"]]
    plain, wide = [row for row in rows if not row.cells], [row for row in rows if row.cells]
    columns = list(dict.fromkeys(name for row in wide for name in row.cells))
    tables = [
        _table(["what", "measured", "goal", ""], [[row.what, row.figure, row.goal, _missed(row)] for row in plain]),
        _table(["what", *columns, ""], [[row.what, *map(row.cells.get, columns), _missed(row)] for row in wide]),
    ]
    return "".join(f"\n{text}\n" for text in (f"## {part}", found["about"], where, *filter(None, tables)))


def _table(columns: list[str], rows: list[list[str | None]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(cell or '' for cell in line)} |" for line in lines) if rows else ""


def _missed(row: Row) -> str:
    return "" if row.reached else "missed"


def _replace(path: Path, text: str) -> None:
    """Whole or not at all: a run that is stopped leaves the figures that were there."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    beside.replace(path)


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _architectures(text: str) -> None:
    """Put in architectures that were measured one at a time: a line of JSON each."""
    module = importlib.import_module("keras_architectures")
    found = module.read(load().get("keras_architectures", {}).get("rows", []))
    found |= {one["name"]: one for one in map(json.loads, text.splitlines())}
    found = {name: found[name] for name in module.NAMES if name in found}
    packages = ("keras", "tensorflow", "onnxruntime")
    keep("keras_architectures", module.table(found), paragraphs(module.__doc__), packages)


def paragraphs(text: str | None) -> str:
    """Those of a docstring, each in one line."""
    return "\n\n".join(" ".join(one.split()) for one in (text or "").split("\n\n"))


if __name__ == "__main__":
    if sys.argv[1:] == ["keras_architectures"]:
        _architectures(sys.stdin.read())
    else:
        write()
