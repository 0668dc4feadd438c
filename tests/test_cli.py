"""The command line as a user meets it: exit statuses, one-line errors, the table and the pictures."""

import io
import os
import re
import subprocess
import sys
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import xpoptim as xo
from xpoptim import demo
from xpoptim.__main__ import main, make_parser

ABSENT = [distribution for module, distribution in demo.EXTRA.items() if find_spec(module) is None]
needs_extra = pytest.mark.skipif(bool(ABSENT), reason=f"needs {', '.join(ABSENT)}: pip install '.[demo]'")
ROOT = Path(xo.__file__).parents[1]
NAMES = ("SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW")
PICTURES = ("surface.png", "paths.png", "training.png", "dropout.png")


@pytest.fixture
def command(tmp_path):
    """Runs ``python -m xpoptim`` in an empty folder; `stubs` are modules that take the place of installed ones."""

    def environment(stubs, variables):
        folder = tmp_path / "stubs"
        folder.mkdir(exist_ok=True)
        for name, text in stubs.items():
            (folder / f"{name}.py").write_text(text)
        inherited = {k: v for k, v in os.environ.items() if not k.startswith("XPOPTIM_")}
        path = os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH"))))
        return {**inherited, "PYTHONPATH": path, **variables}

    def run(*arguments, stubs=None, stdout=subprocess.PIPE, **variables):
        return subprocess.run(
            [sys.executable, "-m", "xpoptim", *arguments],
            stdout=stdout,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=environment(stubs or {}, variables),
            timeout=120,
        )

    return run


def refused(done, *words):
    """Whether the command ended with status 2 and one line on stderr that has all `words`."""
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert done.stderr.startswith("xpoptim")
    for word in words:
        assert word in done.stderr


# Bad command lines


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--steps", "0"], ["--steps", "at least 1", "not 0"]),
        (["demo", "--steps", "many"], ["--steps", "whole number", "'many'"]),
        (["demo", "--seed", "-1"], ["--seed", "not -1"]),
        (["demo", "--seed", str(2**64)], ["--seed", "from 0 to", str(2**64 - 1)]),
        (["demo", "--backend", "tpu"], ["--backend", "tpu", "numpy", "cupy"]),
        (["demo", "--colour"], ["--colour"]),
        (["dance"], ["dance", "demo", "info"]),
        ([], ["command"]),
    ],
)
def test_a_bad_command_line_is_refused_in_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    printed = capsys.readouterr()
    refused(subprocess.CompletedProcess(arguments, stopped.value.code, printed.out, printed.err), *words)


@pytest.mark.smoke
def test_the_process_ends_with_the_status(command):
    refused(command("demo", "--steps", "0"), "--steps")


def test_the_help_tells_the_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["demo", "--help"])
    told = re.findall(r"\(default:\s+(\S+?)\)", capsys.readouterr().out)
    options = make_parser().parse_args(["demo"])
    assert told == [str(value) for value in (options.backend, options.seed, options.out, options.steps)]


def test_the_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"xpoptim {xo.__version__}\n"


# What may be missing


def test_a_missing_extra_is_refused_in_one_line(command):
    stubs = {name: f"raise ImportError('no\\n{name}')" for name in demo.EXTRA}
    refused(command("demo", stubs=stubs), "rich", "matplotlib", "scikit-learn", "pip install '.[demo]'")


@needs_extra
@pytest.mark.parametrize("variable", ["XPOPTIM_ENGINE", "XPOPTIM_NUM_THREADS"])
def test_a_bad_environment_variable_is_refused_in_one_line(command, variable):
    refused(command("demo", "--steps", "1", **{variable: "warp"}), variable, "'warp'")


@needs_extra
@pytest.mark.parametrize("below", ["", "folder"])
def test_a_folder_that_cannot_be_made_is_refused_in_one_line(tmp_path, capsys, below):
    file = tmp_path / "file"
    file.write_text("in the way")
    out = file / below
    status = main(["demo", "--out", str(out), "--steps", "1"])
    printed = capsys.readouterr()
    refused(subprocess.CompletedProcess("demo", status, printed.out, printed.err), str(out), "--out")
    assert file.read_text() == "in the way"


@needs_extra
def test_a_folder_that_becomes_unwritable_while_training_is_refused_in_one_line(tmp_path, capsys):
    (tmp_path / "surface.png").mkdir()
    status = main(["demo", "--out", str(tmp_path), "--steps", "1"])
    printed = capsys.readouterr()
    refused(subprocess.CompletedProcess("demo", status, printed.out, printed.err), str(tmp_path), "--out")


NO_DEVICE = """
class runtime:
    def getDeviceCount():
        raise RuntimeError("cudaErrorNoDevice: no CUDA-capable device\\nis detected")
class cuda:
    runtime = runtime
__version__ = "0.0"
"""


