"""CUDA text to cubins: the options take effect, the cache is safe, and a missing NVRTC is explained."""

import os
import struct
import subprocess
import sys
import threading
import types
from pathlib import Path

import nvrtc_reports
import pytest

import xpoptim as xo
from xpoptim.engines.cuda import nvrtc

try:
    nvrtc.version()
    WHY_NOT = ""
except ImportError as error:
    WHY_NOT = str(error).split(". ")[0]

needs_nvrtc = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)

SOURCE = """
extern "C" __global__ void update(float* p, const float* g, double* v, long long n) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i >= n) return;
    p[i] = p[i] * g[i] + g[i] / sqrtf(p[i]);
    v[i] = v[i] * v[i] + 1.0 / sqrt(v[i]);
}
"""
BROKEN = '// a comment\nextern "C" __global__ void broken(float* p) {\n    p[0] = nowhere;\n}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """An empty cache, on disk and in memory."""
    monkeypatch.setenv("XPOPTIM_CACHE_DIR", str(tmp_path / "kernels"))
    monkeypatch.setattr(nvrtc, "_memory", {})
    return tmp_path / "kernels"


def put_binding(monkeypatch, get_version, pathfinder=None):
    """A CuPy whose binding has this `getVersion` and nothing else, and a cuda-pathfinder; None: not installed."""
    cuda = types.SimpleNamespace(nvrtc=types.SimpleNamespace(getVersion=get_version))
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace(cuda=cuda))
    monkeypatch.setitem(sys.modules, "cupy.cuda", cuda)
    monkeypatch.setitem(sys.modules, "cuda", pathfinder and types.SimpleNamespace(pathfinder=pathfinder))


def fails(error):
    """A function that raises `error`, whatever it is given."""

    def raise_it(*_):
        raise error

    return raise_it


def forbid_compiling(monkeypatch):
    def refuse(*_):
        raise AssertionError("compiled, though the cubin is in the cache")

    monkeypatch.setattr(nvrtc, "_compile", refuse)


# --- compiling


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cubin_is_machine_code_for_a_gpu(arch):
    image = nvrtc.cubin(SOURCE, arch)
    assert image.startswith(b"\x7fELF")
    assert int.from_bytes(image[18:20], "little") == 190  # EM_CUDA
    assert b"update" in image


@needs_nvrtc
def test_what_an_optimizer_shows_can_be_compiled():
    """It is text of a class of its own, which CuPy's binding does not take."""
    source = xo.SGD().source("cuda")
    assert nvrtc.cubin(source, "sm_90") == nvrtc.cubin(str(source), "sm_90")
    assert nvrtc_reports.ptx(source, "compute_90") == nvrtc_reports.ptx(str(source), "compute_90")
    assert nvrtc_reports.resources(source, "sm_90") == nvrtc_reports.resources(str(source), "sm_90") != {}


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_cubin_is_whole(arch):
    """To the last byte of the program headers, which come last: CuPy's binding cuts that off."""
    image = nvrtc.cubin(SOURCE, arch)
    start, size, count = *struct.unpack_from("<Q", image, 32), *struct.unpack_from("<HH", image, 54)
    assert len(image) == start + size * count


@needs_nvrtc
def test_arithmetic_is_strict():
    text = nvrtc_reports.ptx(SOURCE, "compute_90")
    for operation in ("mul", "add", "div", "sqrt"):
        assert f"{operation}.rn.f32" in text
    for operation in ("mul.rn.f64", "add.rn.f64", "sqrt.rn.f64"):
        assert operation in text
    assert "div.rn.f64" in text or "rcp.rn.f64" in text  # a reciprocal, rounded correctly, is 1.0 / x
    for loose in ("fma", ".ftz", ".approx", ".full"):
        assert loose not in text


@needs_nvrtc
@pytest.mark.parametrize(
    ("option", "shows"),
    [
        ("-fmad=true", "fma.rn.f32"),
        ("-ftz=true", ".ftz"),
        ("-prec-div=false", "div.full"),
        ("-prec-sqrt=false", "sqrt.approx"),
    ],
)
def test_every_flag_matters(option, shows, monkeypatch):
    name = option.partition("=")[0]
    flags = tuple(option if flag.startswith(name) else flag for flag in nvrtc.FLAGS)
    assert flags != nvrtc.FLAGS
    monkeypatch.setattr(nvrtc, "FLAGS", flags)  # NVRTC 12.4 refuses an option that is given twice
    assert shows in nvrtc_reports.ptx(SOURCE, "compute_90")


