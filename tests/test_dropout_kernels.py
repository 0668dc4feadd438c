"""The Dropout kernels, on the CPU and (emulated) on the GPU: known answers, the reference's bits, memory, statistics.

Two references stand behind them: the oracle of Python integers in test_random.py, which knows nothing of the package,
and the plain Array API path. The CUDA text is compiled for the host; see cuda_host/emulated.py for what cannot be
seen this way.
"""

import ctypes
import json
import re
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import nvrtc_reports
import pytest
from cuda_host.emulated import emulated_gpu, like
from cuda_host.host_kernel import HostModule, host_memory, missing, run_sanitized, to_cupy, to_numpy
from helpers import DTYPES, LAYOUTS, assert_same_bits, random_values, real_dtype, special_values, threads
from hypothesis import given
from hypothesis import strategies as st
from test_dropout import strided
from test_random import KNOWN_ANSWERS, correlation_in_sigmas, five_sigma, oracle_words

import xpoptim as xo
from xpoptim import random
from xpoptim._dropout import layer as _dropout
from xpoptim.codegen.cuda import blocks as cuda_blocks
from xpoptim.codegen.cuda.elementwise import THREADS
from xpoptim.engines import blocks
from xpoptim.engines.cpu import blocks as cpu_blocks
from xpoptim.engines.cpu import thread_pool
from xpoptim.engines.cuda import driver, nvrtc
from xpoptim.trace.program import BlockProgram, Buffer
from xpoptim.trace.tracer import trace_blocks

WHY_NO_HOST = missing()
on_host = pytest.mark.skipif(WHY_NO_HOST is not None, reason=str(WHY_NO_HOST))
try:
    nvrtc.version()
    WHY_NO_NVRTC = ""
except ImportError as error:
    WHY_NO_NVRTC = str(error).split(". ")[0]
needs_nvrtc = pytest.mark.skipif(bool(WHY_NO_NVRTC), reason=WHY_NO_NVRTC)

EVERY_DTYPE = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
BOTH_ORDERS = pytest.mark.parametrize("backward", [False, True])
SIZES = (0, 1, 2, 3, 4, 5, 7, 8, 9, 100, 4099)
LARGE = 300_001  # enough for several threads
SEED = 0xFEDCBA9876543210
ALL_BITS = 2**64 - 1


def values(shape: tuple[int, ...], dtype: np.dtype, seed: int = 0, special: float = 0.3) -> np.ndarray:
    return random_values(np.random.default_rng(seed), shape, dtype, special)


def on_engines(call: Callable[[], Any], *names: str) -> list[Any]:
    """What a call gives on each engine."""
    results = []
    for name in names or ("reference", "fused"):
        with xo.engine(name):
            results.append(call())
    return results


def assert_engines_agree(call: Callable[[], np.ndarray]) -> np.ndarray:
    expected, actual = on_engines(call)
    assert_same_bits(actual, expected)
    return actual


# --- Known answers --------------------------------------------------------------------------------------


def as_number(xp: Any, word: Any) -> Any:
    """A word as a float64: the sum of its bits, each of them read after it was shifted to the top."""
    number = xp.where(word >= 2**31, float(2**31), 0.0)
    for bit in range(31):
        shifted = xp.multiply_words(word, 2 ** (31 - bit))[1]
        number = number + xp.where(shifted >= 2**31, float(2**bit), 0.0)
    return number


def words_program() -> BlockProgram:
    """The generator as the kernels trace it, its words in place of the elements.

    The counter's lower half is the block's index, with the words `flip_low` and `flip_high` xored in.
    """
    keys = [f"key{r}_{half}" for r in range(random.PHILOX_ROUNDS) for half in ("low", "high")]

    def block(xp: Any, numbers: Any, block: Any, words: Any, scalars: Any) -> Any:
        low, high = block[0] ^ words["flip_low"], block[1] ^ words["flip_high"]
        counter = (low, high, words["stream_low"], words["stream_high"])
        pairs = list(zip(*[iter(words[key] for key in keys)] * 2, strict=True))
        return [as_number(xp, word) for word in random.philox4x32(counter, pairs, xp.multiply_words)]

    return trace_blocks(
        block,
        name="words",
        buffer=Buffer("x", "param", "float64"),
        inputs=(),
        words=("flip_low", "flip_high", "stream_low", "stream_high", *keys),
    )


WORDS = blocks.Kernel(words_program())


def words_by_reference(seed: int, stream: int, start_block: int, n: int) -> np.ndarray:
    return random.words(seed, stream, n, start_block=start_block).astype(np.float64)


def words_by_llvm(seed: int, stream: int, start_block: int, n: int) -> np.ndarray:
    """The words of block 0 and the following, with the start xored in."""
    x = np.zeros(n)
    WORDS.run(x, x, [], flipped(seed, stream, start_block))
    return x


def words_by_cuda(seed: int, stream: int, start_block: int, n: int) -> np.ndarray:
    with emulated_gpu() as gpu:
        x = like(np.zeros(n))
        WORDS.run(x, x, [], flipped(seed, stream, start_block))
        return gpu.to_numpy(x)


