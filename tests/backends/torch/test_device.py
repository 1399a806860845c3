"""The way of CUDA, walked on the CPU: what is measured stays on the device until it is read, once a virtual batch."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from models import cnn
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import bntools
from bntools.backends.torch import free_memory
from bntools.backends.torch.layout import Layout
from bntools.backends.torch.measuring import moments_of, sample_means_of
from bntools.backends.torch.running import prepared
from bntools.moments import Moments, merged

measuring = importlib.import_module("bntools.backends.torch.measuring")
replica = importlib.import_module("bntools.backends.torch.replica")

WAITS = ("aten._local_scalar_dense", "aten.is_nonzero", "aten.equal", "aten.nonzero", "aten.masked_select")
READS = ("numpy", "cpu", "item", "tolist", "__array__", "__bool__", "__float__", "__int__")


@pytest.fixture
def queued(monkeypatch):
    """What the CPU measures stays there, as on CUDA."""
    monkeypatch.setattr(measuring, "QUEUED", ("cpu",))


def images(n=24, seed=0):
    """Images as numpy, float32."""
    return np.random.default_rng(seed).normal(3, 2, (n, 3, 9, 9)).astype(np.float32)


def batches():
    """Batches of unequal size."""
    return np.split(images(), [10, 20])


def statistics(model):
    """All running statistics of a model, one behind the other."""
    return torch.cat([value.double() for key, value in model.state_dict().items() if "running" in key])


def model_of(dtype=torch.float32):
    """A model with statistics of its own, the same each time."""
    torch.manual_seed(0)
    model = cnn().to(dtype)
    model(torch.randn(8, 3, 9, 9, dtype=dtype) + 1)
    return model


WAYS = {
    "exact": {},
    "prior": {"prior": 30},
    "virtual batches": {"memory": 60_000},
    "tolerance": {"tolerance": 0.5, "max_samples": 20},
    "precise": {"method": "precise"},
    "ema": {"method": "ema"},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_device_path_gives_what_the_host_path_gives(monkeypatch, way):
    """Statistics, residual and standard error are those of the ordinary path, to 1e-7."""
    host, device = model_of(torch.float64), model_of(torch.float64)
    expected = bntools.recalibrate(host, batches(), **WAYS[way])
    monkeypatch.setattr(measuring, "QUEUED", ("cpu",))
    found = bntools.recalibrate(device, batches(), **WAYS[way])
    torch.testing.assert_close(statistics(device), statistics(host), rtol=1e-7, atol=1e-7)
    assert (found.samples, found.virtual_batches) == (expected.samples, expected.virtual_batches)
    assert found.residual == pytest.approx(expected.residual, abs=1e-7)
    np.testing.assert_allclose(found.standard_error or 0, expected.standard_error or 0, rtol=1e-5)
    np.testing.assert_allclose(found.convergence, expected.convergence, rtol=1e-5)
    found.undo()
    torch.testing.assert_close(statistics(device), statistics(model_of(torch.float64)), rtol=0, atol=0)


class Watched(TorchDispatchMode):
    """Notes, in order, arrivals at layers and everything that would wait for a device."""

    def __init__(self, monkeypatch):
        super().__init__()
        self.events: list[tuple[str, str]] = []
        for name in READS:
            monkeypatch.setattr(torch.Tensor, name, self.noted(getattr(torch.Tensor, name), f"Tensor.{name}"))
        for name in ("tensor", "as_tensor", "from_numpy"):  # on CUDA: copied there, which waits as well
            monkeypatch.setattr(torch, name, self.noted(getattr(torch, name), name))

    def noted(self, function, name):
        """The function, noted as a wait."""

        def wrapped(*args, **kwargs):
            if name.startswith("Tensor.") or not isinstance(args[0], torch.Tensor):
                self.events.append(("wait", name))
            return function(*args, **kwargs)

        return wrapped

    def arrive(self, walk, name, x):
        """In place of the walk's own method."""
        self.events.append(("arrival", name))
        return ARRIVE(walk, name, x)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Note operators whose result a program reads."""
        if str(func).startswith(WAITS):
            self.events.append(("wait", str(func)))
        return func(*args, **(kwargs or {}))

    def waits(self, first, last):
        """For each virtual batch, what waited between its last arrival at one layer and its last at another."""
        arrivals = [(i, name) for i, (kind, name) in enumerate(self.events) if kind == "arrival"]
        firsts = [i for n, (i, name) in enumerate(arrivals) if name == first and arrivals[n + 1][1] != first]
        found = []
        for start, stop in zip(firsts, [*firsts[1:], len(self.events)], strict=True):
            end = max(i for i, name in arrivals if name == last and start < i < stop)
            found.append([name for kind, name in self.events[start:end] if kind == "wait"])
        return found


ARRIVE = replica.Walk._arrival


def watched(monkeypatch, **options):
    """What waits in each virtual batch of a recalibration."""
    model = model_of()
    with monkeypatch.context() as patched, Watched(patched) as events:
        patched.setattr(replica.Walk, "_arrival", lambda walk, name, x: events.arrive(walk, name, x))
        result = bntools.recalibrate(model, batches(), check=False, **options)
    return events.waits("1", "4"), result


@pytest.mark.parametrize("way", [way for way in WAYS if way not in ("precise", "ema")])
def test_nothing_waits_between_the_first_and_the_last_layer(queued, monkeypatch, way):
    """No number is read, and none brought to the device, while replicas go from layer to layer."""
    found, result = watched(monkeypatch, **WAYS[way])
    assert found == [[]] * max(result.virtual_batches, 1)


def test_reading_at_each_layer_would_be_noticed(monkeypatch):
    """The watch can fail: the CPU's own path reads at every layer."""
    found, _ = watched(monkeypatch)
    assert len(found) == 1
    assert found[0]


