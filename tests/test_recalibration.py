"""recalibrate: exact, whatever the batches; and nothing is lost when it fails."""

from __future__ import annotations

import copy
import re
import signal
from collections import UserDict
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import models
import numpy as np
import pytest
import shim
import torch
from torch import nn, overrides
from torch.overrides import TorchFunctionMode

import bntools
from bntools import BntoolsError
from bntools.layer import distance

torch.set_num_threads(2)


def images(n=24, channels=3, size=9, seed=0):
    """A tensor of images (n, channels, size, size), mean 1 and standard deviation 2."""
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def rows(n=24, features=3, seed=0):
    """A tensor of rows (n, features), mean 1 and standard deviation 2."""
    return torch.randn(n, features, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def stats(model):
    """Mean, variance and counter of every layer."""
    return {layer.name: (layer.mean, layer.var, layer.updates) for layer in bntools.inspect(model)}


def everything(model):
    """All that a call has to leave as it was: tensors, modes, hooks, instance attributes, requires_grad."""
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [module.training for module in model.modules()],
        [
            (len(m._forward_hooks), len(m._forward_pre_hooks), sorted(vars(m)), getattr(m, "momentum", 0))
            for m in model.modules()
        ],
        [p.requires_grad for p in model.parameters()],
    )


def assert_unchanged(model, before):
    """Nothing of ``everything`` has changed."""
    now = everything(model)
    assert now[1:] == before[1:]
    assert now[0].keys() == before[0].keys()
    for name, value in before[0].items():
        assert torch.equal(now[0][name].isnan(), value.isnan()), name
        assert torch.equal(now[0][name].nan_to_num(), value.nan_to_num()), name


def gap(model, reference):
    """The largest distance between two models' statistics, in standard deviations."""
    return max(
        distance(a.stats, b.stats, a.eps)
        for a, b in zip(bntools.inspect(model), bntools.inspect(reference), strict=True)
    )


def recalibrated(model, batches, **options):
    """A recalibrated copy of the model, and the result."""
    model = copy.deepcopy(model)
    return model, bntools.recalibrate(model, batches, **options)


def by_hand(model, x):
    """The definition, layer by layer: each BN gets the moments of its input behind the BNs before it."""
    model = copy.deepcopy(model).double().eval()
    x = x.double()
    with torch.no_grad():
        for module in model:
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.copy_(x.mean((0, 2, 3)))
                module.running_var.copy_(x.var((0, 2, 3), correction=0))
            x = module(x)
    return model


@pytest.mark.parametrize("size", [1, 2, 5, 24])
@pytest.mark.parametrize("order", ["as is", "shuffled"])
def test_exact_statistics_are_those_of_one_batch_of_all_data(size, order):
    """Whatever the micro-batch (also 1, also ragged) and the order, the statistics are the definition's."""
    torch.manual_seed(0)
    model, x = models.cnn(), images()
    batches = x if order == "as is" else x[torch.randperm(len(x))]
    model, result = recalibrated(model, batches.split(size))
    assert gap(model, by_hand(model, x)) < 1e-6
    assert result.residual < 1e-6
    assert (result.samples, result.virtual_batches, result.untouched, result.notes) == (24, 1, {}, [])


def test_update_bn_is_off_where_exact_is_not():
    """The usual helper stores what eval mode does not see: the reason why this exists."""
    torch.manual_seed(0)
    model, x = models.cnn(), images()
    helper = copy.deepcopy(model)
    torch.optim.swa_utils.update_bn(x.split(2), helper)
    exact, _ = recalibrated(model, x.split(2))
    assert gap(helper, by_hand(model, x)) > 0.01
    assert gap(exact, by_hand(model, x)) < 1e-6


def test_a_large_mean_leaves_the_variance_right():
    """Data whose mean is 1e4 times its standard deviation: variance right to 1e-3, in either layout."""
    x = torch.randn(64, 3, 40, 40, dtype=torch.float64) * 0.01 + 100
    for model in (nn.Sequential(nn.BatchNorm2d(3)), nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 1, 1))):
        bntools.recalibrate(model, x.float().split(8))
        expected = x.float().double().var((0, 2, 3), correction=0)
        assert ((model[0].running_var.double() / expected - 1).abs() < 1e-3).all()


