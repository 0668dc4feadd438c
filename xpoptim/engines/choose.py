"""Which engine serves a call: a context manager, the environment variable ``XPOPTIM_ENGINE``, or the default."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Literal, TypeAlias, get_args

Choice: TypeAlias = Literal["auto", "fused", "reference"]
CHOICES: tuple[str, ...] = get_args(Choice)

_chosen: ContextVar[str | None] = ContextVar("xpoptim_engine", default=None)
_from_environment: str | None = None


def _checked(name: object, source: str) -> str:
    if name not in CHOICES:
        raise ValueError(f"{source} is {name!r}: the engines are {', '.join(map(repr, CHOICES))}")
    return str(name)


def selected() -> str:
    """The engine in force here: "auto", "fused" or "reference"."""
    global _from_environment
    name = _chosen.get()
    if name is not None:
        return name
    if _from_environment is None:
        _from_environment = _checked(os.environ.get("XPOPTIM_ENGINE") or "auto", "XPOPTIM_ENGINE")
    return _from_environment


def engine(name: Choice) -> AbstractContextManager[None]:
    """Choose the engine for the updates made inside the ``with`` block (in this thread or task).

    ``"auto"`` (the default) runs a fused kernel for every leaf that can have one and the reference for the others;
    ``"reference"`` runs plain Array API operations; ``"fused"`` insists on kernels, and raises ``ValueError``,
    naming the leaf and the reason, where there can be none. The results have the same bits. The environment
    variable ``XPOPTIM_ENGINE`` sets the default.

    >>> import numpy as np, xpoptim as xo
    >>> params = {"W": np.ones(3)}
    >>> with xo.engine("reference"):
    ...     xo.SGD(lr=0.5).update(params, {"W": np.ones(3)})
    >>> params["W"]
    array([0.5, 0.5, 0.5])
    """
    return _engine(_checked(name, "engine"))  # a wrong name is an error here, not only inside `with`


@contextmanager
def _engine(name: str) -> Iterator[None]:
    # A signal handler may raise after any call: before the token is stored, hence `before`, or within `suppress`.
    before, token = _chosen.get(), None
    try:
        token = _chosen.set(name)
        yield
    finally:
        if token is None:
            _chosen.set(before)
        else:
            try:  # noqa: SIM105
                _chosen.reset(token)
            except ValueError:  # in another context, where a generator was closed: nothing was chosen there
                pass
