"""Records for the tests of the GPU check. Its parts lie in `benchmarks`: import this module before `gpubench`."""

import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cuda_host.host_kernel import missing

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "benchmarks"))

from gpubench.cases import EMULATED, FULL  # noqa: E402
from gpubench.record import Record  # noqa: E402

MACHINE = {
    "card": "NVIDIA H200",
    "emulated": False,
    "memory_bytes": 150e9,
    "l2_bytes": 50_000_000,
    "multiprocessors": 132,
    "compute_capability": "9.0",
    "driver": "580.1",
    "driver_cuda": 13000,
    "runtime_cuda": 13000,
    "nvrtc": "13.0",
    "python": "3.12.3",
    "versions": {"numpy": "2.5.0"},
    "date": "2030-01-02T03:04:05+00:00",
    "commit": "abc",
    "uncommitted_changes": False,
    "command": "benchmarks/gpu_check.sh",
}


def new_record(folder: Path, settings: Any = FULL, **about: Any) -> Record:
    return Record(folder / "found.json", MACHINE | about, settings)


def start_of(tmp_path: Path, **changes: Any) -> Record:
    """A record of an emulated device that has nothing in it yet, on disk."""
    settings = dataclasses.replace(EMULATED, **changes)
    record = new_record(tmp_path, settings, card="emulated", emulated=True, l2_bytes=4096)
    record.save()
    return record


@contextlib.contextmanager
def emulation() -> Iterator[None]:
    """An emulated device, as the check has it; a skip where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    from gpubench.emulated import emulated_device

    with emulated_device():
        yield
