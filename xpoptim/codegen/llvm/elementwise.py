"""A program as LLVM assembly for the CPU.

A kernel walks a table of rows, one row a tensor: length, start, scalar block, then a pointer for each buffer. ``start``
is where the row's elements begin in one long line of all rows, so that the line can be cut into tasks
for any number of threads. Only IEEE operations are used and no fast-math flag is ever
set, so neither vectorising nor threading changes a bit.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from ...arrays.dtypes import BYTES, rounded
from ...trace.ops import TABLE, Type
from ...trace.program import Buffer, Node, Program
from ...trace.sums import CHUNK, LANES

HEADER = 3  # columns of a row before its pointers: length, start, scalar block

_REAL = {"float32": "float", "float64": "double"}
_SUFFIX = {"float32": "f32", "float64": "f64"}
_STORED = {"float16": "half", "bfloat16": "i16", "float32": "float", "float64": "double"}

# For a tensor of so many elements, which is hardly in a fast cache: its memory is asked for ahead of need, a block at a
# time (1,024 float32 are a page, at whose end the CPU's own look-ahead stops).
_LARGE, _BLOCK, _AHEAD = 1 << 16, 128, 1024

_INTEGER_POWER = """\
define internal double @integer_power(double %x, double %exponent) {
entry:
  %negative = fcmp olt double %exponent, 0.0
  %size = call double @llvm.fabs.f64(double %exponent)
  %small = fcmp olt double %size, 0x43D0000000000000 ; 2**62, and what is beyond counts as that
  %bounded = select i1 %small, double %size, double 0x43D0000000000000
  %start = fptosi double %bounded to i64
  br label %test
test:
  %left = phi i64 [ %start, %entry ], [ %shifted, %body ]
  %base = phi double [ %x, %entry ], [ %squared, %body ]
  %result = phi double [ 1.0, %entry ], [ %picked, %body ]
  %done = icmp eq i64 %left, 0
  br i1 %done, label %exit, label %body
body:
  %bit = and i64 %left, 1
  %odd = icmp ne i64 %bit, 0
  %product = fmul double %result, %base
  %picked = select i1 %odd, double %product, double %result
  %squared = fmul double %base, %base
  %shifted = lshr i64 %left, 1
  br label %test
exit:
  %inverse = fdiv double 1.0, %result
  %final = select i1 %negative, double %inverse, double %result
  ret double %final
}
"""


# What the operations call.
DECLARATIONS = "\n".join(
    f"declare {_REAL[kind]} @llvm.{function}.{_SUFFIX[kind]}({_REAL[kind]})"
    for kind in _REAL
    for function in ("sqrt", "fabs")
)


def load_fields(base: str, *names: str, first: int = 0) -> str:
    """Loads of the 64-bit fields of ``%base`` from number ``first`` on; a name comes with its type: ``"i64 n"``."""
    lines = []
    for place, (kind, name) in enumerate((name.split() for name in names), first):
        lines.append(f"  %{base}.{place} = getelementptr i64, ptr %{base}, i64 {place}")
        lines.append(f"  %{name} = load {kind}, ptr %{base}.{place}")
    return "\n".join(lines)


# A job's tasks are shared out evenly; each worker goes through its own share, in order, and then helps with the others.
# So the same data meets the same CPU in every step, with a cache that may still hold it. The first fields of a job
# are the address of the shares' cursors, 64 bytes apart (each in a cache line of its own), and the number of workers.
TASKS = """\
define internal i64 @next_task(ptr %job, i64 %worker, i64 %tasks, ptr %visited) {
entry:
  %shares = load ptr, ptr %job
  %workersp = getelementptr i64, ptr %job, i64 1
  %workers = load i64, ptr %workersp
  br label %visit
visit:
  %v = load i64, ptr %visited
  %over = icmp sge i64 %v, %workers
  br i1 %over, label %none, label %take
take:
  %place = add i64 %worker, %v
  %share = urem i64 %place, %workers
  %behind = add i64 %share, 1
  %lowpart = mul i64 %tasks, %share
  %highpart = mul i64 %tasks, %behind
  %low = udiv i64 %lowpart, %workers
  %high = udiv i64 %highpart, %workers
  %offset = mul i64 %share, 64
  %cursor = getelementptr i8, ptr %shares, i64 %offset
  %number = atomicrmw add ptr %cursor, i64 1 monotonic
  %task = add i64 %low, %number
  %some = icmp slt i64 %task, %high
  br i1 %some, label %found, label %move
move:
  %vnext = add i64 %v, 1
  store i64 %vnext, ptr %visited
  br label %visit
found:
  ret i64 %task
none:
  ret i64 -1
}
"""

# Takes tasks of `grain` elements until none is left, and hands each row's share on.
# The job's fields: cursors, workers, and those that `_driver` names.
_DRIVER = """\
define void @run(ptr %job, i64 %worker) {{
entry:
  %visited = alloca i64
  store i64 0, ptr %visited
{fields}
  %beyond = add i64 %total, %grain
  %last = sub i64 %beyond, 1
  %tasks = udiv i64 %last, %grain
  br label %task
task:
  %before = phi i64 [ 0, %entry ], [ %number, %tasknext ]
  %reached = phi i64 [ 0, %entry ], [ %skipped, %tasknext ]
  %number = call i64 @next_task(ptr %job, i64 %worker, i64 %tasks, ptr %visited)
  %over = icmp slt i64 %number, 0
  br i1 %over, label %exit, label %seek
seek:
  %low = mul i64 %number, %grain
  %high = add i64 %low, %grain
  %onward = icmp sge i64 %number, %before
  %first = select i1 %onward, i64 %reached, i64 0 ; rows before it lie before the task
  br label %row
row:
  %r = phi i64 [ %first, %seek ], [ %rnext, %rownext ]
  %skipped = phi i64 [ %first, %seek ], [ %skip2, %rownext ]
  %inside = icmp slt i64 %r, %rows
  br i1 %inside, label %read, label %tasknext
read:
  %offset = mul i64 %r, {width}
  %entryp = getelementptr i8, ptr %table, i64 %offset
  %n = load i64, ptr %entryp
  %startp = getelementptr i8, ptr %entryp, i64 8
  %start = load i64, ptr %startp
  %end = add i64 %start, %n
  %later = icmp sge i64 %start, %high
  br i1 %later, label %tasknext, label %share
share:
  %past = icmp sle i64 %end, %low
  %after = add i64 %r, 1
  %skip2 = select i1 %past, i64 %after, i64 %skipped
  %b = call i64 @llvm.smin.i64(i64 %end, i64 %high)
  %a = call i64 @llvm.smax.i64(i64 %start, i64 %low)
  %from = sub i64 %a, %start
  %count = sub i64 %b, %a
  %some = icmp sgt i64 %count, 0
  br i1 %some, label %work, label %rownext
work:
  %blockp = getelementptr i8, ptr %entryp, i64 16
  %block = load i64, ptr %blockp
  %blockoffset = mul i64 %block, {block_bytes}
  %constants = getelementptr i8, ptr %scalars, i64 %blockoffset
{pointers}
{call}
  br label %rownext
rownext:
  %rnext = add i64 %r, 1
  br label %row
tasknext:
  br label %task
exit:
  ret void
}}
declare i64 @llvm.smin.i64(i64, i64)
declare i64 @llvm.smax.i64(i64, i64)
"""


# The CPU's mode of a thread: x86 may have been told to flush subnormals, by torch for one. Ours never flushes.
KEEP_SUBNORMALS = """\
  %mode = alloca i32
  %ieee = alloca i32
  call void @llvm.x86.sse.stmxcsr(ptr %mode)
  %was = load i32, ptr %mode
  %clear = and i32 %was, -32833 ; without flush-to-zero (0x8000) and denormals-are-zero (0x40)
  store i32 %clear, ptr %ieee
  call void @llvm.x86.sse.ldmxcsr(ptr %ieee)
