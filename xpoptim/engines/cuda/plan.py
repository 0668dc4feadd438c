"""The CUDA engine: one launch of a fused kernel for all CuPy arrays of a device and a pair of dtypes.

A step neither waits for the GPU nor, after the first, allocates on it. The kernels run on CuPy's current stream
of the arrays' own device; if that is another one than at the step before, `turns` orders the two. Where the host
cannot know the scalars (a global norm, or `capturable=True`) a one-thread kernel works them out on the device, which
then keeps the step count: see `Counter`.
"""

from __future__ import annotations

import operator
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...arrays.dtypes import PART
from ...arrays.leaves import Leaf
from ...arrays.memory import dense_alike
from ...codegen.cuda import elementwise as text
from ...recipe.recipe import Traced
from ...trace.program import Program
from ...trace.scalars import evaluate
from ...trace.sums import CHUNK
from . import driver
from .turns import Turns

_MOST_BYTES = 32_764  # of a kernel's parameters
_OTHER_BYTES = 40  # of them for what comes beside the table
_CAPACITIES = (8, 64, 256)  # rows of a by-value table, and then as many as fit; every row costs launch time
_NULL = np.uint64(0)
_MOST_INPUTS = 61

_lock = threading.Lock()
_functions: dict[tuple[str, str, int], Any] = {}


def kernel(source: str, name: str, device: int) -> Any:
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
        self._upload_kernel = kernel(text.UPLOAD_SOURCE, "upload", device) if rows is None else None

    def launch(self, name: str, grid: int, block: int, *arguments: Any) -> None:
        table: tuple[Any, ...] = (self.value,)
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
            piece = np.zeros((1, text.UPLOAD_WORDS), np.uint64)
            part = words[at : at + text.UPLOAD_WORDS]
            piece[0, : part.size] = part
            value = piece.view(text.PIECE_DTYPE).reshape(1)
            driver.launch(self._upload_kernel, 16, text.THREADS, (value, np.uint32(part.size), self._memory[at:]))
        self._uploaded = now


@dataclass
class _InOrder:
    """A gradient that lies in another order than C's, and a copy in C order: a norm is summed up in that."""

    row: int
    strides: tuple[int, ...]
    copy: Any

    def renew(self, address: int) -> None:
        driver.copy(self.copy, driver.array_at(address, self.copy, self.strides))


@dataclass
class _Group:
    """The leaves of one device and one pair of dtypes: one launch."""

    device: int
    members: list[int]
    update: _Table
    chunk: int  # elements of a block's chunk
    blocks: int
    prologue: str
    scalars: Any = None  # device memory, where the device works them out
    norm: _Table | None = None
    norm_prologue: str = ""
    norm_scalars: Any = None
    norm_chunks: int = 0
    sums: Any = None
    totals: Any = None
    in_order: list[_InOrder] = field(default_factory=list)


class Counter:
    """The step count of an optimizer, kept on the device because only the device knows whether a step was skipped.

    ``state`` holds the applied steps, the skipped ones, whether to skip the present one, and the inputs that
    replays of a captured step read.
    """

    def __init__(self, device: int, step: int) -> None:
        self.device = device
        with driver.on(device):
            self.state = driver.zeros(text.INPUTS + _MOST_INPUTS, np.float64)
        self.write(step)

    def write(self, step: int) -> None:
        """Go on counting from ``step``."""
        self.expected = step  # what the host believes
        driver.upload(self.state[text.STEP : text.STEP + 1], np.array([float(step)]))

    def read(self, turns: Turns) -> tuple[int, int]:
        """Applied and skipped steps after the last turn; waits for that."""
        words = turns.read("the step count cannot be read", self.state)
        self.expected = int(words[text.STEP])
        return self.expected, int(words[text.SKIPPED])


def obstacle(leaf: Leaf) -> str:
    """Why a leaf's kernel cannot work on its arrays as they are, or an empty string."""
    arrays = [leaf.p, *([leaf.g] if leaf.g is not None else []), *leaf.slots]
    if leaf.g is not None and leaf.dtype in PART and leaf.g_dtype not in PART:
        return f"its gradient is real ({leaf.g_dtype}) and it is complex"
    if not dense_alike(arrays):
        return "its arrays are not dense, or differ in layout"
    return ""


def stageable(leaf: Leaf) -> bool:
    """Always: CuPy's own arithmetic would flush subnormals."""
    return leaf.space == "cupy"


def staged(leaf: Leaf) -> Leaf:
    """The leaf through dense copies, for what a kernel cannot walk. `step` brings the results home."""
    dtype = leaf.g_dtype
    if leaf.dtype in PART and dtype not in PART:
        dtype = "complex128" if dtype == "float64" else "complex64"  # exact: kernels round, CuPy flushes subnormals
    g = driver.dense(leaf.g if dtype == leaf.g_dtype else driver.converted(leaf.g, dtype))
    copy = Leaf(leaf.key, leaf.given, leaf.home, leaf.index, space=leaf.space, dtype=leaf.dtype, g_dtype=dtype)
    copy.p, copy.g, copy.slots = driver.dense(leaf.p), g, [driver.dense(slot) for slot in leaf.slots]
    return copy


