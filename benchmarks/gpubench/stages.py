"""The whole check: stage after stage, each in a process of its own and within its time, whatever becomes of others."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import outcomes, report
from .cases import EMULATED, FULL
from .machine import ROOT, compute_sanitizer, installed
from .record import Record, stem

SCRIPT = ROOT / "benchmarks" / "gpu.py"
ENGINE, DEVICE = "tests/gpu/test_gpu_engine.py", "tests/gpu/test_gpu_device.py"
# The suite runs all of the engine's tests emulated; here some show that they run from where they are.
ENGINE_EMULATED = [f"{ENGINE}::{name}" for name in ("test_every_rule_and_dtype", "test_small_but_complete")]
# At most so many seconds of each; the benchmarks have what is left.
LIMITS = {"small run": 40.0, "tests": 200.0, "memcheck": 75.0, "racecheck": 75.0, "first steps": 50.0}
LAST_WORDS = 10.0  # seconds that are kept for the tables
RESTARTS = 8
NAMES = (*LIMITS, "benchmarks")


@dataclass
class Ended:
    """How a stage's process ended: its exit status, negative for a signal, or None if it was stopped."""

    status: int | None
    seconds: float
    limit: float

    @property
    def outcome(self) -> str:
        if self.status is None:
            return f"stopped after {self.limit:.0f} seconds"
        return "passed" if self.status == 0 else f"failed ({exit_text(self.status)})"


def exit_text(status: int | None) -> str:
    if status is None:
        return "stopped"
    return f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