def flipped(seed: int, stream: int, start_block: int) -> list[int]:
    keys = [half for pair in random.round_keys(seed) for half in pair]
    return [start_block % 2**32, start_block >> 32, stream % 2**32, stream >> 32, *keys]


GENERATORS = {
    "reference": words_by_reference,
    "llvm": words_by_llvm,
    "cuda": pytest.param(words_by_cuda, marks=on_host),
}
EVERY_ENGINE = pytest.mark.parametrize("generate", GENERATORS.values(), ids=GENERATORS)


@pytest.mark.smoke
class TestKnownAnswers:
    @EVERY_ENGINE
    @pytest.mark.parametrize(("counter", "key", "answer"), KNOWN_ANSWERS)
    def test_words(self, generate, counter, key, answer):
        seed, block, stream = key[1] << 32 | key[0], counter[1] << 32 | counter[0], counter[3] << 32 | counter[2]
        assert generate(seed, stream, block, 4).tolist() == list(answer)

    @EVERY_ENGINE
    def test_many_words(self, generate):
        assert generate(SEED, ALL_BITS - 7, 0, 4099).tolist() == oracle_words(SEED, ALL_BITS - 7, 4099)

    @pytest.mark.parametrize("place", range(4))
    @pytest.mark.parametrize("dtype", ["float16", "float32", "complex128"])
    def test_the_dropout_kernel_draws_them(self, dtype, place):
        """The first vector has block 0 and stream 0: its words decide on the first elements."""
        word = KNOWN_ANSWERS[0][2][place]
        for limit, kept in ((word, True), (word + 1, False)):
            x = np.ones(4, dtype)
            _dropout.kernel(dtype).run(x, x, [1.0], [limit, 0, 0, *flipped(0, 0, 0)[4:]])
            assert bool(x[place] == 1) is kept

    @EVERY_DTYPE
    def test_an_element_is_kept_at_its_own_word_and_dropped_below_the_next(self, dtype):
        """Through the public form; a ratio with 32 binary digits is exact."""
        x = np.ones(7, dtype)
        for i, word in enumerate(oracle_words(SEED, 3, 7)):
            for limit, kept in ((word, True), (word + 1, False)):
                y = assert_engines_agree(lambda limit=limit: xo.dropout(x, limit / 2**32, seed=SEED, stream=3))
                assert bool(y[i] == 1) is kept


FAR = (0, 1, 2**31 - 2, 2**32 - 2, 2**33 - 1, 7 * 2**32 - 3, 2**60 + 2**32 - 1)


def run_llvm_from(
    kernel: blocks.Kernel, x: np.ndarray, y: np.ndarray, first: int, words: list[int], numbers: int
) -> None:
    """As if the arrays began ``first`` blocks before: its own code, the cursor set to where they really begin."""
    shift = first * len(kernel.program.lanes) * (x.itemsize // (2 if x.dtype.kind == "c" else 1))
    total = first * len(kernel.program.lanes) + numbers
    scalars, given, cursor = np.ones(1, real_dtype(x.dtype)), np.array(words, np.uint32), np.array([first], np.int64)
    at = [(a.ctypes.data - shift) % 2**64 for a in (x, y)]
    where = [cursor.ctypes.data, 1, *at, total, scalars.ctypes.data, given.ctypes.data, 1]
    job = np.array([word - 2**64 if word >= 2**63 else word for word in where], np.int64)
    compiled = cpu_blocks.BlockKernel(kernel.program)  # which holds the code
    run = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)(compiled._compiled(x is y))
    run(job.ctypes.data, 0)


class TestLargeBlockIndexes:
    @pytest.mark.parametrize("first", FAR)
    @pytest.mark.parametrize("in_place", [True, False])
    def test_words_by_llvm(self, first, in_place):
        x = np.zeros(23)
        y = x if in_place else np.zeros(23)
        run_llvm_from(WORDS, x, y, first, flipped(SEED, 5, 0), 23)
        assert y.tolist() == oracle_words(SEED, 5, 23, first)

    @pytest.mark.parametrize("first", FAR)
    @pytest.mark.parametrize("dtype", ["float32", "float64", "complex64"])
    def test_dropout_by_llvm(self, dtype, first):
        x = np.ones(23, dtype)
        y = np.zeros_like(x)
        words = [2**31, 5, 0, *flipped(SEED, 0, 0)[4:]]
        run_llvm_from(_dropout.kernel(dtype), x, y, first, words, x.view(real_dtype(x.dtype)).size)
        assert y.real.tolist() == [float(word >= 2**31) for word in oracle_words(SEED, 5, 23, first)]

    @on_host
    @pytest.mark.parametrize("first", [0, 2**32, 2**59])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
    def test_dropout_by_cuda(self, dtype, first):
        """A grid that lies across ``first``: in the text, the number of a block of threads begins elsewhere."""
        kernel = _dropout.kernel(dtype)
        per_block = THREADS * cuda_blocks.blocks_of_a_thread(kernel.program)  # of random words
        start = max(0, first - per_block)
        text = cuda_blocks.source(kernel.program)
        assert text.count("(long long)blockIdx.x *") == 1
        text = text.replace("(long long)blockIdx.x", f"((long long)blockIdx.x + {start // per_block}LL)")
        n = 4 * 2 * per_block - 3
        x = np.ones(n, dtype)
        shift = start * len(kernel.program.lanes) * real_dtype(x.dtype).itemsize
        numbers = start * len(kernel.program.lanes) + x.view(real_dtype(x.dtype)).size
        words = np.array([2**31, 5, 0, *flipped(SEED, 0, 0)[4:]], np.uint32)
        scalars = np.ones(1, np.float64 if kernel.program.compute == "float64" else np.float32)
        with host_memory():
            memory = to_cupy(x)
            pointer = np.uint64((memory.data.ptr - shift) % 2**64)
            program = kernel.program
            values = (scalars.view(cuda_blocks.scalars_dtype(program)), words.view(cuda_blocks.words_dtype(program)))
            HostModule(text).get_function("blocks")((2,), (THREADS,), (pointer, pointer, np.int64(numbers), *values))
            found = to_numpy(memory)
        drawn = random.words(SEED, 5, n, start_block=start)
        assert drawn[: 4 * 3].tolist() == oracle_words(SEED, 5, 12, start)
        np.testing.assert_array_equal(found.real, (drawn >= 2**31).astype(found.real.dtype))


