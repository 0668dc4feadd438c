"""The CUDA engine: one launch of a fused kernel for all CuPy arrays of a device and a pair of dtypes.

A step neither waits for the GPU nor, after the first, allocates on it. The kernels run on CuPy's current stream
of the arrays' own device; if that is another one than at the step before, `turns` orders the two. Where the host
cannot know the scalars (a global norm, or `capturable=True`) a one-thread kernel works them out on the device, which
then keeps the step count: see `keeper`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...arrays.dtypes import PART
from ...arrays.leaves import Leaf
from ...arrays.types import CuPyArray, Shape
from ...codegen.cuda import elementwise as text
from ...recipe.recipe import Traced
from ...trace.program import Program
from ...trace.scalars import evaluate
from ...trace.sums import CHUNK
from .. import base
from ..base import Columns, Made
from . import driver
from .keeper import MOST_INPUTS, Counter, Keeper, capture_refused
from .watch import Watch

_MOST_BYTES = 32_764  # of a kernel's parameters
_OTHER_BYTES = 40  # of them for what comes beside the table
_CAPACITIES = (8, 64, 256)  # rows of a by-value table, and then as many as fit; every row costs launch time
_NULL = np.uint64(0)

_lock = threading.Lock()
_functions: dict[tuple[str, str, int], driver.Function] = {}


def kernel(source: str, name: str, device: int) -> driver.Function:
    """A kernel of a text, compiled and loaded once for each device."""
    key = (source, name, device)
    if key not in _functions:
        from . import nvrtc

        with _lock:
            if key not in _functions:
                arch = driver.architecture(device)
                module = driver.load(nvrtc.cubin(source, arch), arch)
                _functions[key] = module.get_function(name)
    return _functions[key]


def capacity(program: Program, count: int) -> int | None:
    """The rows of the by-value table for ``count`` tensors, or None if they do not fit into a kernel's parameters."""
    one, two = (text.table_dtype(program, rows).itemsize for rows in (1, 2))
    most = (_MOST_BYTES - _OTHER_BYTES - one) // (two - one) + 1
    return next((rows for rows in (*_CAPACITIES, most) if count <= rows <= most), None)