@needs_nvrtc
def test_resources_of_every_kernel():
    report = nvrtc_reports.resources(SOURCE + SOURCE.replace("update", "again"), "sm_90")
    assert set(report) == {"update", "again"}
    assert report["update"] == report["again"]
    assert 8 <= report["update"].registers <= 64
    assert not report["update"].spills


@needs_nvrtc
@pytest.mark.parametrize("operation", ["*", "/"])  # division calls a subroutine
def test_resources_show_spills(operation):
    loads = "".join(f"float x{i} = p[{i} * n];" for i in range(64))
    stores = "".join(f"p[{i} + n] = x{i} {operation} x{63 - i};" for i in range(64))
    source = f'extern "C" __global__ void hungry(float* p, int n) {{ {loads} __syncthreads(); {stores} }}'
    assert not nvrtc_reports.resources(source, "sm_90")["hungry"].spills
    report = nvrtc_reports.resources(source, "sm_90", ["--maxrregcount=24"])["hungry"]
    assert report.registers <= 24
    assert report.spills


@needs_nvrtc
def test_error_holds_log_and_numbered_text(folder):
    with pytest.raises(nvrtc.CompileError) as caught:
        nvrtc.cubin(BROKEN, "sm_90")
    message = str(caught.value)
    assert 'kernel.cu(3): error: identifier "nowhere" is undefined' in message
    assert "    3      p[0] = nowhere;" in message
    assert "-fmad=false" in message
    assert not folder.exists()  # nothing was kept


class Counted:
    """CuPy's binding, with a count of the programs alive; what `broken` names raises."""

    def __init__(self, binding, broken):
        self.alive, self._binding, self._broken = 0, binding, broken

    def __getattr__(self, name):
        if name == self._broken:
            return fails(self._binding.NVRTCError(1))
        return getattr(self._binding, name)

    def createProgram(self, *arguments):
        self.alive += 1
        return self._binding.createProgram(*arguments)

    def destroyProgram(self, program):
        self.alive -= 1
        self._binding.destroyProgram(program)


@needs_nvrtc
@pytest.mark.parametrize("broken", ["", "compileProgram", "getCUBIN", "getProgramLog"])
@pytest.mark.parametrize("source", [SOURCE, BROKEN], ids=["right", "wrong"])
def test_no_program_is_left_over(broken, source, monkeypatch):
    counted = Counted(nvrtc._nvrtc(), broken)
    monkeypatch.setattr(nvrtc, "_nvrtc", lambda: counted)
    if broken in ("compileProgram", "getCUBIN") or source is BROKEN:  # the log is asked for only then
        with pytest.raises(RuntimeError):
            nvrtc.cubin(source, "sm_90")
    else:
        nvrtc.cubin(source, "sm_90")
    assert counted.alive == 0


@needs_nvrtc
def test_error_in_other_letters_than_ascii():
    with pytest.raises(nvrtc.CompileError, match="größe"):
        nvrtc.cubin('extern "C" __global__ void f(float* p) { p[0] = nowhere; /* größe 大きさ */ }', "sm_90")


@needs_nvrtc
@pytest.mark.parametrize("arch", ["sm_35", "sm_60", "90", "compute_90"])
def test_unknown_architecture(arch):
    with pytest.raises(ValueError, match=f"cannot compile for '{arch}', only for .*sm_90"):
        nvrtc.cubin(SOURCE, arch)


# --- the cache


@needs_nvrtc
def test_compiled_once(folder, monkeypatch):
    image = nvrtc.cubin(SOURCE, "sm_90")
    (file,) = folder.iterdir()
    assert file.suffix == ".cubin"
    assert file.read_bytes().endswith(image)
    forbid_compiling(monkeypatch)
    assert nvrtc.cubin(SOURCE, "sm_90") is image  # from memory
    nvrtc._memory.clear()
    assert nvrtc.cubin(SOURCE, "sm_90") == image  # from disk


