"""A block program as LLVM assembly for the CPU: from one array to another, or in place, four elements at a time.

A word is kept in a lane of 64 bits, whose upper half means nothing. A product reads the lower halves only, so that
it is one vector instruction on any x86-64.
"""

from __future__ import annotations

from collections.abc import Iterator

from ...arrays.dtypes import BYTES
from ...trace.program import BlockProgram, Node
from .elementwise import (
    _INTEGER_POWER,
    _STORED,
    DECLARATIONS,
    TASKS,
    _load,
    _load_scalars,
    _operand,
    _operation,
    _prologue,
    _store,
    load_fields,
)

# Takes tasks of `grain` blocks until none is left. The job's fields: cursors, workers, x, y, numbers, scalars, words,
# grain. A last block that is not full goes through memory
# of the function's own.
_RUN = """\
define void @run(ptr %job, i64 %worker) {{
entry:
  %visited = alloca i64
  store i64 0, ptr %visited
{loads}
  %rest = alloca [{width} x {stored}], align 64
  %full = udiv i64 %numbers, {width}
  %done = mul i64 %full, {width}
  %left = sub i64 %numbers, %done
  %ragged = icmp ne i64 %left, 0
  %one = zext i1 %ragged to i64
  %total = add i64 %full, %one
  %reach = add i64 %total, %grain
  %most = sub i64 %reach, 1
  %tasks = udiv i64 %most, %grain
  br label %task
task:
  %number = call i64 @next_task(ptr %job, i64 %worker, i64 %tasks, ptr %visited)
  %over = icmp slt i64 %number, 0
  br i1 %over, label %exit, label %work
work:
  %low = mul i64 %number, %grain
  %beyond = add i64 %low, %grain
  %high = call i64 @llvm.smin.i64(i64 %beyond, i64 %full)
  %some = icmp slt i64 %low, %high
  br i1 %some, label %blocks, label %last
blocks:
  call void @blocks({call})
  br label %last
last:
  %reaches = icmp sgt i64 %beyond, %full
  %mine = and i1 %reaches, %ragged
  br i1 %mine, label %partial, label %task
partial:
  %bytes = mul i64 %left, {size}
  %offset = mul i64 %done, {size}
  %from = getelementptr i8, ptr %x, i64 %offset
  %to = getelementptr i8, ptr %y, i64 %offset
  call void @llvm.memcpy.p0.p0.i64(ptr %rest, ptr %from, i64 %bytes, i1 false)
  %negative = sub i64 0, %offset
  %origin = getelementptr i8, ptr %rest, i64 %negative
  %after = add i64 %full, 1
  call void @in_place(i64 %full, i64 %after, ptr %origin, ptr %scalars, ptr %words)
  call void @llvm.memcpy.p0.p0.i64(ptr %to, ptr %rest, i64 %bytes, i1 false)
  br label %task
exit:
  ret void
}}
declare i64 @llvm.smin.i64(i64, i64)
declare void @llvm.memcpy.p0.p0.i64(ptr, ptr, i64, i1)
"""


def assembly(program: BlockProgram, *, in_place: bool) -> str:
    """The module: ``prologue(inputs, scalars)`` and ``run(job, worker)``."""
    dtype = program.buffers[0].real
    call = "i64 %low, i64 %high, ptr %x, ptr %scalars, ptr %words"
    parts = [_INTEGER_POWER, TASKS, _prologue(program), _blocks(program, "in_place", same=True)]
    if not in_place:
        call = "i64 %low, i64 %high, ptr %x, ptr %y, ptr %scalars, ptr %words"
        parts.append(_blocks(program, "blocks", same=False))
    loads = load_fields("job", "ptr x", "ptr y", "i64 numbers", "ptr scalars", "ptr words", "i64 grain", first=2)
    run = _RUN.format(loads=loads, width=len(program.lanes), stored=_STORED[dtype], size=BYTES[dtype], call=call)
    parts += [run.replace("@blocks", "@in_place") if in_place else run, DECLARATIONS]
    return "\n".join(parts) + "\n"


def _blocks(program: BlockProgram, name: str, *, same: bool) -> str:
    """Blocks ``%low`` to ``%high``, full ones. Two arrays do not overlap; one is read and written in place."""
    pointers = ["ptr noalias %b0"] if same else ["ptr noalias %b0", "ptr noalias %b1"]
    arguments = ", ".join(["i64 %low", "i64 %high", *pointers, "ptr noalias %scalars", "ptr noalias %words"])
    lines = [f"define internal void @{name}({arguments}) noinline {{", "entry:", *_load_scalars(program)]
    for place, word in enumerate(program.words):
        lines += [
            f"  %wp{place} = getelementptr i32, ptr %words, i64 {place} ; {word}",
            f"  %wi{place} = load i32, ptr %wp{place}",
            f"  %word{place} = zext i32 %wi{place} to i64",
        ]
    lines += ["  br label %loop", "loop:", "  %block = phi i64 [ %low, %entry ], [ %next, %loop ]"]
    lines.append(f"  %first = mul nuw nsw i64 %block, {len(program.lanes)}")
    for number, node in program.array_steps:
        lines += _step(program, number, node)
    for lane, number in enumerate(program.lanes):
        lines += _store_lane(program, lane, number, 0 if same else 1)
    lines += ["  %next = add nuw nsw i64 %block, 1", "  %more = icmp slt i64 %next, %high"]
    lines += ["  br i1 %more, label %loop, label %exit", "exit:", "  ret void", "}", ""]
    return "\n".join(lines)


def _step(program: BlockProgram, number: int, node: Node) -> Iterator[str]:
    if node.op == "lane":
        yield f"  %i{number} = add nuw nsw i64 %first, {node.value}"
        load = _load(program.buffers[0], 0, number, program.compute)
        yield from (line.replace("i64 %i", f"i64 %i{number}") for line in load)
    elif node.op == "block":
        yield f"  %v{number} = lshr i64 %block, {32 * node.index}"
    elif node.op == "word":
        yield f"  %v{number} = or i64 %word{program.words.index(str(node.value))}, 0"
    elif node.op not in ("spread", "const"):
        yield "  " + _operation(program, number, node, program.compute)


def _store_lane(program: BlockProgram, lane: int, number: int, place: int) -> Iterator[str]:
    value = _operand(program, number, program.compute)
    yield f"  %o{lane} = add nuw nsw i64 %first, {lane}"
    for line in _store(program.buffers[0], place, value, program.compute):
        yield line.replace("i64 %i", f"i64 %o{lane}").replace(f"%w{place}", f"%w{place}.{lane}")
