"""The CUDA text, compiled by NVRTC for sm_80 and sm_90: strict arithmetic, wide accesses, no spills, sizes that fit."""

import itertools
import math
import re
from collections import Counter
from typing import Any

import numpy as np
import nvrtc_reports
import pytest
from cuda_host.rules import Assign, Everything, Names
from helpers import COMPLEX_DTYPES, DTYPES, REAL_DTYPES, RULES, make_optimizer, traced

import xpoptim as xo
from xpoptim._dropout import layer as _dropout
from xpoptim.arrays.dtypes import BYTES
from xpoptim.codegen.cuda import blocks as cuda_blocks
from xpoptim.codegen.cuda import elementwise as text
from xpoptim.engines.cuda import nvrtc
from xpoptim.engines.cuda import plan as cuda
from xpoptim.trace.program import Program

try:
    nvrtc.version()
except ImportError as error:
    pytest.skip(str(error), allow_module_level=True)

ARCHITECTURES = ("sm_80", "sm_90")
PARAMETERS = 32_764  # bytes that a kernel may take
# ptxas before CUDA 12.8 keeps a few numbers of a thread in memory around the subroutines of division and square root.
SPILLED = 16 if nvrtc.version() < (12, 8) else 0  # bytes
REGISTERS = 128  # a thread: two blocks of 256 threads fit on a multiprocessor, enough to keep its memory busy
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "options": {"weight_decay": 0.1, "clip_value": 2.0, "maximize": True},
}
PAIRS = [*itertools.product(REAL_DTYPES, REAL_DTYPES), *itertools.product(COMPLEX_DTYPES, COMPLEX_DTYPES)]


def program(opt: xo.Optimizer, dtype: str, g_dtype: str | None = None, kind: str = "update") -> Program:
    return traced(opt).programs(dtype, g_dtype or dtype)[kind]


def kernels(source: str) -> dict[str, str]:
    """The PTX of each kernel of a text."""
    ptx = nvrtc_reports.ptx(source, "compute_90")
    for loose in ("fma.", ".ftz", ".approx", ".full", "call"):
        assert loose not in ptx, f"{loose} in:\n{ptx}"
    return dict(re.findall(r"\.entry (\w+)\((.*?)(?=\.visible \.entry|\Z)", ptx, re.DOTALL))


def vector_accesses(ptx: str) -> Counter[str]:
    """How often a kernel's text loads or stores 16 bytes at once; other vectors are under their own name."""
    found: Counter[str] = Counter()
    for kind, count, bits in re.findall(r"\b(ld|st)\.global(?:\.nc)?\.v(\d)\.[a-z](\d+)", ptx):
        whole = int(count) * int(bits) == 128
        found[kind if whole else f"{kind}.v{count}.{bits}"] += 1
    return found


