"""Make the stored trajectories: the same 100 gradients through torch, optax and Keras, in float64.

Run ``python tests/trajectories/make.py`` with the three libraries installed to rewrite ``torch.npz``, ``optax.npz`` and
``keras.npz`` beside this file, or ``--library NAME --out FILE`` for one of them. Each file holds the start,
the gradients, the parameters after the steps in ``STEPS`` for every case, and the versions that made it.

Nothing of the package under test is imported here.
"""

import argparse
import json
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

LIBRARIES = ("torch", "optax", "keras")
COUNT = 100
STEPS = (1, 2, 3, 10, 30, 100)
SHAPES = {"W": (3, 3), "b": (3,)}

# One setting for all libraries; those that only one of them has are spelled out in its cases.
LR = 0.03
MOMENTUM = 0.9
DECAY_RATE = 0.95
BETAS = (0.8, 0.97)
WEIGHT_DECAY = 0.05
CLIP_VALUE = 0.4
CLIP_NORM = 0.7


def schedule(step: int) -> float:
    """A learning rate that changes every step and is exact in float64: 1/32 down to 1/128."""
    return (1.0 - 0.75 * (step % 4) / 4.0) / 32.0


def problem() -> tuple[np.ndarray, np.ndarray]:
    """The start (12,) and the gradients (100, 12), whose elements span four orders of magnitude."""
    rng = np.random.default_rng(20240607)
    start = rng.standard_normal(12)
    scale = 10.0 ** np.linspace(-3, 1, 12)
    return start, rng.standard_normal((COUNT, 12)) * scale


def split(flat: np.ndarray) -> dict[str, np.ndarray]:
    """A vector of 12 as the leaves ``W`` (3, 3) and ``b`` (3,)."""
    return {"W": flat[:9].reshape(3, 3).copy(), "b": flat[9:].copy()}


def join(leaves: dict[str, np.ndarray]) -> np.ndarray:
    """The inverse of `split`."""
    return np.concatenate([leaves["W"].ravel(), leaves["b"].ravel()])


def keep(step: Callable[[int], np.ndarray]) -> np.ndarray:
    """Call ``step(0) ... step(99)`` and stack what it returned after the steps in ``STEPS``."""
    rows = [step(index) for index in range(COUNT)]
    return np.stack([rows[count - 1] for count in STEPS])


