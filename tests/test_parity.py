"""The fused engine against the reference on NumPy, bit for bit, any NaN being equal to any NaN.

Over rules, dtypes of parameters and gradients, shapes, layouts, special values, thread counts and options; every test
makes several steps, so that slots with special values are read as well as written.
"""

import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import strategies
from helpers import (
    COMPLEX_DTYPES,
    DTYPES,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    OPTION_COMBINATIONS,
    OPTION_VALUES,
    REAL_DTYPES,
    RULES,
    SLOT_DTYPES,
    assert_parity,
    assert_same_tree,
    make_optimizer,
    option_id,
    random_values,
    special_values,
    threads,
    traced,
)
from hypothesis import given
from hypothesis import strategies as st

import xpoptim as xo
from xpoptim._dropout import layer
from xpoptim.codegen.llvm.elementwise import _LARGE
from xpoptim.engines.cpu import jit
from xpoptim.engines.cpu import plan as cpu
from xpoptim.engines.cpu.blocks import BlockKernel

SHAPES: tuple[tuple[int, ...], ...] = (
    (),
    (0,),
    (3, 0, 2),
    (1,),
    (7,),
    (31,),
    (33,),
    (100,),
    (4099,),
    (5, 7, 3),
)


def gradient_dtypes(dtype: str) -> dict[str, Any]:
    """The dtypes a gradient of such a parameter may have."""
    return COMPLEX_DTYPES if dtype in COMPLEX_DTYPES else REAL_DTYPES


def plain_problem(
    dtype: str,
    gradient_dtype: str,
    *,
    shapes: tuple[tuple[int, ...], ...] = SHAPES,
    steps: int = 3,
    special: float = 0.1,
    seed: int = 0,
) -> Callable[[], tuple[Any, list[Any]]]:
    """One parameter of every shape, C order, and `steps` gradients."""

    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(seed)
        params = {f"p{i}": random_values(rng, s, DTYPES[dtype], special) for i, s in enumerate(shapes)}
        grads = [
            {k: random_values(rng, p.shape, DTYPES[gradient_dtype], special) for k, p in params.items()}
            for _ in range(steps)
        ]
        return params, grads

    return build


PAIRS = [(dtype, g) for dtype in DTYPES for g in gradient_dtypes(dtype)]


@pytest.mark.parametrize(("dtype", "gradient_dtype"), PAIRS)
@pytest.mark.parametrize("name", RULES)
def test_rules_dtypes_and_shapes(name: str, dtype: str, gradient_dtype: str) -> None:
    error = assert_parity(lambda: make_optimizer(name), plain_problem(dtype, gradient_dtype), engine="fused")
    assert error is None


@pytest.mark.parametrize("options", OPTION_COMBINATIONS, ids=option_id)
@pytest.mark.parametrize("name", RULES)
def test_options(name: str, options: dict[str, Any]) -> None:
    """Every combination of options on every rule; the gradients are finite, so that clip_norm steps, too."""
    build = plain_problem("float32", "float32", shapes=((33,), (5, 3), ()), special=0.0, steps=2)
    error = assert_parity(lambda: make_optimizer(name, **options), build, engine="fused")
    assert error is None


ALL_ON = {"weight_decay": 0.3, "clip_value": 0.4, "clip_norm": 0.9, "maximize": True}


@pytest.mark.parametrize(("dtype", "gradient_dtype"), PAIRS)
@pytest.mark.parametrize("decoupled", [False, True])
def test_options_and_dtypes(dtype: str, gradient_dtype: str, decoupled: bool) -> None:
    build = plain_problem(dtype, gradient_dtype, special=0.0)
    options = ALL_ON | {"decoupled": decoupled}
    assert assert_parity(lambda: make_optimizer("Adam", **options), build, engine="fused") is None


@pytest.mark.parametrize("clip_norm", [None, 0.9])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_norm_is_refused_alike(dtype: str, clip_norm: float | None) -> None:
    """Infinite gradients: without clip_norm both engines step on, with it both refuse, with the same words."""
    build = plain_problem(dtype, dtype, special=0.3)
    error = assert_parity(lambda: make_optimizer("Adam", clip_norm=clip_norm), build)
    assert (error is not None) is (clip_norm is not None)


