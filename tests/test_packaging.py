"""What is in the wheel, and what an import of bntools costs."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SKIPPED = {"build", "dist", "__pycache__"}
WHEEL = 700_000  # bytes at most
ABOUT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = set(ABOUT["optional-dependencies"]) - {"test", "bench"}  # the others are for users
# modules -> what is installed to have them, where the names differ
CALLED = {"PIL": "pillow", "google": "protobuf", "sklearn": "scikit_learn"}
# Looked for where the user has them: callbacks are classes of these frameworks.
OFFERED = {"lightning", "pytorch_lightning", "transformers", "tensorboard", "datasets"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> list[str]:
    """The names in a wheel built from the sources that git knows, or would know."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("bntools-*.whl")
    assert path.stat().st_size < WHEEL
    return zipfile.ZipFile(path).namelist()


@cache
def tracked() -> tuple[str, ...]:
    """The files of the project: what is there and not ignored."""
    found = []
    for folder, inside, names in os.walk(ROOT):  # not into environments, which hold tens of thousands
        inside[:] = [name for name in inside if not name.startswith(".") and name not in SKIPPED]
        found += [str(Path(folder, name).relative_to(ROOT)) for name in names if not name.startswith(".")]
    return tuple(found)


def test_the_wheel_holds_the_whole_tree(wheel):
    """Every module of bntools and of cli, and the marker of its types, is in the wheel under its place."""
    expected = {
        name for name in tracked() if name.startswith("bntools/") and name.endswith((".py", "py.typed", ".css", ".js"))
    }
    expected |= {f"bntools/{name}" for name in tracked() if name.startswith("cli/") and name.endswith(".py")}
    assert {name for name in wheel if ".dist-info/" not in name} == expected
    assert "bntools/cli/recalibrate.py" in expected
    assert "bntools/backends/torch/layers.py" in expected


def test_the_wheel_installs_one_package(wheel):
    """Nothing but bntools is at the top: no cli, no tests, no samples."""
    assert {name.split("/")[0] for name in wheel if ".dist-info/" not in name} == {"bntools"}


def test_the_wheel_holds_license_and_script(wheel):
    """The license travels along, and the console script is declared."""
    assert any(name.endswith("LICENSE") for name in wheel)
    assert any(name.endswith("entry_points.txt") for name in wheel)


@pytest.mark.parametrize("code", ["import bntools", "import bntools.cli", "import bntools; dir(bntools)"])
def test_importing_bntools_imports_no_framework(code):
    """Importing bntools, its command line, or listing its names imports neither a framework nor NumPy."""
    frameworks = ("torch", "keras", "tensorflow", "onnx", "onnxruntime", "numpy")
    code = f"import sys; {code}; print([name for name in {frameworks} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_all_public_names_are_there():
    """Every name that bntools offers can be had from it."""
    import bntools

    assert [name for name in bntools.__all__ if getattr(bntools, name, None) is None] == []
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = bntools.nonsense


def test_only_back_ends_import_frameworks():
    """No module but a back end's own, and the callbacks that are classes of a framework, imports that framework."""
    owners = {"torch": "torch", "torchvision": "torch", "onnx": "onnx", "onnxruntime": "onnx", "keras": "keras"}
    owners |= {"tensorflow": "keras", "tf2onnx": "keras"}
    # where Keras runs on PyTorch, its exporter is PyTorch's, whose file is named there
    may = {"bntools/backends/keras/scripted.py imports torch", "bntools/backends/keras/scripted.py imports onnx"}
    wrong = []
    for name in tracked():
        if not name.startswith(("bntools/", "cli/")) or not name.endswith(".py"):
            continue
        for module in imported(ROOT / name):
            owner = owners.get(module)
            homes = (f"bntools/backends/{owner}/", f"bntools/callbacks/{owner}.py")
            if owner is not None and not name.startswith(homes):
                wrong.append(f"{name} imports {module}")
    assert set(wrong) == may


@cache
def imported(path: Path) -> set[str]:
    """Top-level names of what a file imports, anywhere in it."""
    import ast

    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add((node.module or "").split(".")[0])
    return found


def declared() -> dict[str, str]:
    """What bntools requires, alone and with extras: the lower bound by package."""
    lines = [*ABOUT["dependencies"], *(line for extra in EXTRAS for line in ABOUT["optional-dependencies"][extra])]
    bounds = (line.partition(">=") for line in lines if not line.startswith("bntools"))
    return {name.replace("-", "_"): bound for name, _, bound in bounds}


def test_what_is_imported_is_declared():
    """Every package that bntools imports is required by it or an extra, not only by another package."""
    names = (name for name in tracked() if name.startswith(("bntools/", "cli/")) and name.endswith(".py"))
    found = set().union(*(imported(ROOT / name) for name in names)) - set(sys.stdlib_module_names) - {"bntools"}
    missing = {CALLED.get(name, name) for name in found} - OFFERED - set(declared())
    assert missing == set()


def test_every_dependency_is_described():
    """DEPENDENCIES.md has a row for each direct dependency of bntools and its extras, and for nothing else."""
    lines = (ROOT / "DEPENDENCIES.md").read_text(encoding="utf-8").splitlines()
    rows = {line.split("`")[1].replace("-", "_") for line in lines if line.startswith("| `") and "bntools" not in line}
    assert rows == set(declared())


def test_the_oldest_versions_are_the_lower_bounds():
    """What the matrix tests as oldest is what pyproject.toml promises."""
    lines = (ROOT / "tests" / "trust" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.replace("-", "_").split("==") for line in lines if line and not line.startswith("#"))
    for name, bound in declared().items():
        if name != "onnxruntime_gpu":
            assert (oldest[name] + ".").startswith(bound + "."), name
