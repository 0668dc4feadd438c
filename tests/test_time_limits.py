"""A test that hangs ends, wherever it hangs: what pyproject.toml sets for every test."""

import subprocess
import sys
from pathlib import Path

import pytest

CONFIGURATION = Path(__file__).parent.parent / "pyproject.toml"
START = """
import ctypes, subprocess, sys
from hypothesis import given, strategies as st

def forever():
    while True:
        pass

"""
AFTER = """
def test_after():
    pass
"""
IN_PYTHON = {
    "in Python": "def test(): forever()",
    "waiting for a process": "def test(): subprocess.run([sys.executable, '-c', 'while True: pass'])",
}
ELSEWHERE = {
    "in machine code that holds the interpreter's lock": """
def test():
    library, lock = ctypes.PyDLL(None), ctypes.create_string_buffer(256)
    while True:
        library.pthread_mutex_lock(lock)
""",
    "again, in what hypothesis tries after a failure": "@given(st.integers())\ndef test(number): forever()",
}


def run(test: str, folder: Path) -> subprocess.CompletedProcess[str]:
    (folder / "test_it.py").write_text(START + test + "\n" + AFTER)
    shorter = ("-o", "timeout=1", "-o", "faulthandler_timeout=4", "-p", "no:cacheprovider")
    command = [sys.executable, "-m", "pytest", "-c", str(CONFIGURATION), *shorter, str(folder / "test_it.py")]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, cwd=folder)


def test_every_test_has_a_limit(pytestconfig: pytest.Config) -> None:
    assert 0 < float(pytestconfig.getini("timeout")) < pytestconfig.getini("faulthandler_timeout")


@pytest.mark.parametrize("where", IN_PYTHON)
def test_what_hangs_where_an_alarm_can_raise_fails_and_the_others_go_on(where: str, tmp_path: Path) -> None:
    done = run(IN_PYTHON[where], tmp_path)
    assert done.returncode == 1
    assert "Timeout (>1.0s)" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.parametrize("where", ELSEWHERE)
def test_what_hangs_elsewhere_ends_the_run(where: str, tmp_path: Path) -> None:
    done = run(ELSEWHERE[where], tmp_path)
    assert done.returncode == 1
    assert "Timeout (0:00:04)!" in done.stderr
    assert "test_it.py" in done.stderr
    assert "passed" not in done.stdout
