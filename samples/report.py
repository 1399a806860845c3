"""Why does the model read another camera's digits so badly? A diagnosis, as a page for the browser.

The page says what to do first, and shows drift by layer, eval against train mode, each channel's statistics, what the
layers receive and how many samples are enough. It is one file that asks no network for anything.
"""

import tempfile
from pathlib import Path

import numpy as np

import bntools
from bntools.backends.torch.digits import trained
from bntools.cli import digits


def main(folder: Path) -> None:
    """Diagnose a network on digits of less contrast, print the advice and write the report."""
    found = digits.load()
    model = trained(digits.inputs(digits.seen(found.ink)), found.labels)
    images = digits.inputs(digits.seen(found.ink[:320], "contrast"))

    diagnosis = bntools.inspect(model, np.array_split(images, 10), histograms=["1", "8"])
    for advice in diagnosis.advice:
        print(f"{advice.action}: {advice.reason}\n    {advice.how}")

    path = folder / "report.html"
    bntools.report(diagnosis, path, title="Digits from another camera", about={"model": "a CNN with 3 BN layers"})
    print(f"the report has {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        main(Path(place))
