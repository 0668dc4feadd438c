"""The rules of the package, a case each: its oracle, its defaults, and settings to test it with."""

from collections.abc import Callable
from typing import Any, NamedTuple

import oracles


class Case(NamedTuple):
    """``defaults`` are those of the arguments that are also taken by position, in order: the book's.

    ``settings`` are away from these and from 0 and 1. ``options`` are common options of which the rule has defaults of
    its own, and ``settings`` for them.
    """

    oracle: Callable[..., float]
    defaults: dict[str, float]
    settings: dict[str, Any]
    options: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "SGD": Case(oracles.sgd, {"lr": 0.01}, {"lr": 0.1}),
    "Momentum": Case(oracles.momentum, {"lr": 0.01, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.8}),
    "Nesterov": Case(oracles.nesterov, {"lr": 0.01, "momentum": 0.9}, {"lr": 0.1, "momentum": 0.8}),
    "AdaGrad": Case(oracles.adagrad, {"lr": 0.01, "eps": 1e-7}, {"lr": 0.1, "eps": 1e-3}),
    "RMSprop": Case(
        oracles.rmsprop,
        {"lr": 0.01, "decay_rate": 0.99, "eps": 1e-7},
        {"lr": 0.1, "decay_rate": 0.7, "eps": 1e-3},
    ),
    "Adam": Case(
        oracles.adam,
        {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7},
        {"lr": 0.1, "beta1": 0.6, "beta2": 0.7, "eps": 1e-3},
    ),
    "AdamW": Case(
        oracles.adam,
        {"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7},
        {"lr": 0.1, "beta1": 0.6, "beta2": 0.7, "eps": 1e-3, "weight_decay": 0.2},
        {"weight_decay": 0.01, "decoupled": True},
    ),
}
