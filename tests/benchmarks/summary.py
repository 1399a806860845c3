"""The README's table: which figures of which part stand in it, and under which words."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any


def each(figures: list[str]) -> str:
    """All of them."""
    return ", ".join(figures)


def worst(figures: list[str]) -> str:
    """The largest."""
    return f"at most {max(figures, key=_number)}"


def span(figures: list[str]) -> str:
    """The smallest and the largest."""
    return f"{min(figures, key=_number)} to {max(figures, key=_number)}"


@dataclass(frozen=True)
class Line:
    """A line of the table: the figures of the rows of a part whose text fits a pattern, in one of the forms above."""

    label: str
    part: str
    pattern: str
    form: Callable[[list[str]], str] = each


LINES = (
    Line(
        "residual, 64 samples at micro-batch 1 to 64: ResNet-18, -50, MobileNetV3, DenseNet-121, a 3-D U-Net, an MLP",
        "exactness",
        "worst residual",
        worst,
    ),
    Line("statistics between those micro-batches, shuffled", "exactness", "statistics between", span),
    Line(
        "exact recalibration of ResNet-50 on 128 images at micro-batch 16 and 64, against "
        "`torch.optim.swa_utils.update_bn`",
        "speed",
        "/ update_bn",
    ),
    Line("the same against fvcore's PreciseBN", "speed", "recalibration / fvcore"),
    Line("the same against the algorithm of mmpretrain's PreciseBNHook", "speed", "recalibration / PreciseBNHook"),
    Line("the same against one plain eval forward", "speed", "exact recalibration / eval"),
    Line("the same with the residual measured as well", "speed", "check of the residual / eval"),
    Line(
        "distance from one batch of all data in float64, in standard deviations, micro-batches of 4 to 120 of 128 "
        "images: bntools",
        "peer_accuracy",
        "@bntools",
        worst,
    ),
    Line("the same: `update_bn`", "peer_accuracy", "@update_bn", span),
    Line("the same: fvcore's PreciseBN", "peer_accuracy", "@fvcore's PreciseBN", span),
    Line("the same: PreciseBNHook's algorithm", "peer_accuracy", "@PreciseBNHook's algorithm", span),
    Line("folded ResNet-50 and MobileNetV3: scale-relative error in float32", "folding", "BN folded"),
    Line(
        "folded networks against the same networks without BN, eager and in ONNX Runtime",
        "folding",
        "without any BN",
        span,
    ),
    Line("{head}: folded by each", "fold_peers", "folded by"),
    Line("the same: worst scale-relative error in float32, of the module and of the file", "fold_peers", "worst error"),
    Line("peak memory with `memory=`, against an eval forward plus that", "memory", "peak", span),
    Line("`tolerance=0.01` on 50,000 JPEGs, 5 draws: largest share of the images used", "enough", "largest share"),
    Line("the same: worst channel's mean against that of all images, in standard deviations", "enough", "mean, off"),
    Line("1,000,000 images streamed: peak memory against that of 100,000", "stream", "peak", each),
    Line(
        "640 JPEGs, decoded while the model computes in one thread, against the slower of the two alone: rate",
        "pipeline",
        "slower alone",
    ),
    Line("`bntools --help` beyond a bare interpreter", "startup", "--help"),
    Line("`bntools inspect model.pt` beyond `import torch`", "startup", "inspect"),
    Line(
        "statistics of a module and of its ONNX file, recalibrated on the same data: a small CNN, ResNet-18",
        "onnx_statistics",
        "(small CNN|ResNet-18), .*and of its file",
    ),
    Line(
        "recalibration of an ONNX ResNet-50, against plain ONNX Runtime on the same micro-batches of 16 and 32",
        "onnx_speed",
        ": recalibration / plain",
    ),
    Line("`bntools inspect` of an ONNX ResNet-50, a fresh process", "onnx_speed", "bntools inspect"),
    Line("folding it, with its comparison, and verifying it once more, 224 pixels", "onnx_speed", "fold with its"),
    Line(
        "peak memory of recalibrate, fold and verify on a 2.1 GiB file with external data, against its size",
        "onnx_memory",
        "peak of bntools",
    ),
    Line(
        "exact recalibration of a Keras ResNet-50 on 256 images of 128 pixels, against `model.predict` at micro-batch "
        "16 and 64",
        "keras_speed",
        "model.predict",
    ),
    Line("the same against an epoch of forward passes with `training=True`", "keras_speed", "an epoch"),
    Line(
        "the {wide} architectures of `keras.applications` with BN, random weights, crops of photographs: residual",
        "keras_architectures",
        ": residual",
        worst,
    ),
    Line("the same: scale-relative error of the exported file", "keras_architectures", "exported file", worst),
    Line(
        "`bntools.watch`, against a training step of ResNet-50 and of a network with 3 BN layers",
        "monitoring",
        "bntools.watch",
    ),
    Line("Keras's `MonitorBatchNorm`, against a training step of ResNet-50", "monitoring", "MonitorBatchNorm"),
    Line("switching a ResNet-50 to other statistics with a prepared `bntools.use`, and back", "monitoring", "use, and"),
)


def lines(results: dict[str, Any]) -> Iterator[str]:
    """The table in Markdown; what was not measured is left out."""
    yield "| what | measured | run |"
    yield "|---|---|---|"
    for line in LINES:
        if line.part in results:
            rows = results[line.part]["rows"]
            if figures := _figures(line.pattern, rows):
                head = next((row["what"] for row in rows if re.search(line.pattern, row["what"])), "").split(":")[0]
                label = line.label.format(wide=sum(bool(row["cells"]) for row in rows), head=head)
                yield f"| {label} | {line.form(figures)} | {results[line.part]['date']} |"


def _figures(pattern: str, rows: list[dict[str, Any]]) -> list[str]:
    """Figures of the rows whose text fits, or of one column of a wide table."""
    if pattern.startswith("@"):
        return [row["cells"][pattern[1:]] for row in rows if pattern[1:] in row["cells"]]
    found = [(row["what"], row["figure"]) for row in rows if not row["cells"] and re.search(pattern, row["what"])]
    if pattern == "folded by":  # figures of one tool each, of which the first number is enough here
        return [f"{what.split('folded by ')[1]}: {figure.split(';')[0]}" for what, figure in found]
    return [figure for _, figure in found]


def _number(figure: str) -> float:
    return float(figure.replace(",", "").split()[0])
