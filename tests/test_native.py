"""The extension: its C under sanitizers, what it refuses, and that all works alike without it."""

import copy
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import numpy as np
import pytest

import xpoptim as xo
from xpoptim.codegen.llvm.elementwise import HEADER
from xpoptim.engines.cpu import native
from xpoptim.engines.cpu.watch import NativeWatch, PlainWatch, Table

C_TESTS = Path(__file__).parent / "native"
SOURCE = Path(__file__).parents[1] / "xpoptim" / "engines" / "cpu" / "native.c"
COMPILER = shutil.which(os.environ.get("CC", "cc"))
REQUIRED = os.environ.get("XPOPTIM_REQUIRE_NATIVE", "0") not in ("", "0")


def compiled(source: str, to: Path, *flags: str) -> Path:
    """A C test as a program. Skipped where there is no compiler with these flags, unless the extension is required."""
    missing = "no C compiler" if COMPILER is None else ""
    if not missing:
        command = [COMPILER, "-std=c11", "-g", "-O1", *flags, str(C_TESTS / source), "-o", str(to), "-pthread"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        missing = done.stderr if done.returncode else ""
    if missing:
        (pytest.fail if REQUIRED else pytest.skip)(missing)
    return to


@pytest.mark.smoke
def test_the_extension_is_there_where_it_is_required() -> None:
    if REQUIRED and os.environ.get("XPOPTIM_NATIVE") != "0":
        assert native.missing() == ""
        assert native.extension() is not None


@pytest.mark.skipif(not SOURCE.is_file(), reason="the C source is not here, but an installed package alone")
@pytest.mark.parametrize(("sanitizers", "forks"), [("thread", 0), ("address,undefined", 0), ("", 60)])
def test_the_pool_under_sanitizers(sanitizers: str, forks: int, tmp_path: Path) -> None:
    """Forks are tested without: a child may wait for ever for a lock of the sanitizer's, which its parent held."""
    flags = [f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"] if sanitizers else []
    program = compiled("stress.c", tmp_path / "stress", *flags)
    done = subprocess.run([program, str(forks)], capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6000 jobs" in done.stdout
    assert "WARNING" not in done.stderr


@pytest.mark.skipif(not SOURCE.is_file(), reason="the C source is not here, but an installed package alone")
def test_a_helper_stays_awake_for_its_patience_and_no_longer(tmp_path: Path) -> None:
    program = compiled("patience.c", tmp_path / "patience")
    done = subprocess.run([program], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "400\n")


# ---------------------------------------------------------------------------------------------------------------------
# The module


@pytest.mark.skipif(bool(native.missing()), reason=f"no extension: {native.missing()}")
@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("perform", ()),
        ("perform", (1, 2, 3, 4)),
        ("perform", (1, 2, 3, 4, "x")),
        ("perform", (1, 2, 3, 4, 5.0)),
        ("same", ((), 0)),
        ("same", ((), 0, None)),
        ("step", ((), [], 0, 0, 0)),
        ("step", ((), [], 0, 0, 0, [])),
        ("states", (1,)),
    ],
)
def test_wrong_arguments_are_an_error(name: str, arguments: tuple[object, ...]) -> None:
    with pytest.raises(TypeError):
        getattr(native.extension(), name)(*arguments)


@pytest.mark.skipif(bool(native.missing()), reason=f"no extension: {native.missing()}")
def test_an_address_beyond_64_bits_is_an_error() -> None:
    with pytest.raises(OverflowError):
        native.extension().perform(0, 0, 0, 0, 2**64)  # type: ignore[union-attr]


# ---------------------------------------------------------------------------------------------------------------------
# The build


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`hatch_build.py`, without hatchling, which is not where the tests run. Skipped without setuptools' wheels."""
    pytest.importorskip("setuptools.command.bdist_wheel")
    path = Path(__file__).parents[1] / "hatch_build.py"
    if not path.is_file():
        pytest.skip("the build's own file is not here, but an installed package alone")
    interface = ModuleType("interface")
    interface.BuildHookInterface = object  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "hatchling.builders.hooks.plugin.interface", interface)
    spec = importlib.util.spec_from_file_location("hatch_build", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("platform", "expected"),
    [
        ("macosx-14.5-arm64", "macosx_14_0_arm64"),  # as of a Python that was compiled there
        ("macosx-14-arm64", "macosx_14_0_arm64"),
        ("macosx-10.13-x86_64", "macosx_10_13_x86_64"),
        ("linux-x86_64", "linux_x86_64"),
    ],
)
def test_a_wheel_has_a_tag_that_pip_takes(
    platform: str, expected: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("sysconfig.get_platform", lambda: platform)
    assert build._tag(str(tmp_path)) == f"cp311-abi3-{expected}"


@pytest.mark.parametrize("compiler", ["false", "/none", "", "g++"])
def test_what_is_no_c_compiler_is_none(compiler: str, build: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", compiler)
    assert "no C11 compiler" in build._no_compiler()


def loaded(error: Exception) -> tuple[object, str]:
    def refuse(*arguments: object) -> None:
        raise error

    with mock.patch.object(native, "import_module", refuse), mock.patch.dict(os.environ, {"XPOPTIM_NATIVE": ""}):
        return native._loaded.__wrapped__()


def test_without_the_extension_it_is_said_why() -> None:
    module, reason = loaded(ModuleNotFoundError("_native"))
    assert module is None
    assert "source folder" in reason or "compiler" in reason


def test_an_extension_that_cannot_be_loaded_is_warned_of() -> None:
    with pytest.warns(RuntimeWarning, match="undefined symbol"):
        module, reason = loaded(ImportError("undefined symbol: PyWhat"))
    assert module is None
    assert "undefined symbol" in reason


def test_a_bad_setting_is_an_error_before_anything_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_loaded", native._loaded.__wrapped__)
    monkeypatch.setenv("XPOPTIM_NATIVE", "false")
    params = [np.zeros(3)]
    with pytest.raises(ValueError, match="XPOPTIM_NATIVE is 'false': set it to 0"):
        xo.SGD().update(params, [np.ones(3)])
    assert not params[0].any()


@pytest.mark.smoke
def test_explain_and_info_say_that_there_is_none() -> None:
    code = """
import numpy as np, xpoptim as xo
print(xo.SGD().explain([np.ones(3)], [np.ones(3)]))
from xpoptim.__main__ import main
main(["info"])
"""
    for setting in ("0", ""):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env=os.environ | {"XPOPTIM_NATIVE": setting},
        )
        assert done.returncode == 0, done.stderr
        without = setting == "0" or find_spec("xpoptim.engines.cpu._native") is None
        assert done.stdout.count("without the extension") == (2 if without else 0), done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# Both watches see the same


def changed(change: Callable[[Any], object]) -> tuple[bool, bool]:
    """What the two watches say of arrays that ``change`` has worked on; it gets the columns."""
    said = []
    for make in (PlainWatch, NativeWatch):
        columns: list[list[Any]] = [
            [np.zeros((2, 3)), np.zeros(4), np.asfortranarray(np.zeros((2, 2)))],
            [np.ones((2, 3)), np.ones(4), np.asfortranarray(np.ones((2, 2)))],
            [np.zeros((2, 3)), np.zeros(4), np.asfortranarray(np.zeros((2, 2)))],
        ]
        memory = np.zeros((3, HEADER + 3), np.int64)
        for j, column in enumerate(columns):
            memory[:, HEADER + j] = [a.ctypes.data for a in column]
        table = Table(memory, rows=[0, 1, 2], lengths=[6, 4, 4], copied=[])
        keys = [["a", "b", "c"]] * 3
        extension = native.extension()
        watch: Any = PlainWatch(columns, table)
        if make is NativeWatch:
            assert extension is not None
            watch = NativeWatch(extension, columns, keys, table)
        new = [list(column) for column in columns]
        change(new)
        said.append(watch.unchanged(new))
        if said[-1]:
            for leaf, g in enumerate(new[1]):
                assert memory[leaf, 0] == (0 if g is None else table.lengths[leaf])
                assert g is None or memory[leaf, HEADER + 1] == g.ctypes.data
    return said[0], said[1]


def put(column: int, leaf: int, make: Callable[[Any], object]) -> Callable[[Any], None]:
    def change(columns: Any) -> None:
        columns[column][leaf] = make(columns)

    return change


def in_place(column: int, leaf: int, alter: Callable[[Any], object]) -> Callable[[Any], None]:
    return lambda columns: alter(columns[column][leaf]) and None


class Sub(np.ndarray):
    pass


UNCHANGED = {
    "nothing": lambda columns: None,
    "a gradient elsewhere": put(1, 0, lambda columns: np.full((2, 3), 5.0)),
    "no gradient": put(1, 1, lambda columns: None),
    "a read-only gradient": in_place(1, 1, lambda g: g.setflags(write=False)),
}
CHANGED = {
    "another parameter": put(0, 0, lambda columns: np.zeros((2, 3))),
    "another slot": put(2, 1, lambda columns: np.zeros(4)),
    "a parameter that is None": put(0, 0, lambda columns: None),
    "a parameter that is no array": put(0, 0, lambda columns: 1.0),
    "a gradient that is no array": put(1, 0, lambda columns: [1.0]),
    "a subclass": put(0, 1, lambda columns: columns[0][1].view(Sub)),
    "a gradient of a subclass": put(1, 1, lambda columns: columns[1][1].view(Sub)),
    "another shape": put(0, 0, lambda columns: columns[0][0].reshape(3, 2)),
    "a gradient of another shape": put(1, 0, lambda columns: np.ones((3, 2))),
    "a gradient of another rank": put(1, 0, lambda columns: np.ones((2, 3, 1))),
    "other strides": put(1, 2, lambda columns: np.ones((2, 2))),
    "another dtype": put(0, 1, lambda columns: columns[0][1].view(np.int64)),
    "a gradient of another dtype": put(1, 1, lambda columns: np.ones(4, np.float32)),
    "a read-only parameter": in_place(0, 1, lambda p: p.setflags(write=False)),
    "a read-only slot": in_place(2, 0, lambda m: m.setflags(write=False)),
    "a gradient that is a parameter": put(1, 1, lambda columns: columns[0][1]),
    "a gradient that is another's slot": put(1, 1, lambda columns: columns[2][1]),
    "a resized parameter": in_place(0, 1, lambda p: p.resize(8, refcheck=False)),
}


@pytest.mark.skipif(bool(native.missing()), reason=f"no extension: {native.missing()}")
@pytest.mark.parametrize("name", [*UNCHANGED, *CHANGED])
def test_both_watches_say_the_same(name: str) -> None:
    expected = name in UNCHANGED
    assert changed((UNCHANGED | CHANGED)[name]) == (expected, expected)


@pytest.mark.parametrize("offset", [-3, -1, 0, 1, 3])
@pytest.mark.skipif(bool(native.missing()), reason=f"no extension: {native.missing()}")
def test_both_watches_see_a_gradient_that_overlaps_by_an_element(offset: int) -> None:
    memory = np.zeros(20)

    extension = native.extension()
    assert extension is not None
    columns: list[list[Any]] = [[memory[8:12]], [np.ones(4)]]
    pointers = np.array([[0] * HEADER + [memory[8:].ctypes.data, 0]])
    table = Table(pointers, rows=[0], lengths=[4], copied=[])
    for watch in (PlainWatch(columns, table), NativeWatch(extension, columns, [["a"]] * 2, table)):
        said = [watch.unchanged([columns[0], [memory[8 + k : 12 + k]]]) for k in (offset, 4 + abs(offset), -4)]
        assert said == [False, True, True]


@pytest.mark.smoke
def test_steps_have_the_same_bits_without_the_extension() -> None:
    """The whole suite runs without it, too; this holds the two against each other."""
    code = """
import sys, numpy as np, xpoptim as xo
rng = np.random.default_rng(0)
params = {str(i): rng.standard_normal(n).astype(np.float32) for i, n in enumerate((3, 1000, 400_000))}
opt = xo.Adam(clip_norm=1.0)
for _ in range(4):
    opt.update(params, {key: rng.standard_normal(p.size).astype(np.float32) for key, p in params.items()})
sys.stdout.buffer.write(b"".join(p.tobytes() for p in params.values()))
"""
    found = [
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            timeout=60,
            check=True,
            env=os.environ | {"XPOPTIM_NATIVE": s},
        ).stdout
        for s in ("0", "")
    ]
    assert len(found[0]) == 4 * 401_003
    assert found[0] == found[1]


def test_optimizers_are_copied_and_run_on_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    opt, params = xo.Momentum(lr=0.5), [np.zeros(3)]
    opt.update(params, [np.ones(3)])
    monkeypatch.setattr(native, "_loaded", lambda: (None, "for a test"))
    other, theirs = copy.deepcopy(opt), [params[0].copy()]
    for one, p in ((opt, params), (other, theirs)):
        one.update(p, [np.ones(3)])
        one.update(p, [np.ones(3)])
    assert params[0].tolist() == theirs[0].tolist()