# Special values.


def all_triples(dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Parameter, gradient and slot over all triples of special values."""
    values = special_values(DTYPES[dtype])
    in_slots = special_values(SLOT_DTYPES[dtype])
    p, g, s = np.meshgrid(values.view(f"u{values.itemsize}"), np.arange(len(values)), np.arange(len(in_slots)))
    even = p.size // 2 * 2  # complex numbers take two
    p = p.reshape(-1)[:even].view(values.dtype)
    g, s = values[g.reshape(-1)[:even]], in_slots[s.reshape(-1)[:even]]
    if DTYPES[dtype].kind == "c":
        return p.view(DTYPES[dtype]), g.view(DTYPES[dtype]), s.view(DTYPES[dtype])
    return p, g, s


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", RULES)
def test_all_triples_of_special_values(name: str, dtype: str, maximize: bool) -> None:
    """Every special value in the parameter against every one in the gradient and in all slots."""
    results = []
    for engine in ("reference", "fused"):
        p, g, s = all_triples(dtype)
        opt = make_optimizer(name, clip_value=0.75, weight_decay=0.1, maximize=maximize)
        params, grads = {"p": p}, {"p": g}
        # One step makes the state, which then gets the special values.
        opt.update({"p": np.zeros_like(params["p"])}, {"p": np.ones_like(params["p"])})
        state = opt.state_dict()
        for slot in state["slots"]:
            state["slots"][slot]["p"] = s.copy()
        opt.load_state_dict(state)
        with xo.engine(engine):
            opt.update(params, grads)
            first = params["p"].copy()
            opt.update(params, grads)
        results.append((first, params, opt.state))
    assert_same_tree(results[1], results[0])


# Layouts.


@pytest.mark.smoke
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype: str, layout: str) -> None:
    """A parameter layout against every layout of the gradient, for several shapes, in one container."""

    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(5)
        params: dict[str, np.ndarray] = {}
        grads: list[dict[str, np.ndarray]] = [{}, {}]
        for g_layout, shape in itertools.product(GRADIENT_LAYOUTS, [(), (0, 3), (1,), (37,), (6, 5), (4, 3, 5)]):
            key = f"{g_layout}{shape}"
            params[key] = LAYOUTS[layout](random_values(rng, shape, DTYPES[dtype], 0.1))
            for step in grads:
                step[key] = GRADIENT_LAYOUTS[g_layout](random_values(rng, shape, DTYPES[dtype], 0.1))
        return params, grads

    assert assert_parity(lambda: make_optimizer("Adam", weight_decay=0.1), build) is None


@pytest.mark.parametrize("layout", GRADIENT_LAYOUTS)
@pytest.mark.parametrize("name", RULES)
def test_layouts_with_a_norm(name: str, layout: str) -> None:
    """The norm is summed in logical C order whatever the layout."""

    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(6)
        params = {key: random_values(rng, shape, DTYPES["float32"]) for key, shape in {"a": (6, 5), "b": (81,)}.items()}
        params["b"] = LAYOUTS[layout](params["b"]) if layout in LAYOUTS else params["b"]
        grads = [
            {k: GRADIENT_LAYOUTS[layout](random_values(rng, p.shape, DTYPES["float64"])) for k, p in params.items()}
            for _ in range(2)
        ]
        return params, grads

    assert assert_parity(lambda: make_optimizer(name, clip_norm=0.5), build) is None


@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_dtypes_in_one_container(dtype: str) -> None:
    """One step over all parameter dtypes at once, each with gradients of another dtype."""

    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(8)
        others = {name: DTYPES[dtype] if dtype in gradient_dtypes(name) else DTYPES[name] for name in DTYPES}
        params = {name: random_values(rng, (19,), DTYPES[name]) for name in DTYPES}
        grads = [{name: random_values(rng, (19,), others[name]) for name in DTYPES} for _ in range(3)]
        return params, grads

    assert assert_parity(lambda: make_optimizer("Adam", clip_norm=2.0), build, engine="fused") is None


def test_byte_swapped_gradients_of_another_dtype() -> None:
    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(9)
        params = {name: random_values(rng, (9,), DTYPES[name]) for name in REAL_DTYPES}
        swapped = {name: random_values(rng, (9,), DTYPES["float64"]).astype(">f8") for name in REAL_DTYPES}
        return params, [swapped, swapped]

    assert assert_parity(lambda: make_optimizer("RMSprop"), build) is None


# Sizes and threads.


@pytest.mark.smoke
@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_threads(name: str, dtype: str, num_threads: int) -> None:
    """Sizes around the chunks, large enough to be shared out."""
    build = plain_problem(dtype, dtype, shapes=((70000,), (4096,), (8192,), (3,), (300, 411)), steps=2, special=0.01)
    assert_parity(lambda: make_optimizer(name), build, engine="fused", num_threads=num_threads)


@pytest.mark.parametrize("num_threads", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, ALL_ON], ids=option_id)
def test_threads_on_a_large_array(options: dict[str, Any], num_threads: int) -> None:
    build = plain_problem("float32", "float32", shapes=((1_000_003,), (257, 513)), steps=2, special=0.0)
    make = lambda: make_optimizer("Adam", **options)  # noqa: E731
    assert assert_parity(make, build, engine="fused", num_threads=num_threads) is None


@pytest.mark.smoke
@pytest.mark.parametrize("num_threads", [1, 2])
@pytest.mark.parametrize("clip_norm", [None, 3.0])
def test_300_tensors(clip_norm: float | None, num_threads: int) -> None:
    shapes = tuple((i % 17, 3) if i % 5 else (i,) for i in range(300))
    build = plain_problem("float32", "float32", shapes=shapes, special=0.0, steps=4)
    make = lambda: make_optimizer("Momentum", clip_norm=clip_norm)  # noqa: E731
    assert assert_parity(make, build, engine="fused", num_threads=num_threads) is None


@pytest.mark.smoke
@pytest.mark.parametrize("size", [*range(18), 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 256, 257])
def test_odd_tails(size: int) -> None:
    """Every length around the vector widths, at every start within a vector."""

    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(size)
        params, grads = {}, {}
        for start in range(5):
            params[f"p{start}"] = random_values(rng, (size + start,), DTYPES["float32"])[start:]
            grads[f"p{start}"] = random_values(rng, (size + 3 * start,), DTYPES["float32"])[: size or None][:size]
        return params, [grads, grads]

    assert assert_parity(lambda: make_optimizer("Adam", clip_norm=0.7), build, engine="fused") is None


@pytest.mark.smoke
def test_nothing_is_written_outside_the_arrays() -> None:
    """Guard elements on both sides of every parameter stay as they are."""
    for dtype in DTYPES.values():
        room = np.full(64 * 40, 7, dtype)
        params = {str(i): room[i * 64 + 5 : i * 64 + 5 + i] for i in range(40)}
        opt = make_optimizer("Adam")
        with xo.engine("fused"):
            opt.update(params, {k: np.ones(p.shape, dtype) for k, p in params.items()})
        outside = np.ones(room.shape, bool)
        for i in range(40):
            outside[i * 64 + 5 : i * 64 + 5 + i] = False
        assert (room[outside] == 7).all()
        assert (room[~outside] != 7).all()


# Rules of a user's own: every function and operator of the table.


class EveryFunction(xo.Optimizer):
    """Uses each function of the table on arrays, on scalars, and on both."""

    lr: float = 0.1
    beta: float = 0.7
    flip: bool = False
    slots = ("m", "n")

    @staticmethod
    def rule(xp, p, g, m, n, *, t, lr, beta, flip):
        m = beta * m + (1 - beta) * g
        size = xp.sqrt(xp.abs(m)) + xp.square(n) * xp.sqrt(lr)
        direction = xp.sign(m) * xp.minimum(size, 1.5) + xp.maximum(g, m) * xp.abs(-lr)
        bounded = xp.clip(direction, -beta, xp.maximum(beta, 0.1))
        good = xp.isfinite(p) & ~(g != g) | (n >= 1.0)
        kept = xp.where(good, bounded, 0.0)
        n = xp.where(xp.isfinite(g), n + g, g)
        if flip:
            kept = -kept
        return p - lr * kept / (1 - beta**t), m, n


class EveryOperator(xo.Optimizer):
    """Uses each operator of the table, forwards and reflected, and integer powers."""

    lr: float = 0.1
    slots = ("m",)

    @staticmethod
    def rule(xp, p, g, m, *, t, lr):
        low, high = (g < m) & (p <= 1.0), (g > m) | (p >= 1.0)
        other = (g == m) | (p != g)
        either = low ^ high
        a = 1.0 - g * 2.0 / (3.0 + m**2) + g**3 - (+p)
        b = 2.0 / (1.0 + xp.square(p)) - (-g) ** 4 + m**1 * m**0
        new = xp.where(~either & other, a, b)
        new = xp.where(low, new, xp.where(high, new * lr**2, -new))
        return p - lr * new * 0.99**t, m + 0.5 * (g - m)


class Branching(xo.Optimizer):
    """Results that come straight from an argument, from a scalar, and from a constant."""

    lr: float = 0.1
    slots = ("a", "b", "c")

    @staticmethod
    def rule(xp, p, g, a, b, c, *, t, lr):
        return xp.minimum(p, g), g, lr * t, 1.0


class Scalars(xo.Optimizer):
    """Each function and operator on scalars alone: the float64 scalar program."""

    lr: float = 0.3
    beta: float = 0.7
    slots = ("a", "b", "c", "d", "e")

    @staticmethod
    def rule(xp, p, g, a, b, c, d, e, *, t, lr, beta):
        root = xp.sqrt(lr) + xp.abs(-beta) + xp.square(lr) - xp.sign(lr - beta) * xp.clip(lr, 0.1, 0.2)
        small, big = xp.minimum(lr, beta), xp.maximum(lr, beta)
        late = (t > 2) & (lr < beta) | ~(beta >= lr)
        chosen = xp.where(late, small, big) * xp.where(t == 1, 1.0, 0.5)
        powers = beta**t + beta ** (t - 1) - lr ** (2 * t + 1) + beta ** (1 - t) + lr**3 + 2**t + lr**-2 + t**2
        mixed = xp.where(late, g, p) + xp.where((g > 0) & (t > 1), lr, xp.where(late ^ (p > 0), g, -beta))
        finite = xp.where(xp.isfinite(lr / (beta - beta)), 1.0, -1.0)
        return p - root * g, mixed * chosen, powers * g, finite * g, a + 1 / 3, xp.clip(g, -xp.inf, 2 * lr)


class SpecialScalars(xo.Optimizer):
    """Scalars that are infinite, NaN, zero of either sign, or beyond float32: no Python exception, no warning."""

    lr: float = 0.3
    slots = ("a", "b", "c", "d", "e", "f")

    @staticmethod
    def rule(xp, p, g, a, b, c, d, e, f, *, t, lr):
        zero = lr - lr
        infinite, nan = lr / zero, xp.sqrt(-lr)
        huge, tiny = 1e300 * lr, 1e-320 * lr
        return (
            xp.where(zero / zero == nan, p, -p),
            g * infinite,
            xp.maximum(g, nan) + (-1 * zero) * g,
            g * huge * 1e300 + infinite**t + tiny * huge,
            xp.minimum(nan, g),
            xp.sign(-zero) / g + xp.sign(nan),
            xp.clip(g, -infinite, huge) / (zero * -1.0) + 0.0**t,
        )


class NumberLikes(xo.Optimizer):
    """Constants of NumPy's scalar types count as the numbers they are, on either side."""

    lr: float = 0.3
    slots = ("m",)

    @staticmethod
    def rule(xp, p, g, m, *, lr):
        m = np.float64(0.1) * m + g * np.float32(0.1) - np.int64(3) / (2 + g * g) + np.float16(1) * lr
        return p - 2**60 * (g - g) - lr * m / np.float64(7) + xp.maximum(np.float64(0.25), m), m


class Rotation(xo.Optimizer):
    """Arguments handed through to other places: all are read before any is written."""

    slots = ("a", "b")

    @staticmethod
    def rule(xp, p, g, a, b):
        return b, p, xp.where(g > 0, a, g)


USER_RULES = {
    "rotation": Rotation,
    "functions": EveryFunction,
    "operators": EveryOperator,
    "results": Branching,
    "scalars": Scalars,
    "special scalars": SpecialScalars,
    "numbers": NumberLikes,
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", USER_RULES)
def test_user_rules(rule: str, dtype: str) -> None:
    build = plain_problem(dtype, dtype, special=0.3, steps=4)
    assert assert_parity(USER_RULES[rule], build, engine="fused") is None


@pytest.mark.parametrize("flip", [False, True])
def test_user_rule_with_a_static_branch(flip: bool) -> None:
    build = plain_problem("float32", "float16", special=0.3, steps=4)
    make = lambda: EveryFunction(flip=flip, clip_value=0.5, weight_decay=0.1)  # noqa: E731
    assert assert_parity(make, build, engine="fused") is None


def test_static_branches_differ() -> None:
    """The same class with the other branch is another program, not the cached one."""
    results = []
    for flip in (False, True):
        opt, params = EveryFunction(flip=flip), {"p": np.ones(3, np.float32)}
        with xo.engine("fused"):
            opt.update(params, {"p": np.ones(3, np.float32)})
        results.append(params["p"][0])
    assert results[0] < 1.0 < results[1]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_table_is_what_numpy_says_on_ordinary_values(dtype: str) -> None:
    """The reference itself, against NumPy's own functions where these agree with the documented semantics."""

    class Table(xo.Optimizer):
        lr: float = 1.0
        slots = ("sqrt", "abs", "sign", "low", "high", "clip", "square", "finite", "where", "cube")

        @staticmethod
        def rule(xp, p, g, sqrt, abs, sign, low, high, clip, square, finite, where, cube, *, lr):
            one, zero = 1.0, 0.0
            return (
                p,
                xp.sqrt(xp.abs(g)),
                xp.abs(g),
                xp.sign(g),
                xp.minimum(g, p),
                xp.maximum(g, p),
                xp.clip(g, -0.5, 0.5),
                xp.square(g),
                xp.where(xp.isfinite(g), one, zero),
                xp.where(g > p, g, p),
                g**3,
            )

    p, g, _ = all_triples(dtype)
    opt = Table()
    opt.update({"p": p}, {"p": g})
    slots = {name: slot["p"] for name, slot in opt.state["slots"].items()}
    part = SLOT_DTYPES[dtype] if dtype not in COMPLEX_DTYPES else np.zeros(0, DTYPES[dtype]).real.dtype
    if dtype in COMPLEX_DTYPES:
        p, g = p.view(part), g.view(part)
        slots = {name: slot.view(part) for name, slot in slots.items()}
    p, g = p.astype(part), g.astype(part)
    with np.errstate(all="ignore"):
        expected = {
            "sqrt": np.sqrt(np.abs(g)),
            "abs": np.abs(g),
            "sign": np.where(np.isnan(g), g, (g > 0).astype(part) - (g < 0).astype(part)),
            "low": np.where((g < p) | (g != g), g, p),
            "high": np.where((g > p) | (g != g), g, p),
            "clip": np.where(np.isnan(g), g, np.minimum(np.maximum(g, part.type(-0.5)), part.type(0.5))),
            "square": g * g,
            "finite": np.isfinite(g).astype(part),
            "where": np.where(g > p, g, p),
            "cube": g * (g * g),
        }
    assert_same_tree(slots, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("step", [0, 1, 9, 10**3, 10**6, 2**31 - 1, 2**31, 2**32 + 5, 2**40 - 1])
def test_late_steps(step: int) -> None:
    """beta**t by repeated squaring, in the same order on both engines, however large t is."""

    class Powers(xo.Optimizer):
        b1: float = 0.9
        b2: float = 0.9999999
        b3: float = 1.0 - 2.0**-45
        slots = ("x", "y", "z")

        @staticmethod
        def rule(xp, p, g, x, y, z, *, t, b1, b2, b3):
            return t * g, b1**t * g, b2**t * g, b3**t * g

    results = []
    for engine in ("reference", "fused"):
        opt, params = Powers(), {"p": np.ones(3)}
        state = opt.init(params) | {"step": step}
        with xo.engine(engine):
            results.append(opt.apply(params, {"p": np.array([1.0, -3.0, 1 / 3])}, state))
    assert_same_tree(results[1], results[0])
    params, state = results[0]
    assert state["step"] == step + 1
    assert params["p"][0] == step + 1
    powers = [state["slots"][name]["p"][0] for name in "xyz"]
    # Squaring doubles a relative error and rounds: at most 2t units of 2^-53, and 1e-16 where it has vanished.
    for base, power in zip((0.9, 0.9999999, 1.0 - 2.0**-45), powers, strict=True):
        assert power == pytest.approx(base ** (step + 1), rel=2 * (step + 1) * 2.0**-53, abs=1e-300)


# Random combinations.


@st.composite
def problems(draw: st.DrawFn) -> tuple[str, dict[str, Any], int, list[tuple], int, float, int]:
    name = draw(st.sampled_from(list(RULES)))
    options = {key: draw(st.sampled_from(values)) for key, values in OPTION_VALUES.items()}
    count = draw(st.integers(1, 5))
    specs = []
    for _ in range(count):
        dtype = draw(st.sampled_from(list(DTYPES)))
        shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
        if draw(st.booleans()):
            shape = (draw(st.sampled_from([1, 16, 100, 4099])),)
        specs.append(
            (
                dtype,
                draw(st.sampled_from(list(gradient_dtypes(dtype)))),
                shape,
                draw(st.sampled_from(list(LAYOUTS))),
                draw(st.lists(st.sampled_from([*GRADIENT_LAYOUTS, "none"]), min_size=3, max_size=3)),
            )
        )
    special = draw(st.sampled_from([0.0, 0.0, 0.1, 0.6]))
    return (
        name,
        options | draw(strategies.hyperparameters(getattr(xo, name))),
        draw(st.integers(1, 3)),
        specs,
        draw(st.integers(1, 3)),
        special,
        draw(st.integers(0, 999)),
    )


@given(problems())
def test_random_combinations(problem: tuple) -> None:
    name, options, num_threads, specs, steps, special, seed = problem

    def build() -> tuple[Any, list[Any]]:
        rng = np.random.default_rng(seed)
        params: list[Any] = []
        grads: list[list[Any]] = [[] for _ in range(steps)]
        for dtype, gradient_dtype, shape, layout, gradient_layouts in specs:
            params.append(LAYOUTS[layout](random_values(rng, shape, DTYPES[dtype], special)))
            for step, gradient_layout in zip(grads, gradient_layouts, strict=False):
                g = random_values(rng, shape, DTYPES[gradient_dtype], special)
                step.append(None if gradient_layout == "none" else GRADIENT_LAYOUTS[gradient_layout](g))
        return params, grads

    assert_parity(lambda: make_optimizer(name, **options), build, num_threads=num_threads)


@given(
    st.sampled_from(list(REAL_DTYPES)),
    st.sampled_from(list(REAL_DTYPES)),
    st.lists(st.tuples(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1)), min_size=1, max_size=40),
    st.sampled_from(list(RULES)),
)
def test_random_bit_patterns(dtype: str, gradient_dtype: str, patterns: list[tuple[int, int]], name: str) -> None:
    """Any bits at all: every word is some float."""

    def build() -> tuple[Any, list[Any]]:
        def floats(chosen: list[int], kind: np.dtype) -> np.ndarray:
            words = np.array(chosen, np.uint64) >> np.uint64(64 - 8 * kind.itemsize)
            return words.astype(f"u{kind.itemsize}").view(kind)

        p = floats([a for a, _ in patterns], DTYPES[dtype])
        g = floats([b for _, b in patterns], DTYPES[gradient_dtype])
        return [p], [[g], [g[::-1].copy()]]

    assert assert_parity(lambda: make_optimizer(name, clip_value=1e30), build, engine="fused") is None


@pytest.mark.smoke
@pytest.mark.parametrize("source", ["float32", "float64"])
@pytest.mark.parametrize("target", ["float16", "bfloat16"])
def test_rounding_to_16_bits(source: str, target: str) -> None:
    """Storing rounds to nearest even: all ties and their neighbours, every exponent, overflow, and NaN payloads."""
    kind = DTYPES[target]
    halves = np.arange(2**16, dtype=np.uint16).view(kind)
    finite = halves[np.isfinite(halves.astype(np.float32))].astype(np.float64)
    finite = np.unique(finite)
    ties = (finite[:-1] + finite[1:]) / 2
    wide = np.concatenate([finite, ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf), finite * 2])
    with np.errstate(over="ignore"):
        values = wide.astype(DTYPES[source])
        expected = (np.float32(0) - values.astype(np.float32)).astype(kind)
    params = {"p": np.zeros(len(values), kind)}
    with xo.engine("fused"), threads(2):
        xo.SGD(lr=1.0).update(params, {"p": values})
    assert_same_tree(params["p"], expected, "rounded")


class Huge(xo.Optimizer):
    """A power of t, of sizes that no count of steps has."""

    base: float = 1 - 2**-53
    negative: bool = False

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, *, base: Any, negative: bool, t: Any) -> Any:
        return p + g * base ** ((-1 if negative else 1) * t * 2**61)


