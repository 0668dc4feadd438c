"""The harness that runs CUDA kernels on the host: it computes what it should, and it sees what it should."""

import threading

import numpy as np
import pytest
from cuda_host.host_kernel import (
    HostModule,
    host_memory,
    launch,
    missing,
    run_sanitized,
    to_cupy,
    to_numpy,
)
from helpers import make_optimizer

WHY_NOT = missing()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=str(WHY_NOT))

BOTH_ORDERS = pytest.mark.parametrize("backward", [False, True])

# y += a * x in chunks of 1000 elements: four at a time from where both lie on 16 bytes, the others one by one.
AXPY = """
struct alignas(16) Four { float x[4]; };

extern "C" __global__ void __launch_bounds__(64) axpy(const float* x, float* y, float a, long long n) {
    const long long start = blockIdx.x * 1000LL;
    const int count = n - start < 1000 ? (int)(n - start) : 1000;
    x += start;
    y += start;
    int head = (int)(-(long long)y & 15) / 4;
    if (((long long)(x + head) & 15) != 0 || head > count) head = count;
    const int body = (count - head) / 4 * 4;
    for (int i = head + threadIdx.x * 4; i < head + body; i += 64 * 4) {
        const Four xs = *(const Four*)(x + i);
        Four ys = *(const Four*)(y + i);
#pragma unroll
        for (int k = 0; k < 4; ++k) ys.x[k] += a * xs.x[k];
        *(Four*)(y + i) = ys;
    }
    for (int i = threadIdx.x; i < count - body; i += 64) {
        const int at = i < head ? i : i + body;
        y[at] += a * x[at];
    }
}
"""

# Lanes of 64 elements, then halves of the lanes, through shared memory and at last within one warp.
SUM = """
extern "C" __global__ void sum(const double* x, double* out, int n) {
    __shared__ double lanes[64];
    double mine = 0;
    for (int i = blockIdx.x * 256 + threadIdx.x; i < n && i < (int)blockIdx.x * 256 + 256; i += 64) mine += x[i];
    lanes[threadIdx.x] = mine;
    __syncthreads();
    if (threadIdx.x < 32) {
        mine = lanes[threadIdx.x] + lanes[threadIdx.x + 32];
        for (int width = 16; width > 0; width /= 2) mine += __shfl_down_sync(0xffffffffu, mine, width);
    }
    __syncthreads();
    if (threadIdx.x == 0) out[blockIdx.x] = mine;
}
"""