def test_channels_last_moments_do_not_drift_with_the_count():
    """PyTorch's kernel for this layout was off by 1e-4 in 800,000 rows; bntools is not."""
    from bntools.backends.torch.measuring import moments_of

    x = (torch.randn(16, 4, 224, 224) + 1).contiguous(memory_format=torch.channels_last)
    var, mean = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    native = torch.batch_norm_update_stats(x, None, None, 0.0)[1].double()
    moments = moments_of(x)
    assert (native / var - 1).abs().max() > 1e-5
    np.testing.assert_allclose(moments.var, var, rtol=1e-6)
    np.testing.assert_allclose(moments.mean, mean, rtol=1e-6)


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(7, 3),
        torch.randn(1, 3, 5),
        torch.randn(4, 3, 5, 6),
        torch.randn(4, 5, 6, 3).permute(0, 3, 1, 2),
        torch.randn(4, 3, 5, 6, 2)[..., 0],
        torch.randn(3000, 2),
        torch.randn(2, 3, 4, 5, 6).half(),
        torch.randn(2, 3, 4).bfloat16(),
        torch.randn(5, 3).double(),
    ],
    ids=lambda x: f"{tuple(x.shape)}-{x.dtype}",
)
def test_moments_of_a_tensor_are_those_of_numpy(x):
    """Every layout, rank and floating dtype gives the float64 reference."""
    from bntools.backends.torch.measuring import moments_of

    got, reference = moments_of(x), bntools.Moments.of(x.double().numpy())
    assert got.count == reference.count
    np.testing.assert_allclose(got.mean, reference.mean, atol=1e-6)
    np.testing.assert_allclose(got.var, reference.var, rtol=1e-5)


def test_batches_may_be_dicts_tuples_arrays_or_anything_with_forward():
    """A dict holds keyword inputs, a tuple its input first, forward= takes the rest."""
    torch.manual_seed(0)
    model = models.TwoInputs()
    left, right = rows(8), rows(8, 2, seed=1)
    by_dict, _ = recalibrated(model, [{"left": left[:3], "right": right[:3]}, {"left": left[3:], "right": right[3:]}])
    by_forward, result = recalibrated(model, [(left, right)], forward=lambda m, batch: m(*batch))
    assert gap(by_dict, by_forward) < 1e-6
    assert result.samples == 8
    single = nn.Sequential(nn.BatchNorm1d(3))
    a, _ = recalibrated(single, [(left, "labels")])
    b, _ = recalibrated(single, [left.numpy()])
    c, _ = recalibrated(single, left)
    assert gap(a, b) == gap(a, c) == 0


def test_only_the_named_layers_move():
    """layers= takes names, globs or a predicate; the others keep their statistics and say why."""
    model = models.cnn()
    before = stats(model)
    result = bntools.recalibrate(model, images().split(8), layers="4")
    assert list(result.untouched.items()) == [("1", "not selected by layers=")]
    after = stats(model)
    assert np.array_equal(after["1"][0], before["1"][0])
    assert not np.array_equal(after["4"][0], before["4"][0])
    assert [
        change.name for change in bntools.recalibrate(model, images(), layers=lambda bn: bn.features == 5).layers
    ] == ["1"]
    with pytest.raises(BntoolsError, match=r"'5' fits none of the model's 2 BN layers"):
        bntools.recalibrate(model, images(), layers="5")


def test_frozen_layers_are_recalibrated_only_when_named():
    """A frozen layer is left alone and says so, unless layers= names it."""
    model = models.cnn()
    bntools.freeze(model, layers="1")
    assert bntools.recalibrate(model, images()).untouched == {"1": "frozen: name it in layers= to recalibrate it"}
    assert bntools.recalibrate(model, images(), layers=["1", "4"]).untouched == {}
    bntools.assert_frozen(model, layers="1")


def test_layers_never_reached_are_untouched_and_reported():
    """A BN that no forward pass meets keeps its statistics (not mean 0 and variance 0)."""
    model = models.Shared()
    before = stats(model)["unused"]
    result = bntools.recalibrate(model, rows())
    assert result.untouched == {"unused": "never reached in a forward pass"}
    assert np.array_equal(stats(model)["unused"][1], before[1])


def test_a_layer_called_twice_pools_its_calls_and_says_so():
    """The statistics are those of both calls' inputs together."""
    model = models.Shared()
    x = rows()
    result = bntools.recalibrate(model, x.split(7))
    both = bntools.Moments.of(torch.cat([x, x * 2 + 5]).numpy())
    layer = bntools.inspect(model)[0]
    np.testing.assert_allclose(layer.mean, both.mean, rtol=1e-5)
    np.testing.assert_allclose(layer.var, both.var, rtol=1e-5)
    assert "called more than once in a forward pass, their calls pooled: bn" in result.notes[0]
    assert result.residual < 1e-6


def test_batches_that_part_ways_meet_again():
    """Where some batches skip a block, the layer behind it waits for those inside, whatever is defined first."""
    torch.manual_seed(0)
    x = rows(40)
    batches = list(x.split(4))
    model, result = recalibrated(models.Branches(), batches)
    assert result.residual < 1e-6
    assert 0 < sum(bool((model.stem.eval()(b))[0, 0] > 0) for b in batches) < len(batches)
    shuffled, again = recalibrated(models.Branches(), batches[::-1])
    assert gap(model, shuffled) < 1e-6
    assert again.residual < 1e-6


