"""A program as CUDA C++ for the GPU.

A kernel walks a table of rows, one row a tensor: a pointer for each buffer, the length, the number of its
first chunk among all rows' chunks, and where its scalars begin. A block takes one chunk. The table comes by value
in the kernel's parameters or, for very many tensors, lies in device memory. No header is needed.

Arithmetic is written operation by operation, to be compiled without contraction and with subnormals, so that
the bits are those of the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np

from ...arrays.dtypes import BYTES, rounded
from ...trace.ops import TABLE, Type
from ...trace.program import Buffer, Node, Program
from ...trace.sums import CHUNK, LANES

THREADS = 256
FOLD_THREADS, FOLD_EACH = 512, 8
MANY_BLOCKS = 2000
VECTORS = 4  # 16-byte accesses of the narrowest buffer that a thread makes one after the other

# The device's own memory of an optimizer: float64 words.
STEP, SKIPPED, SKIP, INPUTS = 0, 1, 2, 3  # applied steps, skipped ones, whether to skip this one, then the inputs

_TYPE = {"float16": "unsigned short", "bfloat16": "unsigned short", "float32": "float", "float64": "double"}
_SUFFIX = {"float32": "f", "float64": ""}
_WIDEN = {"float16": "half_to_float({})", "bfloat16": "bfloat_to_float({})"}
_NARROW = {"float16": "float_to_half({})", "bfloat16": "float_to_bfloat({})"}

_INFINITY = "#define XP_INFINITY __longlong_as_double(0x7ff0000000000000)\n"

_HALF = """\
#ifdef __CUDACC__  // a host compiler is given these two
__device__ __forceinline__ float half_to_float(unsigned short half) {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(half));
    return x;
}
__device__ __forceinline__ unsigned short float_to_half(float x) {
    unsigned short half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    return half;
}
#endif
"""

_BFLOAT = """\
__device__ __forceinline__ float bfloat_to_float(unsigned short bfloat) {
    return __uint_as_float((unsigned)bfloat << 16);
}
__device__ __forceinline__ unsigned short float_to_bfloat(float x) {
    const unsigned bits = __float_as_uint(x);
    if (x != x) return (unsigned short)(bits >> 16 | 0x40);  // stays a NaN, also if its payload was below
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);  // to nearest, to even
}
"""

_OFFSET = """\
#if defined(__CUDACC__) && !__has_builtin(__builtin_offsetof)  // NVRTC up to 13.0, which has it under this name alone
#define XP_OFFSET(type, member) __INTADDR__(&((type*)0)->member)
#else
#define XP_OFFSET(type, member) __builtin_offsetof(type, member)
#endif
"""

_INTEGER_POWER = """\
__device__ double integer_power(double x, double exponent) {  // repeated squaring, low bit first
    const double size = fabs(exponent);
    double result = 1.0;
    for (unsigned long long left = size < 0x1p62 ? (unsigned long long)size : 1ull << 62; left; left >>= 1) {
        if (left & 1) result = result * x;
        x = x * x;
    }
    return exponent < 0.0 ? 1.0 / result : result;
}
"""

_FIND = """\
// The row of a chunk is the last one that begins at or before it; rows without elements come before their neighbour.
template <class Rows> __device__ __forceinline__ unsigned find(const Rows& rows, unsigned count, unsigned chunk) {
    unsigned low = 0;
    for (unsigned high = count; high - low > 1;) {
        const unsigned middle = (low + high) / 2;
        if (rows[middle].first <= chunk) low = middle;
        else high = middle;
    }
    return low;
}
"""


def source(program: Program) -> str:
    """The kernels of a pass, to be read; the engine chooses the number of rows by the number of tensors."""
    kernels = norm_source(program, 8) if program.reduces is not None else update_source(program, 8)
    return kernels + "\n" + prologue_source(program)


def update_source(program: Program, rows: int) -> str:
    """Kernels ``update`` (the table of up to ``rows`` rows by value) and ``update_many`` (the table in memory)."""
    parts = [*_preamble(program), _element(program), _pack(vector_length(program)), _row(program)]
    return "\n".join([*parts, _table(program, rows), _FIND, _update_chunk(program), _update_kernels(program)])


def norm_source(program: Program, rows: int) -> str:
    """Kernels ``sums`` (a sum of squares for each chunk) and ``fold`` (for each tensor), and both as ``_many``."""
    parts = [*_preamble(program), _element(program), _pack(LANES // 32), _row(program)]
    return "\n".join([*parts, _table(program, rows), _FIND, _sum_chunk(program), _sum_kernels(program)])


def prologue_source(program: Program) -> str:
    """Kernel ``prologue``, one thread: counts the step, takes the norm, rounds the scalars. And ``set_inputs``."""
    real, count = _TYPE[program.compute], len(program.inputs)
    known_here, lines = {"norm": "norm", "t": f"state[{STEP}]"}, []
    for place, name in enumerate(program.inputs):
        value = known_here.get(name, f"from_state ? state[{INPUTS + place}] : inputs.at[{place}]")
        lines.append(f"const double {_identifier('input', name)} = {value};")
    for number, node in program.scalar_steps:
        if node.op == "input":
            lines.append(f"const double v{number} = {_identifier('input', str(node.value))};")
        elif node.op != "const":
            lines.append(_statement(program, number, node, "float64"))
    for slot, number in enumerate(program.scalars):
        value = _operand(program, number, "float64")
        rounded_value = f"{value} ? 1 : 0" if program.nodes[number].type is Type.BOOL else f"({real}){value}"
        lines.append(f"scalars[{slot}] = {rounded_value};")
    body = "\n".join("    " + line for line in lines)
    infinity = _INFINITY if any(node.op == "isfinite" for node in program.nodes) else ""
    return f"""\
{infinity}{_INTEGER_POWER}
struct Inputs {{
    double at[{count}];
}};
{layout_checks(Inputs=inputs_dtype(count))}

