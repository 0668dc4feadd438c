"""The demo: real training on real data, with pictures; ``python -m xpoptim demo`` runs it.

The optimizers and Dropout come from the library; everything else here (network, backpropagation, data,
pictures) is what a user of the library would write.

- ``network``: a network with its backpropagation
- ``surface``: a surface to descend
- ``training``: trains the network with every optimizer
- ``plain``: the same optimizers in plain NumPy, to compare with
- ``show``: tables and progress
- ``pictures``: what is drawn
- ``info``: versions, engines and devices, for ``python -m xpoptim info``
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path

import xpoptim as xo

from ..engines.choose import selected

EXTRA = {"rich": "rich", "matplotlib": "matplotlib", "sklearn": "scikit-learn"}  # module: distribution


class DemoError(Exception):
    """The demo cannot run here; the message is one line that says why and what to do."""


def missing_extra() -> dict[str, str]:
    """What the demo needs and cannot import: distribution name to the reason."""
    missing = {}
    for module, distribution in EXTRA.items():
        try:
            import_module(module)
        except ModuleNotFoundError as error:
            missing[distribution] = "not installed" if error.name == module else one_line(error)
        except Exception as error:  # a broken installation may raise anything; to the user it is as good as none
            missing[distribution] = one_line(error)
    return missing


def one_line(error: Exception) -> str:
    """The error's message without its line breaks."""
    return " ".join(str(error).split()) or type(error).__name__


def check_environment() -> None:
    """Refuse bad values of XPOPTIM_ENGINE and XPOPTIM_NUM_THREADS before the training meets them."""
    try:
        selected()
        xo.get_num_threads()
    except ValueError as error:
        raise DemoError(one_line(error)) from error


def run(backend: str, seed: int, out: Path, steps: int) -> None:
    """Train, print the table, save the pictures.

    Parameters
    ----------
    backend
        ``"numpy"`` or ``"cupy"``.
    seed
        Seed of split, weights, mini-batches and Dropout masks.
    out
        Folder for the pictures; made if it does not exist.
    steps
        Training steps of each optimizer, and of each network of the Dropout picture.

    Raises
    ------
    DemoError
        A package is missing, the folder cannot be written, there is no GPU for CuPy, or an environment variable
        of xpoptim's has a bad value.
    """
    missing = missing_extra()
    if missing:
        reasons = ", ".join(f"{name} ({reason})" for name, reason in missing.items())
        raise DemoError(
            f"cannot import {reasons}: install what the demo needs with  pip install '.[demo]'  "
            "in xpoptim's source folder"
        )
    check_environment()
    # Only now may the modules that import those packages be loaded.
    show = import_module("xpoptim.demo.show")
    show.main_job(backend, seed, out, steps)
