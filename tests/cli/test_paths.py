"""Names of files, and what is not overwritten."""

from __future__ import annotations

import os
from pathlib import Path

import click
import pytest

from bntools.cli import paths
from bntools.errors import BntoolsError


def files(folder: Path, **ages: int) -> None:
    """Empty files with these ages in seconds; the names have _ for a dot."""
    for name, age in ages.items():
        path = folder / name.replace("_", ".")
        path.touch()
        os.utime(path, (1e9 - age, 1e9 - age))


def test_default_destination():
    """A changed model goes beside the model, its record beside that."""
    written = paths.destination(Path("a/model.v2.pt"), "recalibrated", None, in_place=False)
    assert written == Path("a/model.v2.recalibrated.pt")
    assert paths.record_of(written) == Path("a/model.v2.recalibrated.json")


def test_in_place_and_named_destination():
    """--in-place is the model itself, -o any name; both at once is a usage error."""
    assert paths.destination(Path("m.pt"), "reset", None, in_place=True) == Path("m.pt")
    assert paths.destination(Path("m.pt"), "reset", Path("b/n.pth"), in_place=False) == Path("b/n.pth")
    with pytest.raises(click.UsageError, match="exclude"):
        paths.destination(Path("m.pt"), "reset", Path("n.pt"), in_place=True)


def test_another_form_is_refused():
    """A model does not change its form on the way."""
    with pytest.raises(BntoolsError, match=r"n\.safetensors.*expected the suffix '\.pt'"):
        paths.destination(Path("m.pt"), "reset", Path("n.safetensors"), in_place=False)


def test_existing_files_need_force(tmp_path):
    """What exists is overwritten only with --force; a folder or a missing one never is."""
    files(tmp_path, model_pt=0)
    with pytest.raises(BntoolsError, match=r"model\.pt exists.*--force"):
        paths.refuse_existing(tmp_path / "model.pt", force=False)
    paths.refuse_existing(tmp_path / "model.pt", force=True)
    paths.refuse_existing(tmp_path / "new.pt", force=False)
    with pytest.raises(BntoolsError, match="is a folder"):
        paths.refuse_existing(tmp_path, force=True)
    with pytest.raises(BntoolsError, match="no folder"):
        paths.refuse_existing(tmp_path / "missing" / "new.pt", force=True)


def test_the_newest_model_is_taken(tmp_path):
    """Of all model files of the export's name the newest counts, whichever it is."""
    files(tmp_path, model_recalibrated_pt=20, model_pt=10, model_safetensors=30)
    chosen, candidates = paths.newest_model(tmp_path / "model.onnx")
    assert chosen.name == "model.pt"
    assert {path.name for path in candidates} == {"model.recalibrated.pt", "model.pt", "model.safetensors"}


def test_the_recalibrated_model_wins_a_tie(tmp_path):
    """Of two models of one age the recalibrated one is taken."""
    files(tmp_path, model_recalibrated_pt=0, model_pt=0)
    assert paths.newest_model(tmp_path / "model.onnx")[0].name == "model.recalibrated.pt"


def test_other_files_are_no_candidates(tmp_path):
    """Records, the export itself, other stems and other suffixes are not taken for models."""
    files(
        tmp_path,
        model_recalibrated_json=0,
        model_onnx=0,
        model_ONNX=0,
        model2_pt=0,
        model_txt=0,
        model_old_pt=0,
    )
    (tmp_path / "model.pt").mkdir()
    with pytest.raises(BntoolsError, match=r"neither a model\.recalibrated\.\* nor a model\.\*"):
        paths.newest_model(tmp_path / "model.onnx")


def test_a_recalibrated_onnx_file_is_a_candidate(tmp_path):
    """Who has ONNX files only folds the recalibrated one."""
    files(tmp_path, model_recalibrated_onnx=0, model_onnx=0)
    assert paths.newest_model(tmp_path / "model.onnx")[0].name == "model.recalibrated.onnx"


def test_brackets_in_a_name_are_no_pattern(tmp_path):
    """A name with characters of a glob is taken literally."""
    (tmp_path / "a[1].pt").touch()
    (tmp_path / "a1.pt").touch()
    assert paths.newest_model(tmp_path / "a[1].onnx")[0].name == "a[1].pt"


def test_a_model_that_statistics_were_applied_to_is_a_candidate(tmp_path):
    """What bntools stats apply wrote after the recalibration is what is meant to be shipped."""
    files(tmp_path, model_pt=20, model_recalibrated_pt=10, model_applied_pt=0)
    assert paths.newest_model(tmp_path / "model.onnx")[0].name == "model.applied.pt"
