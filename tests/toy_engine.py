"""A third engine for NumPy arrays, in plain NumPy, that counts its calls: what an engine has to have, and no more.

As a plugin of pytest, ``-p toy_engine``, it takes the CPU engine's place.
"""

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

from xpoptim.engines import reference, registry

CALLS: Counter[str] = Counter()


class Plan(reference.Plan):
    """The reference's passes, with a watch."""

    def run(self, kind: str, made: Any) -> None:
        CALLS[kind] += 1
        super().run(kind, made)
        if kind == "update":
            for leaf in self._leaves:
                leaf.g = None  # gradients are not kept

    def watch(self, columns: Any, keys: Any, copied: Any) -> Any:
        if any(True for _ in copied) or any(g is None for g in columns[1]):
            return None
        return Watch(self._leaves, columns)


class Watch:
    def __init__(self, leaves: Any, columns: Any) -> None:
        self.leaves, self.seen = leaves, [[looks(a) for a in column] for column in columns]
        self.written = [a for i, column in enumerate(columns) if i != 1 for a in column]

    def unchanged(self, columns: Any) -> bool:
        CALLS["look"] += 1
        written = [a for i, column in enumerate(columns) if i != 1 for a in column]
        if any(a is not b for a, b in zip(written, self.written, strict=True)):
            return False
        if [[looks(a) for a in column] for column in columns] != self.seen:
            return False
        if any(np.may_share_memory(g, a) for g in columns[1] if g is not None for a in written):
            return False
        for leaf, g in zip(self.leaves, columns[1], strict=True):
            leaf.g = g
        return True


def looks(a: Any) -> Any:
    return (type(a), a.shape, a.strides, a.dtype, a.flags.writeable) if isinstance(a, np.ndarray) else type(a)


class Engine:
    def keeper(self) -> None:
        return None

    def plan(self, traced: Any, leaves: Any, keeper: Any, *, capturable: bool, alone: bool) -> Plan:
        return Plan(traced, [replace(leaf) for leaf in leaves if leaf.g is not None])

    def obstacle(self, leaf: Any) -> str:
        return ""

    def remark(self) -> str:
        return ""

    def stageable(self, leaf: Any) -> bool:
        return False

    def block_obstacle(self, x: Any, dtype: str) -> str:
        return "a toy has no block kernels"


def pytest_configure(config: Any) -> None:
    registry.ENGINES["numpy"] = Engine()  # type: ignore[assignment]


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"toy engine: {dict(CALLS)}")