class Plan:
    """Tables over CuPy arrays, and the launches that run them; usable as long as the arrays are what they were."""

    def __init__(self, traced: Traced, leaves: list[Leaf]) -> None:
        self._traced, self.recipe, self.leaves = traced, traced.recipe, len(leaves)
        by_kind: dict[tuple[int, str, str], list[int]] = {}
        for i, leaf in enumerate(leaves):
            if leaf.g is not None:
                by_kind.setdefault((leaf.p.device.id, leaf.dtype, leaf.g_dtype), []).append(i)
        ordered = sorted((leaf.key, i) for i, leaf in enumerate(leaves) if leaf.g is not None)
        self._places = {i: place for place, (_, i) in enumerate(ordered)}  # tensors are added in sorted order
        self._groups = [self._group(kind, members, leaves) for kind, members in by_kind.items()]
        self.devices = sorted({group.device for group in self._groups})
        self._counter: Counter | None = None

    def _group(self, kind: tuple[int, str, str], members: list[int], leaves: list[Leaf]) -> _Group:
        device, dtype, g_dtype = kind
        programs = self._traced.programs(dtype, g_dtype)
        lengths = [leaves[i].p.size * (2 if dtype in PART else 1) for i in members]
        with driver.on(device):
            table = _Table(programs["update"], device, len(members))
            chunk = text.chunk_length(programs["update"], sum(lengths))
            blocks = _fill(table, [leaves[i] for i in members], lengths, chunk)
            group = _Group(device, members, table, chunk, blocks, text.prologue_source(programs["update"]))
            if self.recipe.reductions:
                group.norm = _Table(programs["norm"], device, len(members))
                group.norm_chunks = _fill(group.norm, [leaves[i] for i in members], lengths, CHUNK)
                group.norm.rows["scalars"] = [self._places[i] for i in members]
                group.norm_prologue = text.prologue_source(programs["norm"])
                group.sums = driver.zeros(max(1, group.norm_chunks), np.float64)
                group.totals = driver.zeros(max(1, len(self._places)), np.float64)
                group.in_order = _in_order([leaves[i].g for i in members])
        return group

    def refresh(self, gradients: list[int]) -> None:
        """New addresses of the gradients."""
        for group in self._groups:
            for table in (group.update, group.norm):
                if table is not None:
                    table.rows["g"] = [gradients[i] for i in group.members]

    # On the host: scalars are known, or the norm is fetched.

    def run(self, values: list[float]) -> None:
        """Update every leaf with scalars the host knows."""
        for group in self._groups:
            if group.blocks:
                group.update.scalars[: len(group.update.program.scalars)] = evaluate(group.update.program, values)
                with driver.on(group.device):
                    self._update(group, _NULL, _NULL)

    def squares(self, values: list[float]) -> dict[int, float]:
        """The sum of squares of each leaf's loaded gradient, by the leaf's number. Waits for the devices."""
        sums: dict[int, float] = {}
        for group in self._groups:
            with driver.on(group.device):
                self._sum(group, values, _NULL)
                totals = driver.to_host(group.totals)
            sums |= {i: float(totals[self._places[i]]) for i in group.members}
        return sums

    # On the device.

    def prepare(self) -> None:
        """Allocate and compile what `run_on_device` needs."""
        if len(self.recipe.inputs) > _MOST_INPUTS:
            raise ValueError(
                f"{self.recipe.name} takes {len(self.recipe.inputs)} scalars, but where a GPU counts the steps "
                f"(clip_norm or capturable with CuPy arrays) there may be {_MOST_INPUTS}"
            )
        for group in self._groups:
            with driver.on(group.device):
                for source in filter(None, (group.prologue, group.norm_prologue)):
                    kernel(source, "prologue", group.device)
                if group.scalars is None:
                    group.scalars = _scalar_memory(group.update.program)
                if group.norm is not None and group.norm_scalars is None:
                    group.norm_scalars = _scalar_memory(group.norm.program)
        if self.recipe.reductions:
            for group in self._groups[1:]:
                group.totals = self._groups[0].totals

    def run_on_device(self, values: list[float], counter: Counter, *, from_state: bool) -> None:
        """Update every leaf; t, the norm and the scalars are worked out on the device. All leaves are on one device.

        ``from_state``: take the hyperparameters from the counter's memory, where `set_inputs` puts them.
        """
        self._counter = counter  # whose memory a captured graph goes on using
        with driver.on(counter.device):
            tensors = 0
            if self.recipe.reductions:
                tensors = len(self._places)
                for group in self._groups:
                    assert group.norm is not None
                    if group.norm.program.scalars:
                        self._prologue(group, group.norm, values, counter, 0, False, from_state)
                    self._sum(group, values, group.norm_scalars)
            for n, group in enumerate(self._groups):
                self._prologue(group, group.update, values, counter, tensors, n == 0, from_state)
                self._update(group, group.scalars, counter.state[text.SKIP :])

    def set_inputs(self, values: list[float], counter: Counter) -> None:
        """Give the counter's memory new hyperparameters, in stream order."""
        with driver.on(counter.device):
            function = kernel(self._groups[0].prologue, "set_inputs", counter.device)
            driver.launch(function, 1, 1, (self._inputs(values), counter.state))

    def _prologue(
        self,
        group: _Group,
        table: _Table,
        values: list[float],
        counter: Counter,
        tensors: int,
        advance: bool,
        from_state: bool,
    ) -> None:
        is_norm = table.program.reduces is not None
        function = kernel(group.norm_prologue if is_norm else group.prologue, "prologue", group.device)
        scalars = group.norm_scalars if is_norm else group.scalars
        totals = _NULL if group.totals is None else group.totals
        flags = (np.uint32(tensors), np.uint32(advance), np.uint32(from_state))
        driver.launch(function, 1, 1, (self._inputs(values), counter.state, scalars, totals, *flags))

    def _inputs(self, values: list[float]) -> np.ndarray:
        inputs = np.zeros(1, text.inputs_dtype(len(self.recipe.inputs)))
        inputs["at"][0, : len(values)] = values
        return inputs

    def _sum(self, group: _Group, values: list[float], scalars: Any) -> None:
        """Sums of squares of the group's tensors, into ``totals``."""
        table = group.norm
        assert table is not None
        for gradient in group.in_order:
            gradient.renew(int(group.update.rows["g"][gradient.row]))
            table.rows["g"][gradient.row] = gradient.copy.data.ptr
        if scalars is _NULL:
            table.scalars[: len(table.program.scalars)] = evaluate(table.program, values)
        if group.norm_chunks:
            blocks = -(-group.norm_chunks // (text.THREADS // 32))
            counts = (np.uint32(table.count), np.uint32(group.norm_chunks))
            table.launch("sums", blocks, text.THREADS, *counts, scalars, group.sums)
        table.launch("fold", table.count, text.FOLD_THREADS, group.sums, group.totals)

    def _update(self, group: _Group, scalars: Any, skip: Any) -> None:
        if group.blocks:
            counts = (np.uint32(group.update.count), np.int32(group.chunk))
            group.update.launch("update", group.blocks, text.THREADS, *counts, scalars, skip)


def _in_order(gradients: list[Any]) -> list[_InOrder]:
    odd = [(row, g) for row, g in enumerate(gradients) if not g.flags.c_contiguous]
    return [_InOrder(row, g.strides, driver.dense(g)) for row, g in odd]


def _scalar_memory(program: Program) -> Any:
    real = np.float32 if program.compute == "float32" else np.float64
    return driver.zeros(max(1, len(program.scalars)), real)


def _fill(table: _Table, leaves: list[Leaf], lengths: list[int], chunk: int) -> int:
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


class Watch:
    """Compares CuPy arrays with what they were: places, shapes, strides, dtypes. Gradients may have moved.

    Slots are the optimizer's own: of them it is enough that they are the same objects.
    """

    def __init__(self, plan: Plan, columns: list[list[Any]]) -> None:
        params, grads, *slots = columns
        self._plan, self._slots = plan, slots
        self._layouts = [_layouts(params), _layouts(grads)]
        self._params, self._grads = _addresses(params), _addresses(grads)
        spans = sorted((a.data.ptr, a.data.ptr + a.nbytes) for column in (params, *slots) for a in column if a.nbytes)
        self._starts = np.array([start for start, _ in spans], np.uint64)
        self._ends = np.array([end for _, end in spans], np.uint64)
        self._sizes = np.array([0 if a is None else a.nbytes for a in grads], np.uint64)

    def unchanged(self, columns: list[list[Any]]) -> bool:
        """Whether all arrays are as before, gradients anywhere; the plan's addresses are then up to date."""
        params, grads, *slots = columns
        if any(any(map(operator.is_not, now, was)) for now, was in zip(slots, self._slots, strict=True)):
            return False
        try:
            if [_layouts(params), _layouts(grads)] != self._layouts or _addresses(params) != self._params:
                return False
            moved = _addresses(grads)
        except AttributeError:  # no CuPy array
            return False
        if moved == self._grads:
            return True
        if self._overlaps(moved):
            return False
        self._plan.refresh(moved)
        self._grads = moved
        return True

    def _overlaps(self, gradients: list[int]) -> bool:
        """Whether a gradient lies in memory that is written; the written spans are apart and sorted."""
        if not self._ends.size:
            return False
        starts = np.array(gradients, np.uint64)
        at = np.searchsorted(self._ends, starts, side="right")  # the first span that ends behind the gradient's start
        inside = (at < self._ends.size) & (self._sizes > 0)
        return bool((self._starts[np.minimum(at, self._ends.size - 1)] < starts + self._sizes)[inside].any())


def _addresses(column: list[Any]) -> list[int]:
    return [0 if a is None else a.data.ptr for a in column]


def _layouts(column: list[Any]) -> list[Any]:
    return [None if a is None else (a.shape, a.strides, a.dtype, a.data.device_id) for a in column]
