"""Gradient optimizers and Dropout for NumPy and CuPy: one rule, fused in-place kernels, the same bits everywhere."""

from . import random
from ._dropout import Dropout, dropout
from .engines.choose import engine
from .engines.cpu.threads import get_num_threads, set_num_threads
from .errors import TraceError
from .optimizer import Optimizer
from .optimizers import SGD, AdaGrad, Adam, AdamW, Momentum, Nesterov, RMSprop

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdaGrad",
    "Adam",
    "AdamW",
    "Dropout",
    "Momentum",
    "Nesterov",
    "Optimizer",
    "RMSprop",
    "TraceError",
    "dropout",
    "engine",
    "get_num_threads",
    "random",
    "set_num_threads",
]


def __dir__() -> list[str]:
    """Without the rooms of the package, which become its attributes when they are imported."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