def axpy(module, x, y, a):
    n = y.size
    if n:
        launch(module, "axpy", (-(-n // 1000),), (64,), (x, y, np.float32(a), np.int64(n)))


# --- what kernels compute


@BOTH_ORDERS
@pytest.mark.parametrize("n", [0, 1, 3, 4, 5, 63, 255, 256, 257, 1000, 1001, 2003])
@pytest.mark.parametrize("offsets", [(0, 0), (4, 4), (12, 12), (0, 8), (4, 0)])
def test_vector_kernel(n, offsets, backward):
    random = np.random.default_rng(n)
    x, y = random.standard_normal((2, n), dtype=np.float32)
    device_x, device_y = to_cupy(x, offsets[0]), to_cupy(y, offsets[1])
    axpy(HostModule(AXPY, backward=backward), device_x, device_y, 0.1)
    np.testing.assert_array_equal(to_numpy(device_y), y + np.float32(0.1) * x)
    np.testing.assert_array_equal(to_numpy(device_x), x)


@BOTH_ORDERS
def test_reduction_with_barriers(backward):
    x = np.random.default_rng(0).standard_normal(1000)
    out = to_cupy(np.zeros(4))
    launch(HostModule(SUM, backward=backward), "sum", (4,), (64,), (to_cupy(x), out, np.int32(1000)))
    for chunk in range(4):
        lanes = np.zeros(64)
        for row in np.concatenate([x, np.zeros(24)]).reshape(4, 4, 64)[chunk]:
            lanes = lanes + row
        while len(lanes) > 1:
            lanes = lanes[: len(lanes) // 2] + lanes[len(lanes) // 2 :]
        assert to_numpy(out)[chunk] == lanes[0]


@BOTH_ORDERS
def test_lanes_of_a_warp(backward):
    source = """
    extern "C" __global__ void lanes(int* out, unsigned* votes) {
        int* mine = out + threadIdx.x * 3;
        mine[0] = __shfl_sync(0xffffffffu, (int)threadIdx.x, 5);
        mine[1] = __shfl_xor_sync(0xffffffffu, (int)threadIdx.x, 16);
        mine[2] = __shfl_down_sync(0xffffffffu, (int)threadIdx.x, 31);
        votes[threadIdx.x] = __ballot_sync(0xffffffffu, threadIdx.x % 3 == 0);
        if (__any_sync(0xffffffffu, threadIdx.x == 40)) mine[0] += 1000;
    }
    """
    out, votes = to_cupy(np.zeros((64, 3), np.int32)), to_cupy(np.zeros(64, np.uint32))
    launch(HostModule(source, backward=backward), "lanes", (1,), (64,), (out, votes))
    number = np.arange(64)
    first = number // 32 * 32
    in_second_warp = np.where(number < 32, 0, 1000)
    down = np.where(number % 32 == 0, number + 31, number)
    np.testing.assert_array_equal(to_numpy(out), np.stack([first + 5 + in_second_warp, number ^ 16, down], 1))
    for start in (0, 32):
        mask = sum(1 << lane for lane in range(32) if (start + lane) % 3 == 0)
        assert set(to_numpy(votes)[start : start + 32].tolist()) == {mask}


@BOTH_ORDERS
def test_blocks_and_atomics(backward):
    source = """
    extern "C" __global__ void count(unsigned* total, int* last, unsigned* where) {
        atomicAdd(total, 1u);
        __threadfence();
        atomicMax(last, (int)(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z)));
        if (threadIdx.x == 3 && threadIdx.y == 1) where[blockIdx.y] = blockDim.x * 10 + blockDim.y;
    }
    """
    total, last, where = to_cupy(np.zeros(1, np.uint32)), to_cupy(np.int32(0)), to_cupy(np.zeros(3, np.uint32))
    launch(HostModule(source, backward=backward), "count", (2, 3, 4), (5, 2), (total, last, where))
    assert to_numpy(total) == 2 * 3 * 4 * 5 * 2
    assert to_numpy(last) == 2 * 3 * 4 - 1
    np.testing.assert_array_equal(to_numpy(where), [52, 52, 52])


def test_arithmetic_is_that_of_numpy():
    # sqrt of a float is a float, and a product is rounded before the sum.
    source = """
    extern "C" __global__ void arithmetic(const float* x, float* root, float* sum, float* ratio) {
        const int i = blockIdx.x * 256 + threadIdx.x;
        root[i] = sqrt(x[i]) * 3.0f;
        sum[i] = x[i] * x[i] - 2.0f;
        ratio[i] = 1.0f / x[i];
    }
    """
    x = np.random.default_rng(1).uniform(1e-40, 4, 4096).astype(np.float32)
    x[:16] = np.float32(1e-45) * np.arange(1, 17, dtype=np.float32)
    root, sums, ratio = (to_cupy(np.zeros_like(x)) for _ in range(3))
    launch(HostModule(source), "arithmetic", (16,), (256,), (to_cupy(x), root, sums, ratio))
    np.testing.assert_array_equal(to_numpy(root), np.sqrt(x) * np.float32(3))
    np.testing.assert_array_equal(to_numpy(sums), x * x - np.float32(2))
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(to_numpy(ratio), np.float32(1) / x)


def test_halves():
    source = """
    extern "C" __global__ void widen(const unsigned short* x, float* y) {
        const int i = blockIdx.x * 256 + threadIdx.x;
        y[i] = half_to_float(x[i]);
    }
    extern "C" __global__ void narrow(const float* x, unsigned short* y) {
        const int i = blockIdx.x * 256 + threadIdx.x;
        y[i] = float_to_half(x[i]);
    }
    """
    module = HostModule(source)
    every = np.arange(1 << 16, dtype=np.uint16)
    wide = to_cupy(np.zeros(1 << 16, np.float32))
    launch(module, "widen", (256,), (256,), (to_cupy(every), wide))
    np.testing.assert_array_equal(to_numpy(wide), every.view(np.float16).astype(np.float32))

    # Every half, what lies halfway to the next one, the neighbours of both, and any floats.
    finite = np.sort(every.view(np.float16)[np.isfinite(every.view(np.float16))]).astype(np.float32)
    halfway = (finite[1:] + finite[:-1]) / 2
    ends = np.array([65504, 65519.99, 65520, 65536, 1e30, np.inf, np.nan, 2.0**-25, 2.0**-24, 0.0], np.float32)
    edges = np.concatenate([finite, halfway, ends, -ends])
    any_bits = np.random.default_rng(2).integers(0, 1 << 32, 100_000, np.uint32).view(np.float32)
    up, down = np.nextafter(edges, np.float32(np.inf)), np.nextafter(edges, np.float32(-np.inf))
    x = np.concatenate([edges, up, down, any_bits])
    x = np.concatenate([x, np.zeros(-len(x) % 256, np.float32)])
    halves = to_cupy(np.zeros(len(x), np.uint16))
    launch(module, "narrow", (len(x) // 256,), (256,), (to_cupy(x), halves))
    with np.errstate(over="ignore"):
        expected = x.astype(np.float16)
    found = to_numpy(halves).view(np.float16)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(x))


def test_kernel_named_like_a_function_of_c():
    source = 'extern "C" __global__ void step(float* x) { x[threadIdx.x] = 5; }'
    x = to_cupy(np.zeros(32, np.float32))
    launch(HostModule(source), "step", (1,), (32,), (x,))
    np.testing.assert_array_equal(to_numpy(x), 5)


# --- arguments


TABLE = """
struct Table { unsigned long long pointers[4000]; unsigned count, more; };

extern "C" __global__ void fill(const Table __grid_constant__ table, float value, unsigned n) {
    for (unsigned i = blockIdx.x * 32 + threadIdx.x; i < n; i += gridDim.x * 32)
        for (unsigned row = 0; row < table.count; ++row) ((float*)table.pointers[row])[i] = value + row;
}
"""
ROW = np.dtype([("pointers", np.uint64, 4000), ("count", np.uint32), ("more", np.uint32)])


def test_struct_by_value():
    arrays = [to_cupy(np.zeros(50, np.float32)) for _ in range(3)]
    table = np.zeros(1, ROW)
    table["pointers"][0, :3] = [array.data.ptr for array in arrays]
    table["count"] = 3
    module = HostModule(TABLE)
    for value, argument in enumerate((table, table[0], table.reshape(()), table.view((np.void, ROW.itemsize)))):
        launch(module, "fill", (1,), (32,), (argument, np.float32(value), np.uint32(50)))
        for row, array in enumerate(arrays):
            np.testing.assert_array_equal(to_numpy(array), np.float32(value + row))
    assert HostModule(TABLE).get_function("fill").sizes == [ROW.itemsize, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.float32(1),), "takes 4 arguments, 1 were given"),
        ((1.0, 1.0, 0.5, np.int64(1)), "argument 2 of kernel axpy is of 8 bytes, its parameter of 4"),
        ((1.0, 1.0, np.float32(1), np.int32(1)), "argument 3 of kernel axpy is of 4 bytes, its parameter of 8"),
        ((None, 1.0, np.float32(1), np.int64(1)), "NoneType is no argument"),
        ((np.zeros(3), 1.0, np.float32(1), np.int64(1)), "only one element goes by value"),
        (("x", 1.0, np.float32(1), np.int64(1)), "str is no argument"),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(TypeError, match=message):
        launch(HostModule(AXPY), "axpy", (1,), (64,), arguments)


def test_too_many_bytes():
    source = TABLE.replace("[4000]", "[4094]")
    table = np.zeros(1, np.dtype([("bytes", np.uint64, 4095)]))
    with pytest.raises(TypeError, match="take 32768 bytes, 32764 are allowed"):
        launch(HostModule(source), "fill", (1,), (32,), (table, np.float32(7), np.uint32(50)))


@pytest.mark.parametrize("extent", [(0,), (1, 0)])
def test_empty_grid(extent):
    with pytest.raises(ValueError, match="is empty"):
        launch(HostModule(SUM), "sum", extent, (64,), (0, 0, np.int32(0)))


def test_extents_are_tuples():
    with pytest.raises(TypeError, match="grid must be a tuple"):
        launch(HostModule(SUM), "sum", 4, (64,), (0, 0, np.int32(0)))


def test_unknown_kernel():
    with pytest.raises(AttributeError, match=r"no kernel 'product', only \['sum'\]"):
        HostModule(SUM).get_function("product")


def test_text_that_does_not_compile():
    with pytest.raises(RuntimeError, match=r"kernel\.cu:2:.*error"):
        HostModule('\nextern "C" __global__ void broken(float* p) { p[0] = nowhere; }')


# --- what it sees


def test_parameters_of_another_layout_do_not_compile():
    """The checks that a text makes of its parameters' layout hold for g++ as they do for NVRTC."""
    source = make_optimizer("Adam").source("cuda")
    HostModule(source)
    right, wrong = "XP_OFFSET(Row, first) == 40", "XP_OFFSET(Row, first) == 44"
    assert source.count(right) == 1
    with pytest.raises(RuntimeError, match="static assertion failed"):
        HostModule(source.replace(right, wrong))


@BOTH_ORDERS
def test_divergent_barrier(backward):
    source = """
    extern "C" __global__ void divergent(int way) {
        if (way == 0 && threadIdx.x % 2) return;
        if (way == 1 && threadIdx.x % 2)
            __syncthreads();
        else
            __syncthreads();
    }
    """
    module = HostModule(source, backward=backward)
    launch(module, "divergent", (2,), (64,), (np.int32(2),))
    with pytest.raises(RuntimeError, match=r"kernel divergent: a thread (ends|waits)"):
        launch(module, "divergent", (2,), (64,), (np.int32(0),))
    with pytest.raises(RuntimeError, match="kernel divergent: threads wait at the barriers of lines"):
        launch(module, "divergent", (2,), (64,), (np.int32(1),))
    launch(module, "divergent", (2,), (64,), (np.int32(2),))  # no trace is left of the failures


def test_missing_barrier():
    source = SUM.replace("lanes[threadIdx.x] = mine;\n    __syncthreads();", "lanes[threadIdx.x] = mine;")
    assert source != SUM
    x = np.ones(256)
    found = []
    for backward in (False, True):
        out = to_cupy(np.zeros(1))
        launch(HostModule(source, backward=backward), "sum", (1,), (64,), (to_cupy(x), out, np.int32(256)))
        found.append(to_numpy(out)[0])
    assert found != [256, 256]


@BOTH_ORDERS
def test_shared_memory_starts_as_nan_in_every_block(backward):
    source = """
    extern "C" __global__ void stale(float* out) {
        __shared__ float memory[32];
        out[blockIdx.x * 32 + threadIdx.x] = memory[threadIdx.x];
        memory[threadIdx.x] = 1;
    }
    """
    out = to_cupy(np.zeros(96, np.float32))
    launch(HostModule(source, backward=backward), "stale", (3,), (32,), (out,))
    assert np.isnan(to_numpy(out)).all()


def sanitized(call):
    setup = (
        "import numpy as np\n"
        "from cuda_host.host_kernel import HostModule, launch, to_cupy\n"
        "from test_cuda_host import AXPY, SUM, axpy\n"
        "x, y = to_cupy(np.ones(1001, np.float32)), to_cupy(np.ones(1001, np.float32))\n"
    )
    return run_sanitized("-c", setup + call + "\nprint('came through')")


def test_sanitizers_let_right_kernels_pass():
    done = sanitized(
        "axpy(HostModule(AXPY), x, y, 2)\n"
        "axpy(HostModule(AXPY), x[1:], y[1:], 2)\n"
        "out = to_cupy(np.zeros(1))\n"
        "launch(HostModule(SUM), 'sum', (1,), (64,), (to_cupy(np.ones(200)), out, np.int32(200)))"
    )
    assert (done.returncode, done.stdout) == (0, "came through\n"), done.stderr


@pytest.mark.parametrize(
    ("right", "wrong", "call", "report"),
    [
        ("i < count - body", "i <= count - body", "x, y", "heap-buffer-overflow"),  # one element too far
        ("y[at] +=", "y[at - 1002] +=", "x, y", "heap-buffer-overflow"),  # before the array
        ("((long long)(x + head) & 15) != 0 || ", "", "x, y[1:]", "misaligned"),  # a vector where none lies
    ],
)
def test_sanitizers_catch_accesses(right, wrong, call, report):
    assert AXPY.count(right) == 1
    done = sanitized(f"axpy(HostModule(AXPY.replace({right!r}, {wrong!r})), {call}, 2)")
    assert done.returncode != 0
    assert report in done.stderr
    assert "kernel.cu:" in done.stderr  # the line of the kernel's text


def test_sanitizers_catch_shared_memory():
    done = sanitized(
        "module = HostModule(SUM.replace('threadIdx.x + 32', 'threadIdx.x + 33'))\n"
        "launch(module, 'sum', (1,), (64,), (x, y, np.int32(0)))"
    )
    assert done.returncode != 0
    assert "out of bounds" in done.stderr


# --- memory


def test_arrays_are_cupys():
    import cupy

    values = np.arange(24.0).reshape(4, 6)
    array = to_cupy(values, offset=8)
    assert isinstance(array, cupy.ndarray)
    assert (array.shape, array.dtype, array.strides) == (values.shape, values.dtype, values.strides)
    assert array.data.ptr % 512 == 8
    for view in (np.s_[:], np.s_[::-1, ::2], np.s_[1:3, 4], np.s_[2, 3], np.s_[:0]):
        np.testing.assert_array_equal(to_numpy(array[view]), values[view])
    np.testing.assert_array_equal(to_numpy(array.T), values.T)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64", "complex128", "bfloat16", "int32"])
@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_round_trip(dtype, shape):
    kind = np.dtype(pytest.importorskip("ml_dtypes").bfloat16) if dtype == "bfloat16" else np.dtype(dtype)
    values = np.arange(np.prod(shape, dtype=int)).reshape(shape).astype(kind)
    back = to_numpy(to_cupy(values))
    assert (back.dtype, back.shape) == (kind, shape)
    assert back.tobytes() == values.tobytes()


def test_host_memory():
    import cupy

    with host_memory():
        empty = cupy.empty((2, 3), np.float32)
        assert empty.data.ptr % 512 == 0
        assert np.isnan(to_numpy(empty)).all()  # what is read before it is written shows
        np.testing.assert_array_equal(to_numpy(cupy.zeros(3, np.float16)), [0, 0, 0])
        values = np.arange(6.0)[::-2]
        np.testing.assert_array_equal(cupy.asnumpy(cupy.asarray(values)), values)
        assert cupy.asarray(empty) is empty


def test_python_threads():
    module = HostModule(SUM)
    x = to_cupy(np.ones(1000))
    wrong = []

    def work():
        out = to_cupy(np.zeros(4))
        for _ in range(10):
            launch(module, "sum", (4,), (64,), (x, out, np.int32(1000)))
            if to_numpy(out).tolist() != [256, 256, 256, 232]:
                wrong.append(to_numpy(out))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
