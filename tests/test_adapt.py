import threading
from copy import deepcopy

import numpy as np
import pytest
import torch
from models import BnRelu, cnn
from torch import nn

import bntools
from bntools.errors import BntoolsError


def source(dtype=torch.float64):
    """The small CNN in eval mode, with statistics of its own."""
    torch.manual_seed(0)
    model = cnn().to(dtype)
    for layer in (model[1], model[4]):
        layer.running_mean.normal_()
        layer.running_var.uniform_(0.5, 2)
    return model.eval()


def stream(*sizes, seed=0):
    """Batches of a domain that moves, of these sizes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, 3, 6, 6, generator=generator).double() * (1 + i) + i for i, n in enumerate(sizes)]


def stats(model):
    """Copies of all statistics by key."""
    return {key: value.clone() for key, value in model.state_dict().items() if "running" in key or "tracked" in key}


def assert_same(model, before):
    """The statistics are those of before, bit for bit."""
    for key, value in stats(model).items():
        assert torch.equal(value, before[key]), key


def blend(layer, parts, prior):
    """The closed form: the stored statistics as ``prior`` samples, with each part as its own number of samples."""
    weights = np.array([prior, *(len(part) for part in parts)], float)
    means = [layer.mean, *(part.mean((0, 2, 3)).numpy() for part in parts)]
    squares = [layer.var + layer.mean**2, *(part.square().mean((0, 2, 3)).numpy() for part in parts)]
    mean = np.average(means, axis=0, weights=weights)
    return mean, np.average(squares, axis=0, weights=weights) - mean**2


def test_statistics_are_the_blend_of_the_stored_and_all_seen_samples():
    """After each of several batches, in float64; what eval mode gives uses the statistics with the present batch."""
    model, batches, first = source(), stream(5, 1, 8), bntools.inspect(source())[0]
    with torch.no_grad(), bntools.adapt(model, prior=7, layers="1") as adaptation:
        for index in range(len(batches)):
            output = model(batches[index])
            mean, var = blend(first, [model[0](batch) for batch in batches[: index + 1]], 7)
            np.testing.assert_allclose(model[1].running_mean, mean, rtol=1e-12)
            np.testing.assert_allclose(model[1].running_var, var, rtol=1e-12)
        plain = deepcopy(model)
        assert adaptation.samples == 14
        torch.testing.assert_close(plain(batches[-1]), output, rtol=0, atol=0)


@pytest.mark.parametrize("bound", ["window", "half_life"])
def test_the_memory_is_bounded(bound):
    """A long past is forgotten but for the bound: a stream that has changed moves the statistics all the same."""
    model = source()
    first = bntools.inspect(model)[0]
    with torch.no_grad(), bntools.adapt(model, prior=2, layers="1", **{bound: 6}) as adaptation:
        for batch in stream(*[3] * 40):
            model(batch)
        assert adaptation.samples <= (6 if bound == "window" else 6 / np.log(2) + 3)
        if bound == "window":
            mean, var = blend(first, [model[0](batch) for batch in stream(*[3] * 40)[-2:]], 2)
            np.testing.assert_allclose(model[1].running_mean, mean, rtol=1e-10)
            np.testing.assert_allclose(model[1].running_var, var, rtol=1e-10)


def test_undo_restores_bit_for_bit_and_other_layers_never_move():
    """Only the layer named moves; undone, once or twice, by the handle or the block, nothing is left behind."""
    model = source(torch.float32)
    before = stats(model)
    handle = bntools.adapt(model, prior=4, layers=["4"])
    for batch in stream(4, 4):
        model(batch.float())
    moved = {key for key, value in stats(model).items() if not torch.equal(value, before[key])}
    assert moved == {"4.running_mean", "4.running_var"}
    assert repr(handle) == "<1 BN layer adapting, 8 samples in memory>"
    handle.undo()
    handle.undo()
    assert_same(model, before)
    model(stream(4)[0].float())
    assert_same(model, before)
    assert repr(handle) == "<1 BN layer undone>"
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with bntools.adapt(model, prior=4, layers="*"):
        model(stream(4)[0].float())
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])
    assert_same(model, before)


def test_train_mode_is_unaffected():
    """A step in training moves the statistics as PyTorch does; a frozen layer, which stays in eval mode, adapts."""
    model, twin = source().train(), source().train()
    (batch,) = stream(6)
    with bntools.adapt(model, prior=4, layers="*"):
        torch.testing.assert_close(model(batch), twin(batch), rtol=0, atol=0)
        assert_same(model, stats(twin))
    model = source()
    before = stats(model)
    with bntools.freeze(model, layers="1"), bntools.adapt(model, prior=4, layers="1"):
        model.train()(batch).sum().backward()
        assert not torch.equal(model[1].running_mean, before["1.running_mean"])


def test_a_batch_that_is_not_finite_changes_nothing():
    """Also where it breaks a later layer, after an earlier one has learned; good batches go on afterwards."""
    model = source()
    with torch.no_grad(), bntools.adapt(model, prior=4, layers="*") as adaptation:
        model(stream(4)[0])
        before = stats(model)
        bad = stream(4)[0]
        bad[2, 1, 3, 3] = float("nan")
        with pytest.raises(BntoolsError, match=r"layer '1': the batch is not finite there.*as before"):
            model(bad)
        assert_same(model, before)
        handle = model[3].register_forward_hook(lambda module, args, output: output / 0)
        with pytest.raises(BntoolsError, match="layer '4'"):
            model(stream(4)[0])
        handle.remove()
        assert_same(model, before)
        handle = model[8].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(stream(4)[0])
        handle.remove()
        assert_same(model, before)
        assert adaptation.samples == 4
        try:
            raise KeyError
        except KeyError:
            model(stream(4)[0])  # while its caller handles an error
        assert adaptation.samples == 8


def test_a_pass_that_was_interrupted_is_taken_back_by_the_next():
    """Ctrl-C in the midst of a pass leaves layers that have learned from it only until the model runs again."""

    def interrupt(*_):
        raise KeyboardInterrupt

    model, twin = source(), source()
    with torch.no_grad(), bntools.adapt(model, prior=4, layers="*"), bntools.adapt(twin, prior=4, layers="*"):
        handle = model[3].register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            model(stream(5, seed=1)[0])
        handle.remove()
        model(stream(4)[0])
        twin(stream(4)[0])
        assert_same(model, stats(twin))


def test_passes_of_bntools_leave_an_adapting_model_alone():
    """verify, predict and folding run it, and learn nothing from what they show it; a copy does not adapt."""
    model = source(torch.float32)
    batch = stream(4)[0].float()
    with bntools.adapt(model, prior=4, layers="*") as adaptation:
        model(batch)
        before = stats(model)
        bntools.verify(model, deepcopy(model), [batch])
        bntools.fold(model, batch)
        copy = deepcopy(model)
        copy(batch * 3)
        assert_same(model, before)
        assert_same(copy, before)
        assert adaptation.samples == 4


def test_a_model_that_moved_to_another_device_is_told():
    """What a layer remembers lies where it began; moved back, the model has its statistics again."""
    model = cnn().eval()
    before = model[1].running_mean.clone()
    adaptation = bntools.adapt(model, prior=4, layers="*")
    model[0].to("meta")
    with pytest.raises(BntoolsError, match="layer '1' runs on meta, and began to adapt on cpu"):
        model(torch.randn(2, 3, 8, 8, device="meta"))
    adaptation.undo()
    assert torch.equal(model[1].running_mean, before)


def test_a_second_thread_is_refused_while_a_pass_is_under_way():
    """It gets a clear error and disturbs nothing; afterwards it may run."""
    model, errors = source(), []
    (batch,) = stream(4)

    def run():
        try:
            model(batch)
        except BntoolsError as error:
            errors.append(str(error))

    def elsewhere(*_):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()

    with bntools.adapt(model, prior=4, layers="*") as adaptation:
        handle = model[3].register_forward_hook(elsewhere)
        model(batch)
        handle.remove()
        assert "running in another thread" in errors.pop()
        assert adaptation.samples == 4
        elsewhere()
        assert (errors, adaptation.samples) == ([], 8)


def test_models_in_which_hooks_would_be_passed_over_are_refused():
    """Compiled ones, DataParallel, classes that do more; each with what to do."""
    with pytest.raises(BntoolsError, match="compiled"):
        bntools.adapt(torch.compile(source(), backend="eager"), prior=1, layers="*")
    with pytest.raises(BntoolsError, match="DataParallel"):
        bntools.adapt(nn.DataParallel(source()), prior=1, layers="*")
    with pytest.raises(BntoolsError, match="BnRelu"):
        bntools.adapt(nn.Sequential(BnRelu(3)), prior=1, layers="*")
    with pytest.raises(BntoolsError, match="keeps no statistics"):
        bntools.adapt(nn.BatchNorm1d(3, track_running_stats=False), prior=1, layers="*")
    broken = nn.BatchNorm1d(3)
    broken.running_var[0] = float("inf")
    with pytest.raises(BntoolsError, match="not finite"):
        bntools.adapt(nn.Sequential(broken), prior=1, layers="*")
    model = source()
    with bntools.adapt(model, prior=1, layers="1"):
        with pytest.raises(BntoolsError, match="adapts already"):
            bntools.adapt(model, prior=1, layers="*")
        with pytest.raises(BntoolsError, match=r"undo bntools\.adapt"):
            bntools.save(model, "never.pt")


@pytest.mark.parametrize(
    "options",
    [{"prior": 0}, {"prior": "1"}, {"layers": None}, {"window": 0}, {"half_life": -1}, {"window": 1, "half_life": 1}],
)
def test_arguments_that_mean_nothing_are_refused(options):
    """Each is named; no layers adapt unless they are named."""
    with pytest.raises(BntoolsError, match=next(iter(options))):
        bntools.adapt(source(), **{"prior": 1, "layers": "*", **options})


def test_a_layer_alone_is_a_model():
    """A bare BN layer, and one that is called outside of its model, adapt as well; an empty batch teaches nothing."""
    layer = nn.BatchNorm1d(2).eval()
    with bntools.adapt(layer, prior=1, layers="*") as adaptation:
        layer(torch.full((1, 2), 3.0))
        layer(torch.zeros(0, 2))
        assert adaptation.samples == 1
        torch.testing.assert_close(layer.running_mean, torch.full((2,), 1.5))
        torch.testing.assert_close(layer.running_var, torch.full((2,), 0.5 + 2.25))
    model = source()
    with bntools.adapt(model, prior=1, layers="*") as adaptation:
        model[1](torch.ones(3, 5, 2, 2, dtype=torch.float64))
        assert adaptation.samples == 3


def test_other_frameworks_are_refused_with_what_to_do():
    """An ONNX file is recalibrated with a prior instead."""
    from onnx_nets import Builder

    b = Builder()
    with pytest.raises(BntoolsError, match=r"recalibrate\(model, batches, prior=8\)"):
        bntools.adapt(b.model([b.bn("x", 3)], ("n", 3, 4, 4)), prior=8, layers="*")
