"""When a rule is traced, what that fixes, and that the reference carries out what the rule says."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import array_api_strict
import numpy as np
import pytest
from helpers import DTYPES, OPTION_COMBINATIONS, RULES, assert_same_bits, option_id, traced

import xpoptim as xo
from xpoptim.arrays.leaves import gather, nestings
from xpoptim.engines.cpu import plan as cpu
from xpoptim.engines.reference import Eager
from xpoptim.recipe.recipe import Traced
from xpoptim.trace.language import Functions, Value
from xpoptim.trace.ops import TABLE

ENGINES = ("reference", "fused")


def scaled_rule() -> tuple[type[xo.Optimizer], SimpleNamespace]:
    """A rule that calls a helper which is looked up at each call, as a global of a notebook is; and where it stands."""
    place = SimpleNamespace(helper=lambda g: g)

    class Scaled(xo.Optimizer):
        lr: float = 1.0
        twice: bool = False

        @staticmethod
        def rule(xp: Any, p: Any, g: Any, *, lr: Any, twice: bool) -> Any:
            return p - lr * place.helper(g) * (2.0 if twice else 1.0)

    return Scaled, place


def stepped(opt: xo.Optimizer, engine: str) -> float:
    """How far one step goes against a gradient of 1."""
    params = {"p": np.zeros(3)}
    with xo.engine(engine):
        opt.update(params, {"p": np.ones(3)})
    return -float(params["p"][0])


@pytest.mark.smoke
@pytest.mark.parametrize("first", ENGINES)
@pytest.mark.parametrize("second", ENGINES)
def test_a_redefined_helper_counts_for_new_optimizers(first: str, second: str) -> None:
    rule, place = scaled_rule()
    old = rule()
    assert stepped(old, first) == 1.0
    place.helper = lambda g: 10 * g
    assert stepped(rule(), second) == 10.0
    assert stepped(old, first) == 1.0
    assert stepped(old, second) == 1.0


@pytest.mark.smoke
@pytest.mark.parametrize("engine", ENGINES)
def test_an_assignment_that_changes_the_program_traces_again(engine: str) -> None:
    rule, place = scaled_rule()
    opt = rule()
    assert stepped(opt, engine) == 1.0
    place.helper = lambda g: 10 * g
    opt.lr = 2.0
    assert stepped(opt, engine) == 2.0  # a number is no program
    opt.twice = True
    assert stepped(opt, engine) == 40.0
    place.helper = lambda g: 100 * g
    opt.maximize = True
    assert stepped(opt, engine) == -400.0
    opt.maximize = True
    assert stepped(opt, engine) == -400.0


@pytest.mark.parametrize("engine", ENGINES)
def test_gradients_of_another_dtype_do_not_trace_again(engine: str) -> None:
    rule, place = scaled_rule()
    opt, params = rule(), {"p": np.zeros(3)}
    with xo.engine(engine):
        opt.update(params, {"p": np.ones(3)})
        place.helper = lambda g: 10 * g
        opt.update(params, {"p": np.ones(3, np.float32)})
    assert (params["p"] == -2.0).all()


def test_looking_at_the_source_and_a_refused_step_fix_nothing() -> None:
    rule, place = scaled_rule()
    opt = rule()
    opt.source("graph")
    with pytest.raises(ValueError, match="shape"):
        opt.update({"p": np.zeros(3)}, {"p": np.zeros(4)})
    place.helper = lambda g: 10 * g
    assert stepped(opt, "fused") == 10.0
    place.helper = lambda g: g
    assert "10.0" in opt.source("graph")


def test_a_plain_rule_has_no_source() -> None:
    class Plain(xo.Optimizer):
        fused = False

        @staticmethod
        def rule(xp: Any, p: Any, g: Any) -> Any:
            return p - g

    with pytest.raises(ValueError, match="Plain says fused = False"):
        Plain(clip_norm=1.0).source("graph")


def test_apply_traces_too() -> None:
    rule, place = scaled_rule()
    opt = rule()
    opt.apply((0.0,), (1.0,), opt.init((0.0,)))
    place.helper = lambda g: 10 * g
    assert stepped(opt, "auto") == 1.0


@pytest.mark.parametrize("engine", ["auto", *ENGINES])
def test_the_rule_runs_once(engine: str) -> None:
    rule, place = scaled_rule()
    calls = []
    place.helper = lambda g: calls.append(0) or g
    opt, params = rule(clip_norm=1e9), {"a": np.zeros(3), "b": np.zeros(3, np.float32), "c": np.zeros(8)[::2]}
    grads = {key: np.ones_like(p) for key, p in params.items()}
    with xo.engine("auto" if engine == "fused" else engine):
        for _ in range(3):
            opt.update(params, grads)
    assert len(calls) == 1


def program_of(rule: Callable[..., Any]) -> Any:
    opt = type("Mine", (xo.Optimizer,), {"rule": staticmethod(rule)})()
    return traced(opt).programs("float32", "float32")["update"]


def test_equal_programs_share_kernels() -> None:
    one, two = (program_of(lambda xp, p, g: p - 0.5 * g) for _ in range(2))
    assert one is not two
    assert cpu._kernel(one) is cpu._kernel(two)


@pytest.mark.parametrize(("first", "second"), [(0.0, -0.0), (1.0, 2.0), (float("inf"), float("nan"))])
def test_programs_that_differ_in_a_constant_differ(first: float, second: float) -> None:
    assert program_of(lambda xp, p, g: p - first * g) != program_of(lambda xp, p, g: p - second * g)


def test_a_nan_in_a_program_is_itself() -> None:
    one, two = (program_of(lambda xp, p, g: p - float("nan") * g) for _ in range(2))
    assert (one, hash(one)) == (two, hash(two))


# --- the reference against the rule called directly -------------------------------------------------------


def directly(opt: xo.Optimizer, xp: Any, arrays: list[Any], dtype: str, values: list[float]) -> list[Any]:
    """The options and the rule themselves, called with arrays at once."""
    recipe = opt._recipe
    backend = Eager(recipe.name, xp, getattr(xp, dtype), None)
    buffers = {name: Value(backend, a, argument=name) for name, a in zip(recipe.buffers, arrays, strict=True)}
    scalars = {
        name: Value(backend, np.float64(x), scalar=True, integral=name == "t", argument=name)
        for name, x in zip(recipe.inputs, values, strict=True)
    }
    new = recipe.update(Functions(backend), buffers, scalars)
    return [new[name].raw for name in recipe.buffers if name != "g"]


@pytest.mark.parametrize("xp", [np, array_api_strict], ids=["numpy", "strict"])
@pytest.mark.parametrize("options", OPTION_COMBINATIONS, ids=option_id)
@pytest.mark.parametrize("name", RULES)
def test_the_reference_is_the_rule_called_directly(name: str, options: dict[str, Any], xp: Any) -> None:
    rng = np.random.default_rng(5)
    opt = getattr(xo, name)(**{**RULES[name], **options})
    with xo.engine("reference"):
        for dtype in ("float32", "float64"):
            state = opt.init({"p": xp.asarray(np.zeros(40, dtype))})
            p, g = (xp.asarray(rng.standard_normal(40).astype(dtype)) for _ in range(2))
            slots = [xp.asarray(rng.random(40).astype(dtype)) for _ in state["slots"]]
            state = {"step": 6, "slots": {n: {"p": slot} for n, slot in zip(state["slots"], slots, strict=True)}}
            new, after = opt.apply({"p": p}, {"p": g}, state)
            norm = [float(np.sqrt(np.square(np.asarray(_seen(opt, g), np.float64)).sum()))]
            values = [*opt._scalars(6)[1], *(norm if opt._recipe.reductions else [])]
            wanted = directly(opt, xp, [p, g, *slots], dtype, values)
            found = [new["p"], *(arrays["p"] for arrays in after["slots"].values())]
            for a, b in zip(found, wanted, strict=True):
                if options["clip_norm"] is None:
                    assert_same_bits(np.asarray(a), np.asarray(b))
                else:  # the norm here is summed up otherwise
                    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-7)


def _seen(opt: xo.Optimizer, g: Any) -> Any:
    """The gradient that the norm is taken of."""
    return np.clip(np.asarray(g), -opt.clip_value, opt.clip_value) if opt.clip_value is not None else g


@pytest.mark.parametrize("dtype", DTYPES)
def test_programs_of_all_dtypes_come_from_one_trace(dtype: str) -> None:
    once = Traced(xo.Adam(clip_norm=1.0)._recipe)
    narrow = once.programs("float32", "float32")
    for kind, program in once.programs(dtype, dtype).items():
        assert program.nodes is narrow[kind].nodes
        assert [buffer.dtype for buffer in program.buffers[:2]] == [dtype, dtype]


def test_a_function_that_is_not_in_the_table_names_the_way_out() -> None:
    class Exponential(xo.Optimizer):
        lr: float = 0.1

        @staticmethod
        def rule(xp, p, g, *, lr):
            return p - lr * xp.exp(g)

    with pytest.raises(xo.TraceError, match=r"Exponential\.rule uses xp\.exp.*fused = False"):
        Exponential().update([np.ones(2)], [np.ones(2)])


@pytest.mark.parametrize(
    "power",
    [lambda p, lr, t: p**t, lambda p, lr, t: lr**0.5, lambda p, lr, t: lr**lr, lambda p, lr, t: p**lr],
    ids=["array, step", "scalar, fraction", "scalar, scalar", "array, scalar"],
)
def test_only_a_scalar_takes_a_step_as_exponent_and_nothing_a_fraction(power: Callable[..., Any]) -> None:
    class Power(xo.Optimizer):
        lr: float = 0.1

        @staticmethod
        def rule(xp, p, g, *, t, lr):
            return p - g * power(p, lr, t)

    with pytest.raises(
        xo.TraceError, match=r"to the power .*: the exponent may be an integer constant or, for a scalar"
    ):
        Power().update([np.ones(2)], [np.ones(2)])


@pytest.mark.parametrize(("a", "b"), [(0, 0), (2**32 - 1, 2**32 - 1), (0xD2511F53, 0xCD9E8D57), (3, 2**31)])
def test_products_of_words_are_whole_in_their_two_halves(a: int, b: int) -> None:
    high, low = (TABLE[name].array(np, np.uint64(a), np.uint64(b)) for name in ("multiply_high", "multiply_low"))
    assert (int(high), int(low)) == divmod(a * b, 2**32)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("n", [-3, -1, 0, 1, 5])
def test_an_integer_power_of_an_array(n: int, engine: str) -> None:
    class Power(xo.Optimizer):
        lr: float = 1.0

        @staticmethod
        def rule(xp, p, g, *, lr):
            return p - lr * g**n

    params = {"p": np.zeros(3)}
    with xo.engine(engine):
        Power().update(params, {"p": np.array([2.0, -4.0, 0.5])})
    assert params["p"].tolist() == [-(2.0**n), -((-4.0) ** n), -(0.5**n)]  # powers of two are exact


def test_a_container_that_holds_nothing_by_now_is_gathered() -> None:
    """As where another thread empties it in the middle of a step."""
    nesting, _ = nestings({"a": {}})
    leaves: list[Any] = []
    assert gather({"a": {}}, nesting, leaves)
    assert leaves == []
