"""The verb export: a verified ONNX file of a model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np

import bntools
from bntools import backends
from bntools.batches import count
from bntools.datafiles import data_file, flush, new_name, taken
from bntools.errors import BntoolsError, VerificationError
from bntools.files import atomic_write
from bntools.graphfold import NOTE, fold_file
from bntools.resizing import redrawn, resized, shuffled
from bntools.runner import Outputs
from bntools.verification import Verification, verify

ONNX = ("onnx",)  # the exporter of what is an ONNX file already, whose batch axis is as it is


@dataclass(frozen=True)
class Exported(Verification):
    """The verification of the file that was written, and how it came about.

    ``exporter`` served; ``dynamic`` tells whether the file takes any batch size. ``folded`` names the BN
    layers that were folded before, ``kept`` the others with their reasons, and ``into`` is as in ``fold``, empty where
    the layers were folded on the ONNX graph.
    """

    exporter: str = ""
    dynamic: bool = True
    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    into: dict[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """One try: an exporter, the example it traces, the same with another number of samples, what to verify on."""

    exporter: str
    example: Any
    other: Any | None
    batches: list[Any]

    def __str__(self) -> str:
        return f"{self.exporter} exporter, {'fixed' if self.other is None else 'dynamic'} batch size"


@dataclass(frozen=True)
class Fold:
    """Which BN layers were folded, which kept for what reason.

    ``problem`` says why none could be in the model; ``later`` holds where the exported file may do better.
    """

    folded: list[str] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    problem: str = ""
    later: bool = False
    into: dict[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def notes(self) -> list[str]:
        """Where the layers were folded, if not in the model."""
        return [f"{NOTE if self.folded else 'exported without folding: '}{self.problem}"] if self.problem else []


Attempt = Callable[[Plan, Path], Verification]


def export(
    model: Any,
    path: str | Path,
    example: Any,
    *,
    providers: Sequence[str] = ("cpu",),
    tolerance: float | None = None,
    opset: int | None = None,
    overwrite: bool = True,
) -> Exported:
    """Write a model as an ONNX file that is proven to compute what the model computes in eval mode.

    BN layers are folded first (``bntools.fold``). The exporters are tried in turn until a file verifies
    against the model in ONNX Runtime, also on other values and batch sizes: the batch axis is dynamic wherever
    the model and an exporter allow it. Only then does the file appear under its name, in one step, replacing what was
    there. Weights of 1.8 GB and more lie in a file beside it, as do those of an ONNX model that were external
    before. The model is left as it was.

    Args:
        model: an nn.Module on any device, an ONNX model or the path of one.
        path: the file to write, ending in ``.onnx``.
        example: one batch: an array, a tuple or list (its first element), or a dict, whose keywords become the
            names of the file's inputs.
        providers, tolerance: as in ``verify``. ``opset``: None is the exporter's own.
        overwrite: False refuses to replace a file, also one that appears meanwhile.

    Raises VerificationError, whose ``check`` holds the figures, where no file verifies; BntoolsError where none
    can be had, the model fails on the example or the file cannot be written. Nothing is written then.

        check = bntools.export(model, "model.onnx", images[:8])
        print(check.error, check.exporter, len(check.folded))
    """
    path = _onnx_path(path, overwrite)
    backend, onnx = backends.of(model), backends.backend("onnx")
    onnx.require(providers)
    if hasattr(backend, "require_exporter"):
        backend.require_exporter()
    model = backend.edit(model)
    example = backends.canonical(model, example)
    runner = backend.runners(model)[0]
    plans, notes = _plans(runner.run, example, backend.EXPORTERS)
    source, fold = _folded(backend, model, example)
    folds: dict[Path, Fold] = {}

    def attempt(plan: Plan, file: Path) -> Verification:
        if backend is onnx:
            onnx.export(source, file, data.name, opset)
        else:
            raw = file.with_name("exported.onnx")
            axes = backend.export(source, plan.example, raw, exporter=plan.exporter, other=plan.other, opset=opset)
            onnx.tidy(raw, file, data.name, opset, axes)
            if fold.later:
                folds[file] = _folded_later(file, data.name, plan, backend.labels(model), fold)
        onnx.check(file)
        return verify(model, file, plan.batches, providers=providers, tolerance=tolerance)

    data = new_name(path)
    with _workshop(path) as folder:
        file, plan, check, failures = _first_that_verifies(plans, folder, path.name, attempt)
        said = [note.replace(str(file), path.name) for note in check.notes]
        exported = _exported(check, plan, folds.get(file, fold), notes, [*failures, *said])
        onnx.add_metadata(file, _record(runner.name, backend, exported))
        with data_file(path, onnx.external_files, data):
            _publish(file, data, path, overwrite)
    return exported


def _onnx_path(path: str | Path, overwrite: bool) -> Path:
    if not overwrite and Path(path).exists():
        raise taken(path)
    if Path(path).suffix.lower() != ".onnx":
        raise BntoolsError(f"{path}: expected a name that ends in .onnx")
    return Path(path)


def _exported(check: Verification, plan: Plan, fold: Fold, before: list[str], after: list[str]) -> Exported:
    figures = {one.name: getattr(check, one.name) for one in fields(check) if one.name != "notes"}
    notes = (*before, *fold.notes, *after)
    how = {"exporter": plan.exporter, "dynamic": plan.other is not None}
    own = {"folded": fold.folded, "kept": fold.kept, "into": fold.into}
    return Exported(**{**figures, "notes": notes, **how, **own})


def _folded(backend: ModuleType, model: Any, example: Any) -> tuple[Any, Fold]:
    """The model with BN folded; as it is where folding fails, which a note says or the file makes good."""
    from bntools.folding import fold  # here: an exporting that needs no fold works without

    if not backend.layers(model):
        return model, Fold()
    try:
        result = fold(model, example)
    except BntoolsError as error:
        return model, Fold(problem=str(error), later=hasattr(backend, "labels"))
    return result.model, Fold(result.folded, result.kept, into=result.into)


def _folded_later(file: Path, data_name: str, plan: Plan, labels: Mapping[str, str], fold: Fold) -> Fold:
    """What becomes of the BN layers of an exported file, in place."""
    folded, kept = fold_file(file, data_name, plan.example, labels)
    return Fold(folded, kept, fold.problem)


def _plans(run: Callable[[Any], Outputs], example: Any, exporters: Sequence[str]) -> tuple[list[Plan], list[str]]:
    """The tries in order: with a dynamic batch size where the model itself takes others, then with a fixed one."""
    run(example)
    samples = count(example)
    if not samples:
        raise BntoolsError("the example holds no samples: there is nothing to compare the models on")
    fresh, notes = _fresh(run, example)
    fixed = [Plan(exporter, example, None, [example, *fresh]) for exporter in exporters]
    sizes = [size for size in (1, 2, samples + 1) if size != samples]
    try:
        batches = [resized(example, size) for size in sizes]
        for batch in batches:
            run(batch)
    except BntoolsError as error:
        return fixed, [*notes, f"the batch size is fixed at {samples}: on another the model itself fails ({error})"]
    # Traced with one sample, an exporter may take the 1 for a constant.
    traced = example if samples > 1 else resized(example, 2)
    other = resized(example, max(samples, 2) + 1)
    dynamic = [Plan(exporter, traced, other, [example, *batches, *fresh]) for exporter in exporters]
    return dynamic if exporters == ONNX else [*dynamic, *fixed], notes


def _fresh(run: Callable[[Any], Outputs], example: Any) -> tuple[list[Any], list[str]]:
    """Batches with other values than the example's: a file that is right on the example alone is wrong.

    Left out are those on which the model itself fails or gives NaN, which a note says if none is left.
    """
    batches, problems = [], []
    for batch in (redrawn(example), shuffled(example)):
        try:
            outputs = run(batch)
        except BntoolsError as error:
            problems.append(str(error))
            continue
        strange = [name for name, array in outputs.items() if array.dtype.kind in "fc" and not np.isfinite(array).all()]
        if strange:
            problems.append(f"it gives values that are not finite, in {strange[0]!r}")
        else:
            batches.append(batch)
    if batches:
        return batches, []
    return [], [f"verified on the example's own values only, for on others the model itself fails: {problems[0]}"]


def _first_that_verifies(
    plans: list[Plan], folder: Path, name: str, attempt: Attempt
) -> tuple[Path, Plan, Verification, list[str]]:
    """The file of the first plan that verifies, and what became of the plans before it.

    Raises VerificationError where there were files and none verifies, BntoolsError where there was none.
    """
    failures: list[str] = []
    errors: list[BntoolsError] = []
    for number, plan in enumerate(plans):
        file = folder / str(number) / name
        file.parent.mkdir()
        try:
            check = attempt(plan, file)
            if check.passed:
                return file, plan, check, failures
            error: BntoolsError = VerificationError(f"its file does not agree with the model: {check}", check)
        except BntoolsError as raised:
            error = raised
        errors.append(error)
        reason = str(error).replace(str(file), name)
        if not any(failure.endswith(reason) for failure in failures if failure.startswith(f"{plan.exporter} ")):
            failures.append(f"{plan}: {reason}")
    message = "; ".join(failures)
    causes = ExceptionGroup("why no exporter served", errors)
    checks = [error.check for error in errors if isinstance(error, VerificationError) and error.check]
    if checks:
        best = min(checks, key=lambda check: check.error)
        raise VerificationError(f"{name} was not written, for no file verified. {message}", best) from causes
    raise BntoolsError(f"{name} was not written, for no exporter gave a file that runs. {message}") from causes


def _record(name: str, backend: ModuleType, exported: Exported) -> dict[str, str]:
    """What the file says about itself, as ONNX metadata."""
    framework = backend.__name__.rpartition(".")[2]
    return {
        "bntools.version": bntools.__version__,
        "bntools.source": f"{name} ({framework} {metadata.version(framework)})",
        "bntools.exporter": exported.exporter,
        "bntools.folded": json.dumps(exported.folded),
        "bntools.kept": json.dumps(exported.kept),
        "bntools.error": f"{exported.error:.3e}",
        "bntools.tolerance": f"{exported.tolerance:.3e}",
        "bntools.verified": f"{exported.provider}, graph optimizations off and default, {exported.samples} samples",
    }


@contextmanager
def _workshop(path: Path) -> Iterator[Path]:
    """A folder beside the file to be, so that it can move to its place in one step; gone afterwards."""
    target = Path(os.path.realpath(path))
    try:
        with TemporaryDirectory(prefix=f".{target.stem}.", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise BntoolsError(f"{path}: cannot be written: {error.strerror or error} (nothing was written)") from error


def _publish(file: Path, data: Path, path: Path, overwrite: bool) -> None:
    """Give the verified file its name, its external weights first; ``data`` is the place of those."""
    written = file.with_name(data.name)
    if written.exists():
        flush(written)
        os.replace(written, data)
    with atomic_write(path, overwrite=overwrite) as temporary:
        os.replace(file, temporary)
