"""Each rule against float64 oracles, against numbers worked out by hand, and against the book's code."""

import math
from collections.abc import Callable

import numpy as np
import oracles
import pytest
from cases import CASES
from helpers import (
    DTYPES,
    OPTION_COMBINATIONS,
    ORACLES,
    RULES,
    SLOT_DTYPES,
    assert_follows_oracle,
    assert_same_bits,
    flattened,
    leaves,
    make_optimizer,
    option_id,
    oracle_problem,
    random_values,
    rule_hyperparameters,
    rule_options,
)

import xpoptim as xo

ENGINES = ("reference", "fused")


@pytest.mark.smoke
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RULES)
def test_rule_follows_its_oracle(name: str, engine: str) -> None:
    assert_follows_oracle(
        make_optimizer(name), ORACLES[name], rule_hyperparameters(name), engine=engine, **rule_options(name)
    )


@pytest.mark.parametrize("name", RULES)
def test_default_hyperparameters_follow_the_oracle(name: str) -> None:
    assert_follows_oracle(getattr(xo, name)(), ORACLES[name], CASES[name].defaults, **CASES[name].options)


@pytest.mark.parametrize("options", OPTION_COMBINATIONS, ids=option_id)
@pytest.mark.parametrize("name", ["SGD", "Nesterov", "Adam"])
def test_options_follow_the_oracle(name: str, options: dict) -> None:
    assert_follows_oracle(make_optimizer(name, **options), ORACLES[name], rule_hyperparameters(name), **options)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RULES)
def test_all_options_together_follow_the_oracle(name: str, engine: str) -> None:
    options = {"weight_decay": 0.3, "clip_value": 0.5, "clip_norm": 0.8, "maximize": True}
    for decoupled in (False, True):
        chosen = options | {"decoupled": decoupled}
        assert_follows_oracle(
            make_optimizer(name, **chosen), ORACLES[name], rule_hyperparameters(name), engine=engine, **chosen
        )


def slow_schedule(step: int) -> float:
    return 0.1 / (1 + step)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", RULES)
def test_schedules_follow_the_oracle(name: str, engine: str) -> None:
    """A callable is called with 0 at the first update, for every hyperparameter."""
    schedules = {
        "lr": slow_schedule,
        "momentum": lambda step: 0.9 - 0.5 / (1 + step),
        "decay_rate": lambda step: 0.9 - 0.5 / (1 + step),
        "beta1": lambda step: 0.9 - 0.5 / (1 + step),
        "beta2": lambda step: 0.99 - 0.5 / (1 + step),
        "eps": lambda step: 1e-3 * (1 + step),
    }
    if name == "Nesterov":
        # Sutskever's form and the book's agree only while momentum is constant.
        del schedules["momentum"]
    chosen = {key: schedules.get(key, value) for key, value in rule_hyperparameters(name).items()}
    opt = getattr(xo, name)(**(RULES[name] | chosen))
    assert_follows_oracle(opt, ORACLES[name], chosen, engine=engine, **rule_options(name))


@pytest.mark.parametrize("name", ["Momentum", "Adam"])
def test_complex_parameters_are_pairs_of_reals(name: str) -> None:
    """The moments of real and imaginary part are kept apart; |g|² in their place is torch issue 59998."""
    start, gradients = oracle_problem()
    expected = oracles.trajectory(
        ORACLES[name], [*start, *start[::-1]], [[*g, *g[::-1]] for g in gradients], rule_hyperparameters(name)
    )
    opt, params = make_optimizer(name), {"z": start + 1j * start[::-1]}
    for index, g in enumerate(gradients):
        opt.update(params, {"z": g + 1j * g[::-1]})
        actual = np.concatenate([params["z"].real, params["z"].imag])
        np.testing.assert_allclose(actual, expected[index], rtol=1e-12, atol=1e-13)