"""
RESTORE_MODE = "  call void @llvm.x86.sse.ldmxcsr(ptr %mode)\n"
MODE_DECLARATIONS = "declare void @llvm.x86.sse.stmxcsr(ptr)\ndeclare void @llvm.x86.sse.ldmxcsr(ptr)\n"


def with_subnormals(text: str, names: tuple[str, ...]) -> str:
    """The functions ``names`` of a module, with the thread's mode set on entry to keep subnormals, and set back."""
    for name in names:
        start = text.index(f"define void @{name}(")
        end = text.index("\n}", start)
        body = text[start:end].replace("entry:\n", "entry:\n" + KEEP_SUBNORMALS, 1)
        text = text[:start] + body.replace("  ret void", RESTORE_MODE + "  ret void") + text[end:]
    return text + MODE_DECLARATIONS


def assembly(program: Program) -> str:
    """The whole module: ``prologue(inputs, scalars)`` and ``run(job, worker)``."""
    parts = [f"; {program.name!r}, {program.compute}", _INTEGER_POWER, TASKS, _prologue(program)]
    parts.append(_chunk(program) if program.reduces is not None else _elements(program) + _far(program))
    parts += [_driver(program), DECLARATIONS]
    return "\n".join(parts) + "\n"


def literal(value: float, kind: str) -> str:
    """A floating-point constant, rounded to ``kind``, in LLVM's exact hexadecimal spelling."""
    return f"0x{struct.unpack('<Q', struct.pack('<d', rounded(value, kind)))[0]:016X}"