def test_batches_that_end_early_do_not_hold_up_the_others():
    """A replica that has come to its end is waited for no more."""
    batches = rows(40).split(4)
    _, result = recalibrated(models.Exits(), batches)
    assert result.residual < 1e-6
    assert {change.name for change in result.layers} == {"stem", "late"}


def test_models_that_store_values_on_themselves_get_their_own_back():
    """Between two layers every replica finds what it has stored itself, and the model keeps nothing."""
    torch.manual_seed(0)
    model = models.Remembers()
    before, seen = everything(model), model.seen
    one, _ = recalibrated(model, [rows()])
    result = bntools.recalibrate(model, rows().split(3))
    assert result.residual < 1e-6
    assert gap(model, one) < 1e-5
    assert model.kept is None
    assert model.seen is seen
    assert seen == []
    assert torch.equal(model.calls, before[0]["calls"])


def test_grad_inference_and_autocast_switched_in_forward_do_not_leak():
    """Each replica has its own grad mode, inference mode and autocast; the caller's stay."""
    torch.manual_seed(0)
    model = models.Switches()
    result = bntools.recalibrate(model, rows(32).split(4))
    whole, _ = recalibrated(model, [rows(32)])
    assert result.residual < 1e-6
    assert gap(model, whole) < 1e-2
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("kind", [models.BnRelu, models.ReluBn, models.WrittenOut])
def test_subclasses_that_do_more_in_forward_are_measured_where_they_normalize(kind):
    """What counts is the input of the normalization itself, not of the module around it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), kind(4), nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3))
    x = images()
    result = bntools.recalibrate(model, x.split(5))
    inner = model[0](x).detach()
    inner = inner.relu() * 2 if kind is models.ReluBn else inner
    expected = bntools.Moments.of(inner.numpy())
    np.testing.assert_allclose(model[1].running_mean, expected.mean, atol=1e-5)
    np.testing.assert_allclose(model[1].running_var, expected.var, rtol=1e-5)
    assert result.residual < 1e-6
    assert "forward" not in vars(model[1])


def test_views_that_need_the_plain_layout_work():
    """A model that calls .view where channels-last memory would need .reshape runs in its own layout."""

    torch.manual_seed(0)
    result = bntools.recalibrate(Views(), images().split(8))
    assert result.residual < 1e-6
    assert len(result.layers) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_are_measured_in_higher_precision(dtype):
    """Statistics of a half-precision model are right to the rounding of its own dtype."""
    torch.manual_seed(0)
    model = models.cnn().to(dtype)
    result = bntools.recalibrate(model, images().split(6))
    assert result.residual < 4 * torch.finfo(dtype).eps
    assert model[1].running_mean.dtype == dtype


def test_a_variance_that_the_dtype_cannot_hold_is_refused():
    """float16 ends at 65504; the model keeps what it had."""
    model = nn.Sequential(nn.BatchNorm1d(3)).half()
    before = everything(model)
    with pytest.raises(BntoolsError, match=r"layer '0': a variance of .* does not fit the torch.float16"):
        bntools.recalibrate(model, rows(50) * 300)
    assert_unchanged(model, before)


@pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
def test_momentum_never_enters(momentum):
    """momentum=None and momentum=0 give the same statistics as any other, and stay as they were."""
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=momentum))
    bntools.recalibrate(model, rows().split(5))
    np.testing.assert_allclose(model[0].running_mean, rows().mean(0), rtol=1e-5)
    assert model[0].momentum == momentum


def test_a_checkpoint_without_a_counter_and_late_untracking_work():
    """num_batches_tracked=None and track_running_stats switched off later change nothing."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    model[0].num_batches_tracked = None
    model[1].track_running_stats = False
    assert bntools.recalibrate(model, rows()).residual < 1e-6


def test_layers_that_cannot_be_recalibrated_say_why():
    """No statistics, instance normalization: untouched, with the reason."""
    model = nn.Sequential(
        nn.BatchNorm1d(3),
        nn.BatchNorm1d(3, track_running_stats=False),
        nn.Unflatten(1, (3, 1)),
        nn.Conv1d(3, 3, 1),
        nn.InstanceNorm1d(3, track_running_stats=True),
    )
    untouched = bntools.recalibrate(model, rows()).untouched
    assert untouched["1"].startswith("keeps no statistics")
    assert untouched["4"].startswith("instance normalization")


def test_a_lazy_layer_is_refused_with_the_remedy():
    """A layer that has not seen a batch has no statistics to measure."""
    with pytest.raises(BntoolsError, match="'0' is not initialized yet: run one batch"):
        bntools.recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), rows())


