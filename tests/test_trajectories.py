"""Trajectories of torch, optax and Keras: the stored ones, and those of the libraries that are installed.

`trajectories/make.py` ran the libraries and says with which versions; ``tests/trajectories/*.npz`` is what came
out. Only cases in which the libraries' formulas and the book's must agree are compared; why they must stands at each.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import xpoptim as xo

FOLDER = Path(__file__).with_name("trajectories")
_spec = importlib.util.spec_from_file_location("trajectory_maker", FOLDER / "make.py")
assert _spec is not None
assert _spec.loader is not None
make = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(make)

BETA1, BETA2 = make.BETAS
LR = {"lr": make.LR}
L2 = {"weight_decay": make.WEIGHT_DECAY}
DECOUPLED = {"weight_decay": make.WEIGHT_DECAY, "decoupled": True}
BETAS = {"beta1": BETA1, "beta2": BETA2}
HEAVY = LR | {"momentum": make.MOMENTUM}


def scaled_eps(eps: float, beta2: float) -> Callable[[int], float]:
    """torch and optax add eps to the *corrected* root: m_hat / (sqrt(v_hat) + eps).

    Multiplied out with c = sqrt(1 - beta2**t), that is c * m_hat / (sqrt(v) + c*eps): the book's form with the
    epsilon scaled by c. As epsilon may be a schedule, the two agree exactly.
    """
    return lambda step: eps * math.sqrt(1.0 - beta2 ** (step + 1))


HAT_EPS = {"eps": scaled_eps(1e-3, BETA2)}
ADAM_HAT = LR | BETAS | HAT_EPS

# With a constant lr, torch's and optax's buffer b and the book's v are v = -lr*b: lr outside the buffer or inside
# gives the same path. (With a schedule they differ, so that case is taken from Keras, which has lr inside.)
# Their Nesterov step -lr*(g + momentum*b_new) is momentum²*v - (1 + momentum)*lr*g in the book's terms.
SGD_FAMILY: dict[str, Callable[[], xo.Optimizer]] = {
    "sgd": lambda: xo.SGD(**LR),
    "momentum": lambda: xo.Momentum(**HEAVY),
    "nesterov": lambda: xo.Nesterov(**HEAVY),
    "sgd_clip_value": lambda: xo.SGD(**LR, clip_value=make.CLIP_VALUE),
}

CASES: dict[str, dict[str, Callable[[], xo.Optimizer]]] = {
    "torch": SGD_FAMILY
    | {
        # L2: weight_decay*p is added to the gradient, after `maximize` has negated it, in both.
        "sgd_l2": lambda: xo.SGD(**LR, **L2),
        "sgd_maximize_l2": lambda: xo.SGD(**LR, **L2, maximize=True),
        # Epsilon outside the root and a sum that starts at 0, as in the book.
        "adagrad": lambda: xo.AdaGrad(**LR, eps=1e-7),
        "rmsprop": lambda: xo.RMSprop(**LR, decay_rate=make.DECAY_RATE, eps=1e-7),
        "adam": lambda: xo.Adam(**ADAM_HAT),
        # Without epsilon its place does not matter.
        "adam_eps0": lambda: xo.Adam(**LR, **BETAS, eps=0.0),
        "adam_defaults": lambda: xo.Adam(lr=1e-3, eps=scaled_eps(1e-8, 0.999)),
        "adam_l2": lambda: xo.Adam(**ADAM_HAT, **L2),
        "adam_schedule": lambda: xo.Adam(**(ADAM_HAT | {"lr": make.schedule})),
        # Decoupled decay multiplies by 1 - lr*weight_decay before the step, with the scheduled lr.
        "adamw": lambda: xo.AdamW(**ADAM_HAT, weight_decay=make.WEIGHT_DECAY),
        "adamw_maximize_schedule": lambda: xo.Adam(**(ADAM_HAT | {"lr": make.schedule}), **DECOUPLED, maximize=True),
        # torch, too, handles a complex parameter as a pair of reals.
        "adam_complex": lambda: xo.Adam(**ADAM_HAT, **L2),
    },
    "optax": SGD_FAMILY
    | {
        # optax scales by max_norm/norm without torch's 1e-6, which is min(1, clip/norm).
        "sgd_clip_norm": lambda: xo.SGD(**LR, clip_norm=make.CLIP_NORM),
        "sgd_clip_both": lambda: xo.SGD(**LR, clip_value=make.CLIP_VALUE, clip_norm=make.CLIP_NORM),
        # optax puts epsilon inside the root and starts at 0.1: made to start at 0, without epsilon.
        "adagrad_eps0": lambda: xo.AdaGrad(**LR, eps=0.0),
        # With ``eps_in_sqrt=False`` optax takes the book's place for epsilon.
        "rmsprop": lambda: xo.RMSprop(**LR, decay_rate=make.DECAY_RATE, eps=1e-7),
        "adam": lambda: xo.Adam(**ADAM_HAT),
        # Decayed weights added ahead of Adam are L2 in the gradient.
        "adam_l2": lambda: xo.Adam(**ADAM_HAT, **L2),
        "adam_clip_norm": lambda: xo.Adam(**ADAM_HAT, clip_norm=make.CLIP_NORM),
        # optax adds weight_decay*p to the update before lr scales both: p*(1 - lr*weight_decay) - lr*u.
        "adamw": lambda: xo.AdamW(**ADAM_HAT, weight_decay=make.WEIGHT_DECAY),
    },
    "keras": {
        "sgd": lambda: xo.SGD(**LR),
        # lr is inside the buffer here, so a schedule agrees as well.
        "momentum": lambda: xo.Momentum(**HEAVY),
        "momentum_schedule": lambda: xo.Momentum(lr=make.schedule, momentum=make.MOMENTUM),
        "momentum_clip_value": lambda: xo.Momentum(**HEAVY, clip_value=make.CLIP_VALUE),
        "nesterov": lambda: xo.Nesterov(**HEAVY),
        # Keras has epsilon inside the root and starts at 0.1: made to start at 0, without epsilon.
        "adagrad_eps0": lambda: xo.AdaGrad(**LR, eps=0.0),
        "rmsprop_eps0": lambda: xo.RMSprop(**LR, decay_rate=make.DECAY_RATE, eps=0.0),
        # Keras' Adam is the book's: lr corrected, epsilon beside the uncorrected root, default 1e-7.
        "adam": lambda: xo.Adam(**LR, **BETAS, eps=1e-3),
        "adam_defaults": lambda: xo.Adam(),
        "adam_schedule": lambda: xo.Adam(lr=make.schedule, **BETAS, eps=1e-3),
        "adamw": lambda: xo.AdamW(**LR, **BETAS, eps=1e-3, weight_decay=make.WEIGHT_DECAY),
    },
}


def run(opt: xo.Optimizer, start: np.ndarray, gradients: np.ndarray, *, complex_: bool) -> np.ndarray:
    """The same 100 steps through `opt`, as in the maker."""
    if complex_:
        params: dict[str, Any] = {"z": start[:6] + 1j * start[6:]}

        def step(index: int) -> np.ndarray:
            opt.update(params, {"z": gradients[index, :6] + 1j * gradients[index, 6:]})
            return params["z"].copy()

    else:
        params = make.split(start)

        def step(index: int) -> np.ndarray:
            opt.update(params, make.split(gradients[index]))
            return make.join(params)

    return make.keep(step)


def compare(path: Path, library: str, case: str, engine: str) -> None:
    """Both sides compute in float64 with other associations; 1e-11 is what 100 steps may gather of their last bits."""
    with np.load(path) as stored:
        expected = stored[f"case_{case}"]
        start, gradients = stored["start"], stored["gradients"]
    with xo.engine(engine):
        actual = run(CASES[library][case](), start, gradients, complex_=expected.dtype.kind == "c")
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=1e-11, atol=1e-13)


ALL_CASES = [(library, case) for library, cases in CASES.items() for case in cases]


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize(("library", "case"), ALL_CASES)
def test_stored_trajectory(library: str, case: str, engine: str) -> None:
    compare(FOLDER / f"{library}.npz", library, case, engine)


@pytest.mark.parametrize("library", make.LIBRARIES)
def test_stored_file_is_complete(library: str) -> None:
    """Every stored case is compared, every compared case is stored, and the makers' versions are on record."""
    with np.load(FOLDER / f"{library}.npz") as stored:
        cases = {name.removeprefix("case_") for name in stored.files if name.startswith("case_")}
        versions = json.loads(str(stored["versions"]))
    assert cases == set(CASES[library])
    assert {library, "numpy", "python"} <= set(versions)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs the maker with an installed library, in a process of its own and at most once."""
    made: dict[str, Path] = {}
    folder = tmp_path_factory.mktemp("live")

    def path(library: str) -> Path:
        needed = [library, "torch"] if library == "keras" else [library]
        for module in needed:
            if importlib.util.find_spec(module) is None:
                pytest.skip(f"{module} is not installed")
        if library not in made:
            out = folder / f"{library}.npz"
            command = [sys.executable, str(FOLDER / "make.py"), "--library", library, "--out", str(out)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=120, check=False, env=dict(os.environ)
            )
            assert done.returncode == 0, done.stderr
            made[library] = out
        return made[library]

    return path


@pytest.mark.parametrize(("library", "case"), ALL_CASES)
def test_live_trajectory(live: Callable[[str], Path], library: str, case: str) -> None:
    compare(live(library), library, case, "auto")
