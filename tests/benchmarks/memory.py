"""Peak memory of exact recalibration: an eval forward, plus what memory= allows. In each framework."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from measure import Row, at_most

MIB = 1 << 20
IMAGES = 512

TORCH = """
import torch
from networks import vision
torch.manual_seed(0)
model = vision.resnet50().eval()
images = torch.randn({images}, 3, 128, 128)
batches = images.split({size})
def forward():
    with torch.no_grad():
        for batch in images[:32].split({size}):
            model(batch)
"""

WRITE = """
from pathlib import Path
from networks import vision, write_onnx
write_onnx(vision.resnet50(), 128, Path("{path}"))
"""

ONNX = """
import numpy, onnxruntime
images = numpy.random.default_rng(0).standard_normal(({images}, 3, 128, 128), dtype=numpy.float32)
batches = numpy.split(images, {images} // {size})
model = "{path}"
def forward():
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch in batches[: 32 // {size}]:
        session.run(None, dict(x=batch))
"""

KERAS = """
import keras, numpy
keras.utils.set_random_seed(0)
model = keras.applications.ResNet50(weights=None, input_shape=(128, 128, 3))
images = numpy.random.default_rng(0).standard_normal(({images}, 128, 128, 3), dtype=numpy.float32)
batches = numpy.split(images, {images} // {size})
def forward():
    model.predict(images[:32], batch_size={size}, verbose=0)
"""

# VmHWM is of this process alone; ru_maxrss starts at the peak of the process that started it.
AROUND = """
import re, sys
sys.path[:0] = {paths!r}
{first}
if {allowed}:
    import bntools
    result = bntools.recalibrate(model, batches, memory={allowed}, check=False)
    assert result.virtual_batches > 1, result
else:
    forward()
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""


def rows() -> Iterator[Row]:
    """Two processes a row: eval forwards only, and recalibration with a budget that forces virtual batches."""
    if not Path("/proc/self/status").exists():
        yield Row("ResNet-50: peak memory", "not measured: no /proc here", "", True)
        return
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "model.onnx"
        _run(WRITE.format(path=path))
        for framework, code in (("PyTorch", TORCH), ("ONNX", ONNX), ("Keras", KERAS)):
            for size in (4, 16):
                first = code.format(images=IMAGES, size=size, path=path)
                forward = _run(first)
                for allowed in (400 * MIB, 1000 * MIB):
                    ratio = _run(first, allowed) / (forward + allowed)
                    what = f"{framework}, ResNet-50, micro-batch {size}, memory={allowed // MIB} MiB: peak"
                    yield at_most(f"{what} / (eval forward + allowed)", ratio, 1.1, "{:.2f} x")


def _run(first: str, allowed: int = 0) -> int:
    """Bytes of memory that a process of its own held at most."""
    here = Path(__file__).parent
    code = AROUND.format(paths=[str(here), str(here.parent)], first=first, allowed=allowed)
    quiet = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, env=quiet)
    return int(done.stdout.split()[-1])
