"""What only a GPU shows: its conversions, time and streams, memory, large tensors, and the package as a whole."""

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
from cuda_host.steps import GPU, alike, askew, assert_same, follow, moved, trees
from helpers import DTYPES, RULES, assert_same_bits, from_words, make_optimizer, random_values
from real_gpu import SPIN, RealGPU, needs_a_real_one, real_gpu, size, skip_without_gpu

import xpoptim as xo
from xpoptim.engines.cuda import driver, nvrtc

skip_without_gpu()


@pytest.fixture
def gpu() -> Iterator[RealGPU]:
    with real_gpu() as real:
        yield real


# --- numbers


@pytest.mark.parametrize("name", ["float32", "float64"])
def test_subnormal_numbers_are_kept(name: str, gpu: GPU) -> None:
    """With Adam, a gradient of 3e-19 has a square of 9e-38 and a second moment below the smallest normal float32."""
    dtype = DTYPES[name]
    smallest = np.finfo(dtype).smallest_subnormal
    rng = np.random.default_rng(1)
    tiny = from_words(rng.integers(1, 1 << (np.finfo(dtype).nmant - 1), 5000).tolist(), dtype)
    scale = np.sqrt(np.finfo(dtype).tiny)
    params = {"tiny": tiny, "normal": rng.standard_normal(5000).astype(dtype)}
    gradients = [
        {"tiny": -tiny, "normal": (rng.standard_normal(5000) * scale).astype(dtype)},
        {"tiny": np.full(5000, smallest), "normal": np.full(5000, 3 * scale, dtype)},
    ]
    for rule in RULES:
        follow(gpu, partial(make_optimizer, rule), params, gradients * 2)
    opt = make_optimizer("Adam")
    opt.update({"p": (p := gpu.array(np.zeros(3, dtype)))}, {"p": gpu.array(np.full(3, scale, dtype))})
    second = gpu.host(opt.state["slots"]["v"]["p"])
    assert np.all((second > 0) & (second < np.finfo(dtype).tiny))  # there were subnormal numbers to lose
    assert np.all(np.isfinite(gpu.host(p)))


def test_division_and_root_are_correctly_rounded(gpu: GPU) -> None:
    class Quotient(xo.Optimizer):
        slots = ("root",)

        @staticmethod
        def rule(xp: Any, p: Any, g: Any, root: Any) -> Any:
            return p / g, xp.sqrt(xp.abs(g)) + root * 0

    rng = np.random.default_rng(2)
    for name in ("float32", "float64"):
        dtype = DTYPES[name]
        words = [rng.integers(0, 2**64, size(2_000_000, 5_000), np.uint64).view(dtype) for _ in range(2)]
        follow(gpu, Quotient, {"p": words[0]}, [{"p": words[1]}])


def test_contraction_would_change_bits(gpu: GPU) -> None:
    """``p - lr * g`` in one rounding differs from two for many of these; the engine has to make two."""
    rng = np.random.default_rng(3)
    p, g = rng.standard_normal((2, size(100_000, 10_000))).astype(np.float32)
    fused = (p.astype(np.float64) - np.float64(np.float32(0.1)) * g).astype(np.float32)
    assert np.any(fused != p - np.float32(0.1) * g)
    follow(gpu, lambda: xo.SGD(lr=0.1), {"p": p}, [{"p": g}])


