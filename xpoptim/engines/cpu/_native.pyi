"""The compiled part, ``native.c``. Addresses and numbers are ints; the structs that they lead to are described there."""

from ..base import Columns

def perform(most: int, patience: int, count: int, calls: int, made: int, /) -> None:
    """Run calls one after the other with at most so many helpers. Other Python threads are let in."""

def same(containers: tuple[object, ...] | Columns, kinds: int, watch: int, /) -> bool:
    """Whether the arrays in containers of these types are as before. The table's pointers follow the gradients."""

def step(
    containers: tuple[object, ...], inputs: list[float], step: int, most: int, patience: int, made: int, /
) -> bool:
    """`same` for the step's containers, and if so its calls. Whether they were run."""

def states() -> list[int]:
    """The helpers that there are: 0 asleep, 1 awake, 2 a job lies before it, 3 at work."""