@pytest.mark.parametrize("method", ["precise", "ema"])
def test_pooled_batches_are_read_once_in_a_while(queued, monkeypatch, method):
    """One by one, no batch waits within itself, and many are read together."""
    found, _ = watched(monkeypatch, method=method)
    assert len(found) == 3
    assert found == [[]] * 3


@pytest.mark.parametrize("method", ["exact", "precise"])
@pytest.mark.parametrize("count", [3, 40])
def test_what_is_not_finite_is_named_all_the_same(queued, method, count):
    """Layer and batch as on the CPU, and everything restored."""
    model, data = model_of(), np.split(images(n=2 * count), count)
    before = statistics(model)
    data[1][0, 0, 0, 0] = np.nan
    with pytest.raises(bntools.BntoolsError, match=r"batch 1 brings NaN or Inf to the input of layer '1'"):
        bntools.recalibrate(model, data, method=method)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["exact", "precise"])
def test_a_model_that_stumbles_over_nan_is_not_blamed(queued, method):
    """Where a model raises because of NaN that nobody has read yet, the batch that brought it is named."""

    class Strict(nn.Module):
        def forward(self, x):
            if not bool(x.isfinite().all()):
                raise ValueError("not finite")
            return x

    model = nn.Sequential(nn.BatchNorm2d(3), Strict(), nn.BatchNorm2d(3))
    data = batches()
    data[2][0] = np.inf
    with pytest.raises(bntools.BntoolsError, match=r"batch 2 brings NaN or Inf to the input of layer '0'"):
        bntools.recalibrate(model, data, method=method)


def test_numbers_beyond_the_dtype_are_refused_in_the_end(queued):
    """A variance that float16 cannot hold, and a prior beyond arithmetic: refused, everything as before."""
    with pytest.raises(bntools.BntoolsError, match="does not fit"):
        bntools.recalibrate(nn.Sequential(nn.BatchNorm2d(3)).half(), [images() * 300])
    model = model_of()
    before = statistics(model)
    with pytest.raises(bntools.BntoolsError, match="choose a smaller prior"):
        bntools.recalibrate(model, batches(), prior=1e308)
    torch.testing.assert_close(statistics(model), before, rtol=0, atol=0)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_moments_on_a_device_are_those_of_numpy(queued, layout, dtype):
    """In any layout, for halves too, parts of unequal size merged at once."""
    x = (torch.from_numpy(images()) + 100).to(dtype).contiguous(memory_format=layout)
    found = merged(moments_of(part) for part in x.split(7))
    expected = Moments.of(x.double().numpy())
    assert (found.at_hand, found.mean.dtype, found.count) == (False, torch.float64, expected.count)
    np.testing.assert_allclose(found.mean, expected.mean, rtol=1e-6)
    np.testing.assert_allclose(found.var, expected.var, rtol=1e-4)
    means = sample_means_of(x)
    assert means.dtype == torch.float32
    np.testing.assert_allclose(means, x.double().mean((2, 3)), rtol=1e-5)


