"""Feeds the readers of bntools with damaged and crafted files: ``make fuzz`` (READER=onnx N=1000).

Input number i of a reader is made from a seed file by a generator that i alone seeds. A file must be read or refused
with a BntoolsError, in time, within 1 GiB, without writing anywhere else or running anything. Worker processes read
thousands of inputs each; when one dies or hangs, the input is known and the next worker goes on behind it.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any

import results

READERS = ("pt", "pt2", "safetensors", "stats", "keras", "onnx", "images", "arrays", "tar", "parquet")
WHOLE, KEPT = 100_000, 20_000  # inputs a reader; a run of fewer than KEPT is a try
SLOW = {"pt2": 20}  # readers that get one of so many inputs: PyTorch takes 50 ms to look at one program
CHUNK = 5000  # inputs a worker process
LIMIT_S = 20  # an input
LIMIT_BYTES = 1 << 30
LOOKS = 8  # inputs between two looks at the memory, which are system calls
ROOM = (
    3 << 30
)  # address space beyond what is taken at the start; memory that is asked for but not used is a finding too
MEMORY = ("MemoryError", "allocate memory", "Unable to allocate", "bad_alloc", "memory allocation")


def main() -> int:
    """Fuzz the readers named, and say what came of it; 1 if there is a finding."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("readers", nargs="*", metavar="READER", help=f"of {', '.join(READERS)}; all by default")
    parser.add_argument("-n", type=int, default=WHOLE, help="inputs a reader (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="number of the first input (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="worker processes (default: %(default)s)")
    parser.add_argument("--keep", type=Path, default=Path(tempfile.gettempdir(), "bntools-fuzz"), help="for findings")
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if unknown := set(given.readers) - set(READERS):
        parser.error(f"no reader {', '.join(unknown)}; there are {', '.join(READERS)}")
    given.keep.mkdir(parents=True, exist_ok=True)
    if given.worker:
        start, stop, channel = given.worker
        worked(given.readers, start, stop, os.fdopen(channel, "w"), given.keep)
        return 0
    totals = [fuzzed(reader, given) for reader in given.readers or READERS]
    return int(any(totals))


def fuzzed(reader: str, given: argparse.Namespace) -> int:
    """Fuzz one reader with all workers; returns the number of distinct findings."""
    began, count = time.monotonic(), max(1, given.n // SLOW.get(reader, 1))
    tally: Counter[str] = Counter()
    findings: dict[str, list[int]] = {}
    lock = Lock()

    def chunk(start: int) -> None:
        stop = min(start + CHUNK, given.seed + count)
        while start < stop:
            outcomes, last, death = worker([reader], start, stop, given.keep)
            with lock:
                for number, kind in outcomes:
                    tally["finding" if kind not in ("read", "refused") else kind] += 1
                    if kind not in ("read", "refused"):
                        findings.setdefault(kind, []).append(number)
                if death:
                    tally["finding"] += 1
                    findings.setdefault(death, []).append(last)
            if not death:
                break
            start = last + 1

    with ThreadPoolExecutor(given.workers) as pool:
        list(pool.map(chunk, range(given.seed, given.seed + count, CHUNK)))
    seconds = time.monotonic() - began
    done = sum(tally.values())
    print(
        f"{reader:12} {done:8,} inputs: {tally['read']:,} read, {tally['refused']:,} refused, {tally['finding']:,} "
        f"findings ({len(findings)} kinds), {done / seconds:,.0f}/s",
        flush=True,
    )
    for kind, numbers in sorted(findings.items(), key=lambda item: -len(item[1])):
        print(f"  {len(numbers):6,} x {kind}\n           e.g. inputs {numbers[:4]}, kept in {given.keep}", flush=True)
    if given.n >= KEPT:
        counts = (done, *(tally[kind] for kind in ("read", "refused", "finding")))
        results.keep("fuzz", reader, *(f"{count:,}" for count in counts))
    return len(findings)


def worker(readers: list[str], start: int, stop: int, keep: Path) -> tuple[list[tuple[int, str]], int, str]:
    """The outcomes of one worker process, the last input that it began, and how it died if it did."""
    receiving, sending = os.pipe()
    command = [sys.executable, __file__, *readers, "--keep", str(keep), "--worker", str(start), str(stop), str(sending)]
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryDirectory(prefix="bntools-fuzz-") as place:
        environment = os.environ | {"TMPDIR": place}
        process = subprocess.Popen(command, pass_fds=[sending], stdout=errors, stderr=errors, env=environment)
        os.close(sending)
        outcomes, last = [], start - 1
        with os.fdopen(receiving) as channel:
            for line in channel:
                number, kind = json.loads(line)
                last = max(last, number)
                if kind != "begun":
                    outcomes.append((number, kind))
        code = process.wait()
        errors.seek(0)
        told = errors.read().decode("utf-8", "replace")
        if code:  # what it was reading is still there
            for found in Path(place).rglob("input.*"):
                shutil.copyfile(found, keep / f"{found.parent.name}-{last}{found.suffix}")
    if code == 0:
        return outcomes, last, ""
    if last < start:
        raise SystemExit(f"the worker for {', '.join(readers)} did not start:\n{told[-3000:]}")
    how = "hang" if code == -signal.SIGALRM else f"death by signal {-code}" if code < 0 else f"exit {code}"
    frames = [line.strip() for line in told.splitlines() if "bntools" in line and "File" in line]
    return outcomes, last, f"{how}: {frames[0] if frames else told[-300:]!r}"


def worked(readers: list[str], start: int, stop: int, channel: Any, keep: Path) -> None:
    """A worker process: reads the inputs of one or several readers one by one and reports each outcome."""
    with tempfile.TemporaryDirectory(prefix="bntools-fuzz-") as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place
        folder = Path(place)
        for reader in readers:
            for number, outcome, content in outcomes(reader, start, stop, folder, channel):
                if outcome not in ("read", "refused"):
                    keep.joinpath(f"{reader}-{number}{content[0]}").write_bytes(content[1])
                channel.write(json.dumps([number, outcome]) + "\n")


def outcomes(reader: str, start: int, stop: int, folder: Path, channel: Any = None) -> Any:
    """Yields number, outcome and content of each input of a reader; its seeds are made and read first."""
    import readers
    import seeds
    from guard import Guard

    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import warnings

    import packaging.version  # noqa: F401 - PyTorch 2.9 imports it late
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    place = folder / reader
    place.mkdir()
    given = seeds.files(reader, place)
    for suffix, content in given:
        for number in range(4):  # every way of reading, so that all is imported
            _outcome(readers, reader, place / f"input{suffix}", content, number, None)
            place.joinpath(f"input{suffix}").unlink()
    guard = _guard(str(folder), Guard)
    if channel is not None:
        faulthandler.enable()
        faulthandler.register(signal.SIGALRM, chain=True)  # tells where, and dies of it
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(start, stop):
        rng = random.Random(f"{reader} {number}")
        suffix, content = rng.choice(given)
        content = readers.mutated(reader, suffix, content, given, rng)
        if channel is not None:
            channel.write(json.dumps([number, "begun"]) + "\n")
            channel.flush()
        if channel is not None:
            signal.setitimer(signal.ITIMER_REAL, LIMIT_S)
        path = place / f"input{suffix}"
        outcome = _outcome(readers, reader, path, content, number, guard)
        signal.setitimer(signal.ITIMER_REAL, 0)
        path.unlink()
        yield number, outcome, (suffix, content)


_GUARDS: dict[str, Any] = {}
_PEAK = [0]  # of memory so far, in KiB


def _guard(folder: str, kind: Any) -> Any:
    """One hook a process: it cannot be removed."""
    if folder not in _GUARDS:
        _GUARDS[folder] = kind(folder)
    _GUARDS[folder].packages |= {name.partition(".")[0] for name in sys.modules}
    return _GUARDS[folder]


def _outcome(readers: Any, reader: str, path: Path, content: bytes, number: int, guard: Any) -> str:
    from bntools import BntoolsError

    path.write_bytes(content)
    if guard is not None:
        guard.seen.clear()
        guard.armed = True
    try:
        readers.read(reader, path, number)
        outcome = "read"
    except BntoolsError as error:
        outcome = next((f"too much memory asked for: {word}" for word in MEMORY if word in str(error)), "refused")
        if len(str(error)) > 20_000:
            outcome = f"a message of {len(str(error)):,} characters"
    except Exception as error:
        frame = [one for one in traceback.extract_tb(error.__traceback__) if "bntools" in one.filename][-1:]
        where = f"{Path(frame[0].filename).name}:{frame[0].lineno}" if frame else "?"
        outcome = f"{type(error).__name__} at {where}"
    finally:
        if guard is not None:
            guard.armed = False
    if guard is not None and guard.seen:
        outcome = f"forbidden: {guard.seen[0]}"
    if guard is not None and number % LOOKS:
        return outcome
    before, _PEAK[0] = _PEAK[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    over = guard is not None and (_PEAK[0] - before) * 1024 > LIMIT_BYTES
    return f"over 1 GiB of memory taken by this or the {LOOKS - 1} inputs before" if over else outcome


if __name__ == "__main__":
    sys.exit(main())
