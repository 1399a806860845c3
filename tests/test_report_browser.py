"""Reports in a real browser."""

from __future__ import annotations

import base64
import functools
import http.server
import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from diagnoses import diagnosis

import bntools

webdriver = pytest.importorskip("selenium.webdriver")

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage"
)
LONG = "backbone.stages.3.blocks.2.attention.projection.norm_of_a_very_long_name_indeed"

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no Chromium with its chromedriver here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with a diagnosis, ``report.html``."""
    folder = tmp_path_factory.mktemp("reports")
    found = diagnosis("stem.bn", "layer1.bn", LONG)
    advice = [replace(found.advice[0], how=f"bntools recalibrate {'very-' * 30}long.pt data/"), *found.advice[1:]]
    bntools.report(
        replace(found, advice=advice), folder / "report.html", about={"model": f"/models/{'deep/' * 30}a.pt"}
    )
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Any]:
    """A browser of its own, which logs what it fetches and what the console says."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS.split(), f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@contextmanager
def served(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The folder over HTTP: its address, and the paths that were asked for."""
    asked: list[str] = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            asked.append(self.path)

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=folder))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def opened(browser: Any, folder: Path, width: int = 1200, scheme: str = "light") -> None:
    """Show the report in a window of this width, in light or dark."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get((folder / "report.html").as_uri())


def brightness(browser: Any, element: str, what: str) -> float:
    """How bright a colour of an element is, 0..1."""
    colour = browser.execute_script(f"return getComputedStyle(document.querySelector('{element}')).{what}")
    return sum(float(part) for part in colour.partition("(")[2].rstrip(")").split(",")[:3]) / 3 / 255


def test_it_asks_for_nothing_but_itself(browser, folder):
    """The one request is that for the page, and the console is silent."""
    with served(folder) as (address, asked):
        browser.get_log("performance")
        browser.get(f"{address}/report.html")
        assert browser.title == "BN diagnosis"
        events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    own = ("data:", "chrome:", "chrome-untrusted:")  # the page's empty icon, and the tab that the browser began with
    assert [url for url in urls if not url.startswith(own)] == [f"{address}/report.html"]
    assert asked == ["/report.html"]
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("width", [320, 400, 1200])
def test_the_page_never_scrolls_sideways(browser, folder, width):
    """Long names, paths, commands and wide tables stay within a phone's width; the table scrolls inside itself."""
    opened(browser, folder, width)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    outside = """return [...document.querySelectorAll("body *:not(.scroll *):not(svg *)")].filter(
        (one) => one.getBoundingClientRect().right > innerWidth + 1).map((one) => one.outerHTML.slice(0, 80))"""
    assert browser.execute_script(outside) == []
    scrolls = "const one = document.querySelector('.scroll'); return one.scrollWidth > one.clientWidth"
    assert browser.execute_script(scrolls)
    text = "return Math.min(...[...document.querySelectorAll('svg text')].filter((one) => one.getClientRects().length)"
    smallest = browser.execute_script(f"{text}.map((one) => one.getBoundingClientRect().height))")
    assert smallest >= (8 if width == 320 else 10)


def test_dark_and_light(browser, folder):
    """The page follows the reader's scheme, and its text keeps its distance from the ground in both."""
    for scheme in ("light", "dark"):
        opened(browser, folder, scheme=scheme)
        ground = brightness(browser, "body", "backgroundColor")
        assert (ground < 0.2) == (scheme == "dark")
        for element, what in (("body", "color"), (".explanation", "color"), ("svg .axis", "fill")):
            assert abs(brightness(browser, element, what) - ground) > 0.4, (scheme, element)


def test_another_layer_is_chosen(browser, folder):
    """The layer that drifts most is shown first; with the keyboard alone another one is, and then it alone."""
    opened(browser, folder)
    shown = "return [...document.querySelectorAll('[data-panel]')].filter((one) => one.offsetParent).map((one) => "
    first = browser.execute_script(f"{shown} one.textContent)")
    assert len(first) == 1
    assert LONG in first[0]
    select = browser.find_element("css selector", "select")
    assert select.is_displayed()
    select.send_keys("\ue015")  # arrow down
    (second,) = browser.execute_script(f"{shown} one.textContent)")
    assert "layer1.bn" in second


def test_without_scripts_the_worst_layer_is_shown(browser, folder):
    """Where scripts do not run, everything is readable, and what would need them is not there."""
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        opened(browser, folder)
        panels = browser.find_elements("css selector", "[data-panel]")
        assert [one.is_displayed() for one in panels] == [True, False, False]
        assert not browser.find_element("css selector", "select").is_displayed()
        assert browser.find_elements("css selector", ".copy") == []
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})


def test_commands_can_be_copied(browser, folder):
    """Each command has a button, which says that it has copied."""
    opened(browser, folder)
    granted = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"]}
    browser.execute_cdp_cmd("Browser.grantPermissions", granted)
    buttons = browser.find_elements("css selector", ".copy")
    assert len(buttons) == 2
    buttons[1].click()
    read = "const done = arguments[0]; navigator.clipboard.readText().then(done, (error) => done(String(error)))"
    assert browser.execute_async_script(read) == "bntools.freeze(model)"
    assert buttons[1].text == "Copied"
    assert browser.get_log("browser") == []


def test_it_prints(browser, folder):
    """Printed from a dark screen it is a PDF of a few pages, dark on light, with the whole table on the paper."""
    opened(browser, folder, scheme="dark")
    pdf = base64.b64decode(browser.print_page())
    assert pdf.startswith(b"%PDF-")
    assert 1 <= pdf.count(b"/Type /Page\n") + pdf.count(b"/Type /Page ") <= 8
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    paper = {"width": 690, "height": 1000, "deviceScaleFactor": 1, "mobile": False}  # A4 within its margins
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", paper)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 690
    assert brightness(browser, "body", "backgroundColor") > 0.95
    assert brightness(browser, "body", "color") < 0.3
    hidden = "return getComputedStyle(document.querySelector('.copy')).display"
    assert browser.execute_script(hidden) == "none"