@pytest.mark.parametrize("rule", RULES)
def test_a_thousand_random_steps(rule: str, gpu: GPU) -> None:
    """Shapes, dtypes, offsets, hyperparameters and options at random; compared after each hundred."""
    rng = np.random.default_rng(list(RULES).index(rule))
    names = rng.permutation(list(DTYPES))[:3]
    params = {
        f"{name} {i}": random_values(rng, tuple(rng.integers(1, 60, rng.integers(0, 3))), DTYPES[name])
        for i, name in enumerate(names.tolist() * 4)
    }
    params["large"] = random_values(rng, (size(123_457, 457),), DTYPES["float32"])
    options = {
        "clip_norm": lambda step: 5.0 / (1 + step % 7),
        "weight_decay": 0.001,
        "capturable": bool(rng.integers(2)),
    }
    opt, expected_opt, on_gpu = (*(make_optimizer(rule, **options) for _ in range(2)), moved(gpu, params, askew))
    pool = [alike(params, seed=int(rng.integers(1 << 30)), special=0) for _ in range(7)]
    given = [moved(gpu, grads, askew) for grads in pool]
    for step in range(size(1000, 100)):
        if step % 97 == 0:
            opt.lr = expected_opt.lr = float(rng.uniform(1e-4, 1e-2))
        which = int(rng.integers(len(pool)))
        opt.update(on_gpu, given[which])
        expected_opt.update(params, pool[which])
        if step % 100 == 99:
            assert_same(gpu, opt, on_gpu, expected_opt, params)
    assert opt.skipped == 0


@pytest.mark.parametrize("rule", ["SGD", "Adam"])
def test_large_tensors(rule: str, gpu: GPU) -> None:
    """Many blocks, the longer chunks of large tensors, and a norm that is folded in several rounds."""
    rng = np.random.default_rng(4)
    params = {"a": rng.standard_normal(size(30_000_001, 30_001), np.float32), "b": rng.standard_normal(17, np.float32)}
    grads = {key: rng.standard_normal(p.shape, np.float32) for key, p in params.items()}
    follow(gpu, lambda: make_optimizer(rule, clip_norm=1.0), params, [grads] * 2, place=askew)


@needs_a_real_one
def test_more_elements_than_32_bits_count(gpu: GPU) -> None:
    import cupy

    n = 2**31 + 5000
    free, _ = cupy.cuda.runtime.memGetInfo()
    if free < 6 * n:
        pytest.skip(f"needs {6 * n / 1e9:.0f} GB of GPU memory")
    p, g = cupy.zeros(n, np.float16), cupy.zeros(n, np.float16)
    rng = np.random.default_rng(5)
    pieces = [slice(k, k + 4000) for k in (0, 2**30 + 3, 2**31 - 2000, n - 4000)]
    expected = []
    for piece in pieces:
        values = rng.standard_normal((2, 4000)).astype(np.float16)
        p[piece], g[piece] = (cupy.asarray(v) for v in values)
        expected.append(values)
    opt = xo.SGD(lr=0.25)
    opt.update({"W": p}, {"W": g})
    for piece, (here, slope) in zip(pieces, expected, strict=True):
        xo.SGD(lr=0.25).update({"W": here}, {"W": slope})
        assert_same_bits(p[piece].get(), here)
    untouched = n - 4 * 4000
    assert int((p == 0).sum()) >= untouched


# --- time and streams


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"capturable": True}], ids=["plain", "norm", "capturable"])
@pytest.mark.parametrize("count", [3, 1000])
def test_no_step_waits_for_the_gpu(count: int, options: dict[str, Any], gpu: RealGPU) -> None:
    """Steps return while the GPU is still busy with what was there before them."""
    params = {f"{i}": np.ones(100, np.float32) for i in range(count)}
    opt: Any
    expected_opt: Any
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", **options) for _ in range(2)), moved(gpu, params))
    gradients = [alike(params, seed=step, special=0) for step in range(4)]
    given = [moved(gpu, grads) for grads in gradients]
    opt.update(on_gpu, given[0])  # compiles and allocates
    before = gpu.busy(gpu.stream)
    with gpu.quiet():
        for grads in given[1:]:
            opt.lr = opt.lr / 2
            opt.update(on_gpu, grads)
    assert not before.done, "a step has waited for the GPU"
    for grads in gradients:
        if grads is not gradients[0]:
            expected_opt.lr = expected_opt.lr / 2
        expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_steps_are_in_the_order_of_their_stream(gpu: RealGPU) -> None:
    """A gradient that is written on the stream long after the call is the one that is used."""
    import cupy

    values = np.random.default_rng(0).standard_normal((2, size(100_000, 1_000))).astype(np.float32)
    params = {"W": gpu.array(values[0])}
    grads, late = {"W": gpu.array(np.zeros_like(values[0]))}, gpu.array(values[1])
    opt = xo.SGD(lr=0.25)
    opt.update(params, grads)
    event = gpu.busy(gpu.stream)
    grads["W"][...] = late
    opt.update(params, grads)
    assert not event.done
    assert cupy.cuda.get_current_stream() == gpu.stream
    assert_same_bits(gpu.host(params["W"]), values[0] - np.float32(0.25) * values[1])


