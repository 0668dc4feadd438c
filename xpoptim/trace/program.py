"""A traced rule: typed nodes over a list of buffers, and the scalar expressions they need.

A `Program` is plain immutable data. The code generators walk it; nothing else does.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

from ..arrays.dtypes import PART
from .ops import TABLE, Type


@dataclass(frozen=True)
class Node:
    """``op`` is a row of the table, or one of the leaves: ``buffer`` (value: its index), ``input`` (value: the
    scalar's name), ``const`` (value: the number), ``spread`` (a scalar node, rounded for array use). In a
    `BlockProgram` also ``lane`` (value: which of a block's numbers), ``block`` (value: 0 or 1, the low or the high
    word of the block's index) and ``word`` (value: the name of a word that the caller supplies).

    Nodes are equal if their values are spelled alike: -0.0 is not 0.0, and a NaN is itself."""

    op: str
    args: tuple[int, ...]
    type: Type
    scalar: bool
    value: float | bool | int | str | None = field(default=None, compare=False)
    spelling: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "spelling", repr(self.value))

    @property
    def index(self) -> int:
        """The value of one that has an index."""
        assert isinstance(self.value, int)
        return self.value


@dataclass(frozen=True)
class Buffer:
    """One array that a kernel walks. ``role``: "param", "grad" or "slot"; ``dtype``: how it is stored."""

    name: str
    role: str
    dtype: str

    @property
    def real(self) -> str:
        """The dtype of the numbers in it: of a complex array's parts."""
        return PART.get(self.dtype, self.dtype)


@dataclass(frozen=True)
class Program:
    """One pass over memory.

    It writes ``stores`` (pairs of buffer and node), or, if ``reduces`` names a node, sums that
    node's squares in float64 by the tree of `trace.sums`.
    """

    name: str
    compute: str  # "float32" or "float64"
    buffers: tuple[Buffer, ...]
    inputs: tuple[str, ...]  # float64 scalars the caller supplies, in this order
    nodes: tuple[Node, ...]
    stores: tuple[tuple[int, int], ...] = ()
    reduces: int | None = None

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Worked out once: kernels are looked up by their programs."""
        return hash((self.name, self.compute, self.buffers, self.inputs, self.nodes, self.stores, self.reduces))

    @cached_property
    def written(self) -> frozenset[int]:
        """The buffers that it writes."""
        return frozenset(place for place, _ in self.stores)

    @cached_property
    def needed(self) -> tuple[int, ...]:
        """The nodes that matter, operands before their users."""
        reduced = {self.reduces} if self.reduces is not None else set()
        return _reached(self.nodes, {node for _, node in self.stores} | reduced)

    @cached_property
    def scalars(self) -> tuple[int, ...]:
        """The scalar nodes that array code reads: one entry of the scalar block each. Constants are not among them."""
        return tuple(dict.fromkeys(node.args[0] for node in map(self.read, self.needed) if node.op == "spread"))

    def read(self, number: int) -> Node:
        """A node as others read it: a constant that is rounded is that constant."""
        node = self.nodes[number]
        behind = self.nodes[node.args[0]] if node.op == "spread" else node
        return behind if behind.op == "const" else node

    @cached_property
    def scalar_steps(self) -> tuple[tuple[int, Node], ...]:
        """The needed nodes of the scalar program."""
        return tuple((number, self.nodes[number]) for number in self.needed if self.nodes[number].scalar)

    @cached_property
    def array_steps(self) -> tuple[tuple[int, Node], ...]:
        """Those of the elementwise program."""
        return tuple((number, self.nodes[number]) for number in self.needed if not self.nodes[number].scalar)

    def __str__(self) -> str:
        return "\n".join(_listing(self))


@dataclass(frozen=True)
class BlockProgram(Program):
    """One pass from one array to another of the same kind, or in place, by blocks of four elements.

    A block has an index, from which random words can be drawn. ``lanes`` are the new numbers of a block, in order:
    four, or eight where an element is a complex number.
    """

    words: tuple[str, ...] = ()
    lanes: tuple[int, ...] = ()

    __hash__ = Program.__hash__  # equal ones have equal nodes

    @cached_property
    def needed(self) -> tuple[int, ...]:
        return _reached(self.nodes, set(self.lanes))


def _reached(nodes: tuple[Node, ...], wanted: set[int]) -> tuple[int, ...]:
    """The nodes that others are computed from, and these, operands first."""
    for number in range(len(nodes) - 1, -1, -1):
        if number in wanted:
            wanted.update(nodes[number].args)
    return tuple(sorted(wanted))


def _listing(program: Program) -> Iterator[str]:
    yield f"program {program.name} in {program.compute}"
    for buffer in program.buffers:
        yield f"  {buffer.role:6} {buffer.name}: {buffer.dtype}"
    if program.scalar_steps:
        yield "scalars, in float64"
        yield from (f"  %{i} = {_spell(program, node)}" for i, node in program.scalar_steps)
    yield "for every element"
    yield from (f"  %{i} = {_spell(program, node)}" for i, node in program.array_steps)
    yield from (f"  {program.buffers[b].name} <- %{i}" for b, i in program.stores)
    if program.reduces is not None:
        yield f"  sum of squares of %{program.reduces}"


def _spell(program: Program, node: Node) -> str:
    if node.op == "buffer":
        return program.buffers[node.index].name
    if node.op in ("input", "const"):
        return str(node.value)
    args = [f"%{i}" for i in node.args]
    if node.op == "spread":
        return f"round({args[0]})" if node.type is Type.REAL else args[0]
    symbol = TABLE[node.op].symbol
    if symbol and len(args) == 2:
        return f"{args[0]} {symbol} {args[1]}"
    return f"{symbol}{args[0]}" if symbol else f"{node.op}({', '.join(args)})"
