"""The GPU check without a GPU: what it says, what it keeps, and all of it on an emulated device."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
from cuda_host.host_kernel import missing
from gpu_records import MACHINE, ROOT, emulation, new_record, start_of
from gpubench import device, machine, measure, outcomes, report, stages
from gpubench.cases import EMULATED, FULL, Case
from gpubench.record import Record, replace, stem

SCRIPT, CHECK = ROOT / "benchmarks" / "gpu.py", ROOT / "benchmarks" / "gpu_check.sh"
EMULATION = pytest.mark.skipif(missing() is not None, reason=missing() or "")


def there_is_a_gpu() -> bool:
    if importlib.util.find_spec("cupy") is None:
        return False
    import cupy

    return bool(cupy.cuda.is_available())


# A script finds what lies beside it, which tests otherwise forbid (see conftest.py).
SCRIPTS = {"PYTHON": sys.executable, "PYTHONSAFEPATH": ""}


def run(*words: str, timeout: float = 60, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | SCRIPTS | variables
    return subprocess.run(words, capture_output=True, text=True, timeout=timeout, check=False, env=environment)


@pytest.fixture
def emulated() -> Iterator[None]:
    with emulation():
        yield


# --- what is missing


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if there_is_a_gpu():
        pytest.skip("there is a GPU")
    done = run("bash", str(CHECK), str(tmp_path / "out"))
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1].startswith("no GPU to run on (")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["numpy", "cupy"])
def test_without_numpy_or_cupy_it_ends(module: str, tmp_path: Path) -> None:
    (tmp_path / f"{module}.py").write_text("raise ImportError('it was installed wrongly')\n")
    done = run("bash", str(CHECK), str(tmp_path / "out"), PYTHONPATH=str(tmp_path))
    assert done.returncode == 2, done.stdout + done.stderr
    assert f"no GPU to run on ({module}: cannot be imported (ImportError: it was installed wrongly))" in done.stdout
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_said(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """And how the check goes on; none of these ends it."""
    from xpoptim.engines.cuda import nvrtc

    def no_library() -> Any:
        raise nvrtc.NVRTCNotFound("NVRTC was not found")

    monkeypatch.setattr(nvrtc, "version", no_library)
    monkeypatch.setattr(machine, "installed", lambda name: "")
    monkeypatch.setattr(machine, "no_torch", lambda: "torch is not installed")
    monkeypatch.setattr(machine, "compute_sanitizer", lambda: "")
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    found = {one.name: one for one in machine.findings()}
    assert not any(one.missing for one in (found["numpy"], found["cupy"], found["GPU"]))
    lines = [str(one) for one in found.values() if one.missing]
    assert not any(one.fatal for one in found.values() if one.missing)
    for name, what, how in [
        ("NVRTC", "NVRTC was not found", "its rows hold the error"),
        ("torch", "not installed", "nothing is compared with it"),
        ("pytest", "not installed", "the tests are not run"),
        ("hypothesis", "not installed", "the tests are not run"),
        ("array-api-compat", "not installed", "NumPy and CuPy arrays do not need it"),
        ("compute-sanitizer", "not found", "memcheck and racecheck are not run"),
        ("nvidia-smi", "not found", "driver and clock are known only where nvidia-ml-py is installed"),
    ]:
        (line,) = (line for line in lines if line.startswith(f"{name} "))
        assert what in line
        assert line.endswith(how) or how in line
    about = machine.describe()
    assert about["nvrtc"] == "missing"


def test_a_gpu_that_does_not_answer(emulated: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import cupy

    monkeypatch.setattr(cupy, "zeros", mock.Mock(side_effect=RuntimeError("the driver\nis too old")))
    finding = machine.gpu_finding()
    assert finding.missing
    assert finding.fatal
    assert finding.found == "cannot be used (RuntimeError: the driver is too old)"


def test_tests_and_sanitizers_are_left_out_where_their_programs_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = a_check(tmp_path)
    monkeypatch.setattr(stages, "installed", lambda name: "" if name == "hypothesis" else "1.0")
    monkeypatch.setattr(stages, "compute_sanitizer", lambda: "")
    check.tests(tmp_path / "outcomes")
    check.sanitizer("memcheck")
    found = Record.read(check.record.path).stages
    assert found["tests"] == {"outcome": "not run: hypothesis not installed", "ok": False}
    assert found["memcheck"] == {"outcome": "not run: compute-sanitizer was not found", "ok": False}


def test_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From NVML, else from nvidia-smi, else not at all."""
    nvml = ModuleType("pynvml")
    nvml.__dict__.update(
        NVML_CLOCK_SM=1,
        nvmlInit=lambda: None,
        nvmlSystemGetDriverVersion=lambda: b"580.2",  # as bytes in its older versions
        nvmlDeviceGetHandleByPciBusId=lambda bus: "handle",
        nvmlDeviceGetClockInfo=lambda handle, what: 1980 if (handle, what) == ("handle", 1) else 0,
    )
    with mock.patch.dict(sys.modules, {"pynvml": nvml}):
        assert machine.Clock().sm_mhz() == 1980
        assert machine.Clock().driver() == "580.2"
    monkeypatch.setenv("PATH", str(tmp_path))
    with mock.patch.dict(sys.modules, {"pynvml": None}):
        assert machine.Clock().sm_mhz() is None
        assert machine.Clock().driver() == ""
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\ncase $* in *clocks.sm*) echo 345 ;; *driver_version*) echo 580.1 ;; esac\n")
        program.chmod(0o755)
        assert machine.Clock().sm_mhz() == 345
        assert machine.Clock().driver() == "580.1"