def test_complex_clipping_is_by_part_and_by_modulus() -> None:
    """`clip_value` clamps each part; the global norm adds both parts' squares."""
    params = {"z": np.array([0j])}
    xo.SGD(lr=1.0, clip_value=2.0).update(params, {"z": np.array([3 - 1j])})
    assert params["z"][0] == -2 + 1j
    params = {"z": np.array([0j])}
    xo.SGD(lr=1.0, clip_norm=2.5).update(params, {"z": np.array([3 - 4j])})
    assert params["z"][0] == -1.5 + 2j


# Worked out by hand. All numbers are exact in float16 already, so they must come out exactly in every dtype.
HAND = {
    # p = 2 - 0.5*1 = 1.5; then 1.5 - 0.5*4 = -0.5
    "SGD": ({"lr": 0.5}, [1.0, 4.0], [1.5, -0.5], {}),
    # v = -0.5, p = 1.5; v = 0.5*-0.5 - 0.5 = -0.75, p = 0.75
    "Momentum": ({"lr": 0.5, "momentum": 0.5}, [1.0, 1.0], [1.5, 0.75], {"v": -0.75}),
    # p = 2 + 0.25*0 - 1.5*0.5*1 = 1.25, v = -0.5; p = 1.25 + 0.25*-0.5 - 0.75 = 0.375, v = -0.75
    # (with the new v in place of the old one, a known error elsewhere, the first p would be 1.125)
    "Nesterov": ({"lr": 0.5, "momentum": 0.5}, [1.0, 1.0], [1.25, 0.375], {"v": -0.75}),
    # h = 9, p = 2 - 3/(3+1) = 1.25; then g = 0: both stay
    "AdaGrad": ({"lr": 1.0, "eps": 1.0}, [3.0, 0.0], [1.25, 1.25], {"h": 9.0}),
    # h = 0.25*16 = 4, p = 2 - 0.5*4/(2+2) = 1.5; h = 0.75*4 + 0.25*4 = 4, p = 1.5 - 0.5*2/(2+2) = 1.25
    "RMSprop": ({"lr": 0.5, "decay_rate": 0.75, "eps": 2.0}, [4.0, 2.0], [1.5, 1.25], {"h": 4.0}),
    # lr_t = 1*sqrt(1-0.75)/(1-0.75) = 2; m = 0.25*4 = 1, v = 0.25*16 = 4; p = 2 - 2*1/(2+2) = 1.5
    "Adam": ({"lr": 1.0, "beta1": 0.75, "beta2": 0.75, "eps": 2.0}, [4.0], [1.5], {"m": 1.0, "v": 4.0}),
    # first p*(1 - 1*0.5) = 1, then Adam's -0.5
    "AdamW": (
        {"lr": 1.0, "beta1": 0.75, "beta2": 0.75, "eps": 2.0, "weight_decay": 0.5},
        [4.0],
        [0.5],
        {"m": 1.0, "v": 4.0},
    ),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_steps_worked_out_by_hand(name: str, dtype: str, engine: str) -> None:
    hyperparameters, gradients, expected, slots = HAND[name]
    # For complex numbers both parts make the same steps.
    unit = np.array(1 + 1j if dtype.startswith("complex") else 1).astype(DTYPES[dtype])
    opt, params = getattr(xo, name)(**hyperparameters), {"p": np.array([2 * unit])}
    assert params["p"].dtype == DTYPES[dtype]
    with xo.engine(engine):
        for g, p in zip(gradients, expected, strict=True):
            opt.update(params, {"p": np.array([g * unit]).astype(DTYPES[dtype])})
            assert_same_bits(params["p"], np.array([p * unit]).astype(DTYPES[dtype]))
    for slot, value in slots.items():
        kept = opt.state["slots"][slot]["p"]
        assert_same_bits(kept, np.array([value * unit]).astype(SLOT_DTYPES[dtype]), slot)


def test_adagrad_accumulates_squares() -> None:
    """h = 9, then 9 + 16 = 25: the root of the sum, not the sum of the roots."""
    opt, params = xo.AdaGrad(lr=1.0, eps=3.0), {"p": np.array([2.0])}
    opt.update(params, {"p": np.array([3.0])})
    assert params["p"][0] == 2.0 - 3.0 / 6.0
    opt.update(params, {"p": np.array([4.0])})
    assert params["p"][0] == 1.5 - 4.0 / 8.0


def test_order_of_options_worked_out_by_hand() -> None:
    """clip by norm (3, 4) to (1.5, 2); negate (-1.5, -2); add 0.5*2 of L2 (-0.5, -1); step of 0.5."""
    opt = xo.SGD(lr=0.5, clip_norm=2.5, maximize=True, weight_decay=0.5)
    params = {"p": np.array([2.0, 2.0])}
    opt.update(params, {"p": np.array([3.0, 4.0])})
    assert params["p"].tolist() == [2.25, 2.5]
    # By value first: (3, 4) to (3, 3), whose norm is 3*sqrt(2); the other way round both would shrink differently.
    opt = xo.SGD(lr=1.0, clip_value=3.0, clip_norm=3.0)
    params = {"p": np.array([0.0, 0.0])}
    opt.update(params, {"p": np.array([3.0, 4.0])})
    scale = 3.0 / math.sqrt(18.0)
    assert params["p"].tolist() == [-3.0 * scale, -3.0 * scale]


def test_decoupled_decay_is_not_seen_by_the_moments() -> None:
    opt, params = xo.Adam(weight_decay=0.5, decoupled=True), {"p": np.array([2.0])}
    opt.update(params, {"p": np.array([1.0])})
    np.testing.assert_allclose(opt.state["slots"]["m"]["p"], [0.1], rtol=1e-15)
    opt, params = xo.Adam(weight_decay=0.5), {"p": np.array([2.0])}
    opt.update(params, {"p": np.array([1.0])})
    np.testing.assert_allclose(opt.state["slots"]["m"]["p"], [0.2], rtol=1e-15)


# The book's formulas as plain array code.


def plain_sgd(p, g, s, t, *, lr):
    p -= lr * g


def plain_momentum(p, g, s, t, *, lr, momentum):
    s["v"] = momentum * s["v"] - lr * g
    p += s["v"]


def plain_nesterov(p, g, s, t, *, lr, momentum):
    p += momentum * momentum * s["v"] - (1 + momentum) * lr * g
    s["v"] = momentum * s["v"] - lr * g


def plain_adagrad(p, g, s, t, *, lr, eps):
    s["h"] += g * g
    p -= lr * g / (np.sqrt(s["h"]) + eps)


def plain_rmsprop(p, g, s, t, *, lr, decay_rate, eps):
    s["h"] = decay_rate * s["h"] + (1 - decay_rate) * g * g
    p -= lr * g / (np.sqrt(s["h"]) + eps)


def plain_adam(p, g, s, t, *, lr, beta1, beta2, eps):
    lr_t = lr * math.sqrt(1.0 - beta2**t) / (1.0 - beta1**t)
    s["m"] += (1 - beta1) * (g - s["m"])
    s["v"] += (1 - beta2) * (g * g - s["v"])
    p -= lr_t * s["m"] / (np.sqrt(s["v"]) + eps)


# The betas are sums of few powers of two, so that their powers are exact, by whatever algorithm.
PLAIN: dict[str, tuple[Callable[..., None], dict[str, float]]] = {
    "SGD": (plain_sgd, {"lr": 0.07}),
    "Momentum": (plain_momentum, {"lr": 0.07, "momentum": 0.9}),
    "Nesterov": (plain_nesterov, {"lr": 0.07, "momentum": 0.9}),
    "AdaGrad": (plain_adagrad, {"lr": 0.07, "eps": 1e-7}),
    "RMSprop": (plain_rmsprop, {"lr": 0.07, "decay_rate": 0.99, "eps": 1e-7}),
    "Adam": (plain_adam, {"lr": 0.07, "beta1": 0.75, "beta2": 0.875, "eps": 1e-7}),
}


@pytest.mark.smoke
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("name", PLAIN)
def test_plain_array_code_gives_the_same_bits(name: str, dtype: str, engine: str) -> None:
    """Python floats do not promote in NumPy, so the book's formulas round where the rule must: nowhere else."""
    plain, hyperparameters = PLAIN[name]
    compute = SLOT_DTYPES[dtype]
    rng = np.random.default_rng(3)
    params = {"p": random_values(rng, (257,), DTYPES[dtype])}
    expected = params["p"].copy()
    slots = {key: np.zeros(257, compute) for key in "vhm"}
    opt = getattr(xo, name)(**hyperparameters)
    with xo.engine(engine):
        for t in range(1, 13):
            g = random_values(rng, (257,), DTYPES[dtype])
            opt.update(params, {"p": g})
            p = expected.astype(compute)
            plain(p, g.astype(compute), slots, t, **hyperparameters)
            expected = p.astype(DTYPES[dtype])
            assert_same_bits(params["p"], expected, f"step {t}")
            for slot, value in opt.state["slots"].items():
                assert_same_bits(value["p"], slots[slot], f"slot {slot} in step {t}")


# Errors found in known libraries and texts.


class MisprintedMomentum(xo.Optimizer):
    """The misprint in circulation: ``v += lr*g; p += v``. It climbs and never uses `momentum`."""

    lr: float = 0.01
    momentum: float = 0.9
    slots = ("v",)

    @staticmethod
    def rule(xp, p, g, v, *, lr, momentum):
        v = v + lr * g
        return p + v, v


def test_the_misprinted_momentum_fails() -> None:
    opt = MisprintedMomentum(**RULES["Momentum"])
    with pytest.raises(AssertionError, match="step 1"):
        assert_follows_oracle(opt, oracles.momentum, rule_hyperparameters("Momentum"))


def test_momentum_descends() -> None:
    """On f(p) = p² the first steps of Momentum, as of every rule, go downhill."""
    for name in RULES:
        opt, params = make_optimizer(name), {"p": np.array([3.0])}
        for _ in range(3):
            opt.update(params, {"p": 2 * params["p"]})
        assert abs(params["p"][0]) < 3.0, name


def test_small_complements_are_formed_in_float64() -> None:
    """``1 - beta2`` formed in float32 is wrong by 1.3e-5; formed in float64 and rounded once it is not."""
    params = {"p": np.zeros(1, np.float32)}
    opt = xo.Adam(beta2=0.999)
    opt.update(params, {"p": np.ones(1, np.float32)})
    v = opt.state["slots"]["v"]["p"]
    assert v[0] == np.float32(1 - 0.999)
    assert v[0] != np.float32(1) - np.float32(0.999)


def test_hyperparameters_do_not_take_the_dtype_of_the_parameters() -> None:
    """``beta2 = 0.999`` in bfloat16 is 1, and Adam would divide by zero (optax issues 1414 and 1532)."""
    bfloat16 = DTYPES["bfloat16"]
    opt, params = xo.Adam(lr=0.5), {"p": np.ones(3, bfloat16)}
    opt.update(params, {"p": np.full(3, 2, bfloat16)})
    assert params["p"].astype(np.float32).tolist() == [0.5, 0.5, 0.5]
    assert opt.state["slots"]["v"]["p"].dtype == np.float32
    np.testing.assert_allclose(opt.state["slots"]["v"]["p"], 4 * 0.001, rtol=1e-6)


def test_float64_hyperparameters_do_not_promote_float32_parameters() -> None:
    """Under NumPy 2 ``np.float64`` promotes float32 arrays; the optimizer's attributes are plain floats."""
    hyperparameters = {"lr": np.float64(0.1), "beta1": np.float64(0.9), "beta2": np.float64(0.99)}
    opt, plain = xo.Adam(**hyperparameters), xo.Adam(lr=0.1, beta1=0.9, beta2=0.99)
    for key in hyperparameters:
        assert type(getattr(opt, key)) is float
    params, expected = {"p": np.ones(5, np.float32)}, {"p": np.ones(5, np.float32)}
    for engine in ENGINES:
        with xo.engine(engine):
            opt.update(params, {"p": np.full(5, 0.3, np.float32)})
            plain.update(expected, {"p": np.full(5, 0.3, np.float32)})
    assert params["p"].dtype == np.float32
    assert {a.dtype for slot in opt.state["slots"].values() for a in slot.values()} == {np.dtype(np.float32)}
    assert_same_bits(params["p"], expected["p"])


def test_bias_correction_uses_powers_of_the_step() -> None:
    """``1 - beta`` in place of ``1 - beta**t`` is right in the first step alone (an error found in tike)."""
    opt, params = xo.Adam(lr=1.0, beta1=0.9, beta2=0.999, eps=0.0), {"p": np.zeros(1)}
    for t in range(1, 6):
        before = params["p"][0]
        opt.update(params, {"p": np.array([5.0])})
        # A constant gradient has both corrected moments equal to g and g²: each step is exactly lr long.
        assert before - params["p"][0] == pytest.approx(1.0, rel=1e-12), t


def test_one_update_is_one_step_for_all_parameters() -> None:
    """The step must not advance twice (thinc's RAdam), nor once a parameter."""
    opt = xo.Adam(lr=1.0, eps=0.0)
    params = {str(i): np.zeros(2) for i in range(40)}
    opt.update(params, {key: np.full(2, 3.0) for key in params})
    assert opt.state["step"] == 1
    for p in params.values():
        np.testing.assert_allclose(p, -1.0, rtol=1e-12)


def test_negative_zero_and_zero_gradients() -> None:
    """A zero gradient moves nothing, and AdaGrad with a zero sum and eps > 0 divides 0 by eps, not 0 by 0."""
    for name in RULES:
        opt = make_optimizer(name, **({"weight_decay": 0.0} if name == "AdamW" else {}))
        params = {"p": np.array([1.0, -2.0, 3.0])}
        opt.update(params, {"p": np.array([0.0, -0.0, 0.0])})
        assert params["p"].tolist() == [1.0, -2.0, 3.0], name


@pytest.mark.smoke
def test_the_books_four_paths() -> None:
    """f = x²/20 + y² from (-7, 2), as in the book's figure: Python floats, 30 steps, settings of the figure."""
    settings = {
        "SGD": {"lr": 0.95},
        "Momentum": {"lr": 0.1, "momentum": 0.9},
        "AdaGrad": {"lr": 1.5, "eps": 1e-7},
        "Adam": {"lr": 0.3, "beta1": 0.9, "beta2": 0.999, "eps": 1e-7},
    }
    for name, hyperparameters in settings.items():
        opt = getattr(xo, name)(**hyperparameters)
        params, path = {"x": -7.0, "y": 2.0}, []
        gradients = []
        for _ in range(30):
            gradients.append([params["x"] / 10.0, 2.0 * params["y"]])
            opt.update(params, {"x": gradients[-1][0], "y": gradients[-1][1]})
            path.append([params["x"], params["y"]])
        assert type(params["x"]) is float
        expected = oracles.trajectory(ORACLES[name], [-7.0, 2.0], gradients, hyperparameters)
        np.testing.assert_allclose(path, expected, rtol=1e-12, atol=1e-13, err_msg=name)


def test_flat_helpers_are_inverse() -> None:
    start, _ = oracle_problem()
    assert flattened(leaves(start)).tolist() == start.tolist()
