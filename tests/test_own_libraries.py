"""NumPy and CuPy arrays need no library but their own: array-api-compat is there for the arrays of others.

The functions without an underscore that are no tests run in a process of their own, in which array-api-compat and
array-api-strict cannot be imported, and in which to try is remembered.
"""

import contextlib
import copy
import importlib
import inspect
import itertools
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
from cuda_host import host_kernel
from helpers import (
    DTYPES,
    LAYOUTS,
    RULES,
    assert_parity,
    assert_same_bits,
    assert_same_tree,
    make_optimizer,
    random_values,
)

import xpoptim as xo
from xpoptim import random
from xpoptim._dropout import arrays as masking
from xpoptim._dropout import layer as _dropout
from xpoptim.arrays.namespaces import lookup
from xpoptim.engines import reference

BLOCKED = """
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("array_api_compat", "array_api_strict"):
            asked.append(name)
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

asked = []
sys.meta_path.insert(0, Refuse())
import test_own_libraries
"""

needs_cupy = pytest.mark.skipif(host_kernel.missing() is not None, reason=str(host_kernel.missing()))
OPTIONS: list[dict[str, Any]] = [{}, {"clip_norm": 0.5, "weight_decay": 0.1, "clip_value": 2.0}]


def run_blocked(code: str) -> None:
    """Run a statement after `BLOCKED`, as on a machine that lacks the libraries."""
    here = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), str(here.parent), *filter(None, sys.path)])}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", BLOCKED + code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("what", ["numpy_steps", "numpy_state", "numpy_dropout", "numpy_words"])
def test_numpy(what: str) -> None:
    run_blocked(f"test_own_libraries.{what}(); assert not asked, asked")


@needs_cupy
@pytest.mark.parametrize("what", ["cupy_steps", "cupy_layouts", "cupy_state", "cupy_dropout", "cupy_names"])
def test_cupy(what: str) -> None:
    run_blocked(f"test_own_libraries.{what}(); assert not asked, asked")


@pytest.mark.smoke
def test_arrays_of_other_libraries_say_what_to_install() -> None:
    run_blocked("test_own_libraries.foreign_arrays(); assert set(asked) == {'array_api_compat'}, asked")


def test_what_is_no_array_is_no_reason_to_ask() -> None:
    run_blocked("test_own_libraries.no_arrays(); assert not asked, asked")


@needs_cupy
def test_the_tests_for_a_gpu_import_neither() -> None:
    run_blocked("test_own_libraries.gpu_tests(); assert not asked, asked")


def gpu_tests() -> None:
    """The modules of tests/gpu up to where they skip for want of a GPU, which is behind their imports."""
    sys.path.insert(0, str(Path(__file__).with_name("gpu")))
    for name in ("conftest", "test_gpu_device", "test_gpu_engine"):
        with contextlib.suppress(pytest.skip.Exception):
            importlib.import_module(name)
    assert "test_cuda_engine" in sys.modules


# --- NumPy