def test_shell_script_and_help() -> None:
    assert os.access(CHECK, os.X_OK)
    assert run("bash", "-n", str(CHECK)).returncode == 0
    if shutil.which("shellcheck"):
        done = run("shellcheck", str(CHECK))
        assert done.returncode == 0, done.stdout
    done = run("bash", str(CHECK), "--help")
    assert done.returncode == 0, done.stderr
    for option in ("--emulated", "--seconds", "--only"):
        assert option in done.stdout
    done = run("bash", str(CHECK), "--emulated")
    assert done.returncode == 2
    assert "--emulated needs a folder" in done.stderr


# --- the whole of it, emulated


@EMULATION
@pytest.mark.timeout(600)
def test_the_whole_check_on_an_emulated_device(tmp_path: Path) -> None:
    """Every stage, case and contender. Only torch, for want of CUDA, and the sanitizers are left out."""
    done = run("bash", str(CHECK), "--emulated", str(tmp_path), timeout=550)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("*.json")
    assert path.name.startswith("gpu-emulated-20")
    assert {p.suffix for p in tmp_path.iterdir()} == {".json", ".md", ".log"}
    record = Record.read(path)
    assert list(record.stages) == list(stages.NAMES)
    for name, stage in record.stages.items():
        sanitizer = name in ("memcheck", "racecheck")
        assert stage["outcome"].startswith("not run: emulated" if sanitizer else "passed"), (name, stage)
    assert record.done == [case.key for case in EMULATED.cases()]
    for case in EMULATED.cases():
        for row in record.rows_of(case):
            if row.contender.startswith("torch"):
                assert "torch" in row.note
                continue
            assert (row.error, row.note) == ("", ""), row
            assert len(row.step_ms) == EMULATED.fewest_rounds
            assert bool(row.host_ms) == (row.contender != "copy")
            assert row.sm_mhz == ["unknown"] * 2
            assert (row.peak_bytes is not None) == (case.total >= EMULATED.large)
            assert bool(row.device_ms) != bool(row.device_note) or case.total > EMULATED.small
    with_device_times = {row.contender for row in record.rows if row.device_ms}
    own = {"xpoptim, graph", "xpoptim, forward", "xpoptim, backward"}
    assert with_device_times == {*own, "CuPy kernel", "copy"}
    assert len(record.first_steps) == 4
    assert all(found["seconds"] > 0 for found in record.first_steps.values())
    content = json.loads(path.read_text())
    assert content["machine"]["command"].endswith(f"gpu.py check --emulated {tmp_path}")
    assert {target["verdict"] for target in content["targets"]} == {"not measured"}  # no more can be said here
    text = path.with_suffix(".md").read_text()
    assert "Emulated on the host: times mean nothing." in text
    log = path.with_suffix(".log").read_text()
    assert text in log
    assert log in done.stdout