def test_wrapped_models_are_served_inside():
    """DataParallel and torch.compile are looked into; nothing is compiled on the way."""
    torch.manual_seed(0)
    for wrap in (nn.DataParallel, lambda model: torch.compile(model, backend="eager")):
        model = models.cnn()
        result = bntools.recalibrate(wrap(model), images().split(8))
        assert [change.name for change in result.layers] == ["1", "4"]
        assert gap(model, by_hand(model, images())) < 1e-6


def test_distributed_data_parallel_is_served_inside(tmp_path):
    """One gloo process: recalibrated and folded as the module inside."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        model = models.cnn()
        parallel = nn.parallel.DistributedDataParallel(model)
        assert bntools.recalibrate(parallel, images().split(8)).residual < 1e-6
        assert gap(model, by_hand(model, images())) < 1e-6
        assert bntools.fold(parallel, images(2)).folded == ["1", "4"]
    finally:
        torch.distributed.destroy_process_group()


def test_the_prior_blends_stored_and_measured():
    """prior=N weighs the stored statistics as N samples against the measured n."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = rows(10)
    with torch.no_grad():
        model[0].running_mean.fill_(5.0)
    bntools.recalibrate(model, x.split(3), prior=30)
    mean = (30 * 5.0 + 10 * x.mean(0)) / 40
    second = (30 * (1 + 25.0) + 10 * (x**2).mean(0)) / 40
    torch.testing.assert_close(model[0].running_mean, mean)
    torch.testing.assert_close(model[0].running_var, second - mean**2)


def test_precise_pools_minibatch_moments():
    """PreciseBN: moments of inputs behind layers that normalize with each mini-batch's own statistics."""
    torch.manual_seed(0)
    model, x = models.cnn(), images()
    result_model, result = recalibrated(model, x.split(6), method="precise")
    seen = []
    train = copy.deepcopy(model).train()
    train[4].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().numpy()))
    for batch in x.split(6):
        train(batch)
    np.testing.assert_allclose(result_model[4].running_mean, bntools.Moments.of(np.concatenate(seen)).mean, atol=1e-5)
    assert result.residual > 1e-3
    assert result_model[4].momentum == 0.1


def test_ema_is_the_frameworks_own_update():
    """method="ema" leaves what a training epoch would leave in the statistics, dropout off."""
    torch.manual_seed(0)
    model = models.cnn()
    model.insert(3, nn.Dropout(0.5))
    trained = copy.deepcopy(model).train()
    trained[3].eval()
    with torch.no_grad():
        for batch in images().split(6):
            trained(batch)
    updated, _ = recalibrated(model.eval(), images().split(6), method="ema")
    assert gap(updated, trained) < 1e-6
    assert not updated.training


def test_undo_gives_the_statistics_back():
    """undo() restores mean, variance and counter to the bit."""
    model = models.cnn()
    before = everything(model)
    result = bntools.recalibrate(model, images())
    assert result.layers[0].drift > 0.1
    result.undo()
    assert_unchanged(model, before)


def test_memory_bounds_the_replicas_and_pools_virtual_batches():
    """Past the budget the data runs as several virtual batches, and the result says so."""
    torch.manual_seed(0)
    model = models.cnn()
    one, _ = recalibrated(model, images(48).split(2))
    small, result = recalibrated(model, images(48).split(2), memory=60_000)
    assert result.virtual_batches > 1
    assert any("virtual batches were pooled" in note for note in result.notes)
    assert 1e-6 < result.residual < 0.1
    assert gap(small, one) < 0.1
    assert result.samples == 48


def test_memory_is_measured_at_every_layer():
    """A model that holds little at its first BN and much at a later one starts over with fewer replicas."""

    class Grows(nn.Module):
        def __init__(self):
            super().__init__()
            self.small, self.large = nn.BatchNorm1d(3), nn.BatchNorm1d(3 * 4000)

        def forward(self, x):
            return self.large(self.small(x).repeat(1, 4000))

    torch.manual_seed(0)
    memory = 3 * 2 * 12_000 * 4 + 10_000
    result = bntools.recalibrate(Grows(), rows(24).split(2), memory=memory)
    assert result.virtual_batches >= 4
    assert result.samples == 24


def test_a_generator_too_large_for_memory_leaves_the_residual_unmeasured():
    """What can be read only once is not read twice, and the result says so."""
    result = bntools.recalibrate(models.cnn(), (b for b in images(48).split(2)), memory=30_000)
    assert result.residual is None
    assert any("can be read only once" in note for note in result.notes)
    assert bntools.recalibrate(models.cnn(), (b for b in images().split(2))).residual < 1e-6