@needs_extra
@pytest.mark.parametrize(
    ("cupy", "words"),
    [
        ("raise ImportError('libcuda\\nis missing')", ["CuPy", "libcuda is missing", "cuda12", "--backend numpy"]),
        (NO_DEVICE, ["GPU", "no CUDA-capable device is detected", "--backend numpy"]),
        (NO_DEVICE.replace("raise", "return 0 #"), ["GPU", "--backend numpy"]),
    ],
    ids=["no CuPy", "no driver", "no device"],
)
def test_cupy_without_a_gpu_is_refused_in_one_line(tmp_path, monkeypatch, capsys, cupy, words):
    (tmp_path / "cupy.py").write_text(cupy)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "cupy", raising=False)
    status = main(["demo", "--backend", "cupy", "--out", str(tmp_path / "pictures")])
    sys.modules.pop("cupy", None)
    printed = capsys.readouterr()
    refused(subprocess.CompletedProcess("demo", status, printed.out, printed.err), *words)
    assert not (tmp_path / "pictures").exists()


@pytest.mark.smoke
def test_ctrl_c_ends_without_a_traceback(monkeypatch, capsys):
    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == "xpoptim: interrupted\n"


# The demo


def demo_output(out, seed):
    printed = io.StringIO()
    with redirect_stdout(printed):
        assert main(["demo", "--steps", "4", "--seed", str(seed), "--out", str(out)]) == 0
    return printed.getvalue()


@pytest.fixture(scope="module")
def demo_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo") / "a [new] folder"
    return out, demo_output(out, seed=0)


def rows(printed):
    """The table's rows: optimizer, then the cells as text."""
    lines = (line.replace("|", " ").split() for line in printed.splitlines())
    return {cells[0]: cells[1:] for cells in lines if len(cells) == 8 and cells[0] in NAMES}


@pytest.mark.smoke
@needs_extra
def test_the_demo_prints_a_row_for_each_optimizer(demo_run):
    table = rows(demo_run[1])
    assert tuple(table) == NAMES
    for cells in table.values():
        rate, accuracy, loss, steps, fused, plain, ratio = (cell.replace(",", "") for cell in cells)
        assert float(rate) > 0
        assert re.fullmatch(r"\d+\.\d\d%", accuracy)
        assert 0 < float(loss) < 10
        assert float(steps) > 0
        # The ratio is made of unrounded times: one digit after the point of each is shown.
        assert float(ratio) == pytest.approx(float(plain) / float(fused), rel=0.01, abs=0.06)


@needs_extra
def test_the_demo_saves_four_pictures_and_says_where(demo_run):
    from matplotlib import image

    out, printed = demo_run
    assert sorted(path.name for path in out.iterdir()) == sorted(PICTURES)
    for name in PICTURES:
        assert str(out / name) in printed
        pixels = image.imread(out / name)
        assert min(pixels.shape[:2]) > 600
        colours = np.unique((pixels[..., :3] * 255).astype(int) @ (1, 256, 65536))
        assert len(colours) > 100


@needs_extra
def test_the_seed_decides_the_accuracies(demo_run, tmp_path):
    again = demo_output(tmp_path, seed=0)
    results = [[row[1:3] for row in rows(printed).values()] for printed in (demo_run[1], again)]
    assert results[0] == results[1]
    assert len({tuple(row) for row in results[0]}) > 3  # they are results, not one constant


