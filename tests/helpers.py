"""What several test modules share: bit equality, layouts, special values, "nothing changed"."""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import oracles
import pytest
from cases import CASES

import xpoptim as xo

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
REAL_DTYPES = {
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}
COMPLEX_DTYPES = {"complex64": np.dtype(np.complex64), "complex128": np.dtype(np.complex128)}
DTYPES = REAL_DTYPES | COMPLEX_DTYPES
# Slots are kept in the compute dtype, which is float32 for the 16-bit types.
SLOT_DTYPES = DTYPES | {"float16": np.dtype(np.float32), "bfloat16": np.dtype(np.float32)}

RULES = {name: case.settings for name, case in CASES.items()}
ORACLES = {name: case.oracle for name, case in CASES.items()}
# Every combination of the options that runs in the rule's own pass or feeds it.
OPTION_VALUES: dict[str, tuple[Any, ...]] = {
    "weight_decay": (0.0, 0.3),
    "decoupled": (False, True),
    "clip_value": (None, 0.4),
    "clip_norm": (None, 0.9),
    "maximize": (False, True),
}
OPTION_COMBINATIONS = [
    dict(zip(OPTION_VALUES, values, strict=True)) for values in itertools.product(*OPTION_VALUES.values())
]


def traced(opt: xo.Optimizer) -> Any:
    """What the optimizer's next step carries out."""
    return opt._stepper.traced(opt)


def option_id(options: Mapping[str, Any]) -> str:
    """A readable test id: the options that are on."""
    return "+".join(name for name, value in options.items() if value not in (None, False, 0.0)) or "plain"


def real_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the parts of a complex dtype; a real dtype itself."""
    return np.empty(0, dtype).real.dtype if dtype.kind == "c" else dtype


def native(array: Any) -> np.ndarray:
    """A C-ordered copy in the machine's byte order."""
    array = np.asarray(array)
    return np.array(array.astype(array.dtype.newbyteorder("=")), order="C", copy=True)


def words(array: Any) -> tuple[np.ndarray, np.ndarray]:
    """The array as unsigned words, parts of complex numbers one after the other, and where it is NaN."""
    flat = native(array).reshape(-1)
    info = ml_dtypes.finfo(real_dtype(flat.dtype))
    unsigned = flat.view(f"u{info.bits // 8}")
    infinity = ((1 << info.nexp) - 1) << info.nmant
    # Told by the bits: `np.isnan` of a signalling bfloat16 warns.
    return unsigned, (unsigned & ((1 << (info.bits - 1)) - 1)) > infinity


def same_bits(actual: Any, expected: Any) -> bool:
    """Equal dtype, shape and bits, any NaN being equal to any NaN."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        return False
    if actual.dtype.newbyteorder("=") != expected.dtype.newbyteorder("="):
        return False
    (a, a_nan), (b, b_nan) = words(actual), words(expected)
    return bool(np.all((a == b) | (a_nan & b_nan)))


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """`same_bits`, with a message that shows the first elements that differ."""
    if same_bits(actual, expected):
        return
    actual, expected = np.asarray(actual), np.asarray(expected)
    lines = [f"{what}: bits differ", f"  actual   {actual.dtype} {actual.shape}"]
    lines.append(f"  expected {expected.dtype} {expected.shape}")
    if actual.shape == expected.shape and actual.dtype.itemsize == expected.dtype.itemsize:
        (a, a_nan), (b, b_nan) = words(actual), words(expected)
        for index in np.flatnonzero((a != b) & ~(a_nan & b_nan))[:8]:
            lines.append(f"  part {index}: {int(a[index]):#x} against {int(b[index]):#x}")
    raise AssertionError("\n".join(lines))


def assert_same_tree(actual: Any, expected: Any, what: str = "") -> None:
    """Bit equality of nested containers, dtype and type of every leaf included."""
    if isinstance(expected, Mapping):
        assert sorted(actual) == sorted(expected), f"{what}: keys differ"
        for key in expected:
            assert_same_tree(actual[key], expected[key], f"{what}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(actual) == len(expected), f"{what}: lengths differ"
        for index, pair in enumerate(zip(actual, expected, strict=True)):
            assert_same_tree(*pair, f"{what}[{index}]")
    elif isinstance(expected, np.ndarray | np.generic | float):
        assert_same_bits(actual, expected, what)
    else:
        assert actual == expected, what


def frozen(tree: Any) -> Any:
    """An immutable picture of nested containers, arrays by type, strides and every bit; for comparing with ``==``."""
    if isinstance(tree, Mapping):
        return ("mapping", tuple((key, frozen(value)) for key, value in tree.items()))
    if isinstance(tree, list | tuple):
        return (type(tree).__name__, tuple(frozen(value) for value in tree))
    if isinstance(tree, np.ndarray):
        return ("array", id(tree), str(tree.dtype), tree.shape, tree.strides, native(tree).tobytes())
    if isinstance(tree, float | np.generic):
        return (type(tree).__name__, np.asarray(tree).tobytes())
    return tree


def frozen_state(opt: xo.Optimizer) -> Any:
    """`frozen`, without the identity of the slots' array objects."""
    return frozen_values(opt.state)