@pytest.mark.parametrize("engine", ["reference", "fused"])
@pytest.mark.parametrize("negative", [False, True])
def test_exponents_count_as_2_to_the_62_beyond_that(engine: str, negative: bool) -> None:
    """There a power of the float next to 1 is still neither 0 nor infinite; that of 2**63 would be."""
    opt, found = Huge(negative=negative), []
    for _ in range(5):
        params = {"p": np.zeros(1)}
        with xo.engine(engine):
            opt.update(params, {"p": np.ones(1)})
        found.append(float(params["p"][0]))
    sign = 1 if negative else -1
    assert found[0] == pytest.approx(math.exp(sign * 256), rel=1e-3)
    assert found[1] == pytest.approx(math.exp(sign * 512), rel=1e-3)
    assert found[1:] == [found[1]] * 4


# ---------------------------------------------------------------------------------------------------------------------
# What a kernel cannot walk goes through dense copies: the same bits, in the same arrays.


def transposed(a: np.ndarray) -> np.ndarray:
    return np.asfortranarray(a)


def reversed_(a: np.ndarray) -> np.ndarray:
    return a[::-1].copy()[::-1]


def swapped(a: np.ndarray) -> np.ndarray:
    return a.astype(a.dtype.newbyteorder())


def spread(a: np.ndarray) -> np.ndarray:
    return np.repeat(a, 2, axis=1)[:, ::2]