def _trees(layout: str = "C", names: Any = DTYPES) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Parameters of each dtype and the gradients of two steps, in one layout."""
    rng = np.random.default_rng(0)

    def tree() -> dict[str, Any]:
        lay = LAYOUTS[layout]
        return {f"{n} {s}": lay(random_values(rng, s, DTYPES[n])) for n in names for s in ((), (0,), (5,), (7, 9))}

    return tree(), [tree(), tree()]


def numpy_steps() -> None:
    """Both engines, which have to agree, for every rule and layout."""
    for options in OPTIONS:
        for rule in RULES:
            assert_parity(partial(make_optimizer, rule, **options), _trees)
        for layout in LAYOUTS:
            assert_parity(partial(make_optimizer, "Adam", **options), partial(_trees, layout))

    class Plain(xo.Optimizer):
        fused: ClassVar[bool] = False

        @staticmethod
        def rule(xp: Any, p: Any, g: Any) -> Any:
            return xp.astype(p - 0.5 * g * xp.sum(xp.zeros_like(p)), p.dtype)

    opt, params = Plain(), {"W": np.ones(3), "b": 1.0}
    opt.update(params, {"W": np.ones(3), "b": 2.0})
    assert params["b"] == 1.0


def numpy_state() -> None:
    for options in OPTIONS:
        params, gradients = _trees()
        opt, state = make_optimizer("Adam", **options), make_optimizer("Adam", **options).init(params)
        applied = copy.deepcopy(params)
        for grads in gradients:
            applied, state = opt.apply(applied, grads, state)
        first = make_optimizer("Adam", **options)
        first.update(params, gradients[0])
        second = make_optimizer("Adam", **options)
        second.load_state_dict(pickle.loads(pickle.dumps(first.state_dict())))
        second.update(params, gradients[1])
        assert_same_tree(applied, params)
        assert_same_tree(state, second.state)
        assert "fused" in str(second.explain(params, gradients[1]))


def numpy_dropout() -> None:
    rng = np.random.default_rng(0)
    for name, dtype in DTYPES.items():
        for layout, lay in LAYOUTS.items():
            x = lay(random_values(rng, (13, 7), dtype))
            found = []
            for engine in ("auto", "reference"):
                with xo.engine(engine):
                    drop = xo.Dropout(0.3, inverted=True, seed=5)
                    made = [drop.forward(x), drop.forward(x, train_flg=False), drop.backward(x), drop.mask * 1.0]
                    made += [xo.dropout(x, 0.5, seed=1, stream=2), drop.forward(x, out=np.empty_like(x))]
                    made.append(xo.Dropout(0.5, broadcast_axes=1, seed=3).forward(x))
                    made += [xo.Dropout(ratio, seed=3).forward(x) for ratio in (0, 1)]
                found.append(made)
            assert_same_tree(found[0], found[1], f"{name} {layout}")


def numpy_words() -> None:
    assert xo.random.words(0, 0, 5).tolist() == [1713891541, 3781805453, 3159862348, 2600524760, 4175744164]
    assert np.array_equal(xo.random.words(1, 2, 99, xp=np, device="cpu"), xo.random.words(1, 2, 99))


# --- CuPy


def cupy_steps() -> None:
    from cuda_host.emulated import emulated_gpu
    from cuda_host.steps import follow

    for options in [*OPTIONS, {"capturable": True}]:
        for rule in RULES:
            with emulated_gpu() as gpu:
                follow(gpu, partial(make_optimizer, rule, **options), *_trees())


def cupy_layouts() -> None:
    """Dense and staged."""
    from cuda_host.emulated import emulated_gpu
    from cuda_host.steps import follow

    for options in OPTIONS:
        for layout in ("C", "fortran", "permuted", "reversed", "strided", "columns"):
            with emulated_gpu() as gpu:
                params, gradients = _trees(layout, ("float32", "complex64"))
                follow(gpu, partial(make_optimizer, "Adam", **options), params, gradients)


def cupy_state() -> None:
    from cuda_host.emulated import emulated_gpu
    from cuda_host.steps import follow, moved

    class Started(xo.Optimizer):
        slots: ClassVar = {"zero": 0.0, "one": 1.0}

        @staticmethod
        def rule(xp: Any, p: Any, g: Any, zero: Any, one: Any) -> Any:
            return p - g, zero + g, one + g

    with emulated_gpu() as gpu:
        follow(gpu, Started, *_trees())
    for options in OPTIONS:
        with emulated_gpu() as gpu:
            values, gradients = _trees(names=("float32", "complex128"))
            params, (one, two) = moved(gpu, values), [moved(gpu, grads) for grads in gradients]
            first = make_optimizer("Adam", **options)
            state = first.init(params)
            applied, state = first.apply(params, one, state)
            first.update(params, one)
            assert_same_tree(gpu.host(applied), gpu.host(params))
            assert_same_tree(gpu.host(state), gpu.host(first.state))
            assert "fused" in str(first.explain(params, one))
            for saved in (first.state_dict(), gpu.host(first.state_dict())):  # from a GPU, and from a file
                second, again = make_optimizer("Adam", **options), moved(gpu, gpu.host(params))
                second.load_state_dict(saved)
                second.update(again, two)
            first.update(params, two)
            assert_same_tree(gpu.host(again), gpu.host(params))
            params["alone"], two["alone"] = gpu.array(np.ones(())), 2.0  # a number as the gradient of an array
            xo.SGD().update(params, two)


def cupy_dropout() -> None:
    from cuda_host.emulated import emulated_gpu

    x = random_values(np.random.default_rng(0), (123, 45), DTYPES["float32"])
    with emulated_gpu() as gpu:
        here, there = xo.Dropout(0.3, seed=5), xo.Dropout(0.3, seed=5)
        for lay in (LAYOUTS["C"], LAYOUTS["fortran"], LAYOUTS["strided"]):
            assert_same_bits(gpu.host(there.forward(gpu.array(lay(x)))), here.forward(x))
            assert_same_bits(gpu.host(there.backward(gpu.array(lay(x)))), here.backward(x))
            assert_same_bits(
                gpu.host(there.forward(gpu.array(lay(x)), train_flg=False)), here.forward(x, train_flg=False)
            )


def cupy_names() -> None:
    """What is asked of CuPy, by the signatures of its own functions; NumPy does the work, which takes no GPU."""
    import cupy

    from xpoptim.arrays.namespaces import cupy_namespace

    x = random_values(np.random.default_rng(0), (13, 700), DTYPES["complex64"])
    expected = _asked_for(np, x)
    with _worked_by_numpy():
        for xp in (cupy, cupy_namespace):
            assert_same_tree(_asked_for(xp, x), expected)
    assert cupy_namespace.matmul is cupy.matmul  # for plain rules
    asked = sys.modules["__main__"].asked  # type: ignore[attr-defined]
    assert asked
    asked.clear()


def _asked_for(xp: Any, x: np.ndarray) -> list[Any]:
    """Everything that is computed by the functions of a namespace where that is CuPy's."""
    found: list[Any] = [xo.random.words(1, 2, n, xp=xp, start_block=2**32 - 1) * 1.0 for n in (9, 4099)]
    found += [random.keep_mask(5, 1, (3, 7), ratio, xp=xp) * 1.0 for ratio in (0.0, 0.5, 1.0)]
    names = lookup.standard(xp)
    for array in (x, x.real, x.real[::-2].astype(np.float64), x[:0]):
        leaf = masking.checked("x", array, None)._replace(xp=names, device=None)
        for keep in (None, random.keep_mask(5, 1, array.shape, 0.5, xp=xp), np.ones((1, 1), bool)):
            found.append(masking.by_reference(leaf, keep, 0.3, _dropout._dropped))
        own = array.copy()
        overlapping = leaf._replace(x=own, out=own[::-1])
        found.append(masking.by_reference(overlapping, None, 0.3, _dropout._dropped))
    with mock.patch.object(reference, "namespace", return_value=names), xo.engine("reference"):
        for rule, options in itertools.product(RULES, OPTIONS):
            opt, (params, gradients) = make_optimizer(rule, **options), _trees()
            for grads in gradients:
                grads = {key: np.nan_to_num(g) for key, g in grads.items()}
                opt.update(params, grads)
            found += [params, opt.state]
    return found