# --- The reference's bits, on the CPU -------------------------------------------------------------------


@EVERY_DTYPE
class TestSameBits:
    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("size", SIZES)
    def test_sizes(self, dtype, size, inverted):
        x = values((size,), dtype, seed=size)
        assert_engines_agree(lambda: xo.dropout(x, 0.4, seed=SEED, stream=size, inverted=inverted))

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_threads(self, dtype, count):
        x = values((LARGE,), dtype)
        with threads(count), mock.patch.object(thread_pool, "run", wraps=thread_pool.run) as shared:
            assert_engines_agree(lambda: xo.dropout(x, 0.3, seed=SEED, stream=1, inverted=True))
            assert [thread_pool.hired(thread_pool.Work(call.args[2]))[0] > 0 for call in shared.call_args_list] == [
                count > 1
            ]

    @pytest.mark.parametrize("grain", [1, 2, 3, 1000])
    def test_tasks_of_any_size(self, dtype, grain, monkeypatch):
        """Each block is done by one task and once, also where that is in place."""
        monkeypatch.setattr(thread_pool, "_WORTH_WAKING", 1)
        monkeypatch.setattr(thread_pool, "_WORTH_SHARING", 1)
        monkeypatch.setattr(cpu_blocks, "_GRAIN", grain)
        with threads(2):
            for size in SIZES:
                x = values((size,), dtype, seed=size)
                expected = assert_engines_agree(lambda x=x: xo.Dropout(0.3, seed=1, inverted=True).forward(x))
                xo.Dropout(0.3, seed=1, inverted=True).forward(x, out=x)
                assert_same_bits(x, expected)

    @pytest.mark.parametrize("inverted", [False, True])
    def test_special_values(self, dtype, inverted):
        real = np.repeat(special_values(dtype), 40)
        x = real if dtype.kind != "c" else (np.stack([real, np.roll(real, 17)], -1)).reshape(-1).view(dtype)
        for ratio in (0.2, 0.7):
            y = assert_engines_agree(lambda r=ratio: xo.dropout(x, r, seed=1, stream=2, inverted=inverted))
            dropped = ~np.asarray(random.keep_mask(1, 2, x.shape, ratio))
            assert_same_bits(y[dropped], np.zeros(int(dropped.sum()), dtype))

    @pytest.mark.parametrize("inverted", [False, True])
    def test_ratios(self, dtype, inverted):
        x = values((101,), dtype)
        for ratio in (0.0, 5e-324, 2**-33, 2**-32, 1e-9, 1 / 3, 0.5, 1 - 1e-9, 1 - 2**-32, 1 - 2**-33, 1 - 2**-53, 1.0):
            assert_engines_agree(lambda r=ratio: xo.dropout(x, r, seed=1, stream=2, inverted=inverted))

    def test_test_forward(self, dtype):
        x = values((4099,), dtype)
        for ratio in (0.0, 0.1, 1 / 3, 1 - 2**-53, 1.0):
            for inverted in (False, True):
                drop = xo.Dropout(ratio, inverted=inverted, seed=1)
                y = assert_engines_agree(lambda d=drop: d.forward(x, train_flg=False))
                assert not np.may_share_memory(x, y)

    def test_out(self, dtype):
        """In place, in the same memory by another name, in another array, in strides, and across x itself."""
        n = 1003
        x = values((n,), dtype)
        for ratio, train in ((0.4, True), (0.4, False), (0.0, True), (1.0, True)):
            drop = xo.Dropout(ratio, seed=3, inverted=train)
            with xo.engine("reference"):
                expected = drop.forward(x, train)
            for place in (
                lambda room: (room[:n], room[:n]),
                lambda room: (room[:n], room[:n].view(dtype)),
                lambda room: (room[:n], room[n : 2 * n]),
                lambda room: (room[:n], room[n::2][:n]),
                lambda room: (room[:n], room[1 : n + 1]),
                lambda room: (room[1 : n + 1], room[:n]),
                lambda room: (room[:n], room[:n][::-1]),
                lambda room: (room[: 2 * n : 2], room[1 : 2 * n : 2]),
                lambda room: (room[: 2 * n : 2], room[: 2 * n : 2]),
                lambda room: (room[:n][::-1], room[:n]),
            ):
                source, out = place(np.zeros(3 * n, dtype))
                source[...] = x
                before = random.keep_mask(3, 1, (n,), ratio)
                again = xo.Dropout(ratio, seed=3, inverted=train)
                with xo.engine("fused"):
                    assert again.forward(source, train, out=out) is out
                assert_same_bits(out, expected)
                if train:
                    np.testing.assert_array_equal(again.mask, before)
                if not np.shares_memory(source, out):
                    assert_same_bits(source, x)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("shape", [(), (1,), (0, 3), (4, 5, 6), (33, 1, 7)])
    def test_layouts(self, dtype, layout, shape):
        x = LAYOUTS[layout](values(shape, dtype))
        engine = "auto" if layout == "swapped" else "fused"
        for make in (lambda room: None, *LAYOUTS.values()):

            def call(make: Any = make) -> Any:
                made = make(np.zeros(shape, x.dtype))
                out = None if made is None else np.asarray(made)
                if out is not None and out.dtype != x.dtype:  # swapped back
                    return np.zeros(0, dtype)
                y = xo.Dropout(0.4, seed=1, inverted=True).forward(x, out=out)
                assert out is None or y is out
                return np.array(y)

            expected, actual = on_engines(call, "reference", engine)
            assert_same_bits(actual, expected)

    def test_forwards_and_backwards_of_a_layer(self, dtype):
        x, dout = values((13, 17), dtype), values((13, 17), dtype, seed=1)

        def run() -> list[np.ndarray]:
            drop = xo.Dropout(0.3, inverted=True, seed=ALL_BITS, layer=2**31 - 1)
            forwards = [drop.forward(x) for _ in range(3)]
            return [*forwards, drop.backward(dout), *(drop.backward(dout, call=call) for call in (3, 1, 2))]

        expected, actual = on_engines(run)
        for one, other in zip(actual, expected, strict=True):
            assert_same_bits(one, other)
        for call in (1, 2, 3):
            stream = (2**31 - 1) << 32 | call
            assert_same_bits(actual[call - 1], xo.dropout(x, 0.3, seed=ALL_BITS, stream=stream, inverted=True))

    @pytest.mark.parametrize("seed", [0, 1, 2**32 - 1, 2**32, 2**63, ALL_BITS])
    @pytest.mark.parametrize("stream", [0, 2**32 - 1, 2**32, 2**63 - 1])
    def test_seeds_and_streams(self, dtype, seed, stream):
        y = assert_engines_agree(lambda: xo.dropout(np.ones(37, dtype), 0.5, seed=seed, stream=stream))
        assert (y != 0).tolist() == [word >= 2**31 for word in oracle_words(seed, stream, 37)]

    @pytest.mark.parametrize("axes", [(0,), (1, 2), -1, (0, 1, 2)])
    def test_shared_masks(self, dtype, axes):
        x = values((3, 4, 5), dtype)
        for ratio in (0.0, 0.4, 1.0):
            for make in (lambda: None, lambda: np.zeros_like(x), lambda: np.zeros((3, 4, 10), dtype)[..., ::2], x.copy):

                def run(ratio: float = ratio, make: Callable[[], Any] = make) -> list[np.ndarray]:
                    drop = xo.Dropout(ratio, inverted=True, seed=8, broadcast_axes=axes)
                    return [drop.forward(x, out=make()), drop.backward(x, out=make()), np.where(drop.mask, 1.0, 0.0)]

                for one, other in zip(*on_engines(run), strict=True):
                    assert_same_bits(one, other)


