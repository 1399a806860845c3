"""kill -9 at every step and at random moments of each verb that writes: what the files are then.

``python tests/trust/faults.py [--tries N] [--seed N] [CASE ...]`` (``make faults``). A parent that has imported the
frameworks forks a child for each try, which runs the verb and is killed: before its k-th call that changes a file, for
every k, then at random moments, most of them while it writes. Afterwards files that the verb does not write have to be
as before, each target the old one or complete, a record that of its model or absent, and what else lies there a file
under one of bntools's own names. From every state that is left so, the verb is then run to its end.
"""

from __future__ import annotations

import argparse
import math
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import results
from faultcases import CASES, Case, contents, prepare, run

CHANGING = {"os.rename", "os.remove", "os.link", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "os.symlink"}
TRIES = 240  # for each verb in a run that is kept
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Tally:
    """What came of a case."""

    steps: int = 0
    tries: int = 0
    killed: int = 0
    states: Counter[str] = field(default_factory=Counter)
    leftovers: int = 0
    again: int = 0
    wrong: list[str] = field(default_factory=list)


def watched(at_step: Callable[[], None]) -> None:
    """Call this before each call of Python that changes files, from now on in this process."""

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITING
        if event in CHANGING or writes:
            at_step()

    sync = os.fsync
    os.fsync = lambda descriptor: (at_step(), sync(descriptor))[1]  # raises no audit event
    sys.addaudithook(hook)


def forked(case: Case, folder: Path, kill_at: int = 0) -> tuple[int, int]:
    """Run a case in a child, to be killed at this step; gives its id and a pipe with a byte for each step."""
    reading, writing = os.pipe()
    child = os.fork()
    if child:
        os.close(writing)
        return child, reading
    status = 1
    try:
        os.close(reading)
        silent = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        os.chdir(folder)
        steps = 0

        def at_step() -> None:
            nonlocal steps
            steps += 1
            os.write(writing, b".")
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        watched(at_step)
        status = run(case)
        folder.with_suffix(".modules").write_text("\n".join(sys.modules))
    except BaseException as error:
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


def ended(child: int, reading: int) -> tuple[int, int, float]:
    """Wait for a child: its status (negative: the signal), how many steps it took, and when the first of them was."""
    steps, first = 0, 0.0
    while told := os.read(reading, 65536):
        first = first or time.monotonic()
        steps += len(told)
    os.close(reading)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), steps, first