def frozen_values(tree: Any) -> Any:
    """`frozen`, with arrays by value alone."""
    if isinstance(tree, Mapping):
        return ("mapping", tuple(sorted((str(key), frozen_values(value)) for key, value in tree.items())))
    if isinstance(tree, list | tuple):
        return (type(tree).__name__, tuple(frozen_values(value) for value in tree))
    if isinstance(tree, np.ndarray):
        return ("array", str(tree.dtype), tree.shape, native(tree).tobytes())
    if isinstance(tree, float | np.generic):
        return (type(tree).__name__, np.asarray(tree).tobytes())
    return tree


@contextlib.contextmanager
def refused(
    opt: xo.Optimizer,
    *trees: Any,
    error: type[BaseException] | tuple[type[BaseException], ...],
    names: str = "",
) -> Iterator[pytest.ExceptionInfo]:
    """The block raises `error`, its message holds each word of `names`, and nothing has changed.

    "Nothing" is the optimizer's state and step count, and every bit and object of `trees`.
    """
    before = frozen_state(opt), frozen(trees)
    with pytest.raises(error) as info:
        yield info
    message = str(info.value)
    for word in names.split():
        assert word in message, f"the message does not name {word!r}: {message}"
    assert frozen_state(opt) == before[0], "the state changed"
    assert frozen(trees) == before[1], "parameters or gradients changed"


def step_count(opt: xo.Optimizer) -> int:
    """The number of applied updates."""
    return opt.state["step"]


# Layouts: each makes a new array of the given values, in memory of its own.


def _c_order(values: np.ndarray) -> np.ndarray:
    return np.array(values, order="C")


def _fortran(values: np.ndarray) -> np.ndarray:
    return np.array(values, order="F")


def _permuted(values: np.ndarray) -> np.ndarray:
    """Dense with its axes rotated: neither C nor Fortran order from three axes on."""
    if values.ndim < 2:
        return np.array(values)
    return np.moveaxis(np.array(np.moveaxis(values, 0, -1), order="C"), -1, 0)


def _reversed(values: np.ndarray) -> np.ndarray:
    backwards = (slice(None, None, -1),) * values.ndim
    return np.array(values[backwards], order="C")[backwards]


def _strided(values: np.ndarray) -> np.ndarray:
    if values.ndim == 0:
        return np.array(values)
    room = np.zeros((*values.shape[:-1], 2 * values.shape[-1] + 1), values.dtype)
    room[..., 1::2] = values
    return room[..., 1::2]


def _columns(values: np.ndarray) -> np.ndarray:
    if values.ndim == 0:
        return np.array(values)
    room = np.zeros((*values.shape[:-1], values.shape[-1] + 3), values.dtype)
    room[..., 1:-2] = values
    return room[..., 1:-2]


def _misaligned(values: np.ndarray) -> np.ndarray:
    room = np.zeros(values.nbytes + 1, np.uint8)
    array = np.ndarray(values.shape, values.dtype, buffer=room, offset=1)
    array[...] = values
    return array


def _swapped(values: np.ndarray) -> np.ndarray:
    return np.array(values.astype(values.dtype.newbyteorder()), order="C")


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "C": _c_order,
    "fortran": _fortran,
    "permuted": _permuted,
    "reversed": _reversed,
    "strided": _strided,
    "columns": _columns,
    "misaligned": _misaligned,
    "swapped": _swapped,
}


def _broadcast(values: np.ndarray) -> np.ndarray:
    """Every element the first one, with all strides 0: what ``np.broadcast_to`` gives for a constant gradient."""
    first = values.reshape(-1)[:1] if values.size else np.zeros(1, values.dtype)
    return np.broadcast_to(first.reshape(()).copy(), values.shape)


def _readonly(values: np.ndarray) -> np.ndarray:
    array = np.array(values)
    array.flags.writeable = False
    return array


GRADIENT_LAYOUTS = LAYOUTS | {"broadcast": _broadcast, "readonly": _readonly}


# Values.


def from_words(patterns: list[int], dtype: np.dtype) -> np.ndarray:
    """The floats whose bit patterns are `patterns`."""
    return np.array(patterns, f"u{dtype.itemsize}").view(dtype)


def special_values(dtype: np.dtype) -> np.ndarray:
    """NaNs of both signs and of several payloads, infinities, zeros, subnormals, extremes, ordinary numbers."""
    dtype = real_dtype(dtype)
    info = ml_dtypes.finfo(dtype)
    sign, infinity = 1 << (info.bits - 1), ((1 << info.nexp) - 1) << info.nmant
    one_bit, full = 1, (1 << info.nmant) - 1
    quiet = 1 << (info.nmant - 1)
    positive = [
        0,
        one_bit,  # the smallest subnormal
        full,  # the largest
        full + 1,  # the smallest normal number
        infinity - 1,  # the largest finite one
        infinity,
        infinity | quiet,  # the default NaN
        infinity | one_bit,  # a signalling NaN
        infinity | full,  # all ones, 0x7fffffff in float32: rounding to 16 bits must not carry it away
    ]
    ordinary = np.array([1.0, -1.0, 0.5, 1e-3, -3e-4, 1.7, -250.0], np.float64).astype(dtype)
    return np.concatenate([from_words([w | s for w in positive for s in (0, sign)], dtype), ordinary])