CHANGES = [np.asarray, transposed, reversed_, swapped, spread]
# ml_dtypes has no bfloat16 of the other byte order.
PAIRS = [
    (dtype, p_layout, g_layout)
    for dtype, p_layout, g_layout in itertools.product(["float32", "bfloat16", "complex64"], CHANGES, CHANGES)
    if dtype != "bfloat16" or swapped not in (p_layout, g_layout)
]


@pytest.mark.parametrize("clip_norm", [None, 0.5])
@pytest.mark.parametrize(("dtype", "p_layout", "g_layout"), PAIRS)
def test_any_two_layouts(dtype: str, p_layout: Any, g_layout: Any, clip_norm: float | None) -> None:
    kind, rng = DTYPES[dtype], np.random.default_rng(0)
    start = rng.standard_normal((6, 5)).astype(kind)
    gradients = [rng.standard_normal((6, 5)).astype(kind) for _ in range(4)]

    def run() -> tuple[Any, Any]:
        opt = make_optimizer("Adam", clip_norm=clip_norm)
        params = {"a": p_layout(start.copy()), "b": start.copy()}
        home = params["a"]
        for step, g in enumerate(gradients):
            layout = g_layout if step != 2 else np.asarray
            opt.update(params, {"a": layout(g), "b": layout(g)})
        assert params["a"] is home
        return params, opt.state

    found = run()
    with xo.engine("reference"):
        assert_same_tree(found, run())


