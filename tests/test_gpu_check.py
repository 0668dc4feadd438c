"""The GPU benchmark script without a GPU: it says so, and its logic runs with NumPy in the place of CuPy."""

import importlib.util
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
SCRIPT, CHECK = ROOT / "benchmarks" / "gpu.py", ROOT / "benchmarks" / "gpu_check.sh"


@pytest.fixture
def gpu() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("benchmarks_gpu", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for it
    spec.loader.exec_module(module)
    return module


# --- without a GPU


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    return subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)


def there_is_a_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


@pytest.mark.parametrize("words", [(sys.executable, str(SCRIPT)), ("bash", str(CHECK))], ids=["gpu.py", "gpu_check.sh"])
def test_without_a_gpu_it_says_so_in_one_line(words: tuple[str, ...], tmp_path: Path) -> None:
    if there_is_a_gpu():
        pytest.skip("there is a GPU")
    out = (*words, "--out", str(tmp_path)) if words[0] != "bash" else (*words, str(tmp_path))
    done = run(*out)
    assert done.returncode == 2
    assert done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert "no GPU to run on" in line
    assert not list(tmp_path.iterdir())


def test_help() -> None:
    done = run(sys.executable, str(SCRIPT), "--help")
    assert done.returncode == 0
    for option in ("--out", "--seconds", "--checks", "--probe", "--small"):
        assert option in done.stdout


def test_shell_script() -> None:
    assert os.access(CHECK, os.X_OK)
    done = run("bash", "-n", str(CHECK))
    assert done.returncode == 0, done.stderr
    if shutil.which("shellcheck"):
        done = run("shellcheck", str(CHECK))
        assert done.returncode == 0, done.stdout


STAND_IN = """\
#!/usr/bin/env bash
case "$*" in
    *--probe* | *--small*) exit 0 ;;
    *--checks*) echo "benchmarks: $*" ;;
    *) exit {tests} ;;
esac
"""