@given(data=st.data())
def test_any_strides_and_settings(data):
    x = strided(data, "x")
    out = strided(data, "out", np.zeros(x.shape, x.dtype)) if data.draw(st.booleans(), label="out?") else None
    axes = tuple(data.draw(st.sets(st.integers(0, x.ndim - 1)), label="axes")) if x.ndim else ()
    ratio = data.draw(st.sampled_from([0.0, 0.2, 0.5, 0.99, 1.0]) | st.floats(0, 1), label="ratio")
    settings = {"inverted": data.draw(st.booleans()), "broadcast_axes": axes}
    settings |= {"seed": data.draw(st.integers(0, ALL_BITS)), "layer": data.draw(st.integers(0, 2**31 - 1))}

    def run() -> np.ndarray:
        y = xo.Dropout(ratio, **settings).forward(x, out=out)
        assert out is None or y is out
        return np.array(y)

    assert_engines_agree(run)


@pytest.mark.parametrize("name", ["bfloat16", "float32"])
def test_parallel_forwards_of_a_kernel_that_is_not_compiled_yet(name, monkeypatch):
    new = blocks.Kernel(_dropout.kernel(name).program)
    monkeypatch.setattr(_dropout, "kernel", lambda dtype: new)
    x, start = values((LARGE,), DTYPES[name]), threading.Barrier(6)
    found: list[Any] = [None] * 6

    def work(number: int) -> None:
        start.wait(timeout=60)
        found[number] = xo.dropout(x, 0.5, seed=1, stream=number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    with xo.engine("reference"):
        for number, y in enumerate(found):
            assert_same_bits(y, xo.dropout(x, 0.5, seed=1, stream=number))


# --- Which engine ---------------------------------------------------------------------------------------


def refuse(*_: Any, **__: Any) -> Any:
    raise AssertionError("this engine was not asked for")


@pytest.mark.smoke
class TestEngines:
    def calls(self, x: Any) -> Iterator[Callable[[], Any]]:
        """Every way into Dropout."""
        for ratio in (0.0, 0.5, 1.0):
            for axes in ((), (0,)):
                drop = xo.Dropout(ratio, seed=1, broadcast_axes=axes)
                yield lambda drop=drop: drop.forward(x)
                yield lambda drop=drop: drop.forward(x, train_flg=False)
                yield lambda drop=drop: drop.backward(x)
        yield lambda: xo.dropout(x, 0.5, seed=1, stream=2)

    def test_fused_never_takes_the_reference(self, monkeypatch):
        monkeypatch.setattr(_dropout, "by_reference", refuse)
        for name in ("fused", "auto"):
            with xo.engine(name):
                for call in self.calls(np.ones((3, 5))):
                    call()

    def test_reference_never_takes_a_kernel(self, monkeypatch):
        monkeypatch.setattr(blocks.Kernel, "run", refuse)
        with xo.engine("reference"):
            for call in self.calls(np.ones((3, 5))):
                call()

    @pytest.mark.parametrize("name", ["torch", "array_api_strict", "jax.numpy"])
    def test_other_namespaces(self, name):
        xp = pytest.importorskip(name, reason=f"{name} is not installed")
        drop, x = xo.Dropout(0.5, seed=1), xp.ones((3, 5), dtype=xp.float32)
        drop.forward(x)
        before = drop.state_dict()
        space = re.escape({"jax.numpy": "jax"}.get(name, name))
        reason = rf'cannot take the fused path: there is no fused engine for {space} arrays \(xo.engine\("auto"\) allow'
        with xo.engine("fused"):
            for train in (True, False):
                with pytest.raises(ValueError, match=f"^x {reason}"):
                    drop.forward(x, train)
            with pytest.raises(ValueError, match=f"^dout {reason}"):
                drop.backward(x)
            with pytest.raises(ValueError, match=f"^x {reason}"):
                xo.dropout(x, 0.5, seed=1, stream=1)
        assert drop.state_dict() == before

    def test_foreign_byte_order(self):
        x = np.ones(5, np.dtype("f4").newbyteorder())
        with (
            xo.engine("fused"),
            pytest.raises(ValueError, match=r"^x cannot take the fused path: its bytes are not in the machine's order"),
        ):
            xo.Dropout(0.5).forward(x)

    def test_a_cpu_without_half_precision(self, monkeypatch):
        from xpoptim.engines.cpu import jit

        x = values((101,), DTYPES["float16"])
        fused, reference = on_engines(lambda: xo.dropout(x, 0.5, seed=1, stream=1))
        assert_same_bits(fused, reference)
        monkeypatch.setattr(jit, "half_precision", lambda: False)
        with (
            xo.engine("fused"),
            pytest.raises(ValueError, match=r"^x cannot .*: this CPU has no instructions for float16"),
        ):
            xo.dropout(x, 0.5, seed=1, stream=1)
        monkeypatch.setattr(blocks.Kernel, "run", refuse)
        assert_same_bits(xo.dropout(x, 0.5, seed=1, stream=1), reference)


# --- Memory ---------------------------------------------------------------------------------------------


def traced(call: Callable[[], Any]) -> tuple[Any, int, int]:
    """The result, and the bytes that NumPy and Python hold after the call and held at most."""
    tracemalloc.start()
    try:
        result = call()
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    return result, held, peak


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["float16", "float32", "complex128"])
class TestMemory:
    """4 MB and more of activations, and kernels that have nothing of that size but what is asked for."""

    FEW = 100_000

    def layer(self, dtype: np.dtype) -> tuple[xo.Dropout, np.ndarray]:
        drop, x = xo.Dropout(0.5, seed=1, inverted=True), np.ones((1000, 2000), dtype)
        for out in (x, np.empty_like(x)):  # compiles, and starts threads
            drop.forward(x, out=out)
            drop.forward(x, train_flg=False, out=out)
        return drop, x

    def test_with_out_there_is_no_temporary(self, name, count):
        with threads(count), xo.engine("fused"):
            drop, x = self.layer(DTYPES[name])
            other = np.empty_like(x)
            for out in (x, x[:], other):
                for call in (
                    lambda out=out: drop.forward(x, out=out),
                    lambda out=out: drop.backward(x, out=out),
                    lambda out=out: drop.forward(x, train_flg=False, out=out),
                ):
                    assert traced(call)[2] < self.FEW

    def test_nothing_but_the_result_is_kept(self, name, count):
        with threads(count), xo.engine("fused"):
            drop, x = self.layer(DTYPES[name])
            for call in (lambda: drop.forward(x), lambda: drop.backward(x), lambda: drop.forward(x, train_flg=False)):
                y, held, peak = traced(call)
                assert peak < y.nbytes + self.FEW
                assert held < y.nbytes + self.FEW
            assert traced(lambda: drop.forward(x).real.max() and None)[1] < self.FEW
            assert traced(lambda: drop.backward(x).real.max() and None)[1] < self.FEW