def random_values(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, special: float = 0.0
) -> np.ndarray:
    """Normal numbers over some orders of magnitude, a share of them `special_values`."""
    parts = 2 if dtype.kind == "c" else 1
    size = int(np.prod(shape)) * parts
    values = (rng.standard_normal(size) * 10.0 ** rng.integers(-3, 2, size)).astype(real_dtype(dtype))
    if special:
        pool = special_values(dtype)
        chosen = rng.random(size) < special
        values[chosen] = pool[rng.integers(0, len(pool), int(chosen.sum()))]
    return values.view(dtype).reshape(shape)


# Parity: the fused engine against the reference.


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """`xpoptim.set_num_threads` for a block."""
    before = xo.get_num_threads()
    xo.set_num_threads(count)
    try:
        yield
    finally:
        xo.set_num_threads(before)


def run_steps(
    make: Callable[[], xo.Optimizer], params: Any, gradients: list[Any], engine: str
) -> tuple[xo.Optimizer, Any, BaseException | None]:
    """Updates of a new optimizer under `engine`; a refused step ends the run and is returned."""
    opt = make()
    with xo.engine(engine):
        for grads in gradients:
            before = frozen(params), frozen_state(opt)
            try:
                opt.update(params, grads)
            except FloatingPointError as error:
                assert (frozen(params), frozen_state(opt)) == before, "a refused step changed something"
                return opt, params, error
    return opt, params, None


def assert_parity(
    make: Callable[[], xo.Optimizer],
    build: Callable[[], tuple[Any, list[Any]]],
    *,
    engine: str = "auto",
    num_threads: int = 1,
) -> BaseException | None:
    """Reference and `engine` agree bit for bit in parameters and state, or refuse the same step.

    `build` makes the parameters and the gradients of all steps anew, in the same layouts, for each run.
    """
    expected_opt, expected, expected_error = run_steps(make, *build(), "reference")
    with threads(num_threads):
        opt, actual, error = run_steps(make, *build(), engine)
    assert type(error) is type(expected_error), f"{error!r} against {expected_error!r}"
    assert str(error) == str(expected_error)
    assert_same_tree(actual, expected, "params")
    assert_same_tree(opt.state, expected_opt.state, "state")
    return error


# Oracles.

START = np.array([0.9, -1.3, 0.2, 2.5, -0.4, 1.1, -0.7])
SHAPES = {"W": (2, 2), "b": (3,)}


def oracle_problem(steps: int = 25, seed: int = 7) -> tuple[np.ndarray, np.ndarray]:
    """A start of 7 numbers and `steps` gradients of mixed magnitudes."""
    rng = np.random.default_rng(seed)
    return START, rng.standard_normal((steps, len(START))) * np.array([3.0, 1.0, 0.3, 0.1, 0.03, 1.0, 2.0])


def leaves(flat: np.ndarray) -> dict[str, np.ndarray]:
    """A vector of 7 as a weight and a bias."""
    return {"W": flat[:4].reshape(2, 2).copy(), "b": flat[4:].copy()}


def flattened(params: Mapping[str, np.ndarray]) -> np.ndarray:
    """The inverse of `leaves`."""
    return np.concatenate([params["W"].reshape(-1), params["b"].reshape(-1)])


def assert_follows_oracle(
    opt: xo.Optimizer,
    oracle: Callable[..., float],
    hyperparameters: Mapping[str, Any],
    *,
    engine: str = "auto",
    **options: Any,
) -> None:
    """Every iterate of `opt` in float64 is the oracle's, to rounding.

    The oracle writes the formulas another way, so the last bits may differ; 1e-12 is some 5000 units in the last
    place over 25 steps, and 1e-10 of what the smallest mistake in a formula changes.
    """
    start, gradients = oracle_problem()
    expected = oracles.trajectory(oracle, start.tolist(), gradients.tolist(), hyperparameters, **options)
    params = leaves(start)
    with xo.engine(engine):
        for index, g in enumerate(gradients):
            opt.update(params, leaves(g))
            np.testing.assert_allclose(
                flattened(params), expected[index], rtol=1e-12, atol=1e-13, err_msg=f"step {index + 1}"
            )


def rule_options(name: str) -> dict[str, Any]:
    """The options that a class sets by itself."""
    return {"weight_decay": 0.2, "decoupled": True} if name == "AdamW" else {}


def rule_hyperparameters(name: str) -> dict[str, float]:
    """The arguments of the rule proper in `RULES`."""
    return {key: value for key, value in RULES[name].items() if key != "weight_decay"}


def make_optimizer(name: str, **options: Any) -> xo.Optimizer:
    """The optimizer of `RULES`, with further options."""
    return getattr(xo, name)(**(RULES[name] | options))


def clone(tree: Any) -> Any:
    """A deep copy of containers and arrays that keeps the arrays' layout."""
    return copy.deepcopy(tree)