@pytest.mark.parametrize("p_dtype", ["complex64", "complex128"])
@pytest.mark.parametrize("g_dtype", REAL_DTYPES)
def test_real_gradients_of_complex_parameters(p_dtype: str, g_dtype: str) -> None:
    start = random_values(np.random.default_rng(1), (7,), DTYPES[p_dtype])
    g = random_values(np.random.default_rng(2), (7,), DTYPES[g_dtype], special=0.5)

    def run() -> tuple[Any, Any]:
        opt, params = make_optimizer("Adam"), {"a": start.copy()}
        for _ in range(3):
            opt.update(params, {"a": g})
        return params, opt.state

    found = run()
    with xo.engine("reference"):
        assert_same_tree(found, run())


def test_a_gradient_of_another_layout_is_read_anew_in_every_step() -> None:
    """It goes through a buffer: what the buffer holds from the last step must never be used."""
    opt, params = xo.SGD(lr=1.0), {"a": np.zeros((4, 3)), "b": np.zeros(2)}
    for step in range(1, 6):
        opt.update(params, {"a": np.full((3, 4), float(step)).T, "b": np.ones(2)})
        assert (params["a"] == -step * (step + 1) / 2).all()
    opt.update(params, {"a": None, "b": np.ones(2)})
    assert (params["a"] == -15).all()
    shared = params["a"].base if params["a"].base is not None else params["a"]
    opt.update(params, {"a": shared.reshape(3, 4).T, "b": np.ones(2)})  # overlaps what is written: acts as if copied
    assert (params["a"] == 0).all()


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize(("dtype", "g_dtype"), [("float64", ">f8"), ("complex64", "float32"), ("float32", "float32")])
def test_a_gradient_buffer_that_is_filled_anew(dtype: str, g_dtype: str, order: Any) -> None:
    """The norm reads the gradient itself, in C order; the update reads a copy in the parameter's order and dtype."""
    start = np.random.default_rng(1).standard_normal((6, 5)).astype(dtype)

    def run() -> tuple[Any, Any]:
        opt, params = make_optimizer("Adam", clip_norm=0.5), {"a": np.array(start, order="F")}
        buffer = np.zeros((6, 5), g_dtype, order=order)
        for seed in range(4):
            buffer[...] = np.random.default_rng(seed).standard_normal((6, 5))
            opt.update(params, {"a": buffer})
        return params, opt.state

    found = run()
    with xo.engine("reference"):
        assert_same_tree(found, run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("extra", [-1, 0, 1, 127, 129, 4465])
def test_tensors_that_ask_for_memory_ahead(dtype: str, extra: int) -> None:
    """From so many elements on a kernel goes through blocks; a last one that is not full is done, and no more."""
    size = (_LARGE + extra) // (2 if DTYPES[dtype].kind == "c" else 1)
    rng = np.random.default_rng(extra + 1)
    start = random_values(rng, (size + 2,), DTYPES[dtype], special=0.01)
    g = random_values(rng, (size,), DTYPES[dtype], special=0.01)

    def run() -> tuple[Any, Any]:
        opt, home = make_optimizer("Adam"), start.copy()
        for _ in range(2):
            opt.update({"a": home[1:-1]}, {"a": g})
        return home, opt.state

    found = run()
    with xo.engine("reference"):
        assert_same_tree(found, run())


@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_compute_several_elements_at_a_time(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update, the norm, and Dropout: what is compiled holds operations on vectors."""
    compiled: list[str] = []

    def compiler(module: Any, machine: Any) -> Any:
        compiled.append(str(module))
        return create(module, machine)

    create = jit.llvm.create_mcjit_compiler
    monkeypatch.setattr(jit.llvm, "create_mcjit_compiler", compiler)
    opt = make_optimizer("Adam", clip_norm=1.0)
    for program in traced(opt).programs(dtype, dtype).values():
        cpu.Kernel(program)
    BlockKernel(layer.kernel(dtype).program)._compiled(in_place=False)
    assert len(compiled) == 3
    assert all(re.search(r"= f(add|mul) <\d+ x (float|double)>", text) for text in compiled)