// state: applied steps, skipped steps, whether this step is skipped, then the inputs, for replays.
extern "C" __global__ void prologue(const Inputs __grid_constant__ inputs, double* state, {real}* scalars,
                                    const double* totals, unsigned tensors, unsigned advance, unsigned from_state) {{
    double total = 0.0;  // the tensors' sums of squares, one after the other
#pragma unroll 8
    for (unsigned i = 0; i < tensors; ++i) total = total + totals[i];
    const double norm = sqrt(total);
    if (advance) {{
        const bool finite = norm - norm == 0.0;
        state[{SKIP}] = finite ? 0.0 : 1.0;
        if (finite) state[{STEP}] = state[{STEP}] + 1.0;
        else state[{SKIPPED}] = state[{SKIPPED}] + 1.0;
        for (int i = 0; i < {count} && !from_state; ++i) state[{INPUTS} + i] = inputs.at[i];  // for a replay to find
    }}
{body}
}}

extern "C" __global__ void set_inputs(const Inputs __grid_constant__ inputs, double* state) {{
    for (int i = 0; i < {count}; ++i) state[{INPUTS} + i] = inputs.at[i];
}}
"""


def layout_checks(**structs: np.dtype) -> str:
    """Text that does not compile unless C++ lays out each struct as NumPy the dtype of which its values are made."""
    lines = [_OFFSET]
    for struct, dtype in structs.items():
        lines.append(f"static_assert(sizeof({struct}) == {dtype.itemsize});\n")
        assert dtype.fields is not None
        for name, (member, offset, *_) in dtype.fields.items():
            place, size = f"XP_OFFSET({struct}, {name}) == {offset}", f"sizeof({struct}::{name}) == {member.itemsize}"
            lines.append(f"static_assert({place} && {size});\n")
    return "".join(lines)


# Copies a piece of a large table, which arrives by value, into device memory: in stream order, and nothing waits.
UPLOAD_WORDS = 4000
PIECE_DTYPE = np.dtype([("words", np.uint64, (UPLOAD_WORDS,))])
UPLOAD_SOURCE = f"""\
struct Piece {{
    unsigned long long words[{UPLOAD_WORDS}];
}};
{layout_checks(Piece=PIECE_DTYPE)}
extern "C" __global__ void upload(const Piece __grid_constant__ piece, unsigned count, unsigned long long* to) {{
    for (unsigned i = blockIdx.x * {THREADS} + threadIdx.x; i < count; i += gridDim.x * {THREADS}) {{
        to[i] = piece.words[i];
    }}
}}
"""


def vector_length(program: Program) -> int:
    """Elements that a thread handles at once: as many as 16 bytes of the narrowest buffer hold."""
    return max(16 // BYTES[buffer.real] for buffer in program.buffers)


def chunk_length(program: Program, elements: int) -> int:
    """Elements of a block's chunk: smaller where there would be too few blocks for a large GPU."""
    smallest = THREADS * vector_length(program)
    return smallest * VECTORS if elements >= smallest * VECTORS * MANY_BLOCKS else smallest


