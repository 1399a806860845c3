"""Reports: what they say, that nothing in them runs, and how large they get."""

from __future__ import annotations

import base64
import hashlib
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from diagnoses import diagnosis, layer
from torch import nn

import bntools
from bntools import words
from bntools.comparison import OutputError
from bntools.diagnosis.records import Diagnosis
from bntools.folding import Folded
from bntools.recalibrated import LayerChange, Recalibration
from bntools.reports import channels, charts, rendered
from bntools.trial import Verification

HOSTILE = '</title></script><script>alert(1)</script><img src=x onerror="alert(2)">&amp;\'"`\u202e\x00\ud800'
VOID = {"meta", "link", "path", "rect", "line", "circle", "br", "hr"}


class Page(HTMLParser):
    """The elements and the text of a page; raises AssertionError where elements do not nest."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.said)

    def having(self, style: str) -> list[dict[str, str | None]]:
        """The attributes of elements of this class."""
        return [attrs for _, attrs in self.elements if style in (attrs.get("class") or "").split()]


def test_what_a_layer_fixes():
    """A share in percent; a layer that makes matters worse alone says so, and rounding does not."""
    assert [words.mended(gap) for gap in (None, 0.9, -0.01, -3.7)] == ["-", "90%", "0%", "worse"]


def verification(name: str = "output", error: float = 2e-3) -> Verification:
    """A comparison that failed in one of ten values."""
    histogram = (3, *[0] * 9, 6, 0, 0, 0, 1, *[0] * 4)
    one = OutputError(name, (5, 2), "float32", error, 0.02, 1e-3, 0.8, histogram=histogram)
    reason = f"output {name!r} is off by 2.0e-03 of its scale"
    return Verification(False, error, (one,), "CPUExecutionProvider", 1e-4, 5, 0.8, "off", reason=reason, notes=(name,))


def recalibration(name: str = "bn") -> Recalibration:
    """One layer changed, one left."""
    one = layer(name)
    after = replace(one.layer, mean=one.mean, var=one.var)
    change = LayerChange(name, one.layer, after, one.drift, 1e-7)
    return Recalibration(640, "exact", 1e-7, [change], {f"{name}.2": name}, notes=[name])


def folded(name: str = "a.bn") -> Folded:
    """One layer folded, one kept."""
    check = replace(verification(name), passed=True, reason=None)
    return Folded(None, [name], {f"{name}.2": name}, check, {f"{name}.2": (), name: (f"{name}.weight",)})


def full(*_: object) -> None:
    """A disk without room."""
    raise OSError(28, "No space left on device")


def kinds(name: str = "a.bn") -> list[object]:
    """One result of each kind, with this name wherever a name or a sentence may stand."""
    found = diagnosis(name, f"{name}.2")
    advice = [replace(one, reason=name, how=name) for one in found.advice]
    parts = [replace(one, name=name) for one in found.domains]
    looks = [replace(one, name=name) for one in found.preprocessing]
    found = replace(found, advice=advice, domains=parts, preprocessing=looks, notes=[name], untouched={name: name})
    return [found, recalibration(name), folded(name), verification(name)]


def test_a_diagnosis_begins_with_what_to_do():
    """Advice comes first, with its reason and its command; then every figure the diagnosis holds."""
    page = Page(rendered(diagnosis("stem.bn", "layer1.bn", "layer2.bn"), about={"model": "model.pt"}))
    said = page.text
    order = ["model.pt", "Recalibrate the statistics", "off by 0.4 std", "bntools recalibrate model.pt data/"]
    order += [
        "Also: keep the statistics frozen",
        "1,200",
        "47.0%",
        "Drift by layer",
        "0.2 ± 0.01 std",
        "worst",
        "0.6 ± ",
    ]
    order += [
        "batches of 1",
        "90.0% off, 40.0% agree",
        "all samples in one batch",
        "Stored against measured",
        "mean 0.",
    ]
    order += ["1,024 samples give 0.0187 std. 0.05 std is reached; 0.01 std would take about 3,600", "418 std"]
    order += [
        "site-b",
        "800 samples; first layer 0.3 std",
        "0.31 std",
        "second half",
        "All layers",
        "25%",
        "one of the layers is frozen",
        "head.bn",
    ]
    place = 0
    for each in order:
        place = said.find(each, place)
        assert place >= 0, each


@pytest.mark.parametrize("result", kinds(HOSTILE), ids=lambda one: type(one).__name__)
def test_hostile_names_are_text(result):
    """What a name, a reason, a note, a title or a path holds never becomes an element, an attribute or a script."""
    text = rendered(result, HOSTILE, {HOSTILE: HOSTILE})
    assert text.encode()
    page = Page(text)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1
    assert "img" not in tags
    assert not [key for _, attrs in page.elements for key in attrs if key.startswith("on")]
    shown = "</title></script><script>alert(1)</script>"
    assert shown in page.text
    assert not {"\u202e", "\x00", "\ud800"} & set(text)


@pytest.mark.parametrize("result", kinds(), ids=lambda one: type(one).__name__)
def test_nothing_is_fetched(result):
    """A page names no address, and its policy admits no source and no script but its own, by hash."""
    text = rendered(result)
    assert not re.search(r"https?:|//[a-z]|url\(|@import| src=", text)
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', text)
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy.replace("&#x27;", "'")
    assert policy.startswith("default-src &#x27;none&#x27;")


def test_statistics_that_are_no_numbers():
    """NaN, infinite and zero statistics are said to be so, at the top of the ranking, and break nothing."""
    sick = layer("sick")
    assert sick.layer.mean is not None
    sick.layer.mean[0], sick.mean[1], sick.var[2] = np.nan, np.inf, -1.0
    sick = replace(sick, drift=np.nan, standard_error=np.inf, kl=np.full(8, np.nan))
    text = rendered(Diagnosis(3, [layer("well"), sick], [], convergence=[(1, np.inf), (2, 0.5)]))
    page = Page(text)
    assert "2 whose statistics are not finite" in page.text
    assert "largest drift, in layer  sick" in page.text
    assert page.having("severe")
    assert not re.search(r'[ "](nan|inf)[ "%]', re.sub(r">[^<]*<", "><", text))


def test_size_is_bounded():
    """A report on 200 layers of 2,048 channels stays below 2 MB, says what it left out, and draws the worst."""
    layers = [layer(f"backbone.stage{i // 50}.block{i}.bn", 2048, 0.4, i) for i in range(200)]
    text = rendered(Diagnosis(9, layers, []))
    assert len(text.encode()) < 2e6
    page = Page(text)
    assert "2,048 channels" in page.text
    assert "150 are drawn: those that drift the most, and an even sample of the others" in page.text
    assert sum(tag == "option" for tag, _ in page.elements) == 200
    assert len(page.having("sky")) == 1


def test_channels_that_drift_most_are_drawn():
    """Of too many channels the worst half of the room is theirs, and no channel is drawn twice."""
    one = layer("bn", 1000, 0.3)
    assert one.layer.mean is not None
    of = channels.Channels("bn", one.layer.mean, one.layer.std, one.mean, one.layer.std)
    drawn = channels._sample(of, np.arange(1000), 100)
    assert len(set(drawn)) == 100
    assert set(np.argsort(-of.drift)[:50]) <= set(drawn)
    assert 999 in drawn


def test_recalibration_says_what_is_left():
    """Drift, residual, samples and the layers left alone are there; a residual of rounding draws no long bar."""
    page = Page(rendered(recalibration()))
    for said in ("Recalibrated 1 BN layer on 640 samples, residual 1.0e-07", "0.5 std", "1e-07 std", "bn.2"):
        assert said in page.text
    widths = [attrs["style"] for attrs in page.having("bar") if attrs.get("style")]
    assert widths == ["width:100.00%", "width:0.00%"]


def test_a_recalibration_with_a_tolerance_shows_how_its_error_fell():
    """The curve of the standard error stands in the page where one was measured, and only there."""
    curve = [(2, 0.5), (64, 0.1), (640, 0.03)]
    assert "640 samples give 0.03 std" in Page(rendered(replace(recalibration(), convergence=curve))).text
    assert "How many samples" not in Page(rendered(recalibration())).text


def test_a_fold_draws_the_network():
    """Each BN layer stands in model order with the weights that took it up, or the reason why it is still there."""
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4), nn.GELU())
    model = nn.Sequential(block, nn.Conv2d(4, 3, 3), nn.BatchNorm2d(3)).eval()
    result = bntools.fold(model, torch.randn(2, 2, 8, 8))
    assert result.into == {"0.1": ("0.0.weight",), "0.3": (), "2": ("1.weight",)}
    page = Page(rendered(result))
    assert len(page.having("folded")) == 2
    assert len(page.having("kept")) == 1
    said = page.text
    assert "Folded 2 of 3 BN layers" in said
    assert said.index("into 0.weight") < said.index(f"kept: {result.kept['0.3']}") < said.index("into 1.weight")


def test_exported_names_are_read_as_modules():
    """Operators that exporters name after their module stand in that module's block."""
    name = "/layer1/bn1/BatchNormalization"
    page = Page(rendered(replace(folded(), folded=[name], kept={}, into={name: ("w",)})))
    assert "layer1" in page.said
    assert "bn1" in page.said


