"""Exact recalibration on a GPU against plain eval forwards, and what it waits for: ``python tests/benchmarks gpu``.

Without CUDA there is one line that says so. On a machine with two GPUs or more, two processes measure together through
NCCL as well.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from measure import Row, at_least, at_most, medians
from networks import vision
from torch import nn

import bntools

PIXELS, BATCH = 224, 64
HELD = 12 << 20  # bytes that a waiting image of a ResNet-50 takes in float32, at most
GOAL = 0.85  # of the throughput of eval forwards
PRECISIONS = {"float32": None, "autocast float16": torch.float16, "autocast bfloat16": torch.bfloat16}
SYNCHRONIZED = "synchronizing CUDA operation"  # what PyTorch warns of, and raises
SHAPES = ((64, 112), (256, 56), (2048, 7))  # channels and pixels of inputs of BN layers in a ResNet-50


def rows() -> Iterator[Row]:
    """ResNet-50 at 224 pixels in each precision and layout; what a call waits for; each kernel that takes moments."""
    if not torch.cuda.is_available():
        yield Row("GPU: PyTorch finds no CUDA device here", "skipped", "", True)
        return
    device = torch.device("cuda")
    name = torch.cuda.get_device_name(device)
    torch.manual_seed(0)
    model = vision.resnet50().eval().to(device)
    images = torch.randn(_affordable(device), 3, PIXELS, PIXELS, device=device)
    for precision, dtype in PRECISIONS.items():
        cast = _autocast(device, dtype)
        yield from _speed(f"{name}, ResNet-50, {precision}", model, images, cast)
        yield from _waits(f"{name}, ResNet-50, {precision}", model, images[: 8 * BATCH], cast)
    yield from _agreement(f"{name}, ResNet-50", model, images[:BATCH])
    yield from _kernels(name, device)
    yield from _two_processes(name)


def _affordable(device: torch.device) -> int:
    """So many images that they wait together: past half of the memory there would be several virtual batches."""
    free, _ = torch.cuda.mem_get_info(device)
    return max(4, min(64, int(free * 0.2 / HELD) // BATCH)) * BATCH


def _autocast(device: torch.device, dtype: torch.dtype | None) -> Callable[[], AbstractContextManager[object]]:
    return nullcontext if dtype is None else lambda: torch.autocast(device.type, dtype)


def _speed(
    what: str, model: nn.Module, images: torch.Tensor, cast: Callable[[], AbstractContextManager[object]]
) -> Iterator[Row]:
    """Against eval forwards of the same model on the same batches, both as they are, and both in channels last."""
    for layout, words in ((torch.contiguous_format, ""), (torch.channels_last, ", channels last")):
        model = model.to(memory_format=layout)
        batches = images.contiguous(memory_format=layout).split(BATCH)
        calls = {
            "plain": lambda model=model, batches=batches: _forwards(model, batches, cast),
            "exact": lambda model=model, batches=batches: _recalibrate(model, batches, cast),
        }
        times = medians(calls)
        each = f"{what}{words}, {len(images)} images of {PIXELS} px in batches of {BATCH}"
        yield Row(f"{each}: eval forward, images/s", f"{len(images) / times['plain']:,.0f}", "", True)
        yield at_least(f"{each}: exact recalibration / eval forward, throughput", times["plain"] / times["exact"], GOAL)


def _forwards(model: nn.Module, batches, cast: Callable[[], AbstractContextManager[object]]) -> None:
    with torch.no_grad(), cast():
        for batch in batches:
            model(batch)
    _wait()


def _recalibrate(model: nn.Module, batches, cast: Callable[[], AbstractContextManager[object]], progress=None) -> None:
    with cast():
        result = bntools.recalibrate(model, batches, check=False, progress=progress)
    assert result.virtual_batches == 1, result
    _wait()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _waits(
    what: str, model: nn.Module, images: torch.Tensor, cast: Callable[[], AbstractContextManager[object]]
) -> Iterator[Row]:
    """How often a call waits for the device: not at all between the first layer and the last."""
    batches, layers = images.split(BATCH), len(bntools.inspect(model))
    marks: list[int] = []  # how often it has waited when a layer was released

    def waited() -> int:
        return sum(SYNCHRONIZED in str(one.message) for one in caught)

    def progress(stage: str, done: int, total: int | None) -> None:
        marks.extend([waited()] if stage == "recalibrating" else [])

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _recalibrate(model, batches, cast, progress)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert len(marks) == layers, marks
    yield at_most(f"{what}: waits from the first of {layers} layers to the last", marks[-1] - marks[0], 0, "{:.0f}")
    yield Row(f"{what}: waits in a whole call", str(waited()), "", True)


def _agreement(what: str, model: nn.Module, images: torch.Tensor) -> Iterator[Row]:
    """Statistics measured on the GPU against those of the CPU, the worst channel, in its standard deviations."""
    there, here = copy.deepcopy(model), copy.deepcopy(model).cpu()
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        bntools.recalibrate(there, images.split(16), check=False)
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    bntools.recalibrate(here, images.cpu().split(16), check=False)
    yield at_most(f"{what}, float32 without TF32: GPU against CPU, worst channel in std", _apart(there, here), 1e-3)


def _apart(a: nn.Module, b: nn.Module) -> float:
    worst = 0.0
    for one, other in zip(bntools.inspect(a), bntools.inspect(b), strict=True):
        worst = max(worst, float((abs(one.mean - other.mean) / other.std).max()))
        worst = max(worst, float(abs(one.std / other.std - 1).max()))
    return worst


def _kernels(name: str, device: torch.device) -> Iterator[Row]:
    """Time of each way to take moments in one pass, against reading the same tensor once."""
    for dtype in (torch.float32, torch.float16):
        for layout, words in ((torch.contiguous_format, "contiguous"), (torch.channels_last, "channels last")):
            for channels, pixels in SHAPES:
                x = torch.randn(BATCH, channels, pixels, pixels, device=device, dtype=dtype)
                x = x.contiguous(memory_format=layout)
                times = medians({key: lambda way=way, x=x: _often(way, x) for key, way in WAYS.items()}, rounds=7)
                found = ", ".join(f"{key} {times[key] / times['amax']:.2f}" for key in WAYS if key != "amax")
                of = f"{BATCH}x{channels}x{pixels}x{pixels} {str(dtype).removeprefix('torch.')} {words}"
                yield Row(f"{name}, moments of {of}, times of amax", found, "", True)


WAYS: dict[str, Callable[[torch.Tensor], object]] = {
    "amax": torch.amax,
    "batch_norm_update_stats": lambda x: torch.batch_norm_update_stats(x, None, None, 0.0),
    "var_mean": lambda x: torch.var_mean(x.float(), (0, 2, 3), correction=0),
}


def _often(way: Callable[[torch.Tensor], object], x: torch.Tensor) -> None:
    for _ in range(20):
        way(x)
    _wait()


def _two_processes(name: str) -> Iterator[Row]:
    """Two processes with a GPU each, through NCCL: the statistics of one process, to 1e-6."""
    if torch.cuda.device_count() < 2:
        yield Row("GPU: two processes through NCCL need two GPUs", "skipped", "", True)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_process, (folder, 2), nprocs=2)
        together = torch.load(Path(folder, "0.pt"), weights_only=True)
        alone = _model("cuda:0")
        bntools.recalibrate(alone, _data("cuda:0", 0, 1), check=False)
        worst = max(
            float((together[key] - value.cpu()).abs().div(value.cpu().abs().clamp(min=1e-3)).max())
            for key, value in alone.state_dict().items()
            if "running" in key
        )
    yield at_most(f"2 x {name}, NCCL: two processes against one, worst channel, relative", worst, 1e-4)


def _process(rank: int, folder: str, size: int) -> None:
    device = f"cuda:{rank}"
    torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(str(Path(folder, "store")), size)
    torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=size)
    model = _model(device)
    bntools.recalibrate(model, _data(device, rank, size), check=False, group=torch.distributed.group.WORLD)
    torch.save({key: value.cpu() for key, value in model.state_dict().items()}, Path(folder, f"{rank}.pt"))
    torch.distributed.destroy_process_group()


def _model(device: str) -> nn.Module:
    torch.manual_seed(0)
    torch.backends.cudnn.allow_tf32 = False
    return vision.resnet18().eval().to(device)


def _data(device: str, rank: int, size: int) -> list[torch.Tensor]:
    """The share of one of several processes; shares are uneven."""
    images = torch.randn(100, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(1))
    share = images if size == 1 else (images[:70], images[70:])[rank]
    return [batch.to(device) for batch in share.split(16)]