@contextlib.contextmanager
def _worked_by_numpy() -> Iterator[None]:
    """CuPy's functions check their arguments, as CuPy has them, and then NumPy's do the work."""
    import cupy

    from xpoptim.arrays.namespaces import cupy_namespace

    def as_numpy(name: str) -> Any:
        real, work = getattr(cupy, name), getattr(np, name)
        try:
            signature = inspect.signature(real)
        except (TypeError, ValueError):  # an elementwise function of CuPy
            return work

        def checked(*arguments: Any, **keywords: Any) -> Any:
            signature.bind(*arguments, **keywords)
            return work(*arguments, **keywords)

        return checked

    names = {
        "array",
        "asarray",
        "arange",
        "concatenate",
        "empty",
        "empty_like",
        "full",
        "full_like",
        "zeros",
        "zeros_like",
    }
    names |= {name for name in cupy_namespace.CUPYS_OWN if not isinstance(getattr(np, name), type)}
    with (
        mock.patch.multiple(cupy, **{name: as_numpy(name) for name in names}),
        mock.patch.object(cupy_namespace, "on", return_value=contextlib.nullcontext()),
    ):
        yield


# --- others


class _Foreign:
    """An array of some other library."""

    shape, dtype, ndim, size = (3,), "float32", 1, 3

    def __array_namespace__(self, api_version: str | None = None) -> Any:
        return sys.modules[__name__]


def empty(shape: Any) -> Any:
    return _Foreign()


def _refused(call: Callable[[], Any], error: type[Exception], *words: str) -> None:
    with pytest.raises(error) as caught:
        call()
    for word in words:
        assert word in str(caught.value), caught.value


def foreign_arrays() -> None:
    words = ("_Foreign", "array-api-compat", "pip install array-api-compat")
    theirs: Any = _Foreign()
    ours, opt = np.ones(3), xo.Adam()
    _refused(lambda: opt.update({"W": theirs}, {"W": theirs}), ImportError, *words)
    _refused(lambda: opt.update({"W": ours}, {"W": theirs}), ImportError, *words)
    _refused(lambda: opt.init({"W": theirs}), ImportError, *words)
    _refused(lambda: opt.apply({"W": theirs}, {"W": theirs}, {"step": 0, "slots": {}}), ImportError, *words)
    _refused(lambda: xo.Dropout().forward(theirs), ImportError, *words)
    _refused(lambda: xo.Dropout().forward(ours, out=theirs), ImportError, *words)
    _refused(lambda: xo.random.words(0, 0, 5, xp=sys.modules[__name__]), ImportError, *words)
    assert opt.state == {"step": 0, "slots": {}}
    assert ours.tolist() == [1.0] * 3


def no_arrays() -> None:
    for given in (None, "text", object(), 3, {1, 2}, range(3), memoryview(b"")):
        _refused(lambda given=given: xo.SGD().update({"W": given}, {"W": 1.0}), TypeError, "params['W']")
        if given not in (None, 3):
            _refused(lambda given=given: xo.SGD().update({"W": np.ones(())}, {"W": given}), TypeError, "grads['W']")
            _refused(lambda given=given: xo.Dropout().forward(given), TypeError, "x must be an array or a scalar")


@needs_cupy
def test_a_plain_rule_finds_all_of_the_standard() -> None:
    """What the package has no use for, and CuPy does not have by itself, is array-api-compat's."""
    compat = pytest.importorskip("array_api_compat.cupy")
    from xpoptim.arrays.namespaces import cupy_namespace

    assert cupy_namespace.vecdot is compat.vecdot
    assert cupy_namespace.linalg is compat.linalg
    with pytest.raises(AttributeError):
        _ = cupy_namespace.no_such_function
