"""WHAT: the maths. Each optimizer is its defaults, its slots and its rule, on one screen.

- ``descent``: SGD, Momentum, Nesterov
- ``adaptive``: AdaGrad, RMSprop
- ``adam``: Adam, AdamW
"""

from .adam import Adam, AdamW
from .adaptive import AdaGrad, RMSprop
from .descent import SGD, Momentum, Nesterov

# The registry of rules, in the order of the README. Exports, its table and the cases of the tests follow it.
__all__ = ["SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW"]  # noqa: RUF022