def without_torch(folder: Path) -> dict[str, str]:
    """Variables for a process: to import torch takes longer than all the rest."""
    stand_in = folder / "without" / "torch.py"
    stand_in.parent.mkdir(exist_ok=True)
    stand_in.write_text("raise ImportError('left out')\n")
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(stand_in.parent), os.environ.get("PYTHONPATH")]))}


@EMULATION
@pytest.mark.timeout(300)
def test_a_kill_loses_no_row_that_was_printed(tmp_path: Path) -> None:
    """Killed within the first case, and again later; the files are whole, and the next process goes on from there."""
    record = start_of(tmp_path, many=((1, 40),), dropout=())
    words = [sys.executable, str(SCRIPT), "bench", str(record.path), "60", "--emulated"]
    environment = os.environ | SCRIPTS | without_torch(tmp_path)
    before: dict[str, list[list[float]]] = {}
    for lines in (3, 20):
        with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as running:
            assert running.stdout is not None
            printed = [running.stdout.readline() for _ in range(lines)]
            running.kill()
        found = Record.read(record.path)
        in_file = {
            (f"{row.tensors:,} x {row.elements:,}", row.contender) for row in found.rows if row.step_ms or row.note
        }
        cells = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in printed]
        rows = {(row[0], row[1]) for row in cells if row and row[0][0].isdigit()}
        assert rows <= in_file
        assert record.path.with_suffix(".md").read_text().endswith("|\n")
        assert times_of(found) | before == times_of(found)
        before = times_of(found)
    assert before
    done = run(*words, **without_torch(tmp_path))
    assert done.returncode == 0, done.stderr
    found = Record.read(record.path)
    assert found.done == [case.key for case in found.settings.cases()]
    assert times_of(found) | before == times_of(found)


def times_of(record: Record) -> dict[str, list[list[float]]]:
    """Of all cases that are done."""
    return {case: [row.step_ms for row in record.rows if row.case.key == case] for case in record.done}


@EMULATION
def test_a_check_that_is_told_to_stop_ends_its_stage(tmp_path: Path) -> None:
    words = ["bash", str(CHECK), "--emulated", str(tmp_path), "--only", "benchmarks"]
    environment = os.environ | SCRIPTS | without_torch(tmp_path)
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment) as running:
        assert running.stdout is not None
        while " 1 x 600 | copy" not in (line := running.stdout.readline()):
            assert line
        running.send_signal(signal.SIGTERM)
        assert running.wait(20) == 143
    assert processes_of(tmp_path) == []
    (path,) = tmp_path.glob("*.json")
    assert Record.read(path).done