def test_a_failed_verification_shows_where():
    """Reason, figures and the values beyond the tolerance are told; a passed one says by how much."""
    said = (page := Page(rendered(verification("Logits")))).text
    for each in ("The models do not agree", "Output 'Logits' is off", "0.002", "0.0001", "80.0%", "30.0% of 10 values"):
        assert each in said
    assert [attrs["d"] != "" for attrs in page.having("over")] == [True]
    passed = replace(verification(error=1e-6), passed=True, reason=None)
    assert "100 times below the tolerance" in Page(rendered(passed)).text


def test_outputs_that_cannot_be_compared():
    """Without figures there is the problem in words, and no empty chart."""
    one = OutputError("y", (2,), "float32", np.inf, np.inf, np.inf, problem="shape (3,) where the reference has (2,)")
    page = Page(rendered(replace(verification(), outputs=(one,), error=np.inf)))
    assert "shape (3,) where the reference has (2,)" in page.text
    assert "svg" not in [tag for tag, _ in page.elements]


def test_nothing_measured():
    """A diagnosis of no layers is a page all the same."""
    assert "0" in Page(rendered(Diagnosis(4, [], [], untouched={"bn": "frozen"}))).said


def test_the_file_is_whole_or_as_before(tmp_path, monkeypatch):
    """The file replaces an older one at once; another suffix, another result and a failure leave that as it was."""
    path = tmp_path / "report.html"
    bntools.report(recalibration(), path, title="Night shift", about={"model": "a.pt"})
    before = path.read_text()
    assert "<title>Night shift</title>" in before
    with pytest.raises(bntools.BntoolsError, match="ends in"):
        bntools.report(recalibration(), tmp_path / "report.txt")
    with pytest.raises(bntools.BntoolsError, match="no report on a list"):
        bntools.report([], path)  # type: ignore[arg-type]
    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(bntools.BntoolsError, match="No space left"):
            bntools.report(verification(), path)
    assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
    assert path.read_text() == before