def row_dtype(program: Program) -> np.dtype:
    """A row of the table as NumPy sees it."""
    fields = [(name_of(buffer), np.uint64) for buffer in program.buffers]
    return np.dtype([*fields, ("length", np.int64), ("first", np.uint32), ("scalars", np.uint32)], align=True)


def table_dtype(program: Program, rows: int) -> np.dtype:
    """The by-value table as NumPy sees it."""
    scalars = ("scalars", program.compute, (max(1, len(program.scalars)),))
    return np.dtype([("rows", row_dtype(program), (rows,)), scalars], align=True)


def inputs_dtype(count: int) -> np.dtype:
    """The inputs of a scalar program as NumPy sees them."""
    return np.dtype([("at", np.float64, (count,))])


def name_of(buffer: Buffer) -> str:
    """A buffer in the text and in a row of the table. A slot's name is the user's, and must not meet one of ours."""
    return buffer.name if buffer.role in ("param", "grad") else _identifier("slot", buffer.name)


def _identifier(prefix: str, name: str) -> str:
    """An identifier for a user's name: its own for each, none of ours, and of characters that C++ has.

    What derives from it in the text (``x_``, ``new_``, ``pack_``) is put in front, so that a slot ``m_new`` does not
    meet the new ``m``.
    """
    if re.fullmatch("[A-Za-z0-9_]+", name):
        return f"{prefix}_{name}"
    return f"{prefix}x_" + re.sub("[^A-Za-z0-9]", lambda match: f"_{ord(match[0]):x}_", name)


def _preamble(program: Program) -> Iterator[str]:
    yield f"// {program.name}: " + ", ".join(f"{b.name} {b.dtype}" for b in program.buffers)
    dtypes = {buffer.real for buffer in program.buffers}
    if any(node.op == "isfinite" for node in program.nodes):
        yield _INFINITY
    if "float16" in dtypes:
        yield _HALF
    if "bfloat16" in dtypes:
        yield _BFLOAT


def literal(value: float, compute: str) -> str:
    """A constant in hexadecimal, rounded to the compute dtype."""
    value = rounded(value, compute)
    if not np.isfinite(value):
        bits = np.float64(value).view(np.int64)
        return f"({_TYPE[compute]})__longlong_as_double({bits:#x})"
    text = value.hex() + _SUFFIX[compute]
    return f"({text})" if text.startswith("-") else text


def _operand(program: Program, number: int, compute: str) -> str:
    node = program.read(number)
    if node.op == "const" and node.type is Type.UINT32:
        return f"{node.value}u"
    if node.op == "const" and isinstance(node.value, bool):
        return str(node.value).lower()
    if node.op == "const":
        assert isinstance(node.value, float | int)
        return literal(float(node.value), compute)
    if node.op == "spread":
        scalar = f"s[{program.scalars.index(node.args[0])}]"
        return f"({scalar} != 0)" if node.type is Type.BOOL else scalar
    if node.op == "buffer":
        return name_of(program.buffers[node.index])
    return f"v{number}"


def _statement(program: Program, number: int, node: Node, compute: str) -> str:
    operands = [_operand(program, i, compute) for i in node.args]
    kind = {Type.BOOL: "bool", Type.UINT32: "unsigned"}.get(node.type, _TYPE[compute])
    return f"const {kind} v{number} = {TABLE[node.op].cuda.format(*operands, S=_SUFFIX[compute])};"