def processes_of(folder: Path) -> list[str]:
    """The command lines of processes that name a folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has ended
            continue
        if str(folder) in line:
            found.append(line)
    return found


def a_check(folder: Path, *, limit: float = 100.0) -> stages.Check:
    """One that has looked at its machine already."""
    check = stages.Check(folder, emulated=False, seconds=limit)
    check.record = new_record(folder)
    check.record.save()
    return check


def test_a_process_that_ends_is_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who made it end has a row that says so; everyone else is measured."""
    check, calls = a_check(tmp_path), []
    first, second, third = FULL.cases()[:3]

    def process(words: list[str], limit: float) -> stages.Ended:
        calls.append(words)
        record = Record.read(tmp_path / "found.json")
        if len(calls) == 1:
            record.rows_of(first)
            record.in_work = [first.key, "xpoptim"]
        elif len(calls) == 2:
            assert [row.error for row in record.rows_of(first)[:2]] == ["the process ended (signal SIGSEGV)", ""]
            record.rows_of(first)[1].step_ms = [1.0]
            record.done.append(first.key)
            record.rows_of(second)[0].step_ms = [2.0]
            record.in_work = [second.key, ""]
        else:
            record.done.append(third.key)
        record.save()
        return stages.Ended([-signal.SIGSEGV, device.LOST, 0][len(calls) - 1], 1.0, limit)

    monkeypatch.setattr(check, "process", process)
    check.benchmarks()
    assert len(calls) == 3
    found = Record.read(tmp_path / "found.json")
    assert found.done == [case.key for case in (first, second, third)]
    rows = {(row.case.key, row.contender): row for row in found.rows}
    assert rows[first.key, "torch fused"].error == ""
    assert rows[second.key, "xpoptim"].step_ms == [2.0]  # what was measured stays
    assert rows[second.key, "xpoptim"].error == ""
    assert rows[second.key, "copy"].error == "the process ended (exit status 3)"
    assert found.stages["benchmarks"]["outcome"].startswith("passed: ")
    assert not found.stages["benchmarks"]["ok"]


def test_a_process_that_cannot_even_begin_is_not_begun_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    check = a_check(tmp_path)
    process = mock.Mock(return_value=stages.Ended(1, 1.0, 1.0))
    monkeypatch.setattr(check, "process", process)
    check.benchmarks()
    process.assert_called_once()
    assert Record.read(tmp_path / "found.json").stages["benchmarks"]["outcome"].startswith("failed (exit status 1)")


# --- stages


def test_a_stage_ends_within_its_time_with_all_its_children(tmp_path: Path, capsys: Any) -> None:
    check = a_check(tmp_path)
    text = f"echo begun; sleep 100 & sleep 100 {tmp_path} & wait"
    with mock.patch.dict(stages.LIMITS, {"small run": 1.0}):
        check.stage("small run", ["bash", "-c", text])
    assert "begun" in capsys.readouterr().out
    assert processes_of(tmp_path) == []
    found = Record.read(check.record.path).stages["small run"]
    assert found["outcome"] == "stopped after 1 seconds"
    assert not found["ok"]


