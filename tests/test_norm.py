"""The global norm of `clip_norm`: exact to rounding, and the same bits however it is computed."""

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from helpers import (
    DTYPES,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    RULES,
    assert_same_bits,
    assert_same_tree,
    make_optimizer,
    random_values,
    refused,
    threads,
)
from hypothesis import given
from hypothesis import strategies as st

import xpoptim as xo
from xpoptim.trace.sums import CHUNK, LANES

ENGINES = ("reference", "fused")


def scale_of(grads: dict[str, np.ndarray], clip: float, engine: str = "fused") -> float:
    """min(1, clip / norm), read off a step: a float64 probe with gradient 1 and lr 1 moves by exactly the scale.

    The probe counts in the norm, as a further element 1.
    """
    params = {key: np.zeros_like(g) for key, g in grads.items()} | {"probe": np.zeros(1)}
    with xo.engine(engine):
        xo.SGD(lr=1.0, clip_norm=clip).update(params, grads | {"probe": np.ones(1)})
    return float(-params["probe"][0])


def exact_norm(grads: dict[str, np.ndarray]) -> Fraction:
    """The sum of squares, probe included, as an exact fraction, rooted to 30 decimal digits."""
    total = Fraction(1)
    for g in grads.values():
        parts = g.reshape(-1).view(g.real.dtype)
        for x in parts.tolist() if parts.dtype != DTYPES["bfloat16"] else parts.astype(np.float64).tolist():
            total += Fraction(x) ** 2
    shift = 10**60
    return Fraction(math.isqrt(total.numerator * shift // total.denominator), 10**30)


def depth(grads: dict[str, np.ndarray]) -> int:
    """How many additions the documented tree puts between an element and the total, at most."""
    longest = max(g.view(g.real.dtype).size if g.ndim else 2 for g in grads.values())
    chunks = -(-longest // CHUNK)
    return CHUNK // LANES + int(math.log2(LANES)) + math.ceil(math.log2(max(chunks, 1))) + len(grads) + 1


SIZES = [(1,), (7, 3), (100,), (255,), (4095,), (4096,), (4097,), (20_001,)]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SIZES)
def test_the_norm_is_exact_to_rounding(shape: tuple[int, ...], dtype: str, engine: str) -> None:
    """The bound is the worst case of a summation tree: half its depth in roundings, and five of the rest.

    The depth is some 40 here, where a running sum over 20,000 elements would have 20,000, and a float32 sum 2^29
    times as much. (Squares are exact but for float64; root, division and the final products round once each.)
    """
    rng = np.random.default_rng(11)
    grads = {"a": random_values(rng, shape, DTYPES[dtype]), "b": random_values(rng, (5,), DTYPES[dtype])}
    exact = exact_norm(grads)
    scale = scale_of(grads, 0.5, engine)
    relative = abs(Fraction(scale) * exact / Fraction(1, 2) - 1)
    assert relative <= Fraction(depth(grads) + 10, 2) * Fraction(1, 2**53)


@given(st.lists(st.floats(-(2.0**60), 2.0**60, width=32), max_size=60), st.sampled_from(ENGINES))
def test_the_norm_of_any_numbers(values: list[float], engine: str) -> None:
    grads = {"a": np.array(values, np.float32)}
    exact = exact_norm(grads)
    clip = 2.0**-3
    relative = abs(Fraction(scale_of(grads, clip, engine)) * exact / Fraction(1, 8) - 1)
    assert relative <= Fraction(depth(grads) + 10, 2) * Fraction(1, 2**53)


def test_float32_squares_neither_overflow_nor_vanish() -> None:
    """Squared in float32 these would be inf and 0."""
    for value in (1e30, 1e-30):
        params = {"p": np.zeros(4, np.float32)}
        xo.SGD(lr=1.0, clip_norm=value / 2).update(params, {"p": np.full(4, value, np.float32)})
        np.testing.assert_allclose(params["p"], -np.float32(value) / 4, rtol=3e-7)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_scale_is_at_most_one(engine: str) -> None:
    """A small gradient is left as it is, to the last bit; one at the limit as well; a zero one gives no NaN."""
    g = {"a": np.array([0.3, -0.4], np.float32)}
    for clip in (1.25, 2.0, 1e300):
        assert scale_of(g, clip, engine) == 1.0
    assert scale_of({"a": np.zeros(3)}, 1.0, engine) == 1.0
    params = {"p": np.ones(3)}
    with xo.engine(engine):
        xo.SGD(lr=1.0, clip_norm=1.0).update(params, {"p": np.zeros(3)})
    assert params["p"].tolist() == [1.0] * 3
    params = {"p": np.ones(0)}
    with xo.engine(engine):
        xo.SGD(lr=1.0, clip_norm=1.0).update(params, {"p": np.zeros(0)})


@pytest.mark.smoke
def test_pythagoras() -> None:
    assert scale_of({"a": np.array([2.0]), "b": np.array([2.0])}, 1.5) == 0.5  # with the probe's 1 the norm is 3


def problem(dtype: str, sizes: tuple[int, ...] = (70_001, 4096, 33, 1)) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(2)
    return {f"k{i}": random_values(rng, (n,), DTYPES[dtype]) for i, n in enumerate(sizes)}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_on_any_engine_and_number_of_threads(dtype: str) -> None:
    grads = problem(dtype)
    expected = scale_of(grads, 0.7, "reference")
    for num_threads in (1, 2, 3, 5):
        with threads(num_threads):
            assert scale_of(grads, 0.7, "fused") == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("engine", ENGINES)
def test_the_same_bits_in_any_container_order(engine: str, dtype: str) -> None:
    grads = problem(dtype, (100, 4097, 33, 1))
    seen = {scale_of({key: grads[key] for key in order}, 0.7, engine) for order in itertools.permutations(grads)}
    assert len(seen) == 1


def test_tensors_are_added_in_sorted_order_of_their_keys() -> None:
    """1 is lost beside 2^54 unless two of them meet first, so the order of addition shows in the norm.

    The keys of a list sort as text: "0", "1", "10", "11", "2".
    """
    values = {"0": 2.0**27, "1": 1.0, "10": 1.0, "2": 1.0}
    shuffled = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 2.0**27}
    for keyed in (values, shuffled):
        total = 0.0
        for key in sorted(keyed):
            total += keyed[key] ** 2
        for engine in ENGINES:
            params: Any = {key: np.zeros(1) for key in reversed(keyed)}
            with xo.engine(engine):
                xo.SGD(lr=1.0, clip_norm=1.0).update(params, {k: np.array([v]) for k, v in keyed.items()})
            biggest = max(keyed, key=keyed.__getitem__)
            assert params[biggest][0] == -(1.0 / math.sqrt(total)) * keyed[biggest]


@pytest.mark.parametrize("shape", [(), (5,), (60, 83), (7, 30, 23)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_same_bits_in_any_layout(dtype: str, shape: tuple[int, ...]) -> None:
    """Elements are added in logical C order, not in the order of memory."""
    values = random_values(np.random.default_rng(3), shape, DTYPES[dtype])
    expected = scale_of({"a": values}, 0.7, "reference")
    for name, layout in GRADIENT_LAYOUTS.items():
        if name == "broadcast":
            continue  # has other values
        for engine in ("reference", "auto"):
            assert scale_of({"a": layout(values)}, 0.7, engine) == expected, name
    # The parameter's layout has no part in it either.
    for name, layout in LAYOUTS.items():
        params = {"a": layout(np.zeros_like(values)), "probe": np.zeros(1)}
        xo.SGD(lr=1.0, clip_norm=0.7).update(params, {"a": values, "probe": np.ones(1)})
        assert -params["probe"][0] == expected, name
    fortran = {"a": np.asfortranarray(np.zeros_like(values)), "probe": np.zeros(1)}
    xo.SGD(lr=1.0, clip_norm=0.7).update(fortran, {"a": np.asfortranarray(values), "probe": np.ones(1)})
    assert -fortran["probe"][0] == expected


def test_numbers_count_in_the_norm() -> None:
    params: dict[str, Any] = {"x": 0.0, "y": np.zeros(1), "z": np.float32(0)}
    xo.SGD(lr=1.0, clip_norm=1.5).update(params, {"x": 2.0, "y": np.array([2.0]), "z": np.float32(1)})
    assert (params["x"], params["y"][0], params["z"]) == (-1.0, -1.0, -0.5)


def test_none_gradients_do_not_count() -> None:
    params = {"a": np.zeros(1), "b": np.zeros(1)}
    xo.SGD(lr=1.0, clip_norm=1.0).update(params, {"a": np.array([2.0]), "b": None})
    assert params["a"][0] == -1.0


def test_the_norm_is_of_the_gradients_clipped_by_value() -> None:
    params = {"a": np.zeros(2)}
    xo.SGD(lr=1.0, clip_value=2.0, clip_norm=1.0).update(params, {"a": np.array([100.0, 0.0])})
    assert params["a"].tolist() == [-1.0, 0.0]


def test_weight_decay_and_maximize_are_not_in_the_norm() -> None:
    params = {"a": np.array([100.0])}
    xo.SGD(lr=1.0, clip_norm=2.0, weight_decay=1.0, maximize=True).update(params, {"a": np.array([4.0])})
    assert params["a"].tolist() == [100.0 - (-2.0 + 100.0)]


@pytest.mark.smoke
@pytest.mark.parametrize("engine", ["reference", "auto"])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_non_finite_norm_raises_and_names_the_first_bad_leaf(
    dtype: str, bad: float, fresh: bool, engine: str
) -> None:
    with xo.engine(engine):
        opt = make_optimizer("Adam", clip_norm=1.0)
        params = {key: np.ones(3, DTYPES[dtype]) for key in ("alpha", "beta", "gamma")}
        good = {key: np.ones(3, DTYPES[dtype]) for key in params}
        if not fresh:
            opt.update(params, good)
        grads = {key: g.copy() for key, g in good.items()}
        grads["beta"][1], grads["gamma"][0] = bad, bad
        with refused(opt, params, grads, error=FloatingPointError, names="beta") as info:
            opt.update(params, grads)
        assert "gamma" not in str(info.value)
        state = opt.init(params)
        with refused(opt, params, grads, state, error=FloatingPointError, names="beta"):
            opt.apply(params, grads, state)
        opt.update(params, good)


@pytest.mark.parametrize("clip_norm", [math.inf, lambda step: math.inf], ids=["float", "schedule"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_an_infinite_clip_norm_only_checks(dtype: str, engine: str, clip_norm: Any) -> None:
    """The scale is 1: the same bits as without, also where the norm is 0; what is not finite is refused."""
    opt, plain = make_optimizer("Adam", clip_norm=clip_norm), make_optimizer("Adam")
    start = random_values(np.random.default_rng(1), (5, 3), DTYPES[dtype])
    params, expected = {"a": start.copy(), "b": start[0].copy()}, {"a": start.copy(), "b": start[0].copy()}
    with xo.engine(engine):
        for step in range(5):
            g = random_values(np.random.default_rng(step), (5, 3), DTYPES[dtype])
            if step in (0, 3):
                g = -np.zeros_like(g)
            for one, p in ((opt, params), (plain, expected)):
                one.update(p, {"a": g, "b": g[1]})
        assert_same_tree(params, expected)
        assert_same_tree(opt.state, plain.state)
        for bad in (math.nan, -math.inf):
            with refused(opt, params, error=FloatingPointError, names="grads['b']"):
                opt.update(params, {"a": g, "b": np.full(3, bad, DTYPES[dtype])})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_clip_norm_that_becomes_finite(engine: str) -> None:
    opt, params = xo.SGD(lr=1.0, clip_norm=lambda step: math.inf if step < 2 else 1.0), {"a": np.zeros(2)}
    with xo.engine(engine):
        for _ in range(3):
            opt.update(params, {"a": np.array([3.0, 4.0])})
    assert params["a"].tolist() == [-(3.0 + 3.0 + 0.6), -(4.0 + 4.0 + 0.8)]
    opt.clip_norm = math.inf
    assert opt.clip_norm == math.inf
    assert opt.state_dict()["hyperparameters"]["clip_norm"] == math.inf
    for bad in (-math.inf, lambda step: -math.inf, lambda step: math.nan):
        with refused(opt, params, error=ValueError, names="clip_norm"):
            opt.clip_norm = bad
            opt.update(params, {"a": np.array([3.0, 4.0])})


@pytest.mark.parametrize("engine", ENGINES)
def test_finite_gradients_whose_squares_overflow(engine: str) -> None:
    """The norm is what must be finite: 1e200 squared is not."""
    grads = {"a": np.ones(2), "b": np.array([1e200, 1.0])}
    for clip_norm in (1.0, math.inf):
        opt, params = xo.SGD(clip_norm=clip_norm), {"a": np.ones(2), "b": np.ones(2)}
        with xo.engine(engine), refused(opt, params, error=FloatingPointError, names="b"):
            opt.update(params, grads)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_sum_over_tensors_that_overflows(engine: str) -> None:
    """Each tensor's sum of squares is finite, their total is not."""
    opt, params = xo.SGD(clip_norm=1.0), {key: np.ones(1) for key in "abc"}
    grads = {key: np.array([1.2e154]) for key in "abc"}
    with xo.engine(engine), refused(opt, params, error=FloatingPointError):
        opt.update(params, grads)


@pytest.mark.smoke
@pytest.mark.parametrize("name", RULES)
def test_whole_steps_are_the_same_on_any_engine_and_number_of_threads(name: str) -> None:
    results = []
    for engine, num_threads in [("reference", 1), ("fused", 1), ("fused", 2), ("fused", 3)]:
        opt, params = make_optimizer(name, clip_norm=0.5), {k: np.ones_like(g) for k, g in problem("float32").items()}
        with xo.engine(engine), threads(num_threads):
            for _ in range(2):
                opt.update(params, problem("float32"))
        results.append((params, opt.state))
    for result in results[1:]:
        assert_same_tree(result, results[0])


def test_the_first_parameter_gets_the_same_bits_whoever_stands_beside() -> None:
    """A tensor's own sum does not depend on where in the table it stands."""
    g = random_values(np.random.default_rng(4), (10_000,), DTYPES["float32"])
    pad = {"z": np.zeros(12_345, np.float32)}
    alone, beside = {"a": np.zeros_like(g)}, {"a": np.zeros_like(g), "z": np.zeros(12_345, np.float32)}
    xo.SGD(lr=1.0, clip_norm=1.0).update(alone, {"a": g})
    xo.SGD(lr=1.0, clip_norm=1.0).update(beside, {"a": g} | pad)
    assert_same_bits(alone["a"], beside["a"])


@pytest.mark.smoke
def test_memory_found_good_for_one_dtype_is_not_for_another() -> None:
    """Two columns that lie between each other as float32 overlap as float64 at the same places."""
    memory = np.zeros(64, np.uint8)

    def columns(dtype: Any) -> dict[str, np.ndarray]:
        return {key: np.ndarray(3, dtype, memory, at, (8,)) for key, at in (("a", 0), ("b", 4))}

    opt = xo.SGD(clip_norm=1.0)
    with pytest.raises(FloatingPointError):
        opt.update(columns(np.float32), {"a": np.full(3, np.nan, np.float32), "b": np.ones(3, np.float32)})
    with pytest.raises(ValueError, match="share memory"):
        opt.update(columns(np.float64), {"a": np.ones(3), "b": np.ones(3)})
    assert not memory.any()