@needs_nvrtc
def test_all_that_matters_is_in_the_key(folder, monkeypatch):
    nvrtc.cubin(SOURCE, "sm_90")
    nvrtc.cubin(SOURCE + "// more", "sm_90")
    nvrtc.cubin(SOURCE, "sm_80")
    nvrtc.cubin(SOURCE, "sm_90", ["--maxrregcount=64"])
    monkeypatch.setattr(nvrtc, "version", lambda: (12, 99))
    nvrtc.cubin(SOURCE, "sm_90")
    assert len(list(folder.iterdir())) == 5


@needs_nvrtc
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:10],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:-100] + bytes([content[-100] ^ 1]) + content[-99:],
        lambda content: b"\x7fELF" + content,
        lambda content: content.replace(b"cubin 1", b"cubin 0"),
    ],
)
def test_damaged_file_is_rebuilt(folder, damage):
    image = nvrtc.cubin(SOURCE, "sm_90")
    (file,) = folder.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    nvrtc._memory.clear()
    assert nvrtc.cubin(SOURCE, "sm_90") == image
    assert file.read_bytes() == whole


@needs_nvrtc
def test_folder_that_cannot_be_written(folder, monkeypatch):
    folder.write_text("a file where the folder should be")
    image = nvrtc.cubin(SOURCE, "sm_90")
    assert folder.read_text() == "a file where the folder should be"
    forbid_compiling(monkeypatch)
    assert nvrtc.cubin(SOURCE, "sm_90") is image


@needs_nvrtc
def test_failed_write_leaves_nothing_behind(folder, monkeypatch):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "replace", full)
    assert nvrtc.cubin(SOURCE, "sm_90").startswith(b"\x7fELF")
    assert list(folder.iterdir()) == []