def test_a_failure_keeps_nothing_else_from_running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a process that fails in the place of all."""
    monkeypatch.setattr(stages, "compute_sanitizer", lambda: "compute-sanitizer")
    monkeypatch.setattr(stages, "installed", lambda name: "1.0")
    check, said = stages.Check(tmp_path, emulated=False, seconds=100.0), []

    def process(words: list[str], limit: float) -> stages.Ended:
        if "probe" in words:
            Path(words[-1]).write_text(json.dumps(MACHINE))
            return stages.Ended(0, 1.0, limit)
        said.append(" ".join(words))
        return stages.Ended(9, 1.0, limit)

    monkeypatch.setattr(check, "process", process)
    assert check.run() == 1
    found = Record.read(tmp_path / "gpu-nvidia-h200-2030-01-02.json")
    assert list(found.stages) == list(stages.NAMES)
    assert all(stage["outcome"].startswith("failed (exit status 9)") for stage in found.stages.values())
    for word in ("-m pytest", "gpu.py small", "--tool memcheck", "--tool racecheck", "first-steps", "gpu.py bench"):
        assert any(word in line for line in said)
    verdicts = {target.what: target.verdict for target in report.targets(found)}
    assert verdicts["memcheck is clean"] == verdicts["racecheck is clean"] == "MISSED"


def test_outcomes_of_tests_are_kept_as_they_come(tmp_path: Path) -> None:
    """Also of a run that is killed."""
    (tmp_path / "test_one.py").write_text(
        "import os, pytest\n"
        "@pytest.mark.parametrize('rule', 'ab')\n"
        "def test_every_rule_and_dtype(rule): assert rule == 'a'\n"
        "def test_dropout(): pass\n"
        "def test_left_out(): pytest.skip('no reason')\n"
        "@pytest.fixture\n"
        "def broken(): raise ValueError\n"
        "def test_with_a_broken_fixture(broken): pass\n"
        "def test_that_kills(): os.kill(os.getpid(), 9)\n"
        "def test_that_never_runs(): pass\n"
    )
    kept = tmp_path / "kept"
    words = (sys.executable, "-m", "pytest", "-q", "-p", "gpubench.outcomes", "--outcomes", str(kept), str(tmp_path))
    done = run(*words, PYTHONPATH=str(ROOT / "benchmarks"))
    assert done.returncode == -signal.SIGKILL
    with kept.open("a") as file:
        file.write('{"test": "in pie')
    found = outcomes.read(kept)
    assert found["counts"] == {"collected": 7, "passed": 2, "failed": 2, "skipped": 1}
    assert found["bits"] == {"collected": 3, "passed": 2, "failed": 1, "skipped": 0}
    assert [test.split("::")[1] for test in found["failures"]] == [
        "test_every_rule_and_dtype[b]",
        "test_with_a_broken_fixture",
    ]
    assert outcomes.read(tmp_path / "nothing")["counts"]["collected"] == 0


def test_a_first_step_that_fails(tmp_path: Path) -> None:
    from gpubench import runs

    script = tmp_path / "script.py"
    script.write_text("import sys\nif sys.argv[2] == 'Adam': print(0.25)\nelse: raise ValueError('no kernel')\n")
    record = new_record(tmp_path)
    runs.first_steps(record, script, [])
    found = Record.read(record.path).first_steps
    assert found["Adam, cached"] == {"seconds": 0.25, "error": ""}
    assert found["clip_norm, cached"] == {"seconds": None, "error": "exit status 1; ValueError: no kernel"}


# --- figures


def rows_of(record: Record, case: Case, **step_ms: list[float]) -> None:
    for row in record.rows_of(case):
        name = row.contender.replace(" ", "_").replace(",", "")
        kind = measure.CONTENDERS[row.contender]
        row.bytes_per_step = float(kind.traffic * case.total)
        row.in_l2 = kind.resident * case.total <= record.machine["l2_bytes"]
        row.step_ms = step_ms.get(name, [])
        row.host_ms = [3 * x for x in row.step_ms]


def test_figures(tmp_path: Path) -> None:
    """Bandwidths, shares and ratios, computed by hand."""
    record, case = new_record(tmp_path), FULL.cases()[0]
    rows_of(record, case, xpoptim=[1.0, 2.0, 1.0], torch_fused=[1.5, 3.0, 2.5], copy=[0.25, 0.5, 0.5])
    rows = {row.contender: row for row in record.rows}
    assert rows["xpoptim"].gigabytes_per_second == pytest.approx(2800)  # 2.8 GB in a millisecond
    assert report.ratio(record.rows, "xpoptim", "torch fused") == 1.5  # the median of 1.5, 1.5 and 2.5, within rounds
    assert report.of_copy(record.rows, "xpoptim") == pytest.approx(28 / 8 * 0.25)
    assert report.of_copy(record.rows, "copy") == 1
    assert report.ratio(record.rows, "xpoptim", "CuPy code") is None
    rows["torch fused"].error = "RuntimeError: no"
    assert report.ratio(record.rows, "xpoptim", "torch fused") is None
    assert rows["torch fused"].median_ms is None


def test_what_lives_in_l2_has_no_bandwidth(tmp_path: Path) -> None:
    """1 M elements are 16 to 20 MB for Adam and 8 MB for a copy; 4 M are 32 MB for the copy alone within 50 MB."""
    record = new_record(tmp_path)
    for elements in (1_000_000, 4_000_000):
        case = next(case for case in FULL.cases() if (case.kind, case.tensors, case.elements) == ("Adam", 1, elements))
        rows_of(record, case, xpoptim=[1.0], copy=[1.0])
    small, large = report.grouped(record.rows)
    for group, row_is_in, copy_is_in in ((small, True, True), (large, False, True)):
        rows = {row.contender: row for row in group}
        assert (rows["xpoptim"].in_l2, rows["copy"].in_l2) == (row_is_in, copy_is_in)
        assert (rows["xpoptim"].gigabytes_per_second is None) == row_is_in
        assert report.of_copy(group, "xpoptim") is None
        assert report.cells(rows["xpoptim"], group)[5] == ("in L2" if row_is_in else "112")


def test_targets(tmp_path: Path) -> None:
    record = new_record(tmp_path)
    large, thousand, forward, backward = FULL.cases()[:4]
    rows_of(record, large, xpoptim=[1.0], torch_fused=[0.99], CuPy_code=[5.0], copy=[0.26])
    rows_of(record, thousand, xpoptim=[1.0], torch_fused=[2.1])
    rows_of(record, forward, xpoptim_forward=[1.0], copy=[0.81])
    rows_of(record, backward, xpoptim_backward=[1.0], copy=[0.79])
    record.stages = {
        "tests": {"outcome": "passed: 150 passed", "bits": {"collected": 20, "passed": 20, "failed": 0}},
        "memcheck": {"outcome": "passed", "status": 0},
        "racecheck": {"outcome": "failed (exit status 1)", "status": 1},
    }
    by_verdict: dict[str, list[str]] = {}
    for target in report.targets(record):
        by_verdict.setdefault(target.verdict, []).append(f"{target.what} ({target.measured})")
    assert by_verdict["met"] == [
        "share of a copy's bandwidth, Adam, 1 x 100,000,000: at least 0.9 (0.91)",
        "share of a copy's bandwidth, Dropout forward, 1 x 100,000,000: at least 0.8 (0.81)",
        "torch fused's time over xpoptim's, Adam, 1,000 x 1,000: at least 1 times (2.10 times)",
        "CuPy code's time over xpoptim's, Adam, 1 x 100,000,000: at least 5 times (5.00 times)",
        "torch fused's host time over xpoptim's, Adam, 1,000 x 1,000: at least 2 times (2.10 times)",
        "the CPU's bits for every rule and dtype (tests) (20 such tests passed)",
        "memcheck is clean (passed)",
    ]
    assert by_verdict["MISSED"] == [
        "share of a copy's bandwidth, Dropout backward, 1 x 100,000,000: at least 0.8 (0.79)",
        "torch fused's time over xpoptim's, Adam, 1 x 100,000,000: at least 1 times (0.99 times)",
    ]
    assert "racecheck is clean (failed (exit status 1))" in by_verdict["not measured"]
    every = [target.what for target in report.targets(record)]
    sizes = [case.key for case in FULL.cases() if case.kind == "Adam"]
    assert [f"torch fused's time over xpoptim's, {key}: at least 1 times" for key in sizes] == [
        what for what in every if what.startswith("torch fused's time") and "clip" not in what
    ]
    assert sum(what.startswith("CuPy code's time") for what in every) == len(sizes)


def test_why_a_target_was_not_measured(tmp_path: Path) -> None:
    record = new_record(tmp_path)
    assert {target.verdict for target in report.targets(record)} == {"not measured"}
    large, thousand = FULL.cases()[:2]
    rows_of(record, large, xpoptim=[1.0], copy=[0.26])
    record.rows_of(large)[1].note = "torch is not installed"
    rows_of(record, thousand, torch_fused=[1.0])
    record.rows_of(thousand)[0].error = "ValueError: no"
    small = next(case for case in FULL.cases() if case.key == "Adam, 1 x 1,000,000")
    rows_of(record, small, xpoptim=[1.0])
    record.rows_of(small)[1].note = "torch is not installed"
    record.rows_of(small)[0].in_l2 = True  # which keeps no ratio of times from being taken
    reasons = {target.what: target.measured for target in report.targets(record)}
    what = "torch fused's time over xpoptim's, {}: at least 1 times"
    assert reasons[what.format(large.key)] == "torch fused: torch is not installed"
    assert reasons[what.format(thousand.key)] == "xpoptim: ValueError: no"
    assert reasons[what.format(small.key)] == "torch fused: torch is not installed"
    assert reasons[f"CuPy code's time over xpoptim's, {small.key}: at least 5 times"] == "the time was up in this case"
    for row in record.rows_of(large):
        row.in_l2 = True
    share = f"share of a copy's bandwidth, {large.key}: at least 0.9"
    assert {target.what: target.measured for target in report.targets(record)}[share] == "xpoptim: in L2, not in memory"
    assert reasons[what.format("Adam, 1 x 1,000")] == "the time was up before this case"
    assert reasons["the CPU's bits for every rule and dtype (tests)"] == "the tests were not run"
    record.stages["tests"] = {"outcome": "failed", "bits": {"collected": 20, "passed": 19, "failed": 1}}
    record.stages["tests"]["failures"] = ["tests/gpu/test_gpu_engine.py::test_every_rule_and_dtype[SGD-plain]"]
    assert "- failed: `tests/gpu/test_gpu_engine.py::test_every" in report.markdown(record)
    bits = report.bits(record)
    assert (bits.verdict, bits.measured) == ("MISSED", "1 of 20 such tests failed")


def test_files(tmp_path: Path) -> None:
    record = Record(tmp_path / "new" / f"{stem(MACHINE)}.json", MACHINE, FULL)
    case = FULL.cases()[0]
    rows_of(record, case, xpoptim=[1.0], copy=[0.25])
    record.rows_of(case)[1].error = "ValueError: a | b"
    record.rows_of(case)[0].sm_mhz = [1980, 1755]
    record.save()
    assert sorted(path.name for path in record.path.parent.iterdir()) == [
        "gpu-nvidia-h200-2030-01-02.json",
        "gpu-nvidia-h200-2030-01-02.md",
    ]
    content = json.loads(record.path.read_text())
    assert content["machine"] == MACHINE
    assert [row["contender"] for row in content["rows"]] == list(case.contenders)
    assert content["rows"][0]["gigabytes_per_second"] == pytest.approx(2800)
    assert content["rows"][0]["of_copy"] == pytest.approx(28 / 8 * 0.25)
    text = record.path.with_suffix(".md").read_text()
    table = [line for line in text.splitlines() if "1 x 100,000,000 |" in line or "tensors x" in line]
    assert len(table) == 1 + len(case.contenders)
    assert len({len(line) for line in table}) == 1
    assert "1980 to 1755" in table[1]
    assert "ValueError: a \\| b" in table[2]
    read = Record.read(record.path)
    assert json.dumps(read.content()) == json.dumps(record.content())
    assert read.settings.cases() == FULL.cases()


def test_a_file_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    replace(path, "old")
    with mock.patch.object(Path, "write_text", side_effect=OSError("disk full")), pytest.raises(OSError, match="full"):
        replace(path, "new")
    assert path.read_text() == "old"


def test_cases_cover_what_is_asked() -> None:
    for settings in (FULL, EMULATED):
        cases = settings.cases()
        assert len({case.key for case in cases}) == len(cases)
        assert {name for case in cases for name in case.contenders} == set(measure.CONTENDERS)
        kinds = {case.kind for case in cases if case.total == settings.large}
        assert kinds == set(report.OWN)
    sizes = {(case.tensors, case.elements) for case in FULL.cases() if case.kind == "Adam"}
    assert {(1, n) for n in (1_000_000, 100_000_000, 500_000_000)} <= sizes
    assert {(n, 1_000) for n in (1, 100, 1_000, 10_000)} <= sizes
    traffic = {name: kind.traffic for name, kind in measure.CONTENDERS.items()}
    assert traffic["copy"] == traffic["xpoptim, forward"] == traffic["xpoptim, backward"] == 8
    assert traffic["xpoptim"] == traffic["torch fused"] == traffic["xpoptim, graph"] == 28
    assert traffic["xpoptim, clip_norm"] == traffic["torch fused, clip"] == 32
    assert FULL.warm_up == 0.5
