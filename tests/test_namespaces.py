"""The reference on other Array API namespaces: array-api-strict, torch and JAX against NumPy."""

import itertools
from collections.abc import Callable
from typing import Any

import array_api_strict
import numpy as np
import pytest
from helpers import BFLOAT16, DTYPES, RULES, make_optimizer, refused

import xpoptim as xo

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "all": {"weight_decay": 0.3, "clip_value": 0.4, "clip_norm": 0.9, "maximize": True},
    "decoupled": {"weight_decay": 0.3, "decoupled": True},
}
# Correctly rounded operations need no tolerance, but a namespace may order them otherwise: some last bits.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13, "complex64": 1e-5, "complex128": 1e-13}


def numpy_steps(
    name: str, dtype: str, options: dict[str, Any], steps: int = 6
) -> tuple[dict[str, np.ndarray], list[dict[str, np.ndarray]], Any]:
    """Start, gradients and end of a run on NumPy's reference engine."""
    rng = np.random.default_rng(0)

    def values(*shape: int) -> np.ndarray:
        x = rng.standard_normal(shape)
        return (x + 1j * rng.standard_normal(shape) if "complex" in dtype else x).astype(dtype)

    start = {"W": values(3, 2), "b": values(2), "s": values()}
    gradients = [{"W": values(3, 2), "b": values(2), "s": values()} for _ in range(steps)]
    params = {key: p.copy() for key, p in start.items()}
    with xo.engine("reference"):
        opt = make_optimizer(name, **options)
        for grads in gradients:
            opt.update(params, grads)
    return start, gradients, params


