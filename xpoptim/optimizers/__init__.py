"""WHAT: the maths. Each optimizer is its defaults, its slots and its rule, on one screen.

- ``descent``: SGD, Momentum, Nesterov
- ``adaptive``: AdaGrad, RMSprop
- ``adam``: Adam, AdamW
"""

from .adam import Adam, AdamW
from .adaptive import AdaGrad, RMSprop
from .descent import SGD, Momentum, Nesterov

__all__ = ["SGD", "AdaGrad", "Adam", "AdamW", "Momentum", "Nesterov", "RMSprop"]
