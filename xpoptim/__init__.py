"""Gradient optimizers and Dropout for NumPy and CuPy: one rule, fused in-place kernels, the same bits everywhere."""

from . import optimizers, random
from ._dropout import Dropout, dropout
from .engines.choose import engine
from .engines.cpu.threads import get_num_threads, set_num_threads
from .errors import TraceError
from .optimizer import Optimizer
from .optimizers import *  # noqa: F403
from .recipe.hyperparameters import Hyper

__version__ = "0.1.0"

__all__ = [
    "Dropout",
    "Hyper",
    "Optimizer",
    "TraceError",
    "dropout",
    "engine",
    "get_num_threads",
    "random",
    "set_num_threads",
]
__all__ += optimizers.__all__


def __dir__() -> list[str]:
    """Without the rooms of the package, which become its attributes when they are imported."""
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