def test_moments_of_a_device_and_of_the_host_merge(queued):
    """An empty batch, or what was read before, goes together with what is still on the device."""
    x = torch.from_numpy(images())
    found = merged([moments_of(x[:0]), Moments.of(x[:5].double().numpy()), moments_of(x[5:])])
    expected = Moments.of(x.double().numpy())
    assert found.count == expected.count
    np.testing.assert_allclose(found.numpy().var, expected.var, rtol=1e-5)


def test_autocast_around_the_call_is_that_of_every_layer():
    """Under autocast the statistics are those of what the model computes under autocast, and the residual says so."""
    model, plain, seen = model_of(), model_of(), []
    bntools.recalibrate(plain, batches())
    with torch.autocast("cpu", torch.bfloat16):
        result = bntools.recalibrate(model, batches())
        model[4].register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with torch.no_grad():
            model.eval()(torch.from_numpy(images()))
    assert seen[0].dtype == torch.bfloat16
    assert result.residual < 1e-3
    np.testing.assert_allclose(model[4].running_mean, seen[0].double().mean((0, 2, 3)), atol=1e-4)
    np.testing.assert_allclose(model[4].running_var, seen[0].double().var((0, 2, 3), correction=0), rtol=2e-3)
    assert not torch.allclose(model[4].running_mean, plain[4].running_mean, atol=1e-5)


def test_free_memory_of_a_gpu_counts_what_its_allocator_has_to_spare(monkeypatch):
    """The driver's free memory, and what PyTorch holds of it and does not use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 9000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 300)
    tensor = SimpleNamespace(device=torch.device("cuda:1"))
    assert free_memory(SimpleNamespace(parameters=lambda: iter([tensor]), buffers=lambda: iter([]))) == 1400
    assert free_memory(SimpleNamespace(parameters=lambda: iter([]), buffers=lambda: iter([tensor]))) == 1400


@pytest.mark.parametrize(
    ("dtype", "autocast", "gains"),
    [(torch.float32, None, False), (torch.float16, None, True), (torch.float32, torch.bfloat16, True)],
)
def test_channels_last_on_a_gpu_is_for_half_precision(monkeypatch, dtype, autocast, gains):
    """A model on CUDA keeps its layout in float32, and gets the other in half precision and under autocast."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: autocast is not None)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda kind: autocast)
    weight = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, data=torch.zeros(4, dtype=dtype))
    convolution = nn.Conv2d(1, 1, 1)
    convolution._parameters = {"weight": weight}
    layout = Layout(SimpleNamespace(modules=lambda: [convolution]), 1e9)
    assert (layout.channels_last, layout.held) == (gains, weight.data.nbytes if gains else 0)


def test_a_batch_goes_to_a_gpu_through_pinned_memory_of_its_own(monkeypatch):
    """The copy is not waited for, so that nothing the caller may overwrite meanwhile is copied from."""
    pinned = []

    def pin(tensor):
        pinned.append(tensor.clone())
        return pinned[-1]

    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    example = SimpleNamespace(
        device=torch.device("cpu"), dtype=torch.float32, is_cuda=True, is_floating_point=lambda: True
    )
    given = {"x": np.ones((2, 3)), "labels": torch.tensor([1, 2])}
    found = prepared(SimpleNamespace(parameters=lambda: [example], buffers=lambda: []), given)
    assert [one.dtype for one in pinned] == [torch.float32, torch.int64]
    assert found["x"] is pinned[0]
    assert found["labels"] is pinned[1]