@dataclass
class Check:
    """One check, its record and its log."""

    folder: Path
    emulated: bool
    seconds: float
    only: tuple[str, ...] = NAMES
    said: list[str] = field(default_factory=list)  # until there is a log
    log: Path | None = None

    def __post_init__(self) -> None:
        self.end = time.monotonic() + self.seconds - LAST_WORDS
        self.options = ["--emulated"] if self.emulated else []
        self.record: Any = None

    # --- output and processes

    def say(self, text: str) -> None:
        print(text, flush=True)
        self.said.append(text)
        if self.log is not None:
            with self.log.open("a") as file:
                file.writelines(f"{line}\n" for line in self.said)
            self.said.clear()

    def process(self, words: list[str], limit: float) -> Ended:
        """Run a command; what it prints is shown and kept. It and its children end within the limit."""
        path = os.pathsep.join(filter(None, [str(ROOT), str(SCRIPT.parent), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"}
        if self.emulated:
            environment["XPOPTIM_TEST_GPU"] = "emulated"  # for tests/gpu
        start = time.monotonic()
        running = subprocess.Popen(
            words,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env=environment,
            cwd=ROOT,
        )
        assert running.stdout is not None
        lines = running.stdout
        reader = threading.Thread(target=lambda: [self.say(line.rstrip("\n")) for line in lines], daemon=True)
        reader.start()
        try:
            status: int | None = running.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if running.poll() is None:
                stop(running)
            reader.join(5)
            if not reader.is_alive():
                lines.close()
        return Ended(status, time.monotonic() - start, limit)

    def script(self, *words: str) -> list[str]:
        return [sys.executable, str(SCRIPT), *words, *self.options]

    def keep(self, name: str, outcome: str, *, ok: bool, **more: Any) -> None:
        self.record.stages[name] = {"outcome": outcome, "ok": ok, **more}
        self.record.save()
        self.say(f"== {name}: {outcome}")

    def stage(self, name: str, words: list[str], more: Callable[[Ended], dict[str, Any]] = lambda ended: {}) -> None:
        limit = min(LIMITS[name], self.end - time.monotonic())
        if limit < 1:
            self.keep(name, "not run: the time is up", ok=False)
            return
        self.say(f"\n== {name}: {shlex.join(words)}")
        ended = self.process(words, limit)
        found = {"status": ended.status, "seconds": round(ended.seconds, 1)} | more(ended)
        outcome = found.pop("outcome", ended.outcome)
        self.keep(name, outcome, ok=ended.status == 0, **found)

    # --- the stages

    def run(self) -> int:
        with tempfile.TemporaryDirectory(prefix="gpu-check-") as scratch:
            return self.run_in(Path(scratch))

    def run_in(self, scratch: Path) -> int:
        if status := self.probe(scratch / "machine.json"):
            return status
        work: dict[str, Callable[[], None]] = {
            "small run": lambda: self.stage("small run", self.script("small")),
            "tests": lambda: self.tests(scratch / "outcomes"),
            "memcheck": lambda: self.sanitizer("memcheck"),
            "racecheck": lambda: self.sanitizer("racecheck"),
            "first steps": self.first_steps,
            "benchmarks": self.benchmarks,
        }
        for name in self.only:
            work[name]()
        self.tell()
        return 0 if all(stage["ok"] for stage in self.record.stages.values()) else 1

    def probe(self, found: Path) -> int:
        """What is here; 2 if nothing can be measured."""
        ended = self.process(self.script("probe", str(found)), 120.0)
        if ended.status != 0:
            if ended.status != 2:
                self.say(f"the look at the machine ended with {exit_text(ended.status)}; nothing was measured")
            return 2
        machine = json.loads(found.read_text()) | {"command": shlex.join(sys.argv)}
        self.record = Record(self.folder / f"{stem(machine)}.json", machine, EMULATED if self.emulated else FULL)
        self.record.save()
        self.log = self.record.path.with_suffix(".log")
        self.log.write_text("")
        self.say(f"results go to {self.record.path}, .md and .log, from now on")
        return 0

    def reread(self, ended: Ended) -> dict[str, Any]:
        """Another process has written to the record."""
        self.record = Record.read(self.record.path)
        return {}

    def tests(self, kept: Path) -> None:
        if missing := [name for name in ("pytest", "hypothesis", "ml_dtypes") if not installed(name)]:
            self.keep("tests", f"not run: {', '.join(missing)} not installed", ok=False)
            return
        # The project's own options may ask for plugins that are not here; packages' warnings are no errors here.
        words = [
            "-v",
            "-rfE",
            "--tb=short",
            "-o",
            "addopts=",
            "-W",
            "default",
            "-p",
            "no:cacheprovider",
            "-p",
            "gpubench.outcomes",
        ]
        words += ["--outcomes", str(kept), *(["--timeout=60"] if installed("pytest-timeout") else [])]

        def counted(ended: Ended) -> dict[str, Any]:
            found = outcomes.read(kept)
            counts = ", ".join(f"{n} {what}" for what, n in found["counts"].items() if n and what != "collected")
            return {"outcome": f"{ended.outcome}: {counts or 'no test was run'}", **found}

        files = [*(ENGINE_EMULATED if self.emulated else [ENGINE]), DEVICE]
        self.stage("tests", [sys.executable, "-m", "pytest", *words, *files], counted)

    def sanitizer(self, tool: str) -> None:
        program = compute_sanitizer()
        if self.emulated or not program:
            reason = "emulated" if self.emulated else "compute-sanitizer was not found"
            self.keep(tool, f"not run: {reason}", ok=self.emulated)
            return
        # What a library tries and handles itself is no error of ours; a failed launch raises in Python.
        options = ["--tool", tool, "--error-exitcode", str(report.SANITIZER_FOUND), "--print-limit", "20"]
        options += ["--report-api-errors", "no"] if tool == "memcheck" else []
        self.stage(tool, [program, *options, *self.script("small")])

    def first_steps(self) -> None:
        self.stage("first steps", self.script("first-steps", str(self.record.path)), self.reread)

    def benchmarks(self) -> None:
        """In a process that is begun again if it ends before its time; who made it end is left out then."""
        start = time.monotonic()
        for _ in range(RESTARTS):
            left = self.end - time.monotonic()
            if left < 5:
                how = "not all of them: the time is up"
                break
            words = self.script("bench", str(self.record.path), f"{left - 15:.0f}")
            self.say(f"\n== benchmarks: {shlex.join(words)}")
            ended = self.process(words, left)
            self.reread(ended)
            how = ended.outcome
            if ended.status in (0, None) or not self.blame(exit_text(ended.status)):
                break
        rows = self.record.rows
        raised, left_out = sum(bool(row.error) for row in rows), sum(bool(row.note) for row in rows)
        outcome = f"{how}: {len(rows)} rows, of which {raised} raised and {left_out} could not take part"
        seconds = round(time.monotonic() - start, 1)
        self.keep("benchmarks", outcome, ok=how == "passed" and not raised, seconds=seconds)

    def blame(self, how: str) -> bool:
        """Leave out the contender in which the process ended, or the case; False if neither is known."""
        case, name = self.record.in_work
        for row in self.record.rows:
            if row.case.key == case and name in ("", row.contender) and not (row.error or row.note or row.step_ms):
                row.error = f"the process ended ({how})"
        if case and not name:
            self.record.done.append(case)
        self.record.in_work = ["", ""]
        self.record.save()
        self.say(f"the process ended ({how}) in {case or 'no case'}{', ' + name if name else ''}")
        return bool(case)

    def tell(self) -> None:
        self.say("\n" + report.markdown(self.record))
        self.say(f"written to {self.record.path}, .md and .log")


def stop(running: subprocess.Popen[str]) -> None:
    """End a process and its children."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            running.wait(5)
            return