@pytest.mark.parametrize(("low", "high", "log"), [(0, 0, False), (-3e-9, 2e5, False), (1, 1, True), (1e-12, 4, True)])
def test_axes_have_ticks(low, high, log):
    """Whatever the range, also an empty one, an axis has a few ticks, all of them inside."""
    axis = charts.upward(low, high, "", log)
    assert 2 <= len(axis.ticks) <= 9
    assert all(axis.low <= tick * (1 + 1e-6) + 1e-12 and tick <= axis.high * (1 + 1e-6) for tick in axis.ticks)


def test_severity():
    """A drift within three standard errors is noise; the steps end at 2, and NaN is beyond all of them."""
    drifts = [0.0, 0.05, 0.1, 0.5, 2.0, np.inf, np.nan]
    assert [words.severity(one) for one in drifts] == ["small", "small", "clear", "large", "severe", "severe", "severe"]
    assert words.severity(0.3, 0.1) == "noise"
    assert words.severity(0.3001, 0.1) == "clear"


def test_long_names_lose_their_middle():
    """Both ends stay, and the result is as long as it may be."""
    assert words.shortened("backbone.layer3.5.bn2", 12) == "back…3.5.bn2"
    assert words.shortened("bn", 12) == "bn"
    names = [f"backbone.stages.{i}.attention.norm" for i in range(12)]
    assert words.told_apart(names, 18) == [f"…{i}.attention.norm" for i in range(12)]
    assert len(set(words.told_apart([f"a.{'b' * 40}{i}{'c' * 40}" for i in range(9)], 12))) == 9
    assert words.told_apart(names, 40) == names
