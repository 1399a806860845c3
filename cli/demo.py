"""``bntools demo``: the main job on real data, with the commands that a user would type."""

from __future__ import annotations

import io
import shlex
import tempfile
from contextlib import chdir, nullcontext, redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from bntools.errors import BntoolsError

from . import output

if TYPE_CHECKING:
    from .digits import Digits

CAMERAS = {
    "contrast": "contrast 0.3",
    "brightness": "brightness +0.5",
    "blur": "blur 3x3",
    "noise": "noise 0.3",
}
NEEDED = ("torch", "onnx", "onnxruntime", "onnxscript", "sklearn", "PIL")
COMMANDS = ("bntools inspect model.pt", "bntools recalibrate model.pt data/", "bntools fold --export model.onnx")


@click.command(short_help="The main job on real data, in a minute.")
@click.option("--camera", type=click.Choice(list(CAMERAS)), help="Only this camera; all of them by default.")
@click.argument("folder", type=click.Path(path_type=Path), required=False)
def command(camera: str | None, folder: Path | None) -> None:
    """Train a network on digits, then meet the digits as another camera sees them.

    Runs bntools inspect, recalibrate and fold on a model file and a folder of PNGs, and prints how many
    held-out digits of that camera are read right before, after, and by ONNX Runtime. The files go to
    FOLDER, which must be new or empty; without it they are thrown away.
    """
    if folder is not None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise BntoolsError(f"{folder} is not empty: name a new folder for the files of the demo")
    if missing := [package for package in NEEDED if find_spec(package) is None]:
        raise BntoolsError(f"the demo needs {', '.join(missing)}: pip install 'bntools[demo]'")
    from . import digits

    cameras = [camera] if camera else list(CAMERAS)
    with tempfile.TemporaryDirectory(prefix="bntools-demo-") if folder is None else nullcontext(folder) as place:
        found = digits.load()
        model = _train(found)
        rows = [_meet(name, model, found, Path(place, name), loud=name == cameras[0]) for name in cameras]
    click.echo(f"\nHeld-out digits read right, of {len(found.held_out_labels)}:\n")
    output.table(["camera", "before", "recalibrated", "ONNX Runtime"], rows)
    if folder is not None:
        click.echo(f"\nThe files are in {folder}")


def _train(found: Digits) -> Any:
    from bntools.backends.torch import digits as training

    from . import digits

    click.echo(f"Training a small CNN with BN on {len(found.labels):,} of scikit-learn's digits ...")
    model = training.trained(digits.inputs(digits.seen(found.ink)), found.labels)
    share = _accuracy(model, digits.seen(found.held_out_ink), found)
    click.echo(f"It reads {output.percent(share)} of {len(found.held_out_labels)} held-out digits.")
    return model


def _meet(camera: str, model: Any, found: Digits, folder: Path, loud: bool) -> list[str]:
    """Recalibrate and ship the model for one camera; a row of the table."""
    import bntools

    from . import digits

    click.echo(f"\nAnother camera: {CAMERAS[camera]}. The model and {len(found.ink):,} images without labels:")
    folder.mkdir(parents=True)
    bntools.save(model, folder / "model.pt")
    digits.write_folder(digits.seen(found.ink, camera), folder / "data")
    for line in COMMANDS:
        _run(line, folder, loud)
    test = digits.seen(found.held_out_ink, camera)
    models = (model, bntools.load(folder / "model.recalibrated.pt"), folder / "model.onnx")
    return [CAMERAS[camera], *(output.percent(_accuracy(each, test, found)) for each in models)]


def _run(line: str, folder: Path, loud: bool) -> None:
    """Run a command as it would run when typed in this folder."""
    from . import main

    click.echo(f"\n$ {line}" if loud else f"$ {line}")
    with chdir(folder), nullcontext() if loud else redirect_stdout(io.StringIO()):
        status = main.main(shlex.split(line)[1:], prog_name="bntools", standalone_mode=False)
    if status:
        raise BntoolsError(f"{line} ended with exit status {status}")


def _accuracy(model: Any, images: Any, found: Digits) -> float:
    from bntools import backends

    from . import digits

    backend = backends.of_path(model) if isinstance(model, Path) else backends.of(model)
    (scores,) = backend.predict(model, digits.inputs(images)).values()
    return float((scores.argmax(axis=1) == found.held_out_labels).mean())
