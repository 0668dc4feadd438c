"""Runs a function of `Value`s once and writes down what it does: a `Program`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..arrays.dtypes import PART, compute_dtype
from .language import Functions, Value, among_arrays, scalar_arguments
from .ops import REAL, Op, Type
from .program import BlockProgram, Buffer, Node, Program

Traced = Callable[[Functions, dict[str, Value], dict[str, Value]], Mapping[str, Value] | Value]


class Tracer:
    """The backend that records. Equal nodes are one node, so a common subexpression is computed once."""

    def __init__(self, rule: str) -> None:
        self.rule = rule
        self.nodes: list[Node] = []
        self._known: dict[Node, int] = {}

    def add(self, node: Node) -> int:
        if node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return self._known[node]

    def constant(self, value: float | bool) -> int:
        type = Type.BOOL if isinstance(value, bool) else REAL
        return self.add(Node("const", (), type, True, value))

    def word(self, value: int) -> int:
        return self.add(Node("const", (), Type.UINT32, False, value))

    def operation(self, op: Op, args: list[int], *, scalar: bool) -> int:
        return self.add(Node(op.name, tuple(args), op.gives, scalar))

    def spread(self, scalar: int, type: Type) -> int:
        return self.add(Node("spread", (scalar,), type, False))

    def inputs(self, names: tuple[str, ...]) -> dict[str, Value]:
        """The scalars that the caller of the program supplies."""
        return scalar_arguments(self, {name: self.add(Node("input", (), REAL, True, name)) for name in names})


def trace(function: Traced, name: str, buffers: tuple[Buffer, ...], inputs: tuple[str, ...]) -> Program:
    """Trace ``function(xp, buffers, scalars)``, over buffers of float32: a program of others differs in these alone.

    A mapping from buffer names to values becomes the stores; a single value is summed in squares.
    """
    tracer = Tracer(name)
    arrays = {
        buffer.name: Value(tracer, tracer.add(Node("buffer", (), REAL, False, i)), argument=buffer.name)
        for i, buffer in enumerate(buffers)
    }
    result = function(Functions(tracer), arrays, tracer.inputs(inputs))
    if isinstance(result, Value):
        return Program(name, "float32", buffers, inputs, tuple(tracer.nodes), reduces=among_arrays(result))
    places = {buffer.name: i for i, buffer in enumerate(buffers)}
    stores = tuple((places[key], among_arrays(value)) for key, value in result.items())
    return Program(name, "float32", buffers, inputs, tuple(tracer.nodes), stores=stores)


def trace_blocks(
    function: Callable[..., list[Value]],
    *,
    name: str,
    buffer: Buffer,
    inputs: tuple[str, ...],
    words: tuple[str, ...],
) -> BlockProgram:
    """Trace ``function(xp, lanes, block, words, scalars)``: the new numbers of one block from its old ones.

    ``block`` is the pair of words (low, high) of the block's index. A block is four elements of the buffer, and a
    complex element two numbers.
    """
    tracer, lanes = Tracer(name), 8 if buffer.dtype in PART else 4
    old = [Value(tracer, tracer.add(Node("lane", (), REAL, False, i)), argument=buffer.name) for i in range(lanes)]
    block = [Value(tracer, tracer.add(Node("block", (), Type.UINT32, False, i)), Type.UINT32) for i in (0, 1)]
    given = {key: Value(tracer, tracer.add(Node("word", (), Type.UINT32, False, key)), Type.UINT32) for key in words}
    new = function(Functions(tracer), old, block, given, tracer.inputs(inputs))
    return BlockProgram(
        name,
        compute_dtype(buffer.dtype),
        (buffer,),
        inputs,
        tuple(tracer.nodes),
        words=words,
        lanes=tuple(among_arrays(value) for value in new),
    )
