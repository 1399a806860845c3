"""Real jobs of torchrun on the command line: the same statistics whatever N, one message whoever dies, and the time.

python tests/trust/torchrun.py            # some minutes on two cores
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median

import numpy as np
import psutil
import torch
from results import keep
from torch import nn

import bntools

TORCHRUN = str(Path(sys.executable).with_name("torchrun"))
SLOW = """
import time
import numpy as np

def batches():
    generator = np.random.default_rng(0)
    for _ in range(600):
        time.sleep(0.05)
        yield generator.normal(size=(2, 3, 32, 32)).astype(np.float32)
"""


def network() -> nn.Sequential:
    """Eight convolutions with BN, of PyTorch's own modules, which a file may hold whole."""
    layers: list[nn.Module] = []
    for index, (inputs, outputs) in enumerate(pairwise([3, 32, 32, 64, 64, 128, 128, 256, 256])):
        convolution = nn.Conv2d(inputs, outputs, 3, stride=1 + index % 2, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(256, 10))


def job(folder: Path, count: int, data: str, output: str, *options: str) -> subprocess.Popen[str]:
    """Start one; what it prints goes to ``output``.log."""
    arguments = ["-m", "bntools.cli", "recalibrate", "model.pt", data, "-o", output, *options]
    start = [TORCHRUN, "--nproc-per-node", str(count)] if count else [sys.executable]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(folder)}
    with (folder / f"{output}.log").open("w") as log:
        return subprocess.Popen([*start, *arguments], cwd=folder, env=environment, stdout=log, stderr=log, text=True)


def statistics(path: Path) -> np.ndarray:
    """All statistics of a model in one array, in units of their layers' deviations."""
    layers = bntools.inspect(bntools.load(path))
    return np.concatenate([np.concatenate([layer.mean / layer.std, layer.var / layer.std**2]) for layer in layers])


def same_whatever_count(folder: Path) -> None:
    """N = 1 to 4 against one process without torchrun, on an array and on a folder of images of an uneven number."""
    for data in ("x.npy", "images"):
        assert job(folder, 0, data, "one.pt", "--force").wait() == 0, (folder / "one.pt.log").read_text()
        for count in (1, 2, 3, 4):
            assert job(folder, count, data, "many.pt", "--force").wait() == 0, (folder / "many.pt.log").read_text()
            gap = np.abs(statistics(folder / "many.pt") - statistics(folder / "one.pt")).max()
            print(f"{data}, N={count}: largest difference to one process {gap:.1e} standard deviations", flush=True)
            assert gap < 1e-6
            keep("torchrun", f"{data}, N={count}", f"{gap:.1e} standard deviations from one process, at most")


def one_message(folder: Path) -> None:
    """Whoever is killed, and however, the job ends, says why once, and leaves nothing behind."""
    endings: dict[str, Callable[[psutil.Process, list[psutil.Process]], None]] = {
        "kill -9 of rank 0": lambda agent, ranks: ranks[0].kill(),
        "kill -9 of rank 1": lambda agent, ranks: ranks[1].kill(),
        "kill -9 of rank 2": lambda agent, ranks: ranks[2].kill(),
        "SIGTERM to rank 1": lambda agent, ranks: ranks[1].terminate(),
        "Ctrl-C": lambda agent, ranks: agent.send_signal(signal.SIGINT),
        "SIGTERM to torchrun": lambda agent, ranks: agent.terminate(),
    }
    for what, end in endings.items():
        before = set(folder.iterdir())
        running = job(folder, 3, "slow:batches", "killed.pt")
        log = folder / "killed.pt.log"
        while "batches from slow" not in log.read_text():
            assert running.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(3)
        agent = psutil.Process(running.pid)
        ranks = {int(child.environ()["RANK"]): child for child in agent.children()}
        started = time.monotonic()
        end(agent, [ranks[rank] for rank in sorted(ranks)])
        assert running.wait(60) != 0
        said = [line for line in log.read_text().splitlines() if line.startswith("bntools: ")]
        print(f"{what}: ended after {time.monotonic() - started:.1f} s, {said}", flush=True)
        assert len(said) == 1, log.read_text()
        assert not any(rank.is_running() for rank in ranks.values())
        assert set(folder.iterdir()) - before <= {log}
        keep("torchrun", what, "the job ended with one message and left nothing")


def duration(folder: Path, count: int) -> float:
    """Seconds from start to end of a job without the check."""
    started = time.perf_counter()
    assert job(folder, count, "large.npy", "timed.pt", "--force", "--no-check").wait() == 0
    return time.perf_counter() - started


def ratio(folder: Path) -> None:
    """The time of two processes against one, both under torchrun and with one thread each, start and end included."""
    np.save(folder / "large.npy", np.random.default_rng(0).normal(size=(1500, 3, 96, 96)).astype(np.float32))
    pairs = [(duration(folder, 1), duration(folder, 2)) for _ in range(3)]
    one, two = (median(times) for times in zip(*pairs, strict=True))
    print(f"eight layers, 1,500 samples 3x96x96: {one:.1f} s in one process, {two:.1f} s in two: {two / one:.2f}")
    keep("torchrun", "time", f"two processes of one thread take {two / one:.2f} x that of one (medians of 3 in turns)")


def main() -> None:
    """Everything, in a folder of its own."""
    from PIL import Image

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        torch.save(network(), folder / "model.pt")
        generator = np.random.default_rng(0)
        np.save(folder / "x.npy", generator.normal(1, 2, (101, 3, 32, 32)).astype(np.float32))
        (folder / "images").mkdir()
        for index in range(67):
            pixels = generator.integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        (folder / "slow.py").write_text(SLOW)
        same_whatever_count(folder)
        one_message(folder)
        ratio(folder)


if __name__ == "__main__":
    main()