def test_one_array_and_two_have_code_of_their_own():
    """That for two is told that they do not overlap, so it must not be run in place."""
    kernel, x = blocks.Kernel(_dropout.kernel("float32").program), np.ones(9, np.float32)
    kernel.run(x, x[:], [1.0], [0] * 23)
    assert set(kernel._kernels["numpy"]._modules) == {True}
    kernel.run(x, x.copy(), [1.0], [0] * 23)
    assert set(kernel._kernels["numpy"]._modules) == {True, False}


# --- Statistics -----------------------------------------------------------------------------------------


def mask_of(seed: int, stream: int, n: int, ratio: float = 0.5, dtype: str = "float32") -> np.ndarray:
    """The mask as the kernel applies it."""
    with xo.engine("fused"):
        return xo.dropout(np.ones(n, dtype), ratio, seed=seed, stream=stream) == 1


class TestStatistics:
    @pytest.mark.parametrize("n", [1_000, 65_537, 1_000_003])
    @pytest.mark.parametrize("ratio", [0.01, 0.1, 0.3, 0.5, 0.75, 0.99])
    @pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
    def test_keep_rate(self, dtype, ratio, n):
        for seed, stream in ((0, 1), (1, 2**32 + 1)):
            kept = int(mask_of(seed, stream, n, ratio, dtype).sum())
            assert abs(kept - n * (1 - ratio)) <= five_sigma(n, ratio)

    def test_neighbouring_seeds_calls_and_layers(self):
        n, seed, stream = 200_000, 41, 6 << 32 | 17
        here = mask_of(seed, stream, n)
        for there in (
            mask_of(seed + 1, stream, n),
            mask_of(seed + 2**32, stream, n),
            mask_of(seed, stream + 1, n),
            mask_of(seed, stream + 2**32, n),
            mask_of(stream, seed, n),
        ):
            assert abs(correlation_in_sigmas(here, there)) < 5

    @pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 16, 4096])
    @pytest.mark.parametrize("ratio", [0.1, 0.5])
    def test_neighbouring_elements(self, ratio, lag):
        mask = mask_of(7, 8, 500_000, ratio)
        assert abs(correlation_in_sigmas(mask[:-lag], mask[lag:])) < 5

    @pytest.mark.parametrize("place", range(4))
    def test_each_of_a_block_is_fair(self, place):
        mask = mask_of(9, 1, 400_000, 0.3)[place::4]
        assert abs(int(mask.sum()) - 70_000) <= five_sigma(100_000, 0.3)