class _Table:
    """The rows of one program for one group of leaves, and how a kernel is given them.

    To make one compiles its kernels, so that what is wrong with them shows before anything is written.
    """

    def __init__(self, program: Program, device: int, count: int) -> None:
        self.program, self.device, self.count = program, device, count
        rows = capacity(program, count)
        self.value = np.zeros(1, text.table_dtype(program, rows or 1))
        self.scalars = self.value["scalars"][0]
        self._memory: Any = None
        self._uploaded = b""
        self._captured = False  # whether a graph writes the memory too, whenever it is replayed
        if rows is None:
            self.rows = np.zeros(count, text.row_dtype(program))
            self._memory = driver.zeros(self.rows.nbytes // 8, np.uint64)
        else:
            self.rows = self.value["rows"][0][:count]
        is_norm = program.reduces is not None
        source = (text.norm_source if is_norm else text.update_source)(program, rows or 1)
        names, ending = ("sums", "fold") if is_norm else ("update",), "_many" if rows is None else ""
        self._kernels = {name: kernel(source, name + ending, device) for name in names}
        self._upload_kernel: Any = kernel(text.UPLOAD_SOURCE, "upload", device) if rows is None else None
        self.prologue = text.prologue_source(program)
        self.device_scalars: CuPyArray | np.uint64 = _NULL  # memory, where the device works them out

    def prepare_device(self) -> None:
        """Allocate and compile what works out the scalars on the device."""
        kernel(self.prologue, "prologue", self.device)
        self.device_scalars = driver.zeros(max(1, len(self.program.scalars)), self.program.compute)

    def set_scalars(self, inputs: Sequence[float]) -> None:
        """Work out the scalars on the host."""
        self.scalars[: len(self.program.scalars)] = evaluate(self.program, inputs)

    def launch(self, name: str, grid: int, block: int, *arguments: object) -> None:
        table: tuple[object, ...] = (self.value,)
        if self._memory is not None:
            self._upload()
            table = (self.value, self._memory)
        driver.launch(self._kernels[name], grid, block, (*table, *arguments))

    def _upload(self) -> None:
        """Bring the device's table up to date, through parameters of small kernels: no copy that could wait."""
        now = self.rows.tobytes()
        # A graph brings its own rows, whatever the memory holds when it is replayed; and leaves them there.
        self._captured = self._captured or driver.capturing(self.device)
        if now == self._uploaded and not self._captured:
            return
        words = np.frombuffer(now, np.uint64)
        for at in range(0, words.size, text.UPLOAD_WORDS):
            piece, part = np.zeros(1, text.PIECE_DTYPE), words[at : at + text.UPLOAD_WORDS]
            piece["words"][0, : part.size] = part
            driver.launch(self._upload_kernel, 16, text.THREADS, (piece, np.uint32(part.size), self._memory[at:]))
        self._uploaded = now


@dataclass
class _Group:
    """The leaves of one device and one pair of dtypes: one launch."""

    device: int
    members: list[int]
    update: _Table
    chunk: int  # elements of a block's chunk
    blocks: int
    norm: _Table | None = None
    norm_chunks: int = 0
    sums: CuPyArray | None = None
    totals: Any = _NULL
    # Gradients in another order than C's: row, strides, and a copy in C order, in which a norm is summed up.
    odd: list[tuple[int, Shape, CuPyArray]] = field(default_factory=list)


class Plan(base.Plan):
    """Tables over CuPy arrays, and the launches that run them; usable as long as the arrays are what they were.

    Where all leaves lie on one device and the host cannot know the scalars (a global norm, or `capturable=True`),
    these, the norm and t are worked out on the device. It then counts the steps too, by a counter of the ``keeper``.
    """

    def __init__(
        self, traced: Traced, leaves: list[Leaf[CuPyArray]], keeper: Keeper | None, *, capturable: bool, alone: bool
    ) -> None:
        self._traced, self.recipe, self._capturable, self._keeper = traced, traced.recipe, capturable, keeper
        by_kind: dict[tuple[int, str, str], list[int]] = {}
        for i, leaf in enumerate(leaves):
            if leaf.g is not None:
                by_kind.setdefault((leaf.p.device.id, leaf.dtype, leaf.g_dtype), []).append(i)
        ordered = sorted((leaf.key, i) for i, leaf in enumerate(leaves) if leaf.g is not None)
        self._places = {i: place for place, (_, i) in enumerate(ordered)}  # tensors are added in sorted order
        self._keys = [key for key, _ in ordered]
        self._groups = [self._group(kind, members, leaves) for kind, members in by_kind.items()]
        self.devices = sorted({group.device for group in self._groups})
        self._counter: Counter | None = None
        if keeper is not None and alone and len(self.devices) == 1 and (self.recipe.reductions or capturable):
            self._prepare_device()
            self._counter = keeper.counter_on(self.devices[0])
        self.keeps_sums = self._counter is not None
        self._inputs: Sequence[float] = ()

    def _group(self, kind: tuple[int, str, str], members: list[int], leaves: list[Leaf[CuPyArray]]) -> _Group:
        device, dtype, g_dtype = kind
        programs = self._traced.programs(dtype, g_dtype)
        lengths = [leaves[i].p.size * (2 if dtype in PART else 1) for i in members]
        with driver.on(device):
            table = _Table(programs["update"], device, len(members))
            chunk = text.chunk_length(programs["update"], sum(lengths))
            blocks = _fill(table, [leaves[i] for i in members], lengths, chunk)
            group = _Group(device, members, table, chunk, blocks)
            if self.recipe.reductions:
                group.norm = _Table(programs["norm"], device, len(members))
                group.norm_chunks = _fill(group.norm, [leaves[i] for i in members], lengths, CHUNK)
                group.norm.rows["scalars"] = [self._places[i] for i in members]
                group.sums = driver.zeros(max(1, group.norm_chunks), np.float64)
                group.totals = driver.zeros(len(self._places), np.float64)
                odd = [(row, leaves[i].g) for row, i in enumerate(members) if not leaves[i].g.flags.c_contiguous]
                group.odd = [(row, g.strides, driver.dense(g)) for row, g in odd]
        return group

    def _prepare_device(self) -> None:
        """Allocate and compile what works out the scalars on the device."""
        if len(self.recipe.inputs) > MOST_INPUTS:
            raise ValueError(
                f"{self.recipe.name} takes {len(self.recipe.inputs)} scalars, but where a GPU counts the steps "
                f"(clip_norm or capturable with CuPy arrays) there may be {MOST_INPUTS}"
            )
        for group in self._groups:
            with driver.on(group.device):
                group.update.prepare_device()
                if group.norm is not None:
                    group.norm.prepare_device()
                    group.totals = self._groups[0].totals

    def refresh(self, gradients: list[int]) -> None:
        """New addresses of the gradients."""
        for group in self._groups:
            for table in (group.update, group.norm):
                if table is not None:
                    table.rows["g"] = [gradients[i] for i in group.members]

    def watch(self, columns: Columns, keys: list[list[object]], copied: Iterable[int]) -> Watch | None:
        # A norm that the host fetches takes so long that little is gained, and the arrays might change meanwhile.
        fetched = self.recipe.reductions and self._counter is None
        return None if fetched or any(True for _ in copied) else Watch(self.refresh, columns)

    def set_inputs(self, inputs: Sequence[float]) -> None:
        self._inputs = inputs

    def run(self, kind: str, made: Made) -> None:
        """On the current streams. What is captured into a graph is not carried out yet, and so is not counted."""
        capturing = self._keeper is not None and self._keeper.recording
        step = int(self._inputs[0]) - 1
        if capturing:
            if not self._capturable or self._counter is None or self._counter.expected != step:
                raise capture_refused()
        elif self._counter is not None:
            self._counter.expect(step)
        if kind == "norm":
            self._norm(capturing)
            return
        if capturing:
            assert self._keeper is not None
            self._keeper.capture(self)
        else:  # counted first: a signal handler may raise after the launches
            made.value = 1
            if self._counter is not None:
                self._counter.expected += 1
        self._update(capturing)

    def sums(self) -> dict[str, float]:
        totals = np.zeros(len(self._keys))
        for group in self._groups:
            places = [self._places[i] for i in group.members]
            totals[places] = driver.to_host(group.totals)[places]
        return dict(zip(self._keys, totals.tolist(), strict=True))

    # What a graph replays takes the hyperparameters from the counter's memory, where `set_replay` puts them.

    def set_replay(self, inputs: Sequence[float]) -> None:
        """Give the counter's memory new hyperparameters, in stream order."""
        assert self._counter is not None
        with driver.on(self._counter.device):
            function = kernel(self._groups[0].update.prologue, "set_inputs", self._counter.device)
            driver.launch(function, 1, 1, (self._as_argument(inputs), self._counter.state))

    # The passes.

    def _norm(self, from_state: bool) -> None:
        """Sums of squares of the tensors, into ``totals``."""
        for group in self._groups:
            table = group.norm
            assert table is not None
            with driver.on(group.device):
                if self._counter is None:
                    table.set_scalars(self._inputs)
                elif table.program.scalars:
                    self._prologue(group, table, self._counter, tensors=0, advance=False, from_state=from_state)
                for row, strides, copy in group.odd:
                    driver.copy(copy, driver.array_at(int(group.update.rows["g"][row]), copy, strides))
                    table.rows["g"][row] = copy.data.ptr
                if group.norm_chunks:
                    blocks = -(-group.norm_chunks // (text.THREADS // 32))
                    counts = (np.uint32(table.count), np.uint32(group.norm_chunks))
                    table.launch("sums", blocks, text.THREADS, *counts, table.device_scalars, group.sums)
                table.launch("fold", table.count, text.FOLD_THREADS, group.sums, group.totals)

    def _update(self, from_state: bool) -> None:
        for n, group in enumerate(self._groups):
            with driver.on(group.device):
                table = group.update
                skip: CuPyArray | np.uint64 = _NULL
                if self._counter is None:
                    table.set_scalars(self._inputs)
                else:
                    tensors = len(self._places) if self.recipe.reductions else 0
                    self._prologue(group, table, self._counter, tensors=tensors, advance=n == 0, from_state=from_state)
                    skip = self._counter.state[text.SKIP :]
                if group.blocks:
                    counts = (np.uint32(table.count), np.int32(group.chunk))
                    table.launch("update", group.blocks, text.THREADS, *counts, table.device_scalars, skip)

    def _prologue(
        self, group: _Group, table: _Table, counter: Counter, *, tensors: int, advance: bool, from_state: bool
    ) -> None:
        """Work out the scalars of a pass on the device."""
        function = kernel(table.prologue, "prologue", table.device)
        flags = (np.uint32(tensors), np.uint32(advance), np.uint32(from_state))
        memory = (counter.state, table.device_scalars, group.totals)
        driver.launch(function, 1, 1, (self._as_argument(self._inputs), *memory, *flags))

    def _as_argument(self, inputs: Sequence[float]) -> np.ndarray:
        argument = np.zeros(1, text.inputs_dtype(len(self.recipe.inputs)))
        argument["at"][0, : len(inputs)] = inputs
        return argument


def _fill(table: _Table, leaves: list[Leaf[CuPyArray]], lengths: list[int], chunk: int) -> int:
    """Write the rows of leaves; the number of chunks."""
    arrays = [(leaf.p, leaf.g, *leaf.slots) for leaf in leaves]
    for place, buffer in enumerate(table.program.buffers):
        table.rows[text.name_of(buffer)] = [row[place].data.ptr for row in arrays]
    chunks = [-(-length // chunk) for length in lengths]
    if sum(chunks) >= 2**31:
        raise ValueError(f"{leaves[0].named('params')} and its like have more elements than one launch can take")
    table.rows["length"] = lengths
    table.rows["first"] = np.cumsum([0, *chunks[:-1]])
    return sum(chunks)
