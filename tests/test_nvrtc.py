"""CUDA text to cubins: the options take effect, the cache is safe, and a missing NVRTC is explained."""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from xpoptim.engines import nvrtc

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


@pytest.fixture
def no_library(monkeypatch):
    """A search that finds what the test puts into the list."""
    found: list[str] = []
    monkeypatch.setattr(nvrtc, "_candidates", lambda: found)
    nvrtc._library.cache_clear()
    yield found
    nvrtc._library.cache_clear()


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
def test_arithmetic_is_strict():
    text = nvrtc.ptx(SOURCE, "compute_90")
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
def test_every_flag_matters(option, shows):
    assert shows in nvrtc.ptx(SOURCE, "compute_90", [option])


@needs_nvrtc
def test_resources_of_every_kernel():
    report = nvrtc.resources(SOURCE + SOURCE.replace("update", "again"), "sm_90")
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
    assert not nvrtc.resources(source, "sm_90")["hungry"].spills
    report = nvrtc.resources(source, "sm_90", ["--maxrregcount=24"])["hungry"]
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
    nvrtc.cubin(SOURCE, "sm_90", ["-fmad=true"])
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
        "import sys; from xpoptim.engines import nvrtc\n"
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


# --- the search


def test_missing_library_names_the_extra(no_library):
    with pytest.raises(nvrtc.NVRTCNotFound) as caught:
        nvrtc.cubin(SOURCE, "sm_90")
    for hint in ("xpoptim[cuda13]", "xpoptim[cuda12]", "nvidia-cuda-nvrtc", "CUDA_PATH"):
        assert hint in str(caught.value)
    assert issubclass(nvrtc.NVRTCNotFound, ImportError)


def test_missing_library_in_the_report(no_library):
    report = nvrtc.describe()
    assert report["NVRTC"].startswith("missing: ")
    assert "xpoptim[cuda13]" in report["NVRTC"]


@needs_nvrtc
def test_report():
    report = nvrtc.describe()
    major, minor = nvrtc.version()
    assert report["NVRTC"] == f"{major}.{minor}, {nvrtc.library_path()}"
    assert "sm_" in report["compiles for"]
    assert report["kernel cache"] == os.environ["XPOPTIM_CACHE_DIR"]


def test_unusable_library_is_named(no_library, tmp_path):
    fake = tmp_path / "libnvrtc.so.13"
    fake.write_text("no library")
    no_library.append(str(fake))
    with pytest.raises(nvrtc.NVRTCNotFound, match=f"not usable: {fake}"):
        nvrtc.version()


@needs_nvrtc
def test_old_library_is_named(no_library, monkeypatch):
    monkeypatch.setattr(nvrtc, "_version", lambda library: (11, 8))
    no_library.extend(nvrtc._loaded())
    with pytest.raises(nvrtc.NVRTCNotFound, match=r"version 11\.8 is too old"):
        nvrtc.version()


@needs_nvrtc
def test_library_is_found_once_it_is_there(no_library):
    with pytest.raises(nvrtc.NVRTCNotFound):
        nvrtc.version()
    no_library.extend(nvrtc._loaded())  # an earlier test has loaded it
    assert nvrtc.version() >= nvrtc.OLDEST


@pytest.mark.parametrize(("major", "first"), [(12, "12"), (13, "13"), (None, "13")])
def test_cupys_version_is_preferred(no_library, tmp_path, monkeypatch, major, first):
    for number in (13, 12):
        fake = tmp_path / f"libnvrtc.so.{number}"
        fake.write_text("no library")
        no_library.append(str(fake))
    monkeypatch.setattr(nvrtc, "_cupy_major", lambda: major)
    with pytest.raises(nvrtc.NVRTCNotFound) as caught:
        nvrtc.version()
    tried = re.findall(r"libnvrtc\.so\.(\d+) \(", str(caught.value))  # in this order
    assert sorted(tried) == ["12", "13"]
    assert tried[0] == first


def test_places(tmp_path, monkeypatch):
    expected = [
        "site/nvidia/cu13/lib/libnvrtc.so.13",
        "site/nvidia/cuda_nvrtc/lib/libnvrtc.so.12",
        "conda/lib/libnvrtc.so.13",
        "conda/lib/libnvrtc.so.12",
        "toolkit/lib64/libnvrtc.so",
        "home/targets/x86_64-linux/lib/libnvrtc.so.12.9.86",
    ]
    ignored = [
        "site/nvidia/cu13/lib/libnvrtc-builtins.so.13.0",
        "site/nvidia/cuda_nvrtc/lib/libnvrtc.alt.so.12",
        "site/nvidia/cublas/lib/libcublas.so.12",
    ]
    for name in expected + ignored:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path / "nothing"), str(tmp_path / "site")])
    monkeypatch.setattr(sys, "prefix", str(tmp_path / "nothing"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    monkeypatch.setenv("CUDA_PATH", str(tmp_path / "toolkit"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert list(nvrtc._installed()) == [str(tmp_path / name) for name in expected]


@needs_nvrtc
def test_loaded_library_is_found_first():
    loaded = list(nvrtc._loaded())
    assert loaded
    assert os.path.realpath(nvrtc.library_path()) in map(os.path.realpath, loaded)
    assert nvrtc._candidates()[0] == loaded[0]


# --- what the driver may say


@pytest.mark.parametrize(
    ("mine", "driver", "advice"),
    [
        ((13, 5), 12080, r"xpoptim\[cuda12\]"),
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
