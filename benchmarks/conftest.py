"""Two threads for everyone, and the circumstances in the file that ``--benchmark-json`` writes."""

from __future__ import annotations

from typing import Any

import peers
import pytest

THREADS = 2


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    peers.set_threads(THREADS)


@pytest.hookimpl(optionalhook=True)  # pytest-benchmark's
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info["xpoptim"] = {"threads": THREADS, "versions": peers.versions()}
