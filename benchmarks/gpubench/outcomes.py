"""A pytest plugin that keeps each test's outcome as it comes: ``-p gpubench.outcomes --outcomes FILE``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

BITS = ("test_every_rule_and_dtype", "test_dropout", "test_a_thousand_random_steps")


def pytest_addoption(parser: Any) -> None:
    parser.addoption("--outcomes", type=Path)


class _Keeper:
    def __init__(self, path: Path) -> None:
        self.path = path

    def keep(self, **what: str) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(what) + "\n")

    def pytest_collection_finish(self, session: Any) -> None:
        for item in session.items:
            self.keep(test=item.nodeid, outcome="collected")

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.keep(test=report.nodeid, outcome=report.outcome)


def pytest_configure(config: Any) -> None:
    if path := config.getoption("--outcomes"):
        config.pluginmanager.register(_Keeper(path))


def read(path: Path) -> dict[str, Any]:
    """How many tests ended how, which failed, and the same of those that compare bits with the CPU's."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be in pieces after a kill
    return {
        "counts": _counts(kept),
        "failures": [one["test"] for one in kept if one["outcome"] == "failed"],
        "bits": _counts([one for one in kept if one["test"].split("::")[-1].split("[")[0] in BITS]),
    }


def _counts(kept: list[dict[str, str]]) -> dict[str, int]:
    return {
        outcome: len({one["test"] for one in kept if one["outcome"] == outcome})
        for outcome in ("collected", "passed", "failed", "skipped")
    }
