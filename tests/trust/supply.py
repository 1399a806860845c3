"""What an installation of bntools brings, bare and with each extra: ``make supply``.

Builds the wheel, installs it into environments made from nothing with the versions of constraints.txt, counts packages
and megabytes, lists licences, and uses each as somebody would who has nothing else. DEPENDENCIES.md has the figures.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import environments
from environments import ROOT

INSTALLED = """
import json
from importlib.metadata import distributions

def licence(about):
    for trove in about.get_all("Classifier") or ():
        if trove.startswith("License :: OSI Approved :: "):
            return trove.removeprefix("License :: OSI Approved :: ")
    return (about.get("License") or "not said").strip().splitlines()[0][:60]

print(json.dumps([
    (
        found.name,
        found.metadata.get("License-Expression") or licence(found.metadata),
        sum(file.locate().stat().st_size for file in found.files or () if file.locate().is_file()),
    )
    for found in distributions()
]))
"""
MADE = {
    "torch": """
import numpy, torch
layers = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU()
torch.save(torch.nn.Sequential(*layers).eval(), "model.pt")
numpy.save("x.npy", numpy.random.default_rng(0).random((16, 3, 8, 8), "float32"))
""",
    "keras": """
import keras, numpy
layers = keras.Input((8, 8, 3)), keras.layers.Conv2D(4, 3), keras.layers.BatchNormalization(), keras.layers.ReLU()
keras.Sequential(layers).save("model.keras")
numpy.save("x.npy", numpy.random.default_rng(0).random((16, 8, 8, 3), "float32"))
""",
    "onnx": """
import numpy, onnx
from onnx import helper, numpy_helper
draw = numpy.random.default_rng(0)
stored = {"w": draw.random((4, 3, 3, 3)), "s": [1] * 4, "b": [0] * 4, "m": [0] * 4, "v": [1] * 4}
nodes = [helper.make_node("Conv", ["x", "w"], ["y"]), helper.make_node("BatchNormalization", [*"ysbmv"], ["z"])]
values = [helper.make_tensor_value_info(name, 1, ["n", *shape]) for name, shape in (("x", (3, 8, 8)), ("z", (4, 6, 6)))]
weights = [numpy_helper.from_array(numpy.asarray(value, "float32"), name) for name, value in stored.items()]
graph = helper.make_graph(nodes, "net", values[:1], values[1:], weights)
onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), "model.onnx")
numpy.save("x.npy", draw.random((16, 3, 8, 8), "float32"))
""",
}
SUFFIX = {"torch": "pt", "keras": "keras", "onnx": "onnx"}
USED = (
    "inspect model.{0}",
    "inspect model.{0} x.npy",
    "recalibrate model.{0} x.npy",
    "fold model.recalibrated.{0} x.npy -o folded.{0}",
    "diff model.{0} folded.{0}",
)
EXPORTED = "fold --export exported.onnx model.{0} x.npy"  # works with the extra onnx, and names it without


def main() -> int:
    """Print the table of extras, the licences, and what went wrong; 1 if anything did."""
    problems: list[str] = []
    rows = ["| installed | packages | MB | of these bntools |", "|---|---|---|---|"]
    with tempfile.TemporaryDirectory(prefix="bntools-supply-") as name:
        folder = Path(name)
        wheel = _built(folder)
        for extra in ("", "torch", "onnx", "keras", "torch,onnx,keras"):
            called = f"bntools[{extra}]" if extra else "bntools"
            python = environments.make(
                folder / (extra or "bare"), sys.executable, f"{wheel}{called[7:]}", "-c", str(ROOT / "constraints.txt")
            )
            found = json.loads(_run(python, "-I", "-c", INSTALLED).stdout)
            size = {name: count / 1e6 for name, _, count in found}
            rows.append(f"| `{called}` | {len(found)} | {sum(size.values()):,.0f} | {size['bntools']:.1f} |")
            problems += _use(python, extra, folder / "used")
    print("\n".join([*rows, "", *_licences(found), "", *(problems or ["every command did as it should"])]))
    return bool(problems)


def _built(folder: Path) -> Path:
    """The wheel, whose size and that of the sources it prints."""
    environments.copy(folder / "source")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(folder / "source")]
    subprocess.run(command, capture_output=True, check=True)
    for path in sorted(folder.glob("bntools-*")):
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return next(folder.glob("*.whl"))


def _use(python: Path, extra: str, folder: Path) -> list[str]:
    """Type commands as somebody would who has this extra only; what did not go as it should."""
    problems = []

    def typed(line: str, lacks: str | None = None) -> None:
        done = _run(python, "-m", "bntools.cli", *line.split(), cwd=folder)
        named = f"pip install 'bntools[{lacks}]'"
        if done.returncode != bool(lacks) or (lacks and named not in done.stderr) or "Traceback" in done.stderr:
            problems.append(f"[{extra}] bntools {line}: status {done.returncode}: {done.stderr[-300:]}")

    for kind, code in MADE.items():
        folder = folder.with_name(f"used-{extra}-{kind}")
        folder.mkdir()
        typed("--help")
        made = _run(python, "-c", code, cwd=folder)
        suffix = SUFFIX[kind]
        if kind not in extra:
            if made.returncode:  # its framework is not there; onnx is, without its extra, where Keras is
                (folder / f"model.{suffix}").write_bytes(b"a model")
                (folder / "x.npy").touch()
            typed(f"recalibrate model.{suffix} x.npy", lacks=kind)
            continue
        for line in USED:
            typed(line.format(suffix))
        typed(EXPORTED.format(suffix), lacks=None if "onnx" in extra else "onnx")
    return problems


def _licences(found: list[tuple[str, str, int]]) -> list[str]:
    by = defaultdict(list)
    for name, licence, _ in found:
        by[licence].append(name)
    return [f"{licence}: {', '.join(sorted(names, key=str.lower))}" for licence, names in sorted(by.items())]


def _run(*command: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], cwd=cwd, capture_output=True, text=True, check=False)


if __name__ == "__main__":
    raise SystemExit(main())
