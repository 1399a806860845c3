"""Peak memory of exact recalibration: an eval forward, plus what memory= allows."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from measure import Row, at_most

MIB = 1 << 20

CODE = """
import re, sys
sys.path[:0] = {path!r}
import torch
from networks import vision
import bntools
torch.manual_seed(0)
model = vision.resnet50().eval()
images = torch.randn(512, 3, 128, 128)
with torch.no_grad():
    for batch in images[:32].split({size}):
        model(batch)
if {allowed}:
    result = bntools.recalibrate(model, images.split({size}), memory={allowed}, check=False)
    assert result.virtual_batches > 1, result
# of this process alone; ru_maxrss starts at the peak of the process that started it
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def rows() -> Iterator[Row]:
    """Two processes: eval forwards only, and recalibration with a budget that forces virtual batches."""
    for size in (4, 16):
        forward = _peak(size, 0)
        for allowed in (400 * MIB, 1000 * MIB):
            ratio = _peak(size, allowed) / (forward + allowed)
            what = f"ResNet-50, micro-batch {size}, memory={allowed // MIB} MiB: peak / (eval forward + allowed)"
            yield at_most(what, ratio, 1.1, "{:.2f} x")


def _peak(size: int, allowed: int) -> int:
    here = Path(__file__).parent
    code = CODE.format(path=[str(here), str(here.parent)], size=size, allowed=allowed)
    return int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
