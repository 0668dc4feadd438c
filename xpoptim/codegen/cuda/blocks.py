"""A block program as CUDA C++ for the GPU: from one array to another, or in place, four elements at a time.

A thread takes as many blocks as fill 16 bytes of the array, at least one, loads and stores them 16 bytes at a
time, and draws a block's words once.
"""

from __future__ import annotations

import numpy as np

from ...arrays.dtypes import BYTES
from ...trace.program import BlockProgram
from .elementwise import (
    _NARROW,
    _TYPE,
    _WIDEN,
    THREADS,
    _load_scalars,
    _operand,
    _pack,
    _preamble,
    _statement,
    layout_checks,
)


def blocks_of_a_thread(program: BlockProgram) -> int:
    """How many blocks fill the 16 bytes of an access."""
    return max(1, 16 // (len(program.lanes) * BYTES[program.buffers[0].real]))


def scalars_dtype(program: BlockProgram) -> np.dtype:
    """The scalars, which go by value, as NumPy sees them."""
    return np.dtype([("at", program.compute, (max(1, len(program.scalars)),))])


def words_dtype(program: BlockProgram) -> np.dtype:
    """The words, which go by value, as NumPy sees them."""
    return np.dtype([("at", np.uint32, (max(1, len(program.words)),))])


def source(program: BlockProgram) -> str:
    """Kernel ``blocks(x, y, numbers, scalars, words)``, a thread for each `blocks_of_a_thread` blocks."""
    buffer, lanes, blocks = program.buffers[0], len(program.lanes), blocks_of_a_thread(program)
    stored, real = _TYPE[buffer.real], _TYPE[program.compute]
    widen = _WIDEN.get(buffer.real, "{}").format("pack.at[k]")
    narrow = _NARROW.get(buffer.real, "{}").format("number[k - j]")
    text = f"""\
struct Scalars {{
    {real} at[{max(1, len(program.scalars))}];
}};
struct Words {{
    unsigned at[{max(1, len(program.words))}];
}};
{layout_checks(Scalars=scalars_dtype(program), Words=words_dtype(program))}
// The new numbers of a block in the place of its old ones.
__device__ __forceinline__ void block({real}* number, unsigned low, unsigned high, const {real}* scalars,
                                      const unsigned* word) {{
{_load_scalars(program)}
{_statements(program)}
}}

// `x` and `y` are two arrays that do not overlap, or one and the same.
extern "C" __global__ void __launch_bounds__({THREADS}) blocks(
    const {stored}* x, {stored}* y, long long numbers, const Scalars __grid_constant__ scalars,
    const Words __grid_constant__ words) {{
    const long long first = ((long long)blockIdx.x * {THREADS} + threadIdx.x) * {lanes * blocks};
    if (first >= numbers) return;
    const int count = numbers - first < {lanes * blocks} ? (int)(numbers - first) : {lanes * blocks};
    const bool whole = count == {lanes * blocks} && (((long long)x | (long long)y) & 15) == 0;
    Pack<{stored}> pack = {{}};
    if (whole) pack = *(const Pack<{stored}>*)(x + first);
    else {{
#pragma unroll
        for (int k = 0; k < {lanes * blocks}; ++k)
            if (k < count) pack.at[k] = x[first + k];
    }}
#pragma unroll
    for (int j = 0; j < {lanes * blocks}; j += {lanes}) {{
        const unsigned long long index = (first + j) / {lanes};
        {real} number[{lanes}];
#pragma unroll
        for (int k = j; k < j + {lanes}; ++k) number[k - j] = {widen};
        block(number, (unsigned)index, (unsigned)(index >> 32), scalars.at, words.at);
#pragma unroll
        for (int k = j; k < j + {lanes}; ++k) pack.at[k] = {narrow};
    }}
    if (whole) *(Pack<{stored}>*)(y + first) = pack;
    else {{
#pragma unroll
        for (int k = 0; k < {lanes * blocks}; ++k)
            if (k < count) y[first + k] = pack.at[k];
    }}
}}
"""
    return "\n".join([*_preamble(program), _pack(lanes * blocks), text])


def _statements(program: BlockProgram) -> str:
    lines = []
    for number, node in program.array_steps:
        if node.op == "lane":
            lines.append(f"const {_TYPE[program.compute]} v{number} = number[{node.value}];")
        elif node.op == "block":
            lines.append(f"const unsigned v{number} = {'high' if node.value else 'low'};")
        elif node.op == "word":
            lines.append(f"const unsigned v{number} = word[{program.words.index(str(node.value))}];  // {node.value}")
        elif node.op not in ("spread", "const"):
            lines.append(_statement(program, number, node, program.compute))
    for lane, number in enumerate(program.lanes):
        lines.append(f"number[{lane}] = {_operand(program, number, program.compute)};")
    return "\n".join("    " + line for line in lines)