# --- Other backends, and going on -----------------------------------------------------------------------


class TestSameMasksElsewhere:
    @pytest.mark.parametrize("name", ["array_api_strict", "torch", "jax.numpy"])
    @pytest.mark.parametrize("shape", [(), (7,), (3, 5, 11), (70_001,)])
    def test_masks_of_the_kernels(self, name, shape):
        xp = pytest.importorskip(name, reason=f"{name} is not installed")
        ours, theirs = (xo.Dropout(0.3, seed=SEED, layer=9, inverted=True) for _ in range(2))
        x = values(shape, DTYPES["float32"], special=0)
        for _ in range(2):
            with xo.engine("fused"):
                y, dx = ours.forward(x), ours.backward(x)
            assert_same_bits(np.asarray(theirs.forward(xp.asarray(x))), y)
            assert_same_bits(np.asarray(theirs.backward(xp.asarray(x))), dx)
            np.testing.assert_array_equal(np.asarray(theirs.mask), ours.mask)

    def test_a_run_goes_on_with_another_engine_and_other_threads(self):
        x = values((LARGE,), DTYPES["float32"])

        def steps(drop: xo.Dropout) -> list[np.ndarray]:
            return [y for _ in range(2) for y in (drop.forward(x), drop.backward(x))]

        whole = xo.Dropout(0.25, seed=SEED, layer=3, inverted=True)
        with xo.engine("reference"):
            expected = [*steps(whole), *steps(whole), *steps(whole)]
        found, state = [], xo.Dropout(0.25, seed=SEED, layer=3, inverted=True).state_dict()
        for name, count in (("fused", 1), ("reference", 1), ("fused", 2)):
            drop = xo.Dropout()
            drop.load_state_dict(json.loads(json.dumps(state)))
            with xo.engine(name), threads(count):
                found += steps(drop)
                state = drop.state_dict()
        for y, other in zip(found, expected, strict=True):
            assert_same_bits(y, other)


# --- CUDA, emulated -------------------------------------------------------------------------------------


