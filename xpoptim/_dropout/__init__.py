"""Dropout.

- ``layer``: the definition (which element is kept: ``random.kept``), the layer and the function
- ``arrays``: a mask and a scale applied to one array
"""

from .layer import Dropout, dropout

__all__ = ["Dropout", "dropout"]
