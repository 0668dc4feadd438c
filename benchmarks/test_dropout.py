"""Dropout on the CPU: ``pytest benchmarks/test_dropout.py`` (it needs ``pip install '.[bench]'``; torch is optional).

Each contender is checked before it is timed. For ratios take ``python benchmarks/dropout.py``, where the contenders
take turns.
"""

from __future__ import annotations

import time
from typing import Any

import dropout
import peers
import pytest

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark not installed: pip install '.[bench]'")

pytestmark = pytest.mark.benchmark(disable_gc=True, min_rounds=1)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("what", dropout.STEPS)
@pytest.mark.parametrize("name", dropout.CONTENDERS)
def test_dropout(benchmark: Any, name: str, what: str, threads: int) -> None:
    if reason := dropout.missing(name):
        pytest.skip(reason)
    before = dropout.xo.get_num_threads()
    peers.set_threads(threads)
    try:
        x, dout = dropout.arrays()
        dropout.check(name, x, dout)
        benchmark.group = f"{what}, {dropout.SIZE:,} float32, {threads} threads"
        contender = dropout.CONTENDERS[name](x, dout)
        time.sleep(dropout.PAUSE)  # threads that still spin after the test before go to sleep
        benchmark.pedantic(dropout.STEPS[what], args=(contender,), rounds=20, warmup_rounds=3)
    finally:
        peers.set_threads(before)