def _operation(program: Program, number: int, node: Node, kind: str) -> str:
    names = [_operand(program, i, kind) for i in node.args]
    return TABLE[node.op].llvm.format(*names, r=f"%v{number}", T=_REAL[kind], S=_SUFFIX[kind])


def _operand(program: Program, number: int, kind: str) -> str:
    node = program.read(number)
    if node.op == "spread" and node.type is Type.REAL:
        return f"%s{program.scalars.index(node.args[0])}"
    if node.op == "const" and node.type is Type.UINT32:
        return str(node.value)
    if node.op == "const" and isinstance(node.value, bool):
        return str(node.value).lower()
    if node.op == "const":
        assert isinstance(node.value, float | int)
        return literal(float(node.value), kind)
    return f"%v{number}"


def _prologue(program: Program) -> str:
    """The scalar program: float64 inputs in, one rounded scalar of the compute dtype out for each use."""
    lines = ["define void @prologue(ptr %inputs, ptr %scalars) {", "entry:"]
    for number, node in program.scalar_steps:
        if node.op == "input":
            place = program.inputs.index(str(node.value))
            lines.append(f"  %p{number} = getelementptr double, ptr %inputs, i64 {place}")
            lines.append(f"  %v{number} = load double, ptr %p{number}")
        elif node.op != "const":
            lines.append("  " + _operation(program, number, node, "float64"))
    real = _REAL[program.compute]
    for slot, number in enumerate(program.scalars):
        value = f"%v{number}"
        is_bool = program.nodes[number].type is Type.BOOL
        if is_bool or program.compute == "float32":
            lines.append(f"  %o{slot} = {'uitofp i1' if is_bool else 'fptrunc double'} {value} to {real}")
            value = f"%o{slot}"
        lines.append(f"  %s{slot} = getelementptr {real}, ptr %scalars, i64 {slot}")
        lines.append(f"  store {real} {value}, ptr %s{slot}")
    return "\n".join([*lines, "  ret void", "}", ""])