def _element(program: Program) -> str:
    """The rule for one element: values that it changes come by reference, the others by value."""
    real = _TYPE[program.compute]
    result = "void" if program.reduces is None else real
    arguments = [f"{real}{'&' if i in program.written else ''} {name_of(b)}" for i, b in enumerate(program.buffers)]
    lines = [f"__device__ __forceinline__ {result} element({', '.join(arguments)}, const {real}* s) {{"]
    for number, node in program.array_steps:
        if node.op not in ("buffer", "spread"):
            lines.append("    " + _statement(program, number, node, program.compute))
    if program.reduces is not None:
        lines.append(f"    return {_operand(program, program.reduces, program.compute)};")
    # New values go to their names by way of copies, since one may be another's old value.
    new = {name_of(program.buffers[b]): _operand(program, n, program.compute) for b, n in program.stores}
    lines += [f"    const {real} new_{name} = {value};" for name, value in new.items()]
    lines += [f"    {name} = new_{name};" for name in new]
    return "\n".join([*lines, "}", ""])


def _pack(length: int) -> str:
    return f"""\
// As many elements as a thread handles at once; loaded and stored 16 bytes at a time.
template <class T> struct alignas(16) Pack {{
    T at[{length}];
}};
"""


def _const(program: Program, place: int) -> str:
    return "" if place in program.written else "const "


def _row(program: Program) -> str:
    pointers = [f"    {_const(program, i)}{_TYPE[b.real]}* {name_of(b)};" for i, b in enumerate(program.buffers)]
    tail = ["    long long length;", "    unsigned first;    // the number of its first chunk"]
    return "\n".join(["struct Row {", *pointers, *tail, "    unsigned scalars;  // where its scalars begin", "};", ""])


def _table(program: Program, rows: int) -> str:
    real, count = _TYPE[program.compute], max(1, len(program.scalars))
    checks = layout_checks(Row=row_dtype(program), Table=table_dtype(program, rows))
    return f"struct Table {{\n    Row rows[{rows}];\n    {real} scalars[{count}];\n}};\n{checks}"


def _load_scalars(program: Program) -> str:
    real, count = _TYPE[program.compute], len(program.scalars)
    if not count:
        return f"    const {real}* const s = scalars;"
    return f"    {real} s[{count}];\n#pragma unroll\n    for (int i = 0; i < {count}; ++i) s[i] = scalars[i];"


def _one(program: Program, place: str, indent: str) -> Iterator[str]:
    """Load, compute and store one element; ``place`` spells where a buffer's element is."""
    real = _TYPE[program.compute]
    for buffer in program.buffers:
        stored = place.format(name_of(buffer))
        yield f"{indent}{real} x_{name_of(buffer)} = ({real}){_WIDEN.get(buffer.real, '{}').format(stored)};"
    yield f"{indent}element({', '.join('x_' + name_of(b) for b in program.buffers)}, s);"
    for i, buffer in enumerate(program.buffers):
        if i in program.written:
            value = _NARROW.get(buffer.real, "{}").format("x_" + name_of(buffer))
            yield f"{indent}{place.format(name_of(buffer))} = {value};"


def _update_chunk(program: Program) -> str:
    length, buffers = vector_length(program), program.buffers
    first, width = name_of(buffers[0]), BYTES[buffers[0].real]
    lines = [
        "// A block's part: one chunk, of `size` elements, of one row.",
        f"__device__ __forceinline__ void update_chunk(const Row& row, const {_TYPE[program.compute]}* scalars, "
        "unsigned chunk, int size) {",
        "    const long long begin = (long long)chunk * size;",
        "    const int count = row.length - begin < size ? (int)(row.length - begin) : size;",
        _load_scalars(program),
    ]
    for i, b in enumerate(buffers):
        lines.append(f"    {_const(program, i)}{_TYPE[b.real]}* const {name_of(b)} = row.{name_of(b)} + begin;")
    lines += [f"    __builtin_assume(__isGlobal({name_of(b)}));" for b in buffers]
    aligned = " | ".join(f"(long long)({name_of(b)} + head)" for b in buffers)
    lines += [
        "",
        "    // The first element from which on every buffer lies on 16 bytes; if there is none, all go one by one.",
        f"    int head = (int)(-(long long){first} & 15) / {width};",
        f"    if ((({aligned}) & 15) || head > count) head = count;",
        f"    const int vectors = (count - head) / {length};",
        "#pragma unroll 1",
        f"    for (int i = threadIdx.x; i < vectors; i += {THREADS}) {{",
        f"        const int at = head + i * {length};",
    ]
    for i, b in enumerate(buffers):
        kind = f"Pack<{_TYPE[b.real]}>"
        lines.append(f"        {_const(program, i)}{kind} pack_{name_of(b)} = *(const {kind}*)({name_of(b)} + at);")
    lines += ["#pragma unroll", f"        for (int k = 0; k < {length}; ++k) {{"]
    lines += [*_one(program, "pack_{}.at[k]", " " * 12), "        }"]
    for i, b in enumerate(buffers):
        if i in program.written:
            lines.append(f"        *(Pack<{_TYPE[b.real]}>*)({name_of(b)} + at) = pack_{name_of(b)};")
    lines += [
        "    }",
        "",
        f"    const int body = vectors * {length};",
        "#pragma unroll 1",
        f"    for (int i = threadIdx.x; i < count - body; i += {THREADS}) {{  // the head and the tail",
        "        const int at = i < head ? i : i + body;",
        *_one(program, "{}[at]", " " * 8),
        "    }",
        "}",
        "",
    ]
    return "\n".join(lines)