@needs_nvrtc
def test_threads_at_once(folder):
    images = []
    threads = [threading.Thread(target=lambda: images.append(nvrtc.cubin(SOURCE, "sm_90"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(images) == 8
    assert len(set(images)) == 1
    assert len(list(folder.iterdir())) == 1


@needs_nvrtc
def test_processes_at_once(folder):
    code = (
        "import sys; from xpoptim.engines.cuda import nvrtc\n"
        "sys.stdin.readline()\n"  # so that all begin together
        "for _ in range(20):\n"
        "    nvrtc._memory.clear()\n"
        "    image = nvrtc.cubin(sys.argv[1], 'sm_90')\n"
        "    nvrtc._write(nvrtc._key(sys.argv[1], (*nvrtc.FLAGS, '-arch=sm_90')), image)\n"
        "sys.stdout.write(image.hex())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [*sys.path, os.getcwd()]))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, SOURCE],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert set(outputs) == {nvrtc.cubin(SOURCE, "sm_90").hex()}
    assert len(list(folder.iterdir())) == 1


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    assert nvrtc.cache_folder() == tmp_path / "kernels"
    monkeypatch.setenv("XPOPTIM_CACHE_DIR", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert nvrtc.cache_folder() == tmp_path / "caches" / "xpoptim"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert nvrtc.cache_folder() == tmp_path / ".cache" / "xpoptim"


def test_without_a_home_memory_has_to_do(monkeypatch):
    def homeless():
        raise RuntimeError("no home folder")

    monkeypatch.delenv("XPOPTIM_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    assert nvrtc.cache_folder() is None
    assert "memory only" in nvrtc.describe()["kernel cache"]
    if not WHY_NOT:
        assert nvrtc.cubin(SOURCE, "sm_90").startswith(b"\x7fELF")


# --- what is missing


def test_without_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    with pytest.raises(nvrtc.NVRTCNotFound, match=r"^CuPy, through which .* cannot be imported: ") as caught:
        nvrtc.cubin(SOURCE, "sm_90")
    for hint in ("'.[cuda13]'", "'.[cuda12]'", "nvidia-cuda-nvrtc", "cuda-pathfinder", "CUDA_PATH"):
        assert hint in str(caught.value)
    assert issubclass(nvrtc.NVRTCNotFound, ImportError)


def test_broken_cupy(monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", types.SimpleNamespace())
    monkeypatch.setitem(sys.modules, "cupy.cuda", types.SimpleNamespace())
    with pytest.raises(nvrtc.NVRTCNotFound, match="cannot be imported: ImportError: cannot import name 'nvrtc'"):
        nvrtc.version()


NOT_FOUND = RuntimeError("CuPy failed to load\nlibnvrtc.so.13.")  # with breaks, as pathfinder's messages have


@pytest.mark.parametrize("finder", [None, fails(RuntimeError("not there either"))], ids=["no pathfinder", "not found"])
def test_cupy_without_the_library(monkeypatch, finder):
    pathfinder = finder and types.SimpleNamespace(load_nvidia_dynamic_lib=finder)
    put_binding(monkeypatch, fails(NOT_FOUND), pathfinder)
    with pytest.raises(nvrtc.NVRTCNotFound, match=r"found: RuntimeError: CuPy failed to load libnvrtc\.so\.13\. "):
        nvrtc.architectures()
    report = nvrtc.describe()
    assert report["NVRTC"].startswith("missing: NVRTC, which compiles the CUDA kernels, was not found")
    assert "'.[cuda13]'" in report["NVRTC"]
    assert "\n" not in report["NVRTC"]


def test_cupy_14_without_pathfinder(monkeypatch):
    put_binding(monkeypatch, fails(ModuleNotFoundError("No module named 'cuda'")))
    with pytest.raises(nvrtc.NVRTCNotFound, match="No module named 'cuda'"):
        nvrtc.version()


def test_cupy_13_is_given_what_pathfinder_loads(monkeypatch):
    loaded = []

    def get_version():
        if not loaded:
            raise NOT_FOUND
        return 12, 4

    put_binding(monkeypatch, get_version, types.SimpleNamespace(load_nvidia_dynamic_lib=loaded.append))
    assert nvrtc.version() == (12, 4)
    assert loaded == ["nvrtc"]
    assert nvrtc.version() == (12, 4)
    assert loaded == ["nvrtc"]  # asked for once


def test_old_library_is_named(monkeypatch):
    put_binding(monkeypatch, lambda: (11, 8))
    with pytest.raises(nvrtc.NVRTCNotFound, match=r"NVRTC 11\.8 is too old"):
        nvrtc.version()


def test_library_is_found_once_it_is_there(monkeypatch):
    put_binding(monkeypatch, fails(NOT_FOUND))
    with pytest.raises(nvrtc.NVRTCNotFound):
        nvrtc.version()
    put_binding(monkeypatch, lambda: (13, 0))
    assert nvrtc.version() == (13, 0)


@needs_nvrtc
def test_report():
    import cupy

    report = nvrtc.describe()
    major, minor = nvrtc.version()
    assert report["NVRTC"] == f"{major}.{minor}, through CuPy {cupy.__version__}"
    assert "sm_" in report["compiles for"]
    assert report["kernel cache"] == os.environ["XPOPTIM_CACHE_DIR"]


@needs_nvrtc
def test_bfloat16_where_the_compiler_loads_cupy():
    """CuPy knows the dtype only if ml_dtypes is there when it is imported: whoever imports it first."""
    pytest.importorskip("ml_dtypes")
    code = (
        "import sys, numpy as np\n"
        "from xpoptim.engines.cuda import nvrtc\n"
        "assert 'cupy' not in sys.modules\n"
        "nvrtc.version()\n"
        "import ml_dtypes, cupy\n"
        "a = np.ones(3, ml_dtypes.bfloat16)\n"
        "memory = cupy.cuda.UnownedMemory(a.ctypes.data, a.nbytes, a, 0)\n"
        "print(cupy.ndarray(a.shape, a.dtype, cupy.cuda.MemoryPointer(memory, 0)).dtype)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "bfloat16\n", done.stderr


# --- what the driver may say


@pytest.mark.parametrize(
    ("mine", "driver", "advice"),
    [
        ((13, 5), 12080, r"extra cuda12 and remove the wheel nvidia-cuda-nvrtc,"),
        ((13, 5), 13000, r"nvidia-cuda-nvrtc==13\.0\.\*"),
        ((12, 9), 12080, r"nvidia-cuda-nvrtc-cu12==12\.8\.\*"),
        ((13, 0), 13020, "another architecture"),
    ],
)
def test_refused_cubin(monkeypatch, mine, driver, advice):
    monkeypatch.setattr(nvrtc, "version", lambda: mine)
    error = nvrtc.load_error(RuntimeError("CUDA_ERROR_NO_BINARY_FOR_GPU"), "sm_90", driver)
    with pytest.raises(RuntimeError, match=advice) as caught:
        raise error
    for part in ("CUDA_ERROR_NO_BINARY_FOR_GPU", "sm_90", f"NVRTC {mine[0]}.{mine[1]}"):
        assert part in str(caught.value)