@on_host
@EVERY_DTYPE
class TestEmulatedGPU:
    @BOTH_ORDERS
    def test_sizes_and_alignments(self, dtype, backward):
        """Whole vectors, ends, and arrays of which none, one or both lie on 16 bytes."""
        with emulated_gpu(backward=backward) as gpu:
            for size in SIZES:
                x = values((size,), dtype, seed=size)
                for offset, other in (
                    (0, 0),
                    (dtype.itemsize, 0),
                    (0, dtype.itemsize),
                    (dtype.itemsize, dtype.itemsize),
                ):
                    source, out = like(x, offset), like(np.zeros_like(x), other)
                    for call in (
                        lambda x, out: xo.dropout(x, 0.4, seed=SEED, stream=1, inverted=True),
                        lambda x, out: xo.Dropout(0.4, inverted=True, seed=SEED).forward(x, out=out),
                        lambda x, out: xo.Dropout(0.4, seed=SEED).forward(x, train_flg=False, out=out),
                        lambda x, out: xo.Dropout(0.0, seed=SEED).forward(x, out=out),
                        lambda x, out: xo.Dropout(0.4, inverted=True, seed=SEED).forward(x, out=x),
                    ):
                        with xo.engine("reference"):
                            expected = call(x.copy(), np.zeros_like(x))
                        with xo.engine("fused"):
                            y = call(source, out)
                        assert type(y) is type(source)
                        assert_same_bits(gpu.to_numpy(y), expected, f"{size} elements at {offset} and {other}")
                        assert gpu.take() == (["blocks"] if size else [])

    def test_special_values(self, dtype):
        real = np.repeat(special_values(dtype), 40)
        x = real if dtype.kind != "c" else (np.stack([real, np.roll(real, 17)], -1)).reshape(-1).view(dtype)
        for ratio in (0.2, 0.7):
            with xo.engine("reference"):
                expected = xo.dropout(x, ratio, seed=1, stream=2, inverted=True)
            with emulated_gpu() as gpu:
                assert_same_bits(gpu.to_numpy(xo.dropout(like(x), ratio, seed=1, stream=2, inverted=True)), expected)

    def test_forwards_and_backwards_of_a_layer(self, dtype):
        x, dout = values((13, 17), dtype), values((13, 17), dtype, seed=1)
        with emulated_gpu() as gpu:
            drops = [xo.Dropout(0.3, inverted=True, seed=ALL_BITS, layer=2**31 - 1) for _ in range(2)]
            for _ in range(3):
                assert_same_bits(gpu.to_numpy(drops[0].forward(like(x))), drops[1].forward(x))
            for call in (None, 3, 1, 2):
                assert_same_bits(
                    gpu.to_numpy(drops[0].backward(like(dout), call=call)), drops[1].backward(dout, call=call)
                )
            assert drops[0].state_dict() == drops[1].state_dict()
            assert gpu.take() == ["blocks"] * 7

    def test_layouts_and_overlap(self, dtype):
        """What does not lie in C order, and what overlaps, goes through an array of its own."""
        shape, n = (9, 8), 72
        x = values(shape, dtype)
        expected = xo.dropout(x, 0.4, seed=1, stream=2, inverted=True)
        with emulated_gpu() as gpu:

            def drop(source: Any, out: Any = None) -> Any:
                layer = xo.Dropout(0.4, inverted=True, seed=1)
                layer.load_state_dict(layer.state_dict() | {"call": 1})
                return layer.forward(source, out=out)

            for layout in ("fortran", "reversed", "strided", "columns"):
                source = like(LAYOUTS[layout](x))
                assert_same_bits(gpu.to_numpy(drop(source)), expected, layout)
                assert gpu.take() == ["copy", "blocks"]
                assert drop(source, source) is source
                assert_same_bits(gpu.to_numpy(source), expected, layout)
                assert gpu.take() == ["copy", "blocks", "copy"]
                out = like(LAYOUTS[layout](np.zeros_like(x)))
                assert_same_bits(gpu.to_numpy(drop(like(x), out)), expected, layout)
                assert gpu.take() == ["copy", "blocks", "copy"]
            for first, second in ((0, 3), (3, 0)):
                room = like(np.zeros(n + 3, dtype))
                source, out = room[first : first + n].reshape(shape), room[second : second + n].reshape(shape)
                gpu.fill(source, x)
                assert_same_bits(gpu.to_numpy(drop(source, out)), expected, "overlap")
                assert gpu.take() == ["copy", "blocks", "copy"]
            whole = like(x)
            assert_same_bits(gpu.to_numpy(drop(whole, whole[:])), expected, "the same memory")
            assert gpu.take() == ["blocks"]