def close(actual: Any, expected: np.ndarray, dtype: str) -> None:
    actual = np.asarray(actual)
    assert actual.dtype == expected.dtype
    np.testing.assert_allclose(actual, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


# array-api-strict


def strict_copy(tree: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: array_api_strict.asarray(value.copy()) for key, value in tree.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", RULES)
def test_array_api_strict(name: str, dtype: str, options: str) -> None:
    """A strict namespace refuses whatever the standard does not promise."""
    start, gradients, expected = numpy_steps(name, dtype, OPTIONS[options])
    params = strict_copy(start)
    kept = dict(params)
    opt = make_optimizer(name, **OPTIONS[options])
    for grads in gradients:
        opt.update(params, strict_copy(grads))
    for key in params:
        assert params[key] is kept[key]
        close(params[key], expected[key], dtype)
    for slot in opt.state["slots"].values():
        assert all(type(a) is type(kept["W"]) for a in slot.values())


@pytest.mark.parametrize("name", RULES)
def test_array_api_strict_functional(name: str) -> None:
    start, gradients, expected = numpy_steps(name, "float32", OPTIONS["all"])
    params: Any = strict_copy(start)
    opt = make_optimizer(name, **OPTIONS["all"])
    state = opt.init(params)
    for grads in gradients:
        before = {key: np.asarray(p).copy() for key, p in params.items()}
        new, state = opt.apply(params, strict_copy(grads), state)
        for key, p in params.items():
            np.testing.assert_array_equal(np.asarray(p), before[key])
        params = new
    for key, p in params.items():
        close(p, expected[key], "float32")


@pytest.mark.smoke
def test_array_api_strict_state_resumes() -> None:
    start, gradients, _ = numpy_steps("Adam", "float32", {})
    params, opt = strict_copy(start), make_optimizer("Adam")
    opt.update(params, strict_copy(gradients[0]))
    resumed = make_optimizer("Adam")
    resumed.load_state_dict(opt.state_dict())
    copied = {key: array_api_strict.asarray(np.asarray(p).copy()) for key, p in params.items()}
    opt.update(params, strict_copy(gradients[1]))
    resumed.update(copied, strict_copy(gradients[1]))
    for key, p in params.items():
        np.testing.assert_array_equal(np.asarray(copied[key]), np.asarray(p))


def test_array_api_strict_errors_change_nothing() -> None:
    opt = xo.Adam()
    params = {"a": array_api_strict.ones(2), "b": array_api_strict.ones(3)}

    def values() -> list[list[float]]:
        return [np.asarray(p).tolist() for p in params.values()]

    before = values()
    for bad in (array_api_strict.ones(4), array_api_strict.ones(3, dtype=array_api_strict.int64), np.ones(3)):
        with refused(opt, error=(TypeError, ValueError), names="b"):
            opt.update(params, {"a": array_api_strict.ones(2), "b": bad})
        assert values() == before
    opt = xo.Adam(clip_norm=1.0)
    nan = array_api_strict.asarray([1.0, float("nan"), 1.0])
    with refused(opt, error=FloatingPointError, names="b"):
        opt.update(params, {"a": array_api_strict.ones(2), "b": nan})
    assert values() == before


@pytest.mark.parametrize("shape", [(), (1,), (2, 3)])
def test_array_api_strict_one_array_under_two_keys(shape: tuple[int, ...]) -> None:
    opt, p = xo.SGD(), array_api_strict.ones(shape)
    with refused(opt, error=ValueError, names="a b"):
        opt.update({"a": p, "b": p}, {"a": array_api_strict.ones(shape), "b": array_api_strict.ones(shape)})
    assert float(array_api_strict.sum(p)) == np.prod(shape)


def test_array_api_strict_gradient_that_is_its_parameter() -> None:
    p, q = array_api_strict.asarray([1.0, 2.0]), array_api_strict.asarray([3.0, 4.0])
    xo.SGD(lr=0.5).update({"p": p, "q": q}, {"p": p, "q": p})
    assert np.asarray(p).tolist() == [0.5, 1.0]
    assert np.asarray(q).tolist() == [2.5, 3.0]


def test_a_rule_may_use_every_function_on_a_strict_namespace() -> None:
    class Functions(xo.Optimizer):
        lr: float = 0.1
        slots = ("m",)

        @staticmethod
        def rule(xp, p, g, m, *, t, lr):
            good = (xp.isfinite(g) & (g > m)) | ~(p >= 1.0)
            size = xp.sqrt(xp.abs(g)) + xp.square(m) + xp.maximum(g, 0.5) - xp.minimum(0.5, p)
            m = xp.where(good, xp.clip(size, -1.0, 1.0), 0.0)
            return p - xp.sqrt(lr) * m * xp.sign(g) ** 3 * 0.9**t, m

    start, gradients, _ = numpy_steps("SGD", "float32", {})
    results = []
    for copied in (lambda tree: {k: v.copy() for k, v in tree.items()}, strict_copy):
        opt, params = Functions(), copied(start)
        with xo.engine("reference"):
            for grads in gradients:
                opt.update(params, copied(grads))
        results.append(params)
    for key, p in results[0].items():
        close(results[1][key], p, "float32")


# torch


@pytest.fixture(name="torch")
def torch_fixture() -> Any:
    return pytest.importorskip("torch", reason="torch is not installed")


def torch_copy(torch: Any, tree: dict[str, np.ndarray]) -> dict[str, Any]:
    return {key: torch.tensor(value) for key, value in tree.items()}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", RULES)
def test_torch(torch: Any, name: str, dtype: str, options: str) -> None:
    """In place: the same tensors, the same memory."""
    start, gradients, expected = numpy_steps(name, dtype, OPTIONS[options])
    params = torch_copy(torch, start)
    kept, addresses = dict(params), {key: p.data_ptr() for key, p in params.items()}
    opt = make_optimizer(name, **OPTIONS[options])
    for grads in gradients:
        opt.update(params, torch_copy(torch, grads))
    for key, p in params.items():
        assert p is kept[key]
        assert p.data_ptr() == addresses[key]
        close(p.numpy(), expected[key], dtype)


def test_torch_parameters_that_require_grad(torch: Any) -> None:
    """Leaves of the autograd graph are updated in place and stay leaves; nothing is recorded."""
    w = torch.ones(3, requires_grad=True)
    b = torch.nn.Parameter(torch.ones(2))
    opt = make_optimizer("Adam", clip_norm=1.0, weight_decay=0.1)
    for _ in range(3):
        loss = (w**2).sum() + (b**2).sum()
        w.grad = b.grad = None
        loss.backward()
        opt.update({"w": w, "b": b}, {"w": w.grad, "b": b.grad})
    for p in (w, b):
        assert p.requires_grad
        assert p.is_leaf
        assert p.grad_fn is None
        assert (p < 1).all()
    for slot in opt.state["slots"].values():
        assert not any(a.requires_grad for a in slot.values())
    assert torch.is_grad_enabled()


def test_torch_gradients_that_require_grad(torch: Any) -> None:
    w, g = torch.ones(3), torch.ones(3, requires_grad=True)
    opt = make_optimizer("Adam")
    opt.update({"w": w}, {"w": g * 2})
    assert not w.requires_grad
    new, _ = opt.apply({"w": w}, {"w": g * 2}, opt.init({"w": w}))
    assert not new["w"].requires_grad


@pytest.mark.parametrize("name", RULES)
def test_torch_16_bit_dtypes(torch: Any, name: str) -> None:
    """Computed in float32 and rounded to nearest even, as on NumPy; slots are float32."""
    rng = np.random.default_rng(1)
    values = [rng.standard_normal(50).astype(np.float32) for _ in range(4)]
    for kind, like in ((torch.float16, DTYPES["float16"]), (torch.bfloat16, BFLOAT16)):
        opt, params = make_optimizer(name), {"p": torch.tensor(values[0]).to(kind)}
        expected, arrays = make_optimizer(name), {"p": values[0].astype(like)}
        with xo.engine("reference"):
            for g in values[1:]:
                opt.update(params, {"p": torch.tensor(g).to(kind)})
                expected.update(arrays, {"p": g.astype(like)})
        for slot in opt.state["slots"].values():
            assert slot["p"].dtype == torch.float32
        assert params["p"].dtype == kind
        # One unit in the last place of bfloat16 is 2^-7: a last bit of float32 may decide a tie.
        np.testing.assert_allclose(
            params["p"].to(torch.float32).numpy(), arrays["p"].astype(np.float32), rtol=2**-7, atol=1e-6
        )


def test_torch_layouts_and_none(torch: Any) -> None:
    room = torch.zeros(4, 6)
    params = {
        "columns": room[:, ::2],
        "transposed": torch.zeros(3, 2).T,
        "none": torch.zeros(2),
        "zero": torch.tensor(0.0),
    }
    grads = {"columns": torch.ones(4, 3), "transposed": torch.ones(2, 3), "none": None, "zero": torch.tensor(1.0)}
    xo.SGD(lr=1.0).update(params, grads)
    assert (room[:, ::2] == -1).all()
    assert (room[:, 1::2] == 0).all()
    assert (params["transposed"] == -1).all()
    assert (params["none"] == 0).all()
    assert params["zero"].item() == -1
    assert (grads["columns"] == 1).all()


def test_torch_errors_change_nothing(torch: Any) -> None:
    opt, params = xo.Adam(), {"a": torch.ones(2), "b": torch.ones(3)}
    for bad in (torch.ones(4), torch.ones(3, dtype=torch.int64), np.ones(3), torch.ones(3, dtype=torch.complex64)):
        with refused(opt, error=(TypeError, ValueError), names="b"):
            opt.update(params, {"a": torch.ones(2), "b": bad})
    shared = torch.ones(4)
    with refused(opt, error=ValueError, names="b c"):
        opt.update({"b": shared, "c": shared}, {"b": torch.ones(4), "c": torch.ones(4)})
    with refused(opt, error=ValueError, names="b c"):
        opt.update({"b": shared[:3], "c": shared[2:]}, {"b": torch.ones(3), "c": torch.ones(2)})
    with refused(opt, error=TypeError, names="b"):
        opt.update({"b": torch.ones(2, dtype=torch.int32)}, {"b": torch.ones(2)})
    assert (params["a"] == 1).all()
    assert (shared == 1).all()


def test_torch_gradient_that_overlaps_its_parameter(torch: Any) -> None:
    p = torch.arange(1.0, 9.0)
    expected = p - 0.5 * p.flip(0)
    xo.SGD(lr=0.5).update({"p": p}, {"p": p.flip(0)})
    assert torch.equal(p, expected)
    room = torch.arange(12.0)
    expected = room[1:] - 0.5 * room[:-1]
    xo.SGD(lr=0.5).update({"p": room[1:]}, {"p": room[:-1]})
    assert torch.equal(room[1:], expected)


def test_torch_functional_and_state(torch: Any) -> None:
    start, gradients, expected = numpy_steps("Adam", "float32", OPTIONS["all"])
    params: Any = torch_copy(torch, start)
    opt = make_optimizer("Adam", **OPTIONS["all"])
    state = opt.init(params)
    for grads in gradients:
        params, state = opt.apply(params, torch_copy(torch, grads), state)
    for key, p in params.items():
        close(p.numpy(), expected[key], "float32")
    assert all(type(a) is torch.Tensor for slot in state["slots"].values() for a in slot.values())


# JAX


@pytest.fixture(name="jnp")
def jnp_fixture() -> Any:
    pytest.importorskip("jax", reason="JAX is not installed")
    import jax.numpy

    return jax.numpy


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize("name", RULES)
def test_jax_functional(jnp: Any, name: str, dtype: str, options: str) -> None:
    start, gradients, expected = numpy_steps(name, dtype, OPTIONS[options])
    params: Any = {key: jnp.asarray(p) for key, p in start.items()}
    opt = make_optimizer(name, **OPTIONS[options])
    state = opt.init(params)
    for grads in gradients:
        params, state = opt.apply(params, {key: jnp.asarray(g) for key, g in grads.items()}, state)
    for key, p in params.items():
        assert type(p) is type(jnp.zeros(1))
        # JAX flushes subnormals and may contract: a looser bound.
        np.testing.assert_allclose(np.asarray(p), expected[key], rtol=1e-4, atol=1e-5)
    assert state["step"] == len(gradients)


@pytest.mark.parametrize("name", RULES)
def test_jax_arrays_are_rebound(jnp: Any, name: str) -> None:
    """They are immutable: rebound in a mutable container, refused in a tuple or alone."""
    start, gradients, expected = numpy_steps(name, "float32", {})
    params = {key: jnp.asarray(p) for key, p in start.items()}
    kept = dict(params)
    opt = make_optimizer(name)
    for grads in gradients:
        opt.update(params, {key: jnp.asarray(g) for key, g in grads.items()})
    for key, p in params.items():
        assert p is not kept[key]
        np.testing.assert_array_equal(np.asarray(kept[key]), start[key])
        np.testing.assert_allclose(np.asarray(p), expected[key], rtol=1e-4, atol=1e-5)
    alone = jnp.ones(2)
    for params, grads in [((alone,), (alone,)), (alone, alone)]:
        with refused(make_optimizer(name), error=(TypeError, ValueError), names="apply"):
            make_optimizer(name).update(params, grads)


def test_one_jax_array_under_two_keys_is_fine(jnp: Any) -> None:
    """It is immutable, so no key can write to another's."""
    one = jnp.ones(2)
    params = {"a": one, "b": one}
    xo.SGD(lr=0.5).update(params, {"a": one, "b": 2 * one})
    assert np.asarray(params["a"]).tolist() == [0.5, 0.5]
    assert np.asarray(params["b"]).tolist() == [0.0, 0.0]


def test_jax_bfloat16(jnp: Any) -> None:
    params = {"p": jnp.ones(3, jnp.bfloat16)}
    opt = xo.Adam(lr=0.5)
    opt.update(params, {"p": jnp.full(3, 2, jnp.bfloat16)})
    assert params["p"].dtype == jnp.bfloat16
    assert opt.state["slots"]["v"]["p"].dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(params["p"].astype(jnp.float32)), 0.5, rtol=1e-2)


# Complex gradients: whose convention is ours.

TARGET = np.array([1 + 2j, -0.5 - 1j, 0.25j])
START = np.array([0.5 - 1j, 1 + 1j, -1 - 0.5j])


def complex_loss(z: Any, target: Any) -> Any:
    """Not analytic, and unlike in its two parts."""
    return (abs(z - target) ** 2 + 0.25 * z.real * z.imag).sum()


def finite_differences(z: np.ndarray) -> np.ndarray:
    """``dL/d(re) + 1j*dL/d(im)``, element by element."""
    g = np.zeros_like(z)
    for i, direction in itertools.product(range(len(z)), (1, 1j)):
        h = np.zeros_like(z)
        h[i] = 1e-6 * direction
        g[i] += direction * (complex_loss(z + h, TARGET) - complex_loss(z - h, TARGET)) / 2e-6
    return g


def descent(z: Any, gradient: Callable[[Any], Any], steps: int = 60) -> np.ndarray:
    params, opt = {"z": z}, xo.SGD(lr=0.1)
    for _ in range(steps):
        opt.update(params, {"z": gradient(params["z"])})
    return np.asarray(params["z"])


def test_torch_gives_our_complex_gradient(torch: Any) -> None:
    def gradient(z: Any) -> Any:
        leaf = z.detach().clone().requires_grad_()
        complex_loss(leaf, torch.tensor(TARGET)).backward()
        return leaf.grad

    np.testing.assert_allclose(gradient(torch.tensor(START)).numpy(), finite_differences(START), rtol=1e-6)
    reached = descent(torch.tensor(START), gradient)
    np.testing.assert_allclose(reached, descent(START.copy(), finite_differences), rtol=1e-6)
    assert abs(finite_differences(reached)).max() < 1e-3


def test_jax_gives_the_conjugate_of_our_complex_gradient(jnp: Any) -> None:
    import jax

    target = jnp.asarray(TARGET, jnp.complex64)
    gradient, start = jax.grad(lambda z: complex_loss(z, target)), jnp.asarray(START, jnp.complex64)
    np.testing.assert_allclose(jnp.conj(gradient(start)), finite_differences(START), rtol=1e-5)
    reached = descent(start, lambda z: jnp.conj(gradient(z)))
    np.testing.assert_allclose(reached, descent(START.copy(), finite_differences), rtol=1e-4)
    own = descent(START.copy(), lambda z: np.conj(gradient(jnp.asarray(z, jnp.complex64))))  # a NumPy parameter
    np.testing.assert_allclose(own, reached, rtol=1e-4)
    # As it comes it climbs in the imaginary parts.
    assert abs(descent(start, gradient).imag).max() > 1000
