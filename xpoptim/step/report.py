"""What `Optimizer.explain` gives: a table that can be printed, or read row by row."""

from __future__ import annotations

from typing import NamedTuple


class Served(NamedTuple):
    """One leaf, the engine that serves it, and why."""

    key: str
    engine: str
    reason: str


class Report(tuple[Served, ...]):
    """One `Served` a leaf; as a string, a table."""

    __slots__ = ()

    def __str__(self) -> str:
        rows = [("key", "engine", "why"), *self]
        widths = [max(len(row[k]) for row in rows) for k in (0, 1)]
        return "\n".join(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}" for row in rows)

    __repr__ = __str__