@on_host
class TestLaunches:
    @EVERY_DTYPE
    def test_aligned_arrays_go_16_bytes_at_a_time(self, dtype):
        """Without the text's loops over single elements, all is done in arrays on 16 bytes, and nothing in others."""
        kernel, size = _dropout.kernel(dtype.name), THREADS * 16
        text = cuda_blocks.source(kernel.program).replace("if (k < count)", "if (false)")
        x = values((size,), dtype)
        expected = xo.dropout(x, 0.4, seed=1, stream=2, inverted=True)
        edited = mock.patch.object(cuda_blocks, "source", return_value=text)
        with emulated_gpu() as gpu, mock.patch.dict(kernel._kernels, clear=True), edited:
            for offset, other in ((0, 0), (dtype.itemsize % 16, 0), (0, dtype.itemsize % 16)):
                source, out = like(x, offset), like(np.zeros_like(x), other)
                drop = xo.Dropout(0.4, inverted=True, seed=1)
                drop.load_state_dict(drop.state_dict() | {"call": 1})
                drop.forward(source, out=out)
                assert_same_bits(gpu.host(out), np.zeros_like(x) if offset or other else expected)

    @EVERY_DTYPE
    def test_the_least_grid_that_covers_the_elements(self, dtype):
        """A thread takes 16 bytes, and at least the four elements of a block of random words."""
        of_a_block = THREADS * max(4, 16 // dtype.itemsize)
        for size in (1, of_a_block - 1, of_a_block, of_a_block + 1, 3 * of_a_block, 3 * of_a_block + 1):
            with emulated_gpu(), mock.patch.object(driver, "launch", wraps=driver.launch) as launch:
                xo.dropout(like(np.ones(size, dtype)), 0.4, seed=1, stream=0)
            assert [call.args[1:3] for call in launch.call_args_list] == [(-(-size // of_a_block), THREADS)]

    @pytest.mark.parametrize("name", DTYPES)
    def test_parameters(self, name):
        """Two pointers, a length, the scale, and the words: far below the 4,096 bytes that every GPU takes."""
        kernel, real = _dropout.kernel(name), real_dtype(DTYPES[name]).itemsize
        sizes = HostModule(cuda_blocks.source(kernel.program)).get_function("blocks").sizes
        assert sizes == [8, 8, 8, max(4, real), 4 * len(kernel.program.words)]
        assert len(kernel.program.words) == 3 + 2 * 10
        assert sum(sizes) <= 4096

    def test_sanitizers(self):
        """Not a byte beside the arrays, no misaligned vector, no overflow: all dtypes, sizes and alignments."""
        done = run_sanitized(
            "-c",
            "import numpy as np, xpoptim as xo\n"
            "from cuda_host.emulated import emulated_gpu, like\n"
            "from helpers import DTYPES\n"
            "with emulated_gpu() as gpu:\n"
            "    for dtype in DTYPES.values():\n"
            "        for size in (1, 2, 3, 4, 5, 7, 8, 9, 1029):\n"
            "            for at in (0, 1):\n"
            "                x, out = (like(np.ones(size, dtype), at * dtype.itemsize) for _ in range(2))\n"
            "                drop = xo.Dropout(0.5, seed=1, inverted=True)\n"
            "                for call in (drop.forward, drop.backward, lambda x, out: drop.forward(x, False, out)):\n"
            "                    call(x, out=out)\n"
            "                    call(x, out=x)\n"
            "print(len(gpu))\n",
        )
        assert (done.returncode, done.stdout) == (0, f"{6 * 9 * 2 * 6}\n"), done.stderr


EVERY_KERNEL = pytest.mark.parametrize("kernel", [_dropout.kernel, _dropout.scaling_kernel], ids=["dropout", "scale"])


@needs_nvrtc
@EVERY_KERNEL
@pytest.mark.parametrize("name", DTYPES)
class TestCompiledForGPUs:
    @pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
    def test_nothing_is_spilled(self, name, kernel, arch):
        report = nvrtc_reports.resources(cuda_blocks.source(kernel(name).program), arch)["blocks"]
        assert not report.spills
        assert report.registers <= 64

    def test_sixteen_bytes_at_a_time(self, name, kernel):
        """Vectors of 16 bytes for the whole of what a thread takes, beside single elements for the ends."""
        ptx = nvrtc_reports.ptx(cuda_blocks.source(kernel(name).program), "compute_90")
        bits = {"float16": 16, "bfloat16": 16, "float64": 64, "complex128": 64}.get(name, 32)
        parts, blocks_each = len(kernel(name).program.lanes), cuda_blocks.blocks_of_a_thread(kernel(name).program)
        for access in ("ld", "st"):
            vectors = re.findall(rf"{access}\.global\.v(\d)\.[bfu](\d\d)", ptx)
            assert {int(count) * int(width) for count, width in vectors} == {128}
            assert len(vectors) * 128 == parts * blocks_each * bits
            assert set(re.findall(rf"{access}\.global\.[bfu](\d\d)", ptx)) == {str(bits)}

    def test_words_are_drawn_once_for_four_elements(self, name, kernel):
        """Ten rounds, two products each, of which the stream's in the first is the same for all blocks."""
        ptx = nvrtc_reports.ptx(cuda_blocks.source(kernel(name).program), "compute_90")
        blocks_each = cuda_blocks.blocks_of_a_thread(kernel(name).program)
        products = len(re.findall(r"mul\.hi\.u32|mul\.wide\.u32", ptx)) - 1  # one finds the thread's place
        if kernel is _dropout.kernel:
            assert 19 * blocks_each <= products <= 20 * blocks_each
        else:
            assert products == 0
        for loose in ("fma.", ".ftz", ".approx", ".full", "local"):
            assert loose not in ptx