def _load_scalars(program: Program) -> Iterator[str]:
    real = _REAL[program.compute]
    for slot, _ in enumerate(program.scalars):
        yield f"  %sp{slot} = getelementptr {real}, ptr %scalars, i64 {slot}"
        yield f"  %s{slot} = load {real}, ptr %sp{slot}"


def _body(program: Program) -> Iterator[str]:
    """The elementwise nodes for element ``%i``, in SSA form."""
    real = _REAL[program.compute]
    for number, node in program.array_steps:
        if node.op == "buffer":
            yield from _load(program.buffers[node.index], node.index, number, program.compute)
        elif node.op == "spread":
            if node.type is Type.BOOL and program.read(number) is node:
                yield f"  %v{number} = fcmp une {real} %s{program.scalars.index(node.args[0])}, 0.0"
        else:
            yield "  " + _operation(program, number, node, program.compute)


def _load(buffer: Buffer, place: int, number: int, compute: str) -> Iterator[str]:
    """Element ``%i``, widened (or, from a wider gradient, rounded) to the compute dtype."""
    dtype, real, out = buffer.real, _REAL[compute], f"%v{number}"
    stored = _STORED[dtype]
    yield f"  {out}.at = getelementptr {stored}, ptr %b{place}, i64 %i"
    loaded = out if dtype == compute else f"{out}.raw"
    yield f"  {loaded} = load {stored}, ptr {out}.at, align 1"
    if dtype == "bfloat16":  # the upper half of a float32
        stored, loaded = "float", out if compute == "float32" else f"{out}.single"
        yield f"  {out}.wide = zext i16 {out}.raw to i32"
        yield f"  {out}.bits = shl i32 {out}.wide, 16"
        yield f"  {loaded} = bitcast i32 {out}.bits to float"
    if loaded != out:
        cast = "fptrunc" if BYTES[dtype] > BYTES[compute] else "fpext"
        yield f"  {out} = {cast} {stored} {loaded} to {real}"


def _store(buffer: Buffer, place: int, value: str, compute: str) -> Iterator[str]:
    """Element ``%i``, rounded to nearest even where the buffer is narrower than the compute dtype."""
    dtype, real, tag = buffer.real, _REAL[compute], f"%w{place}"
    stored = _STORED[dtype]
    yield f"  {tag}.at = getelementptr {stored}, ptr %b{place}, i64 %i"
    if dtype == "float16":
        yield f"  {tag} = fptrunc {real} {value} to half"
    elif dtype == "bfloat16":  # add half of the last kept place, less one if that place is even; a NaN stays one
        yield f"  {tag}.bits = bitcast float {value} to i32"
        yield f"  {tag}.high = lshr i32 {tag}.bits, 16"
        yield f"  {tag}.odd = and i32 {tag}.high, 1"
        yield f"  {tag}.half = add i32 {tag}.odd, 32767"
        yield f"  {tag}.sum = add i32 {tag}.bits, {tag}.half"
        yield f"  {tag}.kept = lshr i32 {tag}.sum, 16"
        yield f"  {tag}.nan = fcmp uno float {value}, 0.0"
        yield f"  {tag}.pick = select i1 {tag}.nan, i32 32704, i32 {tag}.kept"
        yield f"  {tag} = trunc i32 {tag}.pick to i16"
    yield f"  store {stored} {tag if BYTES[dtype] == 2 else value}, ptr {tag}.at, align 1"


def _elements(program: Program) -> str:
    """One tensor's share: load, compute, store. ``noalias`` holds, because overlaps were refused or copied."""
    args = ", ".join(["i64 %n", *(f"ptr noalias %b{i}" for i in range(len(program.buffers))), "ptr noalias %scalars"])
    lines = [f"define internal void @elements({args}) noinline {{", "entry:", *_load_scalars(program)]
    lines += ["  br label %loop", "loop:", "  %i = phi i64 [ 0, %entry ], [ %next, %loop ]", *_body(program)]
    for place, number in program.stores:
        if program.nodes[number].op == "buffer" and program.nodes[number].value == place:
            continue  # unchanged
        value = _operand(program, number, program.compute)
        lines += _store(program.buffers[place], place, value, program.compute)
    lines += ["  %next = add nuw nsw i64 %i, 1", "  %more = icmp slt i64 %next, %n"]
    lines += ["  br i1 %more, label %loop, label %exit", "exit:", "  ret void", "}", ""]
    return "\n".join(lines)