_TABLE = "const Table __grid_constant__ table, "


def _also_many(name: str, kernel: str) -> str:
    """A kernel over the rows in the table, and behind it one over rows in memory, ``_many``."""
    many = kernel.replace(f" {name}(", f" {name}_many(").replace(_TABLE, f"{_TABLE}const Row* rows, ")
    return f"{kernel}\n{many.replace('table.rows', 'rows')}"


def _update_kernels(program: Program) -> str:
    update = f"""\
extern "C" __global__ void __launch_bounds__({THREADS}) update(
    {_TABLE}unsigned count, int size, const {_TYPE[program.compute]}* scalars,
    const double* skip) {{
    if (skip && *skip != 0.0) return;
    const Row& row = table.rows[find(table.rows, count, blockIdx.x)];
    update_chunk(row, (scalars ? scalars : table.scalars) + row.scalars, blockIdx.x - row.first, size);
}}
"""
    return f"""\
// `scalars` and `skip` lie in device memory; null where the host knows the scalars, which are then in the table.
{_also_many("update", update)}"""


def _sum_chunk(program: Program) -> str:
    lanes = LANES // 32
    real = _TYPE[program.compute]
    read = {program.nodes[n].index for n in program.needed if program.nodes[n].op == "buffer"}
    used = [program.buffers[i] for i in sorted(read)]
    lines = [
        f"// The sum of squares of a chunk of {CHUNK}: a warp keeps {LANES} sums, {lanes} a thread, then adds halves.",
        f"__device__ __forceinline__ void sum_chunk(const Row& row, const {real}* scalars, unsigned chunk, "
        "double* to) {",
        f"    const long long begin = (long long)chunk * {CHUNK};",
        f"    const int count = row.length - begin < {CHUNK} ? (int)(row.length - begin) : {CHUNK};",
        _load_scalars(program),
        *(f"    const {_TYPE[b.real]}* const {name_of(b)} = row.{name_of(b)} + begin;" for b in used),
        *(f"    __builtin_assume(__isGlobal({name_of(b)}));" for b in used),
        f"    const bool aligned = (({' | '.join(f'(long long){name_of(b)}' for b in used)}) & 15) == 0;",
        f"    double sum[{lanes}] = {{}};",
        "#pragma unroll 2",
        f"    for (int at = threadIdx.x % 32 * {lanes}; at < count; at += {LANES}) {{",
        *(f"        Pack<{_TYPE[b.real]}> pack_{name_of(b)} = {{}};" for b in used),
        f"        const int here = count - at < {lanes} ? count - at : {lanes};",
        f"        if (aligned && here == {lanes}) {{",
        *(f"            pack_{name_of(b)} = *(const Pack<{_TYPE[b.real]}>*)({name_of(b)} + at);" for b in used),
        "        } else {",
        "#pragma unroll",
        f"            for (int k = 0; k < {lanes}; ++k)",
        "                if (k < here) {",
        *(f"                    pack_{name_of(b)}.at[k] = {name_of(b)}[at + k];" for b in used),
        "                }",
        "        }",
        "#pragma unroll",
        f"        for (int k = 0; k < {lanes}; ++k) {{",
    ]
    for b in program.buffers:
        value = f"({real}){_WIDEN.get(b.real, '{}').format(f'pack_{name_of(b)}.at[k]')}" if b in used else "0"
        lines.append(f"            const {real} x_{name_of(b)} = {value};")
    arguments = ", ".join("x_" + name_of(b) for b in program.buffers)
    lines += [
        f"            const double wide = element({arguments}, s);",
        "            if (k < here) sum[k] = sum[k] + wide * wide;",
        "        }",
        "    }",
        "#pragma unroll",
        "    for (int by = 16; by > 0; by /= 2) {",
        "#pragma unroll",
        f"        for (int k = 0; k < {lanes}; ++k) sum[k] = sum[k] + __shfl_down_sync(0xffffffffu, sum[k], by);",
        "    }",
        "#pragma unroll",
        f"    for (int half = {lanes // 2}; half > 0; half /= 2) {{",
        "#pragma unroll",
        "        for (int k = 0; k < half; ++k) sum[k] = sum[k] + sum[k + half];",
        "    }",
        "    if (threadIdx.x % 32 == 0) *to = sum[0];",
        "}",
        "",
    ]
    return "\n".join(lines)