def test_what_is_read_a_second_time_may_be_another_order(tmp_path):
    """Of loaders and generators that is said; files come in the same order again."""
    np.save(tmp_path / "a.npy", images(48).numpy())
    batches = images(48).split(2)
    for data, said in ((bntools.data.open(tmp_path / "a.npy", batch_size=2), False), (batches, True)):
        result = bntools.recalibrate(models.cnn(), data, memory=30_000)
        assert result.virtual_batches > 1
        assert any("second reading" in note for note in result.notes) == said


def test_tolerance_stops_when_the_mean_is_known_well_enough():
    """The standard error, with samples as units, is below the tolerance after a share of the data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    x = images(3000, size=5)
    result = bntools.recalibrate(model, x.split(16), tolerance=0.03)
    assert 64 < result.samples < 3000
    assert result.standard_error <= 0.03
    assert result.residual < 1e-6
    full, _ = recalibrated(model, x.split(100))
    assert gap(model, full) < 4 * 0.03
    missed = bntools.recalibrate(model, x[:100].split(10), tolerance=0.001)
    assert missed.samples == 100
    assert "the tolerance of 0.001 was not reached" in missed.notes[0]


def test_max_samples_cuts_the_last_batch():
    """Exactly that many samples are used."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    result = bntools.recalibrate(model, [(b, b) for b in rows(24).split(7)], max_samples=10)
    assert result.samples == 10
    np.testing.assert_allclose(model[0].running_mean, rows(24)[:10].mean(0), rtol=1e-5)


def test_progress_is_told_in_samples():
    """progress(what, samples, total) goes up to the number of samples."""
    calls = []
    bntools.recalibrate(models.cnn(), images().split(5), progress=lambda *call: calls.append(call))
    assert {call[0] for call in calls} == {"reading", "recalibrating", "checking"}
    assert max(call[1] for call in calls) == 24


class LoaderError(Exception):
    """Raised by a data loader."""


def broken_loader():
    """One batch, then an error."""
    yield images(4)
    raise LoaderError("disk gone")


FAILURES = {
    "loader raises": (lambda: broken_loader(), r"the data raised after 1 batches: LoaderError: disk gone"),
    "empty": (lambda: [], "holds no samples"),
    "empty batches": (lambda: [images(0)], "holds no samples"),
    "nan": (lambda: [images(4), images(4) * float("nan")], r"batch 1 brings NaN or Inf to the input of layer '1'"),
    "inf": (lambda: [images(4) * float("inf")], r"batch 0 brings NaN or Inf"),
    "shape": (lambda: [images(4), images(4, channels=2)], r"the model failed on batch 1: RuntimeError"),
    "not a batch": (lambda: ["text"], "found a batch of type str"),
    "not iterable": (lambda: 3, "found a int where batches were expected"),
}


@pytest.mark.parametrize("method", ["exact", "precise", "ema"])
@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_call_changes_nothing(case, method):
    """Whatever fails, statistics, modes, hooks and flags are as before, and the error says what and where."""
    make, message = FAILURES[case]
    model = models.cnn()
    model[0].train()
    model[4].eval()
    model[1].running_var.fill_(float("nan"))
    before = everything(model)
    with pytest.raises(BntoolsError, match=message) as caught:
        bntools.recalibrate(model, make(), method=method)
    assert_unchanged(model, before)
    if case == "loader raises":
        assert isinstance(caught.value.__cause__, LoaderError)


@pytest.mark.parametrize(
    "wrong", [{"prior": "a"}, {"memory": "1G"}, {"tolerance": "1"}, {"layers": 3}, {"layers": [3]}]
)
def test_arguments_of_another_type_are_refused(wrong):
    """What is no number, or no name, is said to be so."""
    name, value = next(iter(wrong.items()))
    with pytest.raises(BntoolsError, match=re.escape(f"found {name}={value!r}, expected")):
        bntools.recalibrate(nn.Sequential(nn.BatchNorm1d(3)), rows(), **wrong)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_model_that_raises_midway_changes_nothing(error):
    """Also when the replicas stand behind layers that already have new statistics."""

    class Raises(nn.Module):
        def forward(self, x):
            if x.shape[0] == 3:
                raise error("no")
            return x

    model = models.cnn()
    model.insert(3, Raises())
    before = everything(model)
    with pytest.raises(KeyboardInterrupt if error is KeyboardInterrupt else BntoolsError):
        bntools.recalibrate(model, images(11).split(4))
    assert_unchanged(model, before)