class Bench:
    """A case, the files it begins with, and what it makes of them undisturbed."""

    def __init__(self, case: Case, template: Path, place: Path):
        self.case, self.template, self.place = case, template, place
        self.tally = Tally()
        self.old, self.before = contents(template)
        self.seen: set[str] = set()  # states from which the verb was run again
        finished = [self._undisturbed()]
        self._import()
        finished.append(self._undisturbed())
        self.new, self.duration, self.lead, self.tally.steps = finished[1]
        if finished[0][0] != self.new:
            raise SystemExit(f"{case.name}: two undisturbed runs differ")
        if same := [name for name in case.targets if self.old.get(name) == self.new.get(name, "")]:
            raise SystemExit(f"{case.name}: {same[0]} is the same before and after, and would tell nothing")
        if missing := set(case.targets) - self.new.keys():
            raise SystemExit(f"{case.name}: did not write {', '.join(missing)}")

    def fresh(self) -> Path:
        """The folder with the files as they are before the verb."""
        shutil.rmtree(self.place, ignore_errors=True)
        shutil.copytree(self.template, self.place)
        return self.place

    def _undisturbed(self) -> tuple[dict[str, str], float, float, int]:
        folder, begin = self.fresh(), time.monotonic()
        status, steps, first = ended(*forked(self.case, folder))
        if status:
            raise SystemExit(f"{self.case.name}: {folder.with_suffix('.log').read_text()}")
        return contents(folder)[0], time.monotonic() - begin, first - begin, steps

    def _import(self) -> None:
        """Import here what the verb has imported, so that the children that follow need not."""
        for name in self.place.with_suffix(".modules").read_text().split():
            if name.partition(".")[0] in ("bntools", "torch", "onnx", "onnxruntime", "onnxscript", "keras", "h5py"):
                with suppress(Exception):  # what is made by hand in sys.modules
                    import_module(name)

    def every_step(self, most: int) -> None:
        """Kill at every step; at as many, evenly apart, where there are more."""
        steps = range(1, self.tally.steps + 1)
        for step in steps[:: math.ceil(len(steps) / most)]:
            self._try(lambda child, reading: None, step)

    def moments(self, count: int, chance: random.Random) -> None:
        """Kill at random moments until so many tries were killed: what ends before its moment does not count.

        A quarter of the moments is anywhere, the others between the first step and the end.
        """
        for number in range(5 * count):
            if self.tally.killed >= count:
                return
            anywhere = number % 4 == 0
            delay = chance.uniform(0, self.duration if anywhere else self.duration - self.lead)

            def strike(child: int, reading: int, anywhere: bool = anywhere, delay: float = delay) -> None:
                if not anywhere:
                    select.select([reading], [], [])
                time.sleep(delay)
                os.kill(child, signal.SIGKILL)

            self._try(strike)

    def _try(self, strike: Callable[[int, int], None], step: int = 0) -> None:
        folder = self.fresh()
        child, reading = forked(self.case, folder, step)
        strike(child, reading)
        status, _, _ = ended(child, reading)
        self.tally.tries += 1
        self.tally.killed += status == -signal.SIGKILL
        if status > 0:
            self._wrong(f"ended with {status}: {folder.with_suffix('.log').read_text()[-300:]}")
        self._judge(*contents(folder), step)

    def _judge(self, found: dict[str, str], own: set[str], step: int) -> None:
        case, where = self.case, f"step {step}" if step else "a random moment"
        for name in self.old.keys() - set(case.targets):
            if found.get(name) != self.old[name]:
                self._wrong(f"{where}: {name}, which it only reads, was changed")
        for name in case.targets:
            complete = (self.old.get(name), self.new[name], *([None] if name == case.record else []))
            if found.get(name) not in complete:
                self._wrong(f"{where}: {name} is neither as before nor complete: {found.get(name, 'absent')}")
        model = "new" if found.get(case.targets[0]) == self.new[case.targets[0]] else "old"
        matching = (self.new if model == "new" else self.old).get(case.record)
        if case.record and found.get(case.record) not in (None, matching):
            self._wrong(f"{where}: the {model} model has another one's record")
        if strange := sorted(found.keys() - self.old.keys() - set(case.targets)):
            self._wrong(f"{where}: {strange[0]} was left")
        others = own - self.before
        self.tally.leftovers += bool(others)
        state = f"{model}{', no record' if not case.has_record(found) else ''}"
        self.tally.states[state] += 1
        self._go_on(f"{state}, {len(others)} left" if others else state)

    def _go_on(self, state: str) -> None:
        if state in self.seen:
            return
        self.seen.add(state)
        self.tally.again += 1
        status, _, _ = ended(*forked(self.case.again, self.place))
        found, _ = contents(self.place)
        # What a record tells of the state before differs where that was the new model already.
        wanted = [name for name in self.case.targets if name != self.case.record]
        if status or any(found.get(name) != self.new[name] for name in wanted) or not self.case.has_record(found):
            said = self.place.with_suffix(".log").read_text()[-300:]
            self._wrong(f"from the state {state!r} a next run does not come to the result: {status} {said}")

    def _wrong(self, what: str) -> None:
        self.tally.wrong.append(what)


def tried(case: Case, template: Path, place: Path, tries: int, seed: int) -> Tally:
    """All tries of a case."""
    bench = Bench(case, template, place)
    bench.every_step(case.tries(tries))
    bench.moments(case.tries(tries), random.Random(f"{seed} {case.name}"))
    return bench.tally


def group(cases: list[Case], folder: Path, tries: int, seed: int) -> int:
    """Cases of one framework, imported here and used in forks alone: TensorFlow forks badly once it has run."""
    prepare(cases[0].framework, folder)
    wrong = 0
    for case in cases:
        template = folder / case.template
        began = time.monotonic()
        tally = tried(case, template, folder / "try", tries, seed)
        states = ", ".join(f"{count} {state}" for state, count in sorted(tally.states.items()))
        print(
            f"{case.verb:12} {case.name:34} {tally.steps:4} {tally.tries:6} {tally.killed:7} {tally.leftovers:6} "
            f"{tally.again:6} {len(tally.wrong):6}  {states} ({time.monotonic() - began:.0f} s)",
            flush=True,
        )
        if tries >= TRIES:
            name = f"{case.verb}, {case.name}"
            results.keep("faults", name, tally.steps, tally.killed, tally.again, len(tally.wrong))
        for what in tally.wrong[:5]:
            print(f"    {what}")
        wrong += len(tally.wrong)
    return wrong


def main() -> int:
    """Each framework in a process of its own; the exit status is 1 where something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(case.name for case in CASES)}")
    parser.add_argument("--tries", type=int, default=TRIES, help="killed for each verb, shared among its cases")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--framework", help=argparse.SUPPRESS)
    given = parser.parse_args()
    chosen = [case for case in CASES if not given.cases or case.name in given.cases]
    if given.framework:
        with tempfile.TemporaryDirectory(prefix="bntools-faults-") as folder:
            mine = [case for case in chosen if case.framework == given.framework]
            return int(group(mine, Path(folder), given.tries, given.seed) > 0)
    print(f"{'verb':12} {'case':34} steps  tries  killed leaving  again  wrong  states", flush=True)
    failed = 0
    for framework in dict.fromkeys(case.framework for case in chosen):
        failed |= subprocess.run(
            [sys.executable, __file__, "--framework", framework, *sys.argv[1:]], check=False
        ).returncode
    return failed


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
