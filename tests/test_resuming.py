"""A run that was stopped goes on from its checkpoint, to the same result."""

from __future__ import annotations

import copy
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import models
import numpy as np
import pytest
import same_network
import torch
from PIL import Image

import bntools
from bntools import BntoolsError, data, images, resuming
from bntools.backends.keras import feeding

DATA = (np.random.default_rng(0).standard_normal((48, 3, 10, 10)) * 2 + 1).astype(np.float32)
BATCHES = [DATA[i : i + 7] for i in range(0, len(DATA), 7)]
CASES = {
    "virtual batches": {"memory": 160_000},
    "tolerance": {"memory": 160_000, "tolerance": 0.02},
    "one batch at a time": {"memory": 1, "prior": 10, "max_samples": 45},
    "precise": {"method": "precise"},
}


@pytest.fixture(autouse=True)
def always_due(monkeypatch):
    """A checkpoint after each batch, where otherwise some seconds lie between them."""
    monkeypatch.setattr(resuming, "EVERY", 0)
    monkeypatch.setattr("bntools.backends.keras.feeding.TOGETHER", 14)  # samples: two batches together, not all
    torch.set_num_threads(1)


@pytest.fixture(scope="module", params=["torch", "keras", "onnx"])
def case(request, tmp_path_factory):
    """A function that makes the model of a framework anew, and data for it."""
    module = same_network.in_torch()
    if request.param == "torch":
        return lambda: copy.deepcopy(module), BATCHES
    if request.param == "onnx":
        model = same_network.in_onnx(module, tmp_path_factory.mktemp("onnx"))
        return lambda: copy.deepcopy(model), BATCHES
    model = same_network.in_keras(module)

    def copied():
        twin = keras.models.clone_model(model)  # with the same names
        twin.set_weights(model.get_weights())
        return twin

    return copied, [np.ascontiguousarray(x.transpose(0, 2, 3, 1)) for x in BATCHES]


class Killed(BaseException):
    """What ends a run from outside."""


def killed(at: int):
    """Progress that ends the run at the call of this number."""
    calls = iter(range(at))

    def progress(*_):
        if next(calls, None) is None:
            raise Killed

    return progress


def stats(model):
    """Mean, variance and counter of every layer, to be compared bit for bit."""
    return {layer.name: (layer.mean.tobytes(), layer.var.tobytes(), layer.updates) for layer in bntools.inspect(model)}


def outcome(result):
    """What a result says."""
    return (
        result.samples,
        result.virtual_batches,
        result.standard_error,
        result.convergence,
        result.residual,
        result.notes,
    )