def test_one_value_per_channel_is_refused():
    """One sample on a (N, C) input has no variance; two micro-batches of one have."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(BntoolsError, match="layer '0' saw a single value per channel"):
        bntools.recalibrate(model, rows(1))
    assert bntools.recalibrate(model, rows(2).split(1)).residual < 1e-6


def test_a_model_without_bn_is_told_so():
    """The usual reason is that they were folded."""
    with pytest.raises(BntoolsError, match="no BN layers: were they folded already"):
        bntools.recalibrate(nn.Linear(3, 3), rows())


@pytest.mark.parametrize(
    "options",
    [{"method": "best"}, {"prior": -1}, {"memory": 0}, {"max_samples": 0}, {"tolerance": -0.1},
     {"method": "ema", "prior": 5}, {"method": "precise", "tolerance": 0.1}],
    ids=str,
)  # fmt: skip
def test_wrong_options_are_named(options):
    """The error names the option, what was found and what was expected."""
    with pytest.raises(BntoolsError, match=f"found {list(options)[-1]}="):
        bntools.recalibrate(models.cnn(), images(), **options)


def test_the_check_of_unchanged_can_fail():
    """assert_unchanged sees a single changed value, and a NaN that came or went."""
    for old, new in ((1.0, 1.0001), (1.0, float("nan")), (float("nan"), 1.0)):
        model = models.cnn()
        model[1].running_var[0] = old
        before = everything(model)
        model[1].running_var[0] = new
        with pytest.raises(AssertionError):
            assert_unchanged(model, before)


def test_transforms_that_are_modules_may_run_in_the_loader():
    """torchvision's transforms are nn.Modules: they run while the model is prepared, and are not part of it."""
    scale = nn.Linear(3, 3)
    result = bntools.recalibrate(nn.Sequential(nn.BatchNorm1d(3)), (scale(b).detach() for b in rows().split(5)))
    assert result.samples == 24


class Views(nn.Module):
    """Calls .view where channels-last memory would need .reshape."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm1d(4 * 49)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.bn1(x.view(len(x), -1))


@pytest.mark.parametrize("method", ["precise", "ema"])
def test_no_layer_is_trained_twice(method):
    """Where a forward pass has to start again in another layout, no statistics move a second time."""
    torch.manual_seed(0)
    model = Views()
    trained = copy.deepcopy(model).train()
    with torch.no_grad():
        for batch in images().split(8):
            trained(batch)
    bntools.recalibrate(model, images().split(8), method=method)
    if method == "ema":
        assert gap(model, trained) < 1e-6
        assert model.bn.num_batches_tracked == 3
    else:
        expected = bntools.Moments.of(model.conv(images()).detach().numpy())
        np.testing.assert_allclose(model.bn.running_var, expected.var, rtol=1e-5)


def test_a_last_virtual_batch_may_hold_a_single_value():
    """One sample left over is pooled with the others; only data that gives one value in all is refused."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3), nn.BatchNorm1d(3))
    for size, n in ((16, 33), (1, 20)):
        result = bntools.recalibrate(model, rows(n).split(size), memory=300)
        assert result.virtual_batches > 1
        np.testing.assert_allclose(model[1].running_var, model[0](rows(n)).var(0, correction=0).detach(), rtol=1e-4)


@pytest.mark.parametrize("stored", [float("nan"), -1.0])
def test_a_prior_that_is_no_statistic_is_refused(stored):
    """NaN or a negative variance must not be blended in."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    model[0].running_var[1] = stored
    before = everything(model)
    with pytest.raises(BntoolsError, match="found prior= although the stored statistics of layer '0'"):
        bntools.recalibrate(model, rows(), prior=10)
    assert_unchanged(model, before)
    assert bntools.recalibrate(model, rows()).residual < 1e-6


def test_a_prior_beyond_arithmetic_is_refused():
    """1e308 samples overflow: nothing is stored."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    before = everything(model)
    with pytest.raises(BntoolsError, match="choose a smaller prior"), np.errstate(all="ignore"):
        bntools.recalibrate(model, rows() * 100, prior=1e308)
    assert_unchanged(model, before)


def test_a_dead_channel_with_eps_zero_has_no_residual():
    """0 / 0 is not a distance."""
    model = nn.Sequential(nn.BatchNorm1d(3, eps=0))
    assert bntools.recalibrate(model, torch.ones(8, 3)).residual == 0


def test_a_lazy_layer_anywhere_is_refused():
    """Running the model would turn it into another class behind the caller's back."""
    model = nn.Sequential(nn.BatchNorm1d(3), nn.LazyLinear(2), nn.LazyBatchNorm1d())
    with pytest.raises(BntoolsError, match="lazy layers that are not initialized"):
        bntools.recalibrate(model, rows(), layers="0")
    assert isinstance(model[2], nn.LazyBatchNorm1d)


