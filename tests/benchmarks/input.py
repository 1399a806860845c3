"""Images from a folder, tar shards and Parquet: how fast, and in how much memory."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
from measure import Row, at_least, at_most, medians
from PIL import Image

from bntools import ahead, data, images

IMAGES, PIXELS, BATCH = 1000, 224, 32
FEW, MANY, SMALL = 2_000, 20_000, 224  # images whose memory is compared, and their size
MILLION, FOLDERS = 1_000_000, 1000
FORMS = ("folder", "tar", "parquet")

PEAK = """
import re, sys
from bntools import data
read = sum(len(batch) for batch in data.open({source!r}, batch_size=32, channels=3))
assert read == {count}, read
# of this process alone; ru_maxrss starts at the peak of the process that started it
print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
"""

LISTING = """
import re, time
from pathlib import Path
from bntools import sources
from bntools.sources import folders, opening, tars
def resident():
    return int(re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024
before, start = resident(), time.perf_counter()
stock = opening._stock(sources.find(Path({source!r})))
print((resident() - before) / stock.total, time.perf_counter() - start)
"""


def rows() -> Iterator[Row]:
    """Rates against decoding the same bytes from memory in as many threads; memory in processes of their own."""
    with tempfile.TemporaryDirectory() as place:
        yield from _rates(Path(place))
    with tempfile.TemporaryDirectory() as place:
        yield from _peaks(Path(place))
    with tempfile.TemporaryDirectory() as place:
        yield from _listings(Path(place))


def _rates(place: Path) -> Iterator[Row]:
    files = _jpegs(IMAGES, PIXELS)
    opened = {form: data.open(_write(place / form, form, files, IMAGES), batch_size=BATCH) for form in FORMS}
    read = {form: partial(_read, one) for form, one in opened.items()}
    times = medians({"memory": partial(_decoded, files), **read}, rounds=3)
    alone = f"{IMAGES / times['memory']:.0f}/s"
    for form in FORMS:
        what = f"{IMAGES} JPEGs of {PIXELS} px from {form}: {IMAGES / times[form]:.0f}/s, decoded from memory {alone}"
        yield at_least(f"{what}: ratio", times["memory"] / times[form], 0.9, "{:.2f} x")


def _peaks(place: Path) -> Iterator[Row]:
    files = _jpegs(20, SMALL, 100)  # some 40 kB each: more of them than Parquet holds at a time
    for form in FORMS:
        peaks = []
        for count in (FEW, MANY):
            source = str(_write(place / f"{form}{count}", form, files, count))
            peaks.append(int(_run(PEAK.format(source=source, count=count))))
        what = f"Peak memory of reading {MANY:,} images from {form} / of {FEW:,} ({peaks[0] >> 20} MiB)"
        yield at_most(what, peaks[1] / peaks[0], 1.1, "{:.2f} x")


def _listings(place: Path) -> Iterator[Row]:
    small = io.BytesIO()
    Image.new("RGB", (8, 8)).save(small, "PNG")
    for form, write in {"folder": _million_files, "tar": _million_members}.items():
        write(place / form, small.getvalue())
        size, seconds = map(float, _run(LISTING.format(source=str(place / form))).split())
        what = f"{MILLION:,} images in a {form} listed in {seconds:.0f} s: bytes held for each"
        yield at_most(what, size, 64, "{:.0f}")


def _read(opened: data.Data) -> int:
    return sum(map(len, opened))


def _decoded(files: list[bytes]) -> int:
    """Batches of the same images whose bytes are in memory: what reading them from anywhere can at best come to."""
    entries = (images.Entry(i, "", str(i), content) for i, content in enumerate(files))
    decode = partial(images.decode, channels=3, size=(PIXELS, PIXELS))
    with closing(ahead.in_order(decode, entries, 4 * BATCH)) as results:
        read = 0
        while group := [result[0] for result in islice(results, BATCH)]:
            read += len(np.stack(group))
    return read


def _jpegs(count: int, side: int, quality: int = 90) -> list[bytes]:
    generator, files = np.random.default_rng(0), []
    for _ in range(count):
        coarse = generator.integers(0, 256, (side // 8, side // 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=quality)
        files.append(file.getvalue())
    return files


def _write(path: Path, form: str, files: list[bytes], count: int) -> Path:
    """So many images in one of the forms, the same ones again where there are fewer."""
    path.mkdir()
    if form == "folder":
        for i in range(count):
            (path / f"{i:06}.jpg").write_bytes(files[i % len(files)])
    elif form == "tar":
        with open(path / "0.tar", "wb") as file:
            for i in range(count):
                file.write(_member(f"{i:06}.jpg", files[i % len(files)]))
            file.write(bytes(1024))
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        schema = pa.schema({"image": pa.struct({"bytes": pa.binary(), "path": pa.string()})})
        with pq.ParquetWriter(path / "0.parquet", schema, use_dictionary=False) as writer:  # images are all different
            for start in range(0, count, 200):
                cells = [{"bytes": files[i % len(files)], "path": None} for i in range(start, min(count, start + 200))]
                writer.write_table(pa.table({"image": cells}, schema))
    return path


def _member(name: str, content: bytes) -> bytes:
    header = tarfile.TarInfo(name)
    header.size = len(content)
    return header.tobuf(tarfile.USTAR_FORMAT) + content + bytes(-len(content) % 512)


def _million_files(path: Path, content: bytes) -> None:
    """A folder of a million names for a few files: a file may have so many names only."""
    for number in range(FOLDERS):
        folder = path / f"n{number:08}"
        folder.mkdir(parents=True)
        first = folder / f"n{number:08}_00000.png"
        first.write_bytes(content)
        for i in range(1, MILLION // FOLDERS):
            os.link(first, folder / f"n{number:08}_{i:05}.png")


def _million_members(path: Path, content: bytes) -> None:
    path.mkdir()
    for shard in range(10):
        with open(path / f"{shard:03}.tar", "wb") as file:
            for i in range(MILLION // 10):
                file.write(_member(f"{shard:03}{i:06}.png", content))
            file.write(bytes(1024))


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