def test_the_default_stream() -> None:
    """Without a stream of the user's own."""
    with real_gpu() as gpu:
        import cupy

        params = trees({"float32": np.dtype(np.float32)}, special=0)
        gradients = [alike(params, seed=step, special=0) for step in range(3)]
        with cupy.cuda.Stream.null:
            follow(gpu, lambda: make_optimizer("Adam", clip_norm=0.5), params, gradients)


# --- memory


@needs_a_real_one
def test_memory(gpu: RealGPU) -> None:
    """The first step takes the slots' memory and a few kilobytes; later ones nothing, not for a moment."""
    import cupy

    taken = []

    class Record(cupy.cuda.MemoryHook):
        name = "record"

        def malloc_postprocess(self, **about: Any) -> None:
            taken.append(about["mem_size"])

    p, g = (cupy.ones(1_000_000, np.float32) for _ in range(2))
    for options in ({}, {"clip_norm": 1.0}, {"capturable": True}):
        opt = make_optimizer("Adam", **options)
        taken.clear()
        with Record():
            opt.update({"W": p}, {"W": g})
            assert 8_000_000 <= sum(taken) <= 8_000_000 + 16_384
            taken.clear()
            for _ in range(3):
                opt.update({"W": p}, {"W": g.copy()})
        assert sum(taken) <= 3 * 4_000_256  # the copies of g alone


# --- the whole of the package


@needs_a_real_one
def test_a_cubin_for_another_gpu_is_explained() -> None:
    """The error names both versions and the architecture."""
    other = "sm_75" if driver.architecture(0) != "sm_75" else "sm_80"
    with pytest.raises(RuntimeError, match=f"refused a kernel that NVRTC .* compiled for {other}"):
        driver.load(nvrtc.cubin(SPIN, other), other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout(dtype: str, gpu: GPU) -> None:
    """The same bits as in NumPy, forward, backward and in a test pass."""
    x = random_values(np.random.default_rng(0), (123, 457), DTYPES[dtype], 0.1)
    for inverted in (False, True):
        here, there = (xo.Dropout(0.3, inverted=inverted, seed=5) for _ in range(2))
        for _ in range(2):
            assert_same_bits(gpu.host(there.forward(gpu.array(x))), here.forward(x))
            assert_same_bits(gpu.host(there.backward(gpu.array(x))), here.backward(x))
        assert_same_bits(gpu.host(there.forward(gpu.array(x), train_flg=False)), here.forward(x, train_flg=False))


@needs_a_real_one
def test_mask_of_dropout(gpu: GPU) -> None:
    here, there = (xo.Dropout(0.3, seed=5) for _ in range(2))
    x = np.ones((123, 457), np.float32)
    here.forward(x)
    there.forward(gpu.array(x))
    assert np.array_equal(gpu.host(there.mask), here.mask)


@needs_a_real_one
def test_demo(tmp_path: Any) -> None:
    for module in ("rich", "matplotlib", "sklearn"):
        pytest.importorskip(module)
    command = [sys.executable, "-m", "xpoptim", "demo", "--backend", "cupy", "--steps", "60", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert list(tmp_path.glob("*.png"))


@needs_a_real_one
def test_info() -> None:
    pytest.importorskip("rich")
    done = subprocess.run(
        [sys.executable, "-m", "xpoptim", "info"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "usable: CuPy arrays" in done.stdout