@pytest.mark.parametrize("options", CASES.values(), ids=CASES.keys())
def test_wherever_it_was_stopped_the_result_is_the_same(case, options, tmp_path, request):
    """Statistics, counters and all that the result says are those of a run that nobody stopped, bit for bit."""
    made, batches = case
    whole, calls = made(), []
    expected = bntools.recalibrate(whole, batches, progress=lambda *call: calls.append(call), **options)
    path = tmp_path / "state"

    resumed = set()
    places = {1, len(calls) // 3, len(calls) // 2, len(calls) - 1}
    for at in places if request.node.callspec.params["case"] == "torch" else {2 * len(calls) // 3}:
        model = made()
        before = stats(model)
        with pytest.raises(Killed):
            bntools.recalibrate(model, batches, progress=killed(at), checkpoint=path, **options)
        assert stats(model) == before
        seen = []
        result = bntools.recalibrate(
            model, batches, checkpoint=path, progress=lambda *call, seen=seen: seen.append(call), **options
        )
        assert stats(model) == stats(whole)
        assert outcome(result) == outcome(expected)
        assert os.listdir(tmp_path) == []
        resumed.add(len(calls) - len(seen))
    assert max(resumed) > len(calls) // 4  # of the work was not done again


@pytest.fixture
def stopped(tmp_path):
    """A small module, and the checkpoint of a run on it that was stopped in the middle."""
    model, path = same_network.in_torch(), tmp_path / "state"
    with pytest.raises(Killed):
        bntools.recalibrate(model, BATCHES, memory=1, progress=killed(16), checkpoint=path)
    assert path.exists()
    return model, path


def test_the_memory_that_was_free_then_counts(tmp_path, monkeypatch):
    """What is free decides where virtual batches end; a run that goes on takes what was free when it began."""
    whole = same_network.in_torch()
    model = copy.deepcopy(whole)
    monkeypatch.setattr("bntools.backends.torch.free_memory", lambda _: 400_000)
    expected = bntools.recalibrate(whole, BATCHES)
    assert 1 < expected.virtual_batches < len(BATCHES)
    with pytest.raises(Killed):
        bntools.recalibrate(model, BATCHES, progress=killed(12), checkpoint=tmp_path / "state")
    monkeypatch.setattr("bntools.backends.torch.free_memory", lambda _: 1 << 40)
    result = bntools.recalibrate(model, BATCHES, checkpoint=tmp_path / "state")
    assert result.virtual_batches == expected.virtual_batches
    assert stats(model) == stats(whole)


def test_batches_that_part_ways_do_so_again(tmp_path):
    """Which layer was found to lead to which is kept as well."""
    torch.manual_seed(0)
    batches = [x + (i % 3 - 1) for i, x in enumerate(torch.randn(12, 6, 3))]
    whole, path = models.Branches(), tmp_path / "state"
    model = copy.deepcopy(whole)
    bntools.recalibrate(whole, batches, memory=300)
    with pytest.raises(Killed):
        bntools.recalibrate(model, batches, memory=300, progress=killed(20), checkpoint=path)
    bntools.recalibrate(model, batches, memory=300, checkpoint=path)
    assert stats(model) == stats(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prior": 3}, "prior 0 and not 3"),
        ({"method": "precise"}, "method 'exact' and not 'precise'"),
        ({"max_samples": 40}, "max_samples None and not 40"),
        ({"layers": "1"}, "other statistics, other layers"),
        ({"forward": lambda model, batch: model(torch.from_numpy(batch))}, "forward False and not True"),
        ({"batches": BATCHES[::-1]}, "stopped after .* samples: the batch that was its last is another now"),
        ({"batches": [DATA[i : i + 5] for i in range(0, 48, 5)]}, "stopped after .* samples"),
        ({"batches": BATCHES[:1]}, "stopped after .* samples"),
    ],
)
def test_another_run_is_refused(stopped, change, message):
    """Other arguments or data: one message says what differs; model and file stay as they are."""
    model, path = stopped
    before, content = stats(model), path.read_bytes()
    change = {"batches": BATCHES, "memory": 1, **change}
    with pytest.raises(BntoolsError, match=message):
        bntools.recalibrate(model, change.pop("batches"), checkpoint=path, **change)
    assert (stats(model), path.read_bytes()) == (before, content)


def test_another_model_or_version_is_refused(stopped, monkeypatch):
    """Other weights, other statistics to begin with, another bntools."""
    model, path = stopped
    for change, message in (
        (lambda: monkeypatch.setattr(bntools, "__version__", "9"), r"bntools '0.* and not '9'"),
        (lambda: model[1].running_mean.add_(1), "other statistics"),
        (lambda: model[0].weight.data.add_(1), "other weights"),
    ):
        change()
        with pytest.raises(BntoolsError, match=message):
            bntools.recalibrate(model, BATCHES, memory=1, checkpoint=path)


def test_a_damaged_file_is_refused(stopped, monkeypatch):
    """Cut off anywhere, or with any byte changed, it is refused in one line or read; nothing else is raised."""
    model, path = stopped
    content, before = path.read_bytes(), stats(model)
    generator = np.random.default_rng(0)
    damaged = [content[:length] for length in range(0, len(content), len(content) // 20)]
    places = generator.integers(len(content), size=100)
    damaged += [content[:place] + bytes([place % 256]) + content[place + 1 :] for place in places]
    errors = []
    monkeypatch.setattr(resuming.Checkpoint, "_check", lambda *_: None)
    for each in damaged:
        path.write_bytes(each)
        try:
            resuming.Checkpoint(path, BATCHES, dict).load()
        except BntoolsError as error:
            errors.append(str(error))
    assert 20 < len(errors) < len(damaged)
    assert not any("\n" in error for error in errors)
    path.write_bytes(content[:-8])
    with pytest.raises(BntoolsError, match=r"state: .*damaged"):
        bntools.recalibrate(model, BATCHES, memory=1, checkpoint=path)
    assert stats(model) == before


def test_what_cannot_be_kept_is_refused_before_it_runs(tmp_path):
    """A moving average lies in the model, and a folder has to be there."""
    for options, message in (
        ({"method": "ema", "checkpoint": tmp_path / "state"}, "method='ema'"),
        ({"checkpoint": tmp_path / "none" / "state"}, "does not exist"),
    ):
        with pytest.raises(BntoolsError, match=message):
            bntools.recalibrate(same_network.in_torch(), BATCHES, **options)


def test_a_checkpoint_that_cannot_be_written_ends_no_run(tmp_path, monkeypatch):
    """A full disk costs the checkpoint, not the result, which says so."""

    def full(*_):
        raise BntoolsError("state: cannot be written: No space left on device")

    monkeypatch.setattr(resuming.Kind, "write", full)
    result = bntools.recalibrate(same_network.in_torch(), BATCHES, memory=1, checkpoint=tmp_path / "state")
    assert any("no checkpoint could be written: state: cannot be written" in note for note in result.notes)


def test_one_virtual_batch_writes_nothing(tmp_path, monkeypatch):
    """Where all data goes through together, there is nothing to go on with, and no file is written."""
    monkeypatch.setattr(resuming.Kind, "write", lambda *_: pytest.fail("written"))
    result = bntools.recalibrate(same_network.in_torch(), BATCHES, checkpoint=tmp_path / "state")
    assert result.virtual_batches == 1


@pytest.mark.parametrize("damaged", [False, True])
def test_images_before_the_place_are_not_decoded_again(damaged, tmp_path, monkeypatch):
    """They are passed over; where one of them turned out damaged, all are read, to find the same place again."""
    folder, path = tmp_path / "images", tmp_path / "state"
    folder.mkdir()
    for number, pixels in enumerate(np.random.default_rng(0).integers(0, 255, (40, 8, 8, 3), np.uint8)):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    if damaged:
        first = np.random.default_rng(0).permutation(40)[10]
        image = sorted(folder.iterdir())[first]
        content = image.read_bytes()
        image.write_bytes(content[:60] + bytes(40) + content[100:])  # which only decoding finds

    def run(progress=None, checkpoint=None):
        batches = data.open(folder, batch_size=4)
        decoded.clear()
        model = copy.deepcopy(untouched)
        options = {"memory": 1, "check": False, "progress": progress, "checkpoint": checkpoint}
        result = bntools.recalibrate(model, batches, **options)
        return outcome(result), stats(model), batches.spec

    untouched, decoded, decode = models.cnn(), [], images.decode
    monkeypatch.setattr(images, "decode", lambda *one, **how: decoded.append(one) or decode(*one, **how))
    expected = run()
    with pytest.raises(Killed):
        run(killed(26), path)
    resumed = run(None, path)
    assert len(decoded) > 35 if damaged else len(decoded) < 15
    assert len(resumed[-1]["skipped"]) == damaged
    assert resumed == expected


def test_batches_keep_their_numbers(tmp_path):
    """Behind the place where a Keras run goes on, its batches are counted as from the beginning."""
    np.save(tmp_path / "x.npy", DATA[:40].transpose(0, 2, 3, 1))
    feed = feeding.Feed(None, data.open(tmp_path / "x.npy", batch_size=4), limited=False)
    rest, before = feed.batches_after(12)
    next(rest), next(rest)
    assert (before, feed.place, feed.read) == (3, 4, 5)