def expected_accesses(update: Program) -> dict[str, int]:
    """A thread handles so many elements of all buffers; what of each is read and written, in units of 16 bytes."""
    length = text.vector_length(update)
    written = {place for place, _ in update.stores}
    units = [length * BYTES[buffer.real] // 16 for buffer in update.buffers]
    return {"ld": sum(units), "st": sum(units[place] for place in written)}


def check_resources(source: str, names: set[str], architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    for arch in architectures:
        report = nvrtc_reports.resources(source, arch)
        assert set(report) == names
        for name, used in report.items():
            assert max(used.stack, used.spill_stores, used.spill_loads) <= SPILLED, f"{name} for {arch}: {used}"
            assert used.registers <= REGISTERS, f"{name} for {arch}: {used}"


def check_update(update: Program, architectures: tuple[str, ...] = ARCHITECTURES) -> None:
    source = text.update_source(update, 8)
    check_resources(source, {"update", "update_many"}, architectures)
    expected = expected_accesses(update)
    for name, ptx in kernels(source).items():
        found = vector_accesses(ptx)
        assert {kind: found[kind] for kind in ("ld", "st")} == expected, name
        row = {"ld.v2.32": 1} if name == "update_many" else {}  # two words of a row at once
        assert {kind: n for kind, n in found.items() if kind not in ("ld", "st")} == row, name


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(rule: str, dtype: str, options: str) -> None:
    opt = make_optimizer(rule, **OPTIONS[options])
    update = program(opt, dtype)
    assert [buffer.role for buffer in update.buffers] == ["param", "grad", *["slot"] * len(opt._slot_names())]
    check_update(update, ARCHITECTURES if options == "plain" else ARCHITECTURES[1:])


@pytest.mark.parametrize(("dtype", "g_dtype"), [pair for pair in PAIRS if pair[0] != pair[1]])
def test_gradient_dtypes(dtype: str, g_dtype: str) -> None:
    check_update(program(make_optimizer("Adam", clip_norm=1.0), dtype, g_dtype))


@pytest.mark.parametrize(("dtype", "g_dtype"), [pair for pair in PAIRS if "16" not in pair[0]])
def test_norm(dtype: str, g_dtype: str) -> None:
    """The gradient is loaded 16 bytes at a time, and nothing else is."""
    norm = program(make_optimizer("Adam", clip_norm=1.0, clip_value=2.0), dtype, g_dtype, "norm")
    source = text.norm_source(norm, 8)
    check_resources(source, {"sums", "sums_many", "fold", "fold_many"})
    ptx = kernels(source)
    units = text.LANES // 32 * BYTES[norm.buffers[1].real] // 16
    for name in ("sums", "sums_many"):
        found = vector_accesses(ptx[name])
        assert found["ld"] > 0
        assert found["ld"] % units == 0
        assert set(found) == {"ld"}
        assert "shfl.sync.down" in ptx[name]
    for name in ("fold", "fold_many"):
        assert "bar.sync" in ptx[name]


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_prologue(rule: str, dtype: str) -> None:
    opt = make_optimizer(rule, clip_norm=1.0, clip_value=2.0, weight_decay=0.1)
    for kind in ("norm", "update"):
        source = text.prologue_source(program(opt, dtype, kind=kind))
        check_resources(source, {"prologue", "set_inputs"})
        prologue = kernels(source)["prologue"]
        assert "sqrt.rn.f64" in prologue
        assert ("cvt.rn.f32.f64" in prologue) == (dtype != "float64" and bool(program(opt, dtype, kind=kind).scalars))


def test_upload() -> None:
    check_resources(text.UPLOAD_SOURCE, {"upload"})
    assert set(kernels(text.UPLOAD_SOURCE)) == {"upload"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_every_operation_and_constant(dtype: str) -> None:
    check_update(program(Everything(), dtype))
    check_resources(text.prologue_source(program(Everything(), dtype)), {"prologue", "set_inputs"})


def test_names_of_slots_and_hyperparameters() -> None:
    """None collides with another, with the text's own, or with a word of C++; nor is any refused for its letters."""
    update = program(Names(), "float32")
    source = text.update_source(update, 8)
    for arch in ARCHITECTURES:
        assert set(nvrtc_reports.resources(source, arch)) == {"update", "update_many"}
        assert set(nvrtc_reports.resources(text.prologue_source(update), arch)) == {"prologue", "set_inputs"}
    names = [text.name_of(buffer) for buffer in update.buffers]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch("[A-Za-z0-9_]+", name) for name in names)


# --- sizes


def by_value_texts() -> dict[str, str]:
    """A text with each struct that a kernel takes by value."""
    adam = make_optimizer("Adam", clip_norm=1.0)
    return {
        "update": text.update_source(program(adam, "float16"), 8),
        "update in double": text.update_source(program(adam, "complex128"), 8),
        "a table in memory": text.update_source(program(adam, "float32"), 1),
        "norm": text.norm_source(program(adam, "float32", kind="norm"), 8),
        "no scalars": text.update_source(program(Assign(), "float32"), 8),
        "prologue": text.prologue_source(program(adam, "float32")),
        "upload": text.UPLOAD_SOURCE,
        "dropout": cuda_blocks.source(_dropout.kernel("float32").program),
        "no words": cuda_blocks.source(_dropout.scaling_kernel("float64").program),
    }


def test_every_by_value_parameter_is_checked() -> None:
    """The size of each struct, and the size and the place of each of its members: no more and no fewer."""
    for name, source in by_value_texts().items():
        structs = set(re.findall(r"const (\w+) __grid_constant__", source))
        structs |= {"Row"} & set(re.findall(r"struct (\w+) ", source))
        assert structs, name
        for struct in structs:
            body = re.search(rf"struct {struct} {{(.*?)}};", source, re.DOTALL)
            assert body is not None
            members = re.findall(r"(\w+)(?:\[\d+\])?;", body[1])
            assert members
            assert f"static_assert(sizeof({struct}) == " in source, name
            checks = re.findall(rf"\(XP_OFFSET\({struct}, (\w+)\) == \d+ && sizeof\({struct}::(\w+)\) == \d+\)", source)
            assert checks == [(member, member) for member in members], name
        nvrtc_reports.ptx(source, "compute_90")


def wrong(dtype: np.dtype, mistake: str) -> np.dtype:
    """A dtype with a mistake in its last members, of which there are as many as it takes."""
    assert dtype.fields is not None
    assert dtype.names is not None
    fields = {name: dtype.fields[name][0] for name in dtype.names}
    last = dtype.names[-1]
    if mistake == "order":
        *front, one, two = dtype.names
        assert fields[one].itemsize == fields[two].itemsize
        return np.dtype([(name, fields[name]) for name in (*front, two, one)], align=True)
    if mistake == "another number":
        number, shape = fields[last].base, fields[last].shape
        fields[last] = np.dtype((f"{number.kind}{12 - number.itemsize}", shape))
    elif mistake == "one more":
        fields[last] = np.dtype((fields[last].base, (fields[last].shape[0] + 1,)))
    return np.dtype(list(fields.items()), align=True)


# Where a dtype is made, and how it can be wrong.
WRONG = [
    (text, "row_dtype", "order"),
    (text, "row_dtype", "another number"),
    (text, "table_dtype", "another number"),
    (text, "table_dtype", "one more"),
    (text, "inputs_dtype", "another number"),
    (text, "inputs_dtype", "one more"),
    (cuda_blocks, "scalars_dtype", "another number"),
    (cuda_blocks, "scalars_dtype", "one more"),
    (cuda_blocks, "words_dtype", "another number"),
    (cuda_blocks, "words_dtype", "one more"),
]


def source_with(module: Any, name: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A text for which the layout of a parameter was taken from a wrong dtype."""
    right = getattr(module, name)
    monkeypatch.setattr(module, name, lambda *given: wrong(right(*given), mistake))
    if module is cuda_blocks:
        return cuda_blocks.source(_dropout.kernel("float32").program)
    return text.source(program(make_optimizer("Adam"), "float32"))


@pytest.mark.parametrize(("module", "name", "mistake"), WRONG)
def test_a_wrong_dtype_does_not_compile(module: Any, name: str, mistake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(nvrtc.CompileError, match="static assertion failed"):
        nvrtc_reports.ptx(source_with(module, name, mistake, monkeypatch), "compute_90")


@pytest.mark.parametrize("mistake", ["another number", "one more"])
def test_a_wrong_dtype_of_the_upload_does_not_compile(mistake: str) -> None:
    right = text.layout_checks(Piece=text.PIECE_DTYPE)
    assert right in text.UPLOAD_SOURCE
    source = text.UPLOAD_SOURCE.replace(right, text.layout_checks(Piece=wrong(text.PIECE_DTYPE, mistake)))
    with pytest.raises(nvrtc.CompileError, match="static assertion failed"):
        nvrtc_reports.ptx(source, "compute_90")


def parameter_bytes(ptx: str) -> int:
    """The size of a kernel's parameter block, each parameter on a multiple of its size."""
    sizes = {"u16": 2, "u32": 4, "b32": 4, "u64": 8, "b64": 8, "f32": 4, "f64": 8}
    total = 0
    for align, kind, count in re.findall(r"\.param (?:\.align (\d+) )?\.(\w+) \w+(?:\[(\d+)\])?", ptx.split("{")[0]):
        size, align = (int(count), int(align)) if count else (sizes[kind], sizes[kind])
        total = -(-total // align) * align + size
    return total


@pytest.mark.parametrize("count", [1, 8, 9, 65, 257, 600])
@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_parameters_fit(rule: str, count: int) -> None:
    """Each capacity of the table; for hundreds of tensors the largest that is possible."""
    opt = make_optimizer(rule, clip_norm=1.0)
    for kind in ("update", "norm"):
        found = program(opt, "float32", kind=kind)
        rows = cuda.capacity(found, count)
        assert rows is not None
        assert rows >= count
        source = (text.update_source if kind == "update" else text.norm_source)(found, rows)
        for name, ptx in kernels(source).items():
            used = parameter_bytes(ptx)
            assert text.table_dtype(found, rows).itemsize < used <= PARAMETERS, name
    if count == 600 and rows is not None:
        check_resources(source, {"sums", "sums_many", "fold", "fold_many"})
        assert text.table_dtype(found, rows + 1).itemsize + cuda._OTHER_BYTES > PARAMETERS  # it is the largest


def test_many_tensors_go_by_a_table_in_memory() -> None:
    for rule, most in (("SGD", 1022), ("Adam", 681)):
        update = program(make_optimizer(rule), "float32")
        assert cuda.capacity(update, most) == most
        assert cuda.capacity(update, most + 1) is None


def test_scalars_are_part_of_the_capacity() -> None:
    """A rule with many scalars leaves room for fewer rows, and its parameters still fit."""
    update = program(Names(), "float64")
    rows = cuda.capacity(update, 200)
    assert rows is not None
    for ptx in kernels(text.update_source(update, rows)).values():
        assert parameter_bytes(ptx) <= PARAMETERS


# --- the text itself


@pytest.mark.parametrize("value", [1 / 3, 1e-45, 5e-324, 3.5e38, 1e39, -1e300, 0.0, -0.0, math.inf, -math.inf])
@pytest.mark.parametrize("compute", [np.float32, np.float64])
def test_literals(value: float, compute: Any) -> None:
    """A constant is in the text to the last bit of the compute dtype, its sign too."""
    found = text.literal(value, np.dtype(compute).name)
    with np.errstate(over="ignore"):
        expected = compute(value)
    if match := re.fullmatch(r"\(\w+\)__longlong_as_double\((-?0x[0-9a-f]+)\)", found):
        parsed = np.int64(int(match[1], 16)).view(np.float64)
    else:
        assert found.endswith(("f", "f)")) == (compute is np.float32)
        parsed = np.float64(float.fromhex(found.strip("()f")))
    assert np.float64(expected).tobytes() == parsed.tobytes()


def test_literal_of_nan() -> None:
    for compute in ("float32", "float64"):
        found = text.literal(math.nan, compute)
        bits = found.removeprefix(f"({text._TYPE[compute]})__longlong_as_double(").removesuffix(")")
        assert np.isnan(np.int64(int(bits, 16)).view(np.float64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_text_needs_no_header(dtype: str) -> None:
    source = make_optimizer("Adam", clip_norm=1.0).source("cuda", dtype)
    assert "#include" not in source
    assert source.count('extern "C" __global__') >= 8


def test_only_what_is_used_is_defined() -> None:
    plain = str(make_optimizer("SGD").source("cuda", "float32"))
    assert "half" not in plain
    assert "bfloat" not in plain
    assert "INFINITY" not in plain
    assert "half_to_float" in make_optimizer("SGD").source("cuda", "float32", "float16")
    assert "bfloat_to_float" in make_optimizer("SGD").source("cuda", "bfloat16", "float32")
