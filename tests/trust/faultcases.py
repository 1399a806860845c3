"""The cases of faults.py: the files that they begin with, what they run, and what their files hold."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

HERE = Path(__file__).parent
# What bntools may leave when it is killed: hidden temporaries beside the target, and a data file too many.
OWN = re.compile(r"\.(model|out|old)[^/]*(/.*)?$|(model|out)\.[0-9a-f]{8}\.data$")
VOLATILE = ("date", "command", "bntools.version", "source")


@dataclass(frozen=True)
class Case:
    """A verb on the files of a template; ``what`` is a command line, or Python if it begins with an import."""

    verb: str
    name: str
    framework: str
    template: str
    what: str
    targets: tuple[str, ...]
    share: float = 1.0
    record: str = ""

    def tries(self, of: int) -> int:
        """How many tries of those for its verb are this case's."""
        return round(of * self.share)

    @property
    def again(self) -> Case:
        """The case where the killed run may have left a target, which is then overwritten."""
        forces = self.what.startswith("import") or "--force" in self.what or "--in-place" in self.what
        return self if forces else replace(self, what=f"{self.what} --force")

    def has_record(self, found: dict[str, str]) -> bool:
        """Whether the record is there, if the verb writes one."""
        return not self.record or self.record in found


SAVE = "import bntools; bntools.save(bntools.load('{}'{}), '{}')"
CASES = [
    Case("recalibrate", "in place .pt", "torch", "pt", "recalibrate model.pt data.npy --in-place",
         ("model.pt", "model.json"), 0.25, "model.json"),
    Case("recalibrate", "over an old .safetensors", "torch", "safetensors",
         "recalibrate model.safetensors data.npy --arch nets:net -o out.safetensors --force",
         ("out.safetensors", "out.json"), 0.25, "out.json"),
    Case("recalibrate", "new .pt", "torch", "plain", "recalibrate model.pt data.npy",
         ("model.recalibrated.pt", "model.recalibrated.json"), 0.1, "model.recalibrated.json"),
    Case("recalibrate", "per domain", "torch", "domains", "recalibrate model.pt domains --per-domain -o out --force",
         ("out/a.safetensors", "out/b.safetensors", "out/record.json"), 0.2),
    Case("fold", "over an old .pt", "torch", "pt", "fold model.pt --shape 3,12,12 -o out.pt --force", ("out.pt",), 0.5),
    Case("save", ".pt", "torch", "pt", SAVE.format("model.pt", "", "out.pt"), ("out.pt",), 0.25),
    Case("save", ".safetensors", "torch", "safetensors",
         SAVE.format("model.safetensors", ", arch='nets:net'", "out.safetensors"), ("out.safetensors",), 0.25),
    Case("stats", "save", "torch", "pt", "stats save model.pt -o out.safetensors --force", ("out.safetensors",), 0.1),
    Case("stats", "apply in place", "torch", "pt", "stats apply model.pt some.safetensors --in-place",
         ("model.pt",), 0.1),
    Case("export", "from .pt", "torch", "pt", "export model.pt out.onnx --shape 3,12,12 --force", ("out.onnx",), 0.1),
    Case("recalibrate", "in place .onnx, external weights", "onnx", "onnx",
         "recalibrate model.onnx data.npy --in-place", ("model.onnx", "model.json"), 0.25, "model.json"),
    Case("fold", "--export, external weights", "onnx", "onnx", "fold model.onnx --export out.onnx --force",
         ("out.onnx",), 0.5),
    Case("export", "external weights", "onnx", "onnx", "export model.onnx out.onnx --force", ("out.onnx",), 0.9),
    Case("save", ".onnx, external weights", "onnx", "onnx", SAVE.format("model.onnx", "", "out.onnx"),
         ("out.onnx",), 0.25),
    Case("recalibrate", "in place .keras", "keras", "keras", "recalibrate model.keras data.npy --in-place",
         ("model.keras", "model.json"), 0.15, "model.json"),
    Case("save", ".keras", "keras", "keras", SAVE.format("model.keras", "", "out.keras"), ("out.keras",), 0.25),
]  # fmt: skip


def run(case: Case) -> int:
    """Run a case in this process and folder; gives its exit status."""
    if case.what.startswith("import"):
        exec(case.what, {})
        return 0
    from bntools.cli import main

    try:
        main(case.what.split())
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(bool(end.code))
    return 0


def prepare(framework: str, folder: Path) -> None:
    """Make the templates of a framework, in another process, and import what its cases need in this one."""
    subprocess.run([sys.executable, HERE / "faultfiles.py", framework, folder], check=True, stdout=subprocess.DEVNULL)
    import bntools  # noqa: F401

    if framework == "torch":
        import onnx  # noqa: F401
        import onnxruntime
        import torch

        torch.set_num_threads(1)
    elif framework == "onnx":
        import onnxruntime  # noqa: F401
    else:
        import keras  # noqa: F401
    from bntools import backends
    from bntools.cli import export, fold, recalibrate, stats  # noqa: F401

    backends.backend(framework)


def contents(folder: Path) -> tuple[dict[str, str], set[str]]:
    """What each file of a folder holds, by name: a digest without dates, or why it cannot be read to its end.

    Apart from them the names of bntools's own: temporaries, and data files, which belong to the .onnx that names them.
    """
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    own = {name for name in names if OWN.match(name)}
    found = {}
    for name in sorted(name for name in names - own if "__pycache__" not in name):
        try:
            found[name] = hashlib.sha256(_essence(folder / name)).hexdigest()[:16]
        except Exception as error:
            found[name] = f"damaged ({type(error).__name__}: {error})"
    return found, own


def _essence(path: Path) -> bytes:
    """The bytes of a file that tell what it holds; raises where it is not whole."""
    if path.suffix == ".json":
        record = json.loads(path.read_text())
        return json.dumps({key: value for key, value in record.items() if key not in VOLATILE}).encode()
    if path.suffix == ".onnx":
        return _onnx(path)
    if path.suffix == ".keras":
        with zipfile.ZipFile(path) as archive:
            parts = [name for name in sorted(archive.namelist()) if name != "metadata.json"]
            return b"".join(name.encode() + archive.read(name) for name in parts) + archive.comment
    if path.suffix == ".safetensors":  # statistics tell when they were taken
        return re.sub(rb'\\"date\\": \\"[^"]*\\"', b"", path.read_bytes())
    return path.read_bytes()


def _onnx(path: Path) -> bytes:
    import onnx

    model = onnx.load(path)  # with its external weights, which have to be there
    onnx.checker.check_model(model)
    del model.metadata_props[:]
    return model.SerializeToString(deterministic=True)


if os.environ.get("KERAS_BACKEND") is None:
    os.environ["KERAS_BACKEND"] = "tensorflow"
sys.path[:0] = [str(HERE.parent)]  # the helpers of the tests