def test_frozen_variants_that_know_no_train_mode_take_the_exact_method_alone():
    """precise and ema need a layer that trains; exact writes into the buffers when it is named."""
    model = nn.Sequential(shim.import_torchvision().ops.FrozenBatchNorm2d(3))
    for method in ("precise", "ema"):
        with pytest.raises(BntoolsError, match="layer '0' is a FrozenBatchNorm2d, which knows no train mode"):
            bntools.recalibrate(model, images(), method=method, layers="0")
    assert bntools.recalibrate(model, images().split(5), layers="0").residual < 1e-6
    np.testing.assert_allclose(model[0].running_mean, images().mean((0, 2, 3)), rtol=1e-5)


class Pair(NamedTuple):
    """A batch with names."""

    x: torch.Tensor
    y: list


def test_batches_keep_their_type_when_they_are_cut():
    """Named tuples, mappings and lists of samples are cut to max_samples and stay what they are."""
    seen = []

    def forward(model, batch):
        seen.append(batch)
        return model(batch.x)

    model = nn.Sequential(nn.BatchNorm1d(3))
    batch = Pair(rows(8), list("abcdefgh"))
    bntools.recalibrate(model, [batch], forward=forward, max_samples=5, check=False)
    assert isinstance(seen[0], Pair)
    assert seen[0].y == list("abcde")
    np.testing.assert_allclose(model[0].running_mean, rows(8)[:5].mean(0), rtol=1e-5)
    mapping = UserDict(input=rows(8))
    assert bntools.recalibrate(model, [mapping], max_samples=5, check=False).samples == 5


def test_a_loader_that_cannot_be_iterated_is_named():
    """__iter__ may raise as well."""

    class Bad:
        def __iter__(self):
            raise ValueError("no workers")

    with pytest.raises(BntoolsError, match="the data raised after 0 batches: ValueError: no workers"):
        bntools.recalibrate(models.cnn(), Bad())


class Repeats(nn.Module):
    """Calls its BN a second time for large batches."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x):
        y = self.bn(self.linear(x))
        return self.bn(self.linear(y)) if len(x) > 4 else y


def test_calls_that_only_some_batches_make_are_measured_in_any_order():
    """No replica is ended because another one had come to its end."""
    torch.manual_seed(0)
    model, batches = Repeats(), [rows(4), rows(6, seed=1) * 4]
    one, result = recalibrated(model, batches)
    other, _ = recalibrated(model, batches[::-1])
    assert gap(one, other) < 1e-6
    assert "called more than once" in result.notes[0]


@pytest.mark.parametrize("error", [AssertionError, ValueError])
def test_models_that_want_their_own_layout_get_it(error):
    """Whatever a model raises about channels-last memory, it runs in the layout it was written for."""

    class Strict(nn.Module):
        def forward(self, x):
            if not x.is_contiguous():
                raise error
            return x

    torch.manual_seed(0)
    model = models.cnn()
    model.insert(1, Strict())
    weight = model[0].weight.data_ptr()
    assert bntools.recalibrate(model, images().split(8)).residual < 1e-6
    assert model[0].weight.data_ptr() == weight


def test_a_layout_that_changes_the_function_shows_in_the_residual():
    """The check runs in the model's own layout, so that it can see what channels-last memory did to as_strided."""

    class Strided(nn.Module):
        def forward(self, x):
            n, c, h, w = x.shape
            return x.as_strided((n, c, h - 1, w - 1), (c * h * w, h * w, w, 1))

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), Strided(), nn.BatchNorm2d(3))
    result = bntools.recalibrate(model, images().split(8))
    assert result.residual > 0.01
    assert "memory layout" in result.notes[0]


def test_inputs_changed_in_place_are_copies():
    """A model that normalizes its input in place changes neither the caller's data nor a second run on it."""

    class InPlace(nn.Module):
        def forward(self, x):
            return x.sub_(3.0).div_(2.0)

    x = rows(200)
    before = x.clone()
    model = nn.Sequential(InPlace(), nn.BatchNorm1d(3))
    for data in (x, x.numpy()):
        result = bntools.recalibrate(model, [data[:100], data[100:]], tolerance=0.01)
        assert result.residual < 1e-6
        assert torch.equal(x, before)
        np.testing.assert_allclose(model[1].running_mean, ((before - 3) / 2).mean(0), atol=1e-6)


def test_values_that_hooks_keep_on_any_module_are_each_replicas_own():
    """Also on PyTorch's own modules, and in nested containers; nothing is left behind."""

    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.bn, self.last = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3)
            self.state = {"features": []}

        def forward(self, x):
            self.state["features"].clear()
            self.state["features"].append(self.first(x))
            y = self.bn(self.state["features"][0])
            return self.last(torch.tanh(y) + self.first.kept + self.state["features"][-1])

    torch.manual_seed(0)
    model = Reads()
    model.first.register_forward_hook(lambda module, args, output: setattr(module, "kept", output))
    whole, _ = recalibrated(model, [rows()])
    result = bntools.recalibrate(model, rows().split(4))
    assert result.residual < 1e-6
    assert gap(model, whole) < 1e-5
    assert not hasattr(model.first, "kept")
    assert model.state == {"features": []}


