"""One step on the CPU: ``pytest benchmarks`` (it needs ``pip install '.[bench]'``; with torch installed, torch too).

Every step gets gradients in arrays just allocated. Each contender's first steps are checked before it is timed. For
ratios take ``python benchmarks/compare.py``, where the contenders take turns.
"""

from __future__ import annotations

import time
from typing import Any

import peers
import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark not installed: pip install '.[bench]'")

pytestmark = pytest.mark.benchmark(disable_gc=True, min_rounds=1)

ROUNDS = dict(zip(peers.SIZES, (200, 50, 50, 8), strict=True))
WIDTHS = [pytest.param(size, id=f"{size[0]}x{size[1]}") for size in peers.SIZES]


def run(benchmark: Any, name: str, size: tuple[int, int], rule: str = "Adam") -> None:
    if reason := peers.missing(name):
        pytest.skip(reason)
    peers.check(name, size, rule)
    benchmark.group = f"{rule}, {size[0]:,} × {size[1]:,} float32"
    contender = peers.made(name, peers.arrays(size, seed=0), rule)
    gradients = [peers.arrays(size, seed=k) for k in (1, 2)]
    count = 0

    def hand_over() -> None:
        nonlocal count
        count += 1
        contender.hand_over(gradients[count % 2])

    time.sleep(0.05)  # threads that still spin after the test before go to sleep
    benchmark.pedantic(contender.step, setup=hand_over, rounds=ROUNDS[size], warmup_rounds=3)


@pytest.mark.parametrize("name", ["xpoptim", "reference", "NumPy", "traffic", "torch-fused"])
@pytest.mark.parametrize("size", WIDTHS)
def test_adam(benchmark: Any, name: str, size: tuple[int, int]) -> None:
    run(benchmark, name, size)


@pytest.mark.parametrize("name", ["xpoptim", "reference", "NumPy"])
@pytest.mark.parametrize("rule", ["SGD", "Momentum", "AdaGrad", "RMSprop"])
def test_other_rules(benchmark: Any, name: str, rule: str) -> None:
    run(benchmark, name, peers.SIZES[0], rule)