@needs_extra
def test_the_demo_runs_as_a_process_and_on_an_output_that_knows_ascii_only(command, tmp_path):
    done = command("demo", "--steps", "1", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert tuple(rows(done.stdout)) == NAMES
    assert sorted(path.name for path in (tmp_path / "xpoptim-demo").iterdir()) == sorted(PICTURES)


# Information


@pytest.mark.smoke
def test_the_demo_of_a_checkout_says_that_it_runs_without_the_extension(tmp_path):
    """Even where an installed package has it: ``python -m`` runs what lies in the current folder."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("XPOPTIM_", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "xpoptim", "demo", "--steps", "2", "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=inherited,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "without the extension" in line]
    built = any((ROOT / "xpoptim" / "engines" / "cpu").glob("_native.*.so"))
    assert len(lines) == (0 if built else 1)
    assert built or "source folder" in lines[0]


def test_info_shows_versions_engines_devices_and_threads(command):
    done = command("info", XPOPTIM_NUM_THREADS="3")
    assert (done.returncode, done.stderr) == (0, "")
    for expected in (xo.__version__, np.__version__, "with LLVM", "reference", "fused, CPU", "fused, CUDA", "CPU "):
        assert expected in done.stdout
    assert re.search(r"fused, CPU +usable", done.stdout)
    assert re.search(r"threads +3 at most .*XPOPTIM_NUM_THREADS", done.stdout)


def test_info_works_where_everything_is_missing_or_broken(command):
    broken = dict.fromkeys((*demo.EXTRA, "cupy", "torch", "jax"), "raise ImportError('not here')")
    broken["llvmlite"] = "raise OSError('libLLVM.so:\\ncannot open')"
    done = command("info", stubs=broken, XPOPTIM_ENGINE="warp", XPOPTIM_NUM_THREADS="none")
    assert (done.returncode, done.stderr) == (0, "")
    for pattern in (
        r"- llvmlite +cannot be imported \(libLLVM.so: cannot open\); pip install",
        r"- fused, CPU +cannot be imported \(libLLVM.so",
        r"- CuPy +cannot be imported \(not here\); pip install '\.\[cuda13\]'",
        r"- NVRTC +missing: CuPy, .* cannot be imported: ImportError: not here\. Install .* '\.\[cuda13\]'",
        r"- CUDA +cannot be imported",
        r"- threads +XPOPTIM_NUM_THREADS is 'none'",
        r"- engine +XPOPTIM_ENGINE is 'warp'",
        r"  reference +usable",
    ):
        assert re.search(pattern, done.stdout), pattern


@pytest.mark.parametrize(
    ("cupy", "reason"),
    [
        (NO_DEVICE, r"no device \(cudaErrorNoDevice: no CUDA-capable device is detected\): an NVIDIA GPU"),
        (NO_DEVICE.replace("raise", "return 0 #"), "no device: an NVIDIA GPU and its driver are needed"),
    ],
    ids=["no driver", "no device"],
)
def test_info_says_why_there_is_no_cuda_device(command, cupy, reason):
    done = command("info", stubs={"cupy": cupy})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(rf"- CUDA +{reason}", done.stdout)
    assert re.search(rf"- fused, CUDA +{reason}", done.stdout)


def test_info_lists_each_cuda_device(monkeypatch):
    from xpoptim.demo import info

    class runtime:
        def getDeviceCount():
            return 2

        def getDeviceProperties(index):
            return {"name": [b"Tiny", "Vast"][index], "totalGlobalMem": (index + 1) << 30, "major": 9, "minor": index}

    monkeypatch.setattr(info, "load_cupy", lambda: SimpleNamespace(cuda=SimpleNamespace(runtime=runtime)))
    assert info.cuda_devices() == "0: Tiny, 1 GiB, compute capability 9.0; 1: Vast, 2 GiB, compute capability 9.1"


def test_info_says_that_an_engine_computes_wrongly(monkeypatch):
    from xpoptim.demo import info

    monkeypatch.setattr(xo.SGD, "update", lambda self, params, grads: None)
    wrong = r"a step gave \[1\. 1\. 1\.\] where 0.5 is right: please report this"
    rows = info.engines(info.Row("CUDA", False, "no device"))
    assert [row.name for row in rows if re.search(wrong, row.text)] == ["reference", "fused, CPU"]
    assert not any(row.usable for row in rows)


NO_NVRTC = """
import sys
class nvrtc:
    def getVersion():
        raise RuntimeError("CuPy failed to load libnvrtc.so.13")
cuda.nvrtc = nvrtc
sys.modules["cupy.cuda"] = cuda
"""


def test_info_says_that_nvrtc_is_missing(command):
    done = command("info", stubs={"cupy": NO_DEVICE + NO_NVRTC, "cuda": "raise ImportError"})
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(
        r"- NVRTC +missing: NVRTC, .*CuPy failed to load libnvrtc.so.13\. .*nvidia-cuda-nvrtc", done.stdout
    )


def test_info_shows_the_compiler(command):
    from xpoptim.engines.cuda import nvrtc

    try:
        major, minor = nvrtc.version()
    except ImportError as error:
        pytest.skip(str(error))
    done = command("info", XPOPTIM_CACHE_DIR="/a folder")
    assert re.search(rf"  NVRTC +{major}\.{minor}, through CuPy", done.stdout)
    assert re.search(r"  compiles for +sm_\d+ to sm_\d+\n", done.stdout)
    assert re.search(r"  kernel cache +/a folder\n", done.stdout)


def test_info_in_colour_says_the_same(capsys):
    pytest.importorskip("rich", reason="needs rich: pip install '.[demo]'")
    from xpoptim.demo import info

    sections = info.gather()
    info.show_plain(sections)
    plain = capsys.readouterr().out
    from rich.console import Console

    coloured = Console(file=io.StringIO(), force_terminal=True, width=1000)  # so that no line is broken
    info.show_rich(sections, coloured)
    text = re.sub(r"\x1b\[[0-9;]*m", "", coloured.file.getvalue())
    for line in plain.splitlines():
        for part in line.strip("- ").split("  "):
            assert part.strip() in text


def test_a_reader_that_goes_away_is_no_error(command):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = command("info", stdout=writing)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_behind_the_output_is_refused_in_one_line(command):
    with open("/dev/full", "w") as full:
        refused(command("info", stdout=full), "No space left")