def _far(program: Program) -> str:
    """`_elements` in blocks, each after a request for memory further on: for arrays that no cache holds.

    While a block waits for its divisions and roots, the memory is kept busy. The arithmetic is the same code.
    """
    buffers = [_STORED[buffer.real] for buffer in program.buffers]
    args = ", ".join(["i64 %n", *(f"ptr %b{i}" for i in range(len(buffers))), "ptr %scalars"])
    lines = [f"define internal void @far({args}) noinline {{", "entry:", "  br label %block", "block:"]
    lines += ["  %i = phi i64 [ 0, %entry ], [ %next, %block ]", f"  %ahead = add i64 %i, {_AHEAD}"]
    for place, buffer in enumerate(program.buffers):
        step = 64 // BYTES[buffer.real]
        for line in range(0, _BLOCK, step):
            lines += [
                f"  %l{place}.{line} = add i64 %ahead, {line}",
                f"  %a{place}.{line} = getelementptr {buffers[place]}, ptr %b{place}, i64 %l{place}.{line}",
                f"  call void @llvm.prefetch.p0(ptr %a{place}.{line}, i32 0, i32 3, i32 1)",
            ]
    lines += ["  %left = sub i64 %n, %i", f"  %count = call i64 @llvm.smin.i64(i64 %left, i64 {_BLOCK})"]
    for place, stored in enumerate(buffers):
        lines.append(f"  %p{place} = getelementptr {stored}, ptr %b{place}, i64 %i")
    call = ", ".join(["i64 %count", *(f"ptr %p{i}" for i in range(len(buffers))), "ptr %scalars"])
    lines += [f"  call void @elements({call})", f"  %next = add i64 %i, {_BLOCK}", "  %more = icmp slt i64 %next, %n"]
    lines += ["  br i1 %more, label %block, label %exit", "exit:", "  ret void", "}"]
    return "\n".join([*lines, "declare void @llvm.prefetch.p0(ptr, i32, i32, i32)", ""])


