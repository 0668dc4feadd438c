"""An engine is a folder and a line: one of some 60 lines takes the place of the CPU engine and keeps the contract."""

import os
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent

# What the contract's tests say of the CPU engine's kernels, and not of every engine.
OF_KERNELS = (
    "test_arrays_are_held_during_a_step",  # it looks into the CPU engine's plan
    "test_engine_contexts",  # the toy has a "kernel" for everything
    "test_explain_names_a_cpu_without_float16",
    "test_explain_says_leaf_by_leaf",
    "test_many_steps_do_not_grow",
    "test_no_retrace_and_no_recompile",
    "test_no_temporary_of_a_parameters_size",
    "test_numbers_are_looked_at_in_full_once",  # the toy's watch does not know of gradients that become None
    "test_the_first_step_makes_the_slots_alone",
)


def test_a_toy_engine_keeps_the_contract() -> None:
    left_out = [f"--deselect=tests/test_contract.py::{name}" for name in OF_KERNELS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "toy_engine", "tests/test_contract.py", *left_out]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        command, cwd=HERE.parent, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, done.stdout[-3000:]
    calls = re.search(r"toy engine: (.*)", done.stdout)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert calls is not None
    assert passed is not None
    counts = {kind: int(n) for kind, n in re.findall(r"'(\w+)': (\d+)", calls[1])}
    assert counts.keys() == {"update", "norm", "look"}
    assert min(counts.values()) > 500  # the toy was asked, and asked again
    assert int(passed[1]) > 1000
