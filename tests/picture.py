"""Makes samples/report.png and samples/report-dark.png: the top of the page that samples/report.py writes.

python tests/picture.py    needs chromium, chromedriver, selenium and Pillow
"""

import base64
import io
import runpy
import shutil
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver

SAMPLES = Path(__file__).parent.parent / "samples"
WIDTH = 1000
LAST = "channels"  # the section that the picture ends with
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"


def main() -> None:
    """Write the pictures, in a palette of 128 colours to keep them small."""
    with tempfile.TemporaryDirectory() as place:
        runpy.run_path(str(SAMPLES / "report.py"))["main"](Path(place))
        driver = browser(Path(place))
        try:
            for scheme, name in (("light", "report.png"), ("dark", "report-dark.png")):
                shot = shown(driver, Path(place) / "report.html", scheme)
                shot.quantize(128, dither=Image.Dither.NONE).save(SAMPLES / name, optimize=True)
                print(f"{name}: {shot.size}, {(SAMPLES / name).stat().st_size / 1024:.0f} KiB")
        finally:
            driver.quit()


def browser(folder: Path) -> Any:
    """Chromium with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS.split(), "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def shown(driver: Any, page: Path, scheme: str) -> Image.Image:
    """The page in this colour scheme, down to the end of the section ``LAST``."""
    feature = {"name": "prefers-color-scheme", "value": scheme}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    size = {"width": WIDTH, "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(page.as_uri())
    height = driver.execute_script(f"return document.getElementById('{LAST}').getBoundingClientRect().bottom") + 24
    clip = {"x": 0, "y": 0, "width": WIDTH, "height": height, "scale": 1}
    options = {"format": "png", "captureBeyondViewport": True, "clip": clip}
    shot = driver.execute_cdp_cmd("Page.captureScreenshot", options)
    return Image.open(io.BytesIO(base64.b64decode(shot["data"]))).convert("RGB")


if __name__ == "__main__":
    main()