def _chunk(program: Program) -> str:
    """The sums of squares of one tensor's chunks, by the tree of `norm`; one float64 a chunk goes to ``%sums``."""
    assert program.reduces is not None
    args = ", ".join(["i64 %n", *(f"ptr %b{i}" for i in range(len(program.buffers))), "ptr %scalars", "ptr %sums"])
    value = _operand(program, program.reduces, program.compute)
    widen = f"  %d = fpext float {value} to double" if program.compute == "float32" else ""
    wide = "%d" if widen else value
    lines = [
        f"define internal void @elements({args}) noinline {{",
        "entry:",
        f"  %lanes = alloca [{LANES} x double], align 64",
        *_load_scalars(program),
        "  br label %chunk",
        "chunk:",
        "  %base = phi i64 [ 0, %entry ], [ %basenext, %done ]",
        "  %out = phi ptr [ %sums, %entry ], [ %outnext, %done ]",
        f"  call void @llvm.memset.p0.i64(ptr align 64 %lanes, i8 0, i64 {LANES * 8}, i1 false)",
        f"  %chunkend = add i64 %base, {CHUNK}",
        "  %last = call i64 @llvm.smin.i64(i64 %chunkend, i64 %n)",
        "  br label %line",
        "line:",
        "  %at = phi i64 [ %base, %chunk ], [ %lineend, %lineexit ]",
        f"  %lineend = add i64 %at, {LANES}",
        "  %stop = call i64 @llvm.smin.i64(i64 %lineend, i64 %last)",
        "  br label %loop",
        "loop:",
        "  %i = phi i64 [ %at, %line ], [ %next, %loop ]",
        *_body(program),
        *([widen] if widen else []),
        f"  %square = fmul double {wide}, {wide}",
        "  %lane = sub i64 %i, %at",
        "  %lanep = getelementptr double, ptr %lanes, i64 %lane",
        "  %old = load double, ptr %lanep",
        "  %new = fadd double %old, %square",
        "  store double %new, ptr %lanep",
        "  %next = add nuw nsw i64 %i, 1",
        "  %more = icmp slt i64 %next, %stop",
        "  br i1 %more, label %loop, label %lineexit",
        "lineexit:",
        "  %again = icmp slt i64 %lineend, %last",
        "  br i1 %again, label %line, label %halve",
        "halve:",
        f"  %width = phi i64 [ {LANES // 2}, %lineexit ], [ %half, %halved ]",
        "  br label %addloop",
        "addloop:",
        "  %k = phi i64 [ 0, %halve ], [ %knext, %addloop ]",
        "  %kp = getelementptr double, ptr %lanes, i64 %k",
        "  %kw = add i64 %k, %width",
        "  %kwp = getelementptr double, ptr %lanes, i64 %kw",
        "  %x = load double, ptr %kp",
        "  %y = load double, ptr %kwp",
        "  %xy = fadd double %x, %y",
        "  store double %xy, ptr %kp",
        "  %knext = add nuw nsw i64 %k, 1",
        "  %kmore = icmp slt i64 %knext, %width",
        "  br i1 %kmore, label %addloop, label %halved",
        "halved:",
        "  %half = lshr i64 %width, 1",
        "  %wide = icmp sgt i64 %half, 0",
        "  br i1 %wide, label %halve, label %done",
        "done:",
        "  %sum = load double, ptr %lanes",
        "  store double %sum, ptr %out",
        "  %outnext = getelementptr double, ptr %out, i64 1",
        f"  %basenext = add i64 %base, {CHUNK}",
        "  %unfinished = icmp slt i64 %basenext, %n",
        "  br i1 %unfinished, label %chunk, label %exit",
        "exit:",
        "  ret void",
        "}",
        "declare void @llvm.memset.p0.i64(ptr, i8, i64, i1)",
        "",
    ]
    return "\n".join(lines)


def _driver(program: Program) -> str:
    columns = HEADER + len(program.buffers)
    block_bytes = len(program.scalars) * BYTES[program.compute]
    lines, pointers = [], []
    for i, buffer in enumerate(program.buffers):
        lines += [
            f"  %cell{i} = getelementptr i8, ptr %entryp, i64 {8 * (HEADER + i)}",
            f"  %base{i} = load ptr, ptr %cell{i}",
            f"  %ptr{i} = getelementptr {_STORED[buffer.real]}, ptr %base{i}, i64 %from",
        ]
        pointers.append(f"ptr %ptr{i}")
    arguments = ", ".join(["i64 %count", *pointers, "ptr %constants"])
    if program.reduces is not None:
        call = [
            "  %line = add i64 %start, %from",
            f"  %chunkno = udiv i64 %line, {CHUNK}",
            "  %sum = getelementptr double, ptr %sums, i64 %chunkno",
            f"  call void @elements({arguments}, ptr %sum)",
        ]
    else:
        call = [
            f"  %large = icmp sge i64 %n, {_LARGE}",
            "  br i1 %large, label %away, label %near",
            "away:",
            f"  call void @far({arguments})",
            "  br label %rownext",
            "near:",
            f"  call void @elements({arguments})",
        ]
    job = load_fields("job", "ptr table", "i64 rows", "ptr scalars", "i64 grain", "i64 total", "ptr sums", first=2)
    return _DRIVER.format(
        fields=job, width=8 * columns, block_bytes=block_bytes, pointers="\n".join(lines), call="\n".join(call)
    )