def torch_cases(start: np.ndarray, gradients: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import torch

    def run(make, *, before=None, each=None, start=start, gradients=gradients, split=split, join=join):
        leaves = {key: torch.tensor(value, requires_grad=True) for key, value in split(start).items()}
        optimizer = make(list(leaves.values()))

        def step(index: int) -> np.ndarray:
            for key, value in split(gradients[index]).items():
                leaves[key].grad = torch.tensor(value)
            if before is not None:
                before(leaves.values())
            if each is not None:
                for group in optimizer.param_groups:
                    group["lr"] = each(index)
            optimizer.step()
            return join({key: leaf.detach().numpy() for key, leaf in leaves.items()})

        return keep(step)

    optim = torch.optim
    cases = {
        "sgd": run(lambda p: optim.SGD(p, lr=LR)),
        "sgd_l2": run(lambda p: optim.SGD(p, lr=LR, weight_decay=WEIGHT_DECAY)),
        "sgd_maximize_l2": run(lambda p: optim.SGD(p, lr=LR, weight_decay=WEIGHT_DECAY, maximize=True)),
        "sgd_clip_value": run(
            lambda p: optim.SGD(p, lr=LR),
            before=lambda p: torch.nn.utils.clip_grad_value_(p, CLIP_VALUE),
        ),
        "momentum": run(lambda p: optim.SGD(p, lr=LR, momentum=MOMENTUM)),
        "nesterov": run(lambda p: optim.SGD(p, lr=LR, momentum=MOMENTUM, nesterov=True)),
        "adagrad": run(lambda p: optim.Adagrad(p, lr=LR, eps=1e-7)),
        "rmsprop": run(lambda p: optim.RMSprop(p, lr=LR, alpha=DECAY_RATE, eps=1e-7)),
        "adam": run(lambda p: optim.Adam(p, lr=LR, betas=BETAS, eps=1e-3)),
        "adam_eps0": run(lambda p: optim.Adam(p, lr=LR, betas=BETAS, eps=0.0)),
        "adam_defaults": run(lambda p: optim.Adam(p)),
        "adam_l2": run(lambda p: optim.Adam(p, lr=LR, betas=BETAS, eps=1e-3, weight_decay=WEIGHT_DECAY)),
        "adam_schedule": run(lambda p: optim.Adam(p, lr=LR, betas=BETAS, eps=1e-3), each=schedule),
        "adamw": run(lambda p: optim.AdamW(p, lr=LR, betas=BETAS, eps=1e-3, weight_decay=WEIGHT_DECAY)),
        "adamw_maximize_schedule": run(
            lambda p: optim.AdamW(p, lr=LR, betas=BETAS, eps=1e-3, weight_decay=WEIGHT_DECAY, maximize=True),
            each=schedule,
        ),
        "adam_complex": run(
            lambda p: optim.Adam(p, lr=LR, betas=BETAS, eps=1e-3, weight_decay=WEIGHT_DECAY),
            start=start[:6] + 1j * start[6:],
            gradients=gradients[:, :6] + 1j * gradients[:, 6:],
            split=lambda flat: {"z": flat.copy()},
            join=lambda leaves: leaves["z"].copy(),
        ),
    }
    return cases, {"torch": torch.__version__}


def optax_cases(start: np.ndarray, gradients: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    import optax

    def run(transform):
        params = {key: jnp.asarray(value) for key, value in split(start).items()}
        state = transform.init(params)

        def step(index: int) -> np.ndarray:
            nonlocal params, state
            grads = {key: jnp.asarray(value) for key, value in split(gradients[index]).items()}
            updates, state = transform.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return join({key: np.asarray(value) for key, value in params.items()})

        return keep(step)

    b1, b2 = BETAS
    cases = {
        "sgd": run(optax.sgd(LR)),
        "sgd_clip_value": run(optax.chain(optax.clip(CLIP_VALUE), optax.sgd(LR))),
        "sgd_clip_norm": run(optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.sgd(LR))),
        "sgd_clip_both": run(optax.chain(optax.clip(CLIP_VALUE), optax.clip_by_global_norm(CLIP_NORM), optax.sgd(LR))),
        "momentum": run(optax.sgd(LR, momentum=MOMENTUM)),
        "nesterov": run(optax.sgd(LR, momentum=MOMENTUM, nesterov=True)),
        "adagrad_eps0": run(optax.adagrad(LR, initial_accumulator_value=0.0, eps=0.0)),
        "rmsprop": run(optax.rmsprop(LR, decay=DECAY_RATE, eps=1e-7, eps_in_sqrt=False)),
        "adam": run(optax.adam(LR, b1=b1, b2=b2, eps=1e-3)),
        "adam_l2": run(optax.chain(optax.add_decayed_weights(WEIGHT_DECAY), optax.adam(LR, b1=b1, b2=b2, eps=1e-3))),
        "adam_clip_norm": run(
            optax.chain(optax.clip_by_global_norm(CLIP_NORM), optax.adam(LR, b1=b1, b2=b2, eps=1e-3))
        ),
        "adamw": run(optax.adamw(LR, b1=b1, b2=b2, eps=1e-3, weight_decay=WEIGHT_DECAY)),
    }
    return cases, {"optax": optax.__version__, "jax": jax.__version__}


def keras_cases(start: np.ndarray, gradients: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is first imported
    import keras
    import torch

    keras.config.set_floatx("float64")

    def run(optimizer, *, each=None):
        leaves = {key: keras.Variable(value, dtype="float64") for key, value in split(start).items()}
        optimizer.build(list(leaves.values()))

        def step(index: int) -> np.ndarray:
            grads = [torch.tensor(value) for value in split(gradients[index]).values()]
            if each is not None:
                optimizer.learning_rate = each(index)
            optimizer.apply(grads, list(leaves.values()))
            return join({key: keras.ops.convert_to_numpy(leaf) for key, leaf in leaves.items()})

        return keep(step)

    optim = keras.optimizers
    b1, b2 = BETAS
    # No `global_clipnorm`: with this backend Keras rounds its scale to float32.
    cases = {
        "sgd": run(optim.SGD(LR)),
        "momentum": run(optim.SGD(LR, momentum=MOMENTUM)),
        "momentum_schedule": run(optim.SGD(LR, momentum=MOMENTUM), each=schedule),
        "momentum_clip_value": run(optim.SGD(LR, momentum=MOMENTUM, clipvalue=CLIP_VALUE)),
        "nesterov": run(optim.SGD(LR, momentum=MOMENTUM, nesterov=True)),
        "adagrad_eps0": run(optim.Adagrad(LR, initial_accumulator_value=0.0, epsilon=0.0)),
        "rmsprop_eps0": run(optim.RMSprop(LR, rho=DECAY_RATE, epsilon=0.0)),
        "adam": run(optim.Adam(LR, beta_1=b1, beta_2=b2, epsilon=1e-3)),
        "adam_defaults": run(optim.Adam()),
        "adam_schedule": run(optim.Adam(LR, beta_1=b1, beta_2=b2, epsilon=1e-3), each=schedule),
        "adamw": run(optim.AdamW(LR, weight_decay=WEIGHT_DECAY, beta_1=b1, beta_2=b2, epsilon=1e-3)),
    }
    return cases, {"keras": keras.__version__, "torch": torch.__version__}


MAKERS = {"torch": torch_cases, "optax": optax_cases, "keras": keras_cases}


def make(library: str, path: Path) -> None:
    """Run one library's cases and write them to `path`."""
    start, gradients = problem()
    cases, versions = MAKERS[library](start, gradients)
    versions |= {"numpy": np.__version__, "python": platform.python_version()}
    stored: dict[str, Any] = {f"case_{name}": rows for name, rows in cases.items()}
    stored |= {"versions": np.array(json.dumps(versions, sort_keys=True)), "start": start, "gradients": gradients}
    np.savez_compressed(path, **stored)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--library", choices=LIBRARIES, action="append")
    parser.add_argument("--out", type=Path, help="file to write (one --library only)")
    options = parser.parse_args()
    libraries = options.library or list(LIBRARIES)
    if options.out is not None and len(libraries) != 1:
        parser.error("--out takes exactly one --library")
    for library in libraries:
        make(library, options.out or Path(__file__).with_name(f"{library}.npz"))


if __name__ == "__main__":
    main()