def test_default_dtype_and_function_modes_do_not_leak():
    """What a model switches for the process or the thread around a layer is its own replica's alone."""

    class Doubles(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is torch.tanh else result

    class Switching(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = (nn.BatchNorm1d(3) for _ in range(3))

        def forward(self, x):
            torch.set_default_dtype(torch.float64)
            try:
                x = self.one(x)
            finally:
                torch.set_default_dtype(torch.float32)
            with Doubles():
                x = torch.tanh(self.two(x))
            return self.three(torch.tanh(x) * torch.ones(3))

    model = Switching()
    whole, _ = recalibrated(model, [rows()])
    result = bntools.recalibrate(model, rows().split(4))
    assert result.residual < 1e-6
    assert gap(model, whole) < 1e-5
    assert torch.get_default_dtype() == torch.float32


def test_threads_with_models_of_their_own_leave_the_compiler_as_it_was():
    """torch.compile's stance is one for the process: the last thread to leave puts it back."""
    before = torch._dynamo.eval_frame._stance.stance
    made = [(models.cnn(), images(seed=i)) for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda pair: bntools.recalibrate(pair[0], pair[1].split(3)), made))
    assert torch._dynamo.eval_frame._stance.stance == before
    for (model, x), result in zip(made, results, strict=True):
        assert result.residual < 1e-6
        assert gap(model, by_hand(model, x)) < 1e-6


# Python swallows what is raised while a weak reference's callback runs, an interrupt too.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_ctrl_c_at_any_moment_changes_nothing_or_all():
    """Interrupted at 60 moments: statistics all as before or all new, everything else as before."""
    torch.manual_seed(0)
    model = models.cnn()
    model.insert(3, models.BnRelu(5))
    pointers = [p.data_ptr() for p in model.parameters()]
    before, done = everything(model), copy.deepcopy(model)
    bntools.recalibrate(done, images().split(3))
    interrupted = 0
    for moment in np.linspace(0.0005, 0.03, 60):
        signal.setitimer(signal.ITIMER_REAL, moment)
        try:
            try:
                bntools.recalibrate(model, images().split(3))
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        now = everything(model)
        assert now[1:] == before[1:]
        assert [p.data_ptr() for p in model.parameters()] == pointers
        if not np.array_equal(stats(model)["1"][0], stats(done)["1"][0]):
            assert_unchanged(model, before)
        model.load_state_dict(before[0])
    assert interrupted > 10


def test_a_function_mode_that_an_interrupt_left_is_taken_off():
    """Ctrl-C between two lines of a mode's exit leaves it on the thread's stack, where it would meet the next model."""

    class Mode(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    class Interrupted(nn.Module):
        def forward(self, x):
            Mode().__enter__()
            torch.set_default_dtype(torch.float64)
            raise KeyboardInterrupt

    outer = Mode()
    with outer:
        with pytest.raises(KeyboardInterrupt):
            bntools.recalibrate(nn.Sequential(nn.BatchNorm1d(3), Interrupted()), rows().split(8))
        assert overrides._get_current_function_mode_stack() == [outer]
    assert torch.get_default_dtype() == torch.float32


@pytest.fixture(autouse=True)
def alarm_is_ctrl_c():
    """SIGALRM raises what Ctrl-C raises, through SIGINT's handler."""
    previous = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, previous)


def test_a_model_that_draws_random_numbers_is_called_out():
    """The residual then is more than rounding, and the result says so."""

    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn(x.shape[1])

    torch.manual_seed(0)
    result = bntools.recalibrate(nn.Sequential(Noisy(), nn.BatchNorm1d(3)), rows().split(4))
    assert "random numbers" in result.notes[0]


def test_dropout_stays_off_and_every_mode_is_kept():
    """The whole-model train() of other helpers switches dropout on and flattens the modules' own modes."""
    model = models.cnn()
    model.insert(3, nn.Dropout(0.9))
    model.train()
    model[0].eval()
    before = everything(model)[1:]
    assert bntools.recalibrate(model, images().split(4)).residual < 1e-6
    assert everything(model)[1:] == before


def test_synchronized_bn_works_on_the_cpu():
    """In eval mode SyncBatchNorm is a plain BN."""
    torch.manual_seed(0)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(models.cnn())
    assert bntools.recalibrate(model, images().split(4)).residual < 1e-6
    assert bntools.inspect(model)[0].kind == "SyncBatchNorm"