def _sum_kernels(program: Program) -> str:
    warps = THREADS // 32
    sums = f"""\
extern "C" __global__ void __launch_bounds__({THREADS}) sums(
    {_TABLE}unsigned count, unsigned chunks, const {_TYPE[program.compute]}* scalars,
    double* out) {{
    const unsigned chunk = blockIdx.x * {warps} + threadIdx.x / 32;
    if (chunk >= chunks) return;
    const Row& row = table.rows[find(table.rows, count, chunk)];
    sum_chunk(row, scalars ? scalars : table.scalars, chunk - row.first, out + chunk);
}}
"""
    fold = f"""\
extern "C" __global__ void __launch_bounds__({FOLD_THREADS}) fold(
    {_TABLE}double* sums, double* totals) {{
    fold_row(table.rows[blockIdx.x], sums, totals);
}}
"""
    return f"""\
{_also_many("sums", sums)}
// A tensor's chunk sums, neighbour added to neighbour until one is left. A block takes a tensor; each round turns up
// to {FOLD_THREADS * FOLD_EACH} sums into one, {FOLD_EACH} a thread and then by halving distances.
__device__ __forceinline__ void fold_row(const Row& row, double* sums, double* totals) {{
    __shared__ double part[{FOLD_THREADS}];
    unsigned left = (unsigned)((row.length + {CHUNK - 1}) / {CHUNK});
    double* const mine = sums + row.first;
    while (left > 1) {{
        const unsigned tiles = (left + {FOLD_THREADS * FOLD_EACH - 1}) / {FOLD_THREADS * FOLD_EACH};
        for (unsigned tile = 0; tile < tiles; ++tile) {{
            const unsigned begin = (tile * {FOLD_THREADS} + threadIdx.x) * {FOLD_EACH};
            double x[{FOLD_EACH}];
#pragma unroll
            for (int k = 0; k < {FOLD_EACH}; ++k) x[k] = begin + k < left ? mine[begin + k] : 0.0;
#pragma unroll
            for (int by = 1; by < {FOLD_EACH}; by *= 2) {{
#pragma unroll
                for (int k = 0; k < {FOLD_EACH}; k += 2 * by) x[k] = x[k] + x[k + by];
            }}
            part[threadIdx.x] = x[0];
            __syncthreads();
            for (unsigned by = 1; by < {FOLD_THREADS}; by *= 2) {{
                const unsigned at = threadIdx.x * 2 * by;
                if (at + by < {FOLD_THREADS}) part[at] = part[at] + part[at + by];
                __syncthreads();
            }}
            if (threadIdx.x == 0) mine[tile] = part[0];
            __syncthreads();
        }}
        left = tiles;
    }}
    if (threadIdx.x == 0) totals[row.scalars] = row.length > 0 ? mine[0] : 0.0;
}}

// Here a row's `scalars` says the tensor's place in sorted order.
{_also_many("fold", fold)}"""