@pytest.mark.parametrize(("tests", "status", "outcome"), [(0, 0, "passed"), (1, 1, "failed")])
def test_a_failure_does_not_keep_the_benchmarks_from_running(
    tests: int, status: int, outcome: str, tmp_path: Path
) -> None:
    """With programs that only tell how they were called in the place of Python and compute-sanitizer."""
    for name, text in (
        ("python", STAND_IN.format(tests=tests)),
        ("compute-sanitizer", "#!/usr/bin/env bash\nexit 0\n"),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PYTHON": str(tmp_path / "python"), "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    words = ("bash", str(CHECK), str(tmp_path / "results"))
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert done.returncode == status, done.stderr
    assert f"--checks tests={outcome},memcheck=passed,racecheck=passed" in done.stdout
    assert f"--out {tmp_path / 'results'}" in done.stdout
    assert done.stdout.rstrip().endswith("== benchmarks=passed")


# --- the logic, with NumPy in the place of CuPy


class Array(np.ndarray):
    """A NumPy array that can be asked for its values as CuPy's can."""

    def get(self) -> np.ndarray:
        return np.array(self)

    @property
    def data(self) -> Any:
        return SimpleNamespace(copy_from_device_async=lambda source, size, stream: None)


def array(values: Any) -> Array:
    return np.array(values).view(Array)


class Event:
    def record(self, stream: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        pass


def stand_in_for_cupy() -> Any:
    def kernel(*_: Any) -> Any:
        def run(g: Any, lr_t: Any, rest1: Any, rest2: Any, eps: Any, p: Any, m: Any, v: Any) -> None:
            m += rest1 * (g - m)
            v += rest2 * (g * g - v)
            p -= lr_t * m / (np.sqrt(v) + eps)

        return run

    hook = type("MemoryHook", (), {"__enter__": lambda self: self, "__exit__": lambda *_: None})
    stream = SimpleNamespace(synchronize=lambda: None)
    generator = np.random.default_rng(0)
    return SimpleNamespace(
        float32=np.float32,
        sqrt=np.sqrt,
        zeros_like=np.zeros_like,
        ones=lambda n, dtype: array(np.ones(n, dtype)),
        empty=lambda n, dtype: array(np.ones(n, dtype)),
        concatenate=lambda parts: array(np.concatenate(parts)),
        ElementwiseKernel=kernel,
        random=SimpleNamespace(
            default_rng=lambda seed: SimpleNamespace(
                standard_normal=lambda n, dtype: array(generator.standard_normal(n, dtype))
            )
        ),
        get_default_memory_pool=lambda: SimpleNamespace(free_bytes=lambda: 0, free_all_blocks=lambda: None),
        cuda=SimpleNamespace(
            Event=Event,
            MemoryHook=hook,
            get_current_stream=lambda: stream,
            get_elapsed_time=lambda a, b: (b.time - a.time) * 1e3,
            runtime=SimpleNamespace(memGetInfo=lambda: (1 << 40, 1 << 40)),
        ),
    )


@pytest.fixture
def rows(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setitem(sys.modules, "cupy", stand_in_for_cupy())
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    monkeypatch.setattr(gpu, "BLOCK", 1e-4)
    stream = SimpleNamespace(synchronize=lambda: None)
    found = gpu.measure("one tensor", 1, 3000, gpu.PLAIN, 0.0, stream)
    return found + gpu.measure("clip_norm", 5, 700, (*gpu.CLIPPED, "copy"), 0.0, stream)


def test_measuring(gpu: ModuleType, rows: list[Any]) -> None:
    """Every contender that is there follows the formula, and is timed as often as the others."""
    assert [row.contender for row in rows] == [*gpu.PLAIN, *gpu.CLIPPED, "copy"]
    for row in rows:
        if row.contender.startswith("torch"):
            assert row.note == "torch is not installed"
            assert not row.step_ms
        else:
            assert len(row.step_ms) == gpu.FEWEST_ROUNDS
            assert bool(row.host_ms) == (row.contender != "copy")
            assert min(row.step_ms) > 0


def test_a_wrong_contender_is_not_timed(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", stand_in_for_cupy())
    monkeypatch.setitem(gpu.ADAM, "eps", 1e-7)
    start, grads = gpu.arrays(3, 50, 0), [gpu.arrays(3, 50, 1)]
    for name in ("xpoptim", "CuPy code", "CuPy kernel", "xpoptim, clip_norm"):
        gpu.check(name, gpu.CONTENDERS[name](start, grads), start)
        wrong = gpu.CONTENDERS[name](start, grads)
        wrong.params["W1"][3] += 1e-4
        with pytest.raises(AssertionError, match=name):
            gpu.check(name, wrong, start)


def test_gradients_change_from_step_to_step(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", stand_in_for_cupy())
    contender = gpu.Xpoptim(gpu.arrays(2, 5, 0), [gpu.arrays(2, 5, 1), gpu.arrays(2, 5, 2)])
    assert contender.next_grads() is contender.next_grads()
    contender.changing = True
    first, second = contender.next_grads(), contender.next_grads()
    assert first["W0"] is not second["W0"]
    assert contender.next_grads() is first


def row(gpu: ModuleType, contender: str, step_ms: list[float], *, host_ms: float = 1.0, case: Any = None) -> Any:
    name, tensors, elements = case or ("one tensor", 1, gpu.LARGE)
    size = float(gpu.bytes_per_element(contender)) * tensors * elements
    return gpu.Row(name, contender, tensors, elements, size, step_ms, [host_ms])


def test_figures(gpu: ModuleType) -> None:
    """Bandwidths, shares and ratios, computed by hand."""
    group = [
        row(gpu, "xpoptim", [1.0, 2.0, 1.0]),
        row(gpu, "torch fused", [1.5, 3.0, 2.5]),
        row(gpu, "copy", [0.25, 0.5, 0.5]),
    ]
    assert group[0].gigabytes_per_second == pytest.approx(2800)  # 2.8 GB in a millisecond
    assert gpu.ratio(group, "xpoptim", "torch fused") == 1.5  # the median of 1.5, 1.5 and 2.5, within rounds
    assert gpu.of_copy(group, "xpoptim") == pytest.approx(28 / 8 * 0.25)
    assert gpu.of_copy(group, "copy") == 1
    assert gpu.ratio(group, "xpoptim", "CuPy code") is None


def test_targets(gpu: ModuleType) -> None:
    thousand = ("many tensors", 1_000, 1_000)
    rows = [
        row(gpu, "xpoptim", [1.0]),
        row(gpu, "torch fused", [0.99]),
        row(gpu, "CuPy code", [5.0]),
        row(gpu, "copy", [0.26]),
        row(gpu, "xpoptim", [1.0], host_ms=1.0, case=thousand),
        row(gpu, "torch fused", [3.0], host_ms=2.1, case=thousand),
    ]
    verdicts = dict(reversed(line.split("  ", 1)) for line in gpu.targets(rows))
    verdicts = {what.strip(): verdict.strip() for what, verdict in verdicts.items()}
    by_verdict = {verdict: [what for what in verdicts if verdicts[what] == verdict] for verdict in verdicts.values()}
    assert [what[:20] for what in by_verdict["met"]] == [
        "of a copy's bandwidt",
        "torch fused over xpo",
        "CuPy code over xpopt",
        "torch fused's host t",
    ]
    assert by_verdict["MISSED"] == ["torch fused over xpoptim, 1 x 100,000,000: at least 1x (0.99x)"]
    assert by_verdict["not measured"] == ["CuPy code over xpoptim, 1,000 x 1,000: at least 5x"]
    assert all("not measured" in line for line in gpu.targets([]))


def test_table_and_file(gpu: ModuleType, rows: list[Any], tmp_path: Path) -> None:
    text = gpu.table(rows)
    assert len(text.splitlines()) == 2 + len(rows)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "torch is not installed" in text
    about = {"card": "NVIDIA H100 80GB HBM3", "date": "2030-01-02T03:04:05+00:00", "commit": "abc"}
    path = gpu.write(tmp_path / "new", about, rows, {"Adam, cached": [0.1]}, {"tests": "passed"})
    assert path.name == "gpu-nvidia-h100-80gb-hbm3-2030-01-02.json"
    content = json.loads(path.read_text())
    assert content["machine"] == about
    assert content["checks"] == {"tests": "passed"}
    assert [entry["contender"] for entry in content["rows"]] == [row.contender for row in rows]
    assert content["rows"][0]["median_step_ms"] == rows[0].median_ms
    assert math.isclose(content["rows"][0]["of_copy"], gpu.of_copy(rows[: len(gpu.PLAIN)], "xpoptim"))


def test_cases_cover_what_is_asked(gpu: ModuleType) -> None:
    sizes = {(case, tensors, elements) for case, tensors, elements, _ in gpu.cases()}
    assert {("one tensor", 1, n) for n in (1_000_000, gpu.LARGE, 500_000_000)} <= sizes
    assert {n for case, n, _ in sizes if case == "many tensors"} >= {1, 100, 1_000, 10_000}
    assert {name for *_, names in gpu.cases() for name in names} == set(gpu.CONTENDERS)
    bandwidths = {name: gpu.bytes_per_element(name) for name in gpu.CONTENDERS}
    assert bandwidths["copy"] == 8
    assert bandwidths["xpoptim"] == bandwidths["torch fused"] == 28
    assert bandwidths["xpoptim, clip_norm"] == bandwidths["torch fused, clip"] == 32
