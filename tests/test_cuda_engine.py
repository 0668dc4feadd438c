"""The CUDA engine against the NumPy engine, bit for bit.

Here the GPU is emulated on the host: what runs is the engine's own text, tables and launches, and
cuda_host/emulated.py says what cannot be seen this way. tests/gpu runs the same tests on a GPU.
"""

import contextlib
import copy
import itertools
import pickle
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar
from unittest import mock

import numpy as np
import pytest
from cuda_host.emulated import emulated_gpu
from cuda_host.host_kernel import missing
from cuda_host.rules import Assign, Everything, Names
from cuda_host.steps import (
    GPU,
    Tree,
    alike,
    askew,
    assert_same,
    capture_and_replay,
    follow,
    frozen_on,
    moved,
    trees,
)
from helpers import (
    COMPLEX_DTYPES,
    DTYPES,
    GRADIENT_LAYOUTS,
    LAYOUTS,
    REAL_DTYPES,
    RULES,
    SLOT_DTYPES,
    assert_same_bits,
    assert_same_tree,
    make_optimizer,
    random_values,
    special_values,
    traced,
)

import xpoptim as xo
from xpoptim.arrays.leaves import pairs
from xpoptim.codegen.cuda import elementwise as text
from xpoptim.engines import reference
from xpoptim.engines.cuda import driver
from xpoptim.engines.cuda import plan as cuda
from xpoptim.step.checks import resolve
from xpoptim.step.prepared import Prepared
from xpoptim.trace.sums import CHUNK

# What CuPy arrays can have: their bytes are in the machine's order, their elements on multiples of their size.
CUPY_LAYOUTS = [name for name in LAYOUTS if name not in ("misaligned", "swapped")]
CUPY_GRADIENT_LAYOUTS = [name for name in GRADIENT_LAYOUTS if name not in ("misaligned", "swapped", "readonly")]


@pytest.fixture
def gpu() -> Iterator[GPU]:
    if reason := missing():
        pytest.skip(reason)
    with emulated_gpu() as emulated:
        yield emulated


# --- the same bits


@pytest.mark.parametrize(
    "options", [{}, {"weight_decay": 0.3, "clip_value": 0.7, "maximize": True}], ids=["plain", "options"]
)
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_and_dtype(rule: str, options: dict[str, Any], gpu: GPU) -> None:
    params = trees(DTYPES)
    gradients = [alike(params, seed=step) for step in range(1, 4)]
    follow(gpu, lambda: make_optimizer(rule, **options), params, gradients, place=askew)
    assert gpu == ["update"] * (3 * len(DTYPES))  # one launch for each dtype and step


def test_gradient_dtypes(gpu: GPU) -> None:
    """A gradient is cast when it is loaded; a real one of a complex parameter goes through a complex copy."""
    pairs = [*itertools.product(REAL_DTYPES, REAL_DTYPES), *itertools.product(COMPLEX_DTYPES, DTYPES)]
    rng = np.random.default_rng(1)
    params = {f"{p} {g}": random_values(rng, (301,), DTYPES[p], 0.2) for p, g in pairs}
    gradients = [
        {f"{p} {g}": random_values(np.random.default_rng(k), (301,), DTYPES[g], 0.3) for p, g in pairs} for k in (1, 2)
    ]
    follow(gpu, lambda: make_optimizer("Adam"), params, gradients)
    assert gpu.count("update") == 2 * (16 + 4)


@pytest.mark.parametrize("offset", [0, 1, 3])
def test_what_lies_on_16_bytes_goes_16_bytes_at_a_time(offset: int, gpu: GPU) -> None:
    """Without the text's loop over single elements, the head and the tail are left as they were, and nothing else."""
    source, changed = text.update_source, []

    def without_single_elements(*arguments: Any) -> str:
        changed.append(source(*arguments).replace("i < count - body", "i < 0"))
        assert changed[-1] != source(*arguments)
        return changed[-1]

    p = gpu.array(np.zeros(1003, np.float32), 4 * offset)
    with mock.patch.object(text, "update_source", without_single_elements):
        xo.SGD(lr=1.0).update({"p": p}, {"p": gpu.array(np.ones(1003, np.float32), 4 * offset)})
    assert changed
    head = -offset % 4
    body = (1003 - head) // 4 * 4
    assert gpu.to_numpy(p).tolist() == [0.0] * head + [-1.0] * body + [0.0] * (1003 - head - body)


@pytest.mark.parametrize("name", ["float16", "float32", "complex128"])
def test_each_buffer_aligned_in_its_own_way(name: str, gpu: GPU) -> None:
    dtype, slot_dtype = DTYPES[name], SLOT_DTYPES[name]
    apart = [
        (0, 0, 0, 0),
        (1, 1, 1, 1),
        (3, 3, 3, 3),
        (1, 0, 0, 0),
        (0, 1, 0, 0),
        (0, 0, 1, 0),
        (2, 2, 0, 2),
        (1, 3, 1, 1),
    ]
    keys = [f"{offsets} {size}" for offsets in apart for size in (1, 3, 4, 17, 2500)]
    places = dict(zip(keys, [offsets for offsets in apart for _ in range(5)], strict=True))
    rng = np.random.default_rng(2)
    params = {key: random_values(rng, (int(key.split()[-1]),), dtype, 0.1) for key in keys}
    slots = {
        slot: {key: abs(random_values(rng, params[key].shape, slot_dtype)).astype(slot_dtype) for key in keys}
        for slot in ("m", "v")
    }
    opt, expected_opt = make_optimizer("Adam"), make_optimizer("Adam")
    state = {"class": "Adam", "step": 3, "slots": slots}
    expected_opt.load_state_dict(state)
    opt.load_state_dict(state)
    for number, slot in enumerate(("m", "v")):
        for key in keys:
            offset = places[key][2 + number] * slot_dtype.itemsize
            opt.state["slots"][slot][key] = gpu.array(slots[slot][key], offset)
    on_gpu = {key: gpu.array(p, places[key][0] * dtype.itemsize) for key, p in params.items()}
    for step in range(2):
        grads = alike(params, seed=step)
        opt.update(on_gpu, {key: gpu.array(g, places[key][1] * dtype.itemsize) for key, g in grads.items()})
        expected_opt.update(params, grads)
        assert_same(gpu, opt, on_gpu, expected_opt, params)
    assert gpu == ["update"] * 2


@pytest.mark.parametrize("layout", CUPY_LAYOUTS)
def test_layouts(layout: str, gpu: GPU) -> None:
    """Every layout of a parameter with every layout of its gradient, with and without a norm."""
    shapes = ((4, 5, 6), (1, 7), (3, 0), (9, 8), ())
    for options in ({}, {"clip_norm": 0.7}):
        values = {
            f"{number} {other}": random_values(np.random.default_rng(number), shape, np.dtype(np.float32))
            for number, shape in enumerate(shapes)
            for other in CUPY_GRADIENT_LAYOUTS
        }
        opt, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
        on_gpu = {key: gpu.array(LAYOUTS[layout](p)) for key, p in values.items()}
        for step in range(3):
            grads = {key: GRADIENT_LAYOUTS[key.split()[1]](g) for key, g in alike(values, seed=step, special=0).items()}
            opt.update(on_gpu, {key: gpu.array(g) for key, g in grads.items()})
            expected_opt.update(values, grads)
            assert_same(gpu, opt, on_gpu, expected_opt, values)
        assert gpu.count("update") == 3
        gpu.take()


@pytest.mark.parametrize("layout", ["fortran", "permuted"])
def test_dense_arrays_of_equal_layout_need_no_copies(layout: str, gpu: GPU) -> None:
    params = {"W": random_values(np.random.default_rng(0), (12, 13, 5), np.dtype(np.float32))}
    make = LAYOUTS[layout]
    follow(
        gpu,
        lambda: make_optimizer("Momentum"),
        params,
        [alike(params, seed=step, special=0) for step in range(3)],
        place=lambda gpu, p, _: gpu.array(make(p)),
        place_gradient=lambda gpu, g, _: gpu.array(make(g)),
    )
    assert gpu == ["update"] * 3
    with mock.patch.object(driver, "copy", side_effect=AssertionError):
        opt = make_optimizer("Momentum")
        report = str(opt.explain({"W": gpu.array(make(params["W"]))}, {"W": gpu.array(make(params["W"]))}))
    assert "dense CuPy arrays of equal layout" in report


def test_strided_arrays_are_staged(gpu: GPU) -> None:
    values = random_values(np.random.default_rng(0), (6, 7), np.dtype(np.float64))
    params = {"W": gpu.array(LAYOUTS["columns"](values)), "b": gpu.array(values[0].copy())}
    grads = {"W": gpu.array(values), "b": gpu.array(values[1].copy())}
    opt = make_optimizer("Adam")
    assert "staged" in str(opt.explain(params, grads))
    with xo.engine("fused"), pytest.raises(ValueError, match=r"params\['W'\] cannot take the fused path: .*not dense"):
        opt.update(params, grads)
    assert_same_bits(gpu.host(params["W"]), values)
    assert opt.state["step"] == 0
    assert not gpu
    opt.update(params, grads)
    assert gpu == ["update", "copy"]


def test_special_values_of_all_buffers(gpu: GPU) -> None:
    """Each special value of a parameter with each of its gradient, over several steps."""
    params, grads = {}, {}
    for name, dtype in REAL_DTYPES.items():
        values = special_values(dtype)
        params[name] = np.repeat(values, len(values))
        grads[name] = np.tile(values, len(values))
    for rule in ("Nesterov", "Adam"):
        follow(gpu, partial(make_optimizer, rule, clip_value=3.0), params, [grads] * 3)


@pytest.mark.parametrize("to", REAL_DTYPES)
def test_conversions(to: str, gpu: GPU) -> None:
    """Every 16-bit number, what lies halfway between two, their neighbours, and random bits, into each dtype."""
    every = np.arange(1 << 16, dtype=np.uint16)
    words = np.random.default_rng(0).integers(0, 2**64, 50_000, np.uint64)
    sources = [every.view(np.float16), every.view(DTYPES["bfloat16"])]
    for dtype in (DTYPES["float32"], DTYPES["float64"]):
        with np.errstate(all="ignore"):
            values = np.concatenate([a.astype(dtype) for a in sources[:2]])
            finite = np.unique(values[np.isfinite(values)])
            edges = np.concatenate([values, finite[1:] / 2 + finite[:-1] / 2])
            near = [np.nextafter(edges, dtype.type(end)) for end in (-np.inf, np.inf)]
        sources.append(np.concatenate([edges, *near, words.view(dtype)]))
    for source in sources:
        follow(gpu, Assign, {"W": np.zeros(source.shape, DTYPES[to])}, [{"W": source}])


def test_long_chunks(gpu: GPU) -> None:
    """Where a block's threads go round more than once, as with large tensors."""
    params = trees({name: DTYPES[name] for name in ("bfloat16", "float64")}, ((40_000,), (33_000,)))
    with mock.patch.object(text, "MANY_BLOCKS", 1):
        follow(gpu, lambda: make_optimizer("Adam"), params, [alike(params, seed=1)] * 2, place=askew)
    assert gpu == ["update"] * 4


@pytest.mark.parametrize("flag", [False, True])
def test_every_operation_and_constant(flag: bool, gpu: GPU) -> None:
    params = trees({name: DTYPES[name] for name in ("bfloat16", "float32", "float64")}, ((1001,), (3,)), special=0.4)
    gradients = [alike(params, seed=step, special=0.4) for step in range(1, 4)]
    follow(gpu, lambda: Everything(flag=flag), params, gradients)
    follow(gpu, lambda: Everything(flag=flag, capturable=True), params, gradients)


def test_names_of_slots_and_hyperparameters(gpu: GPU) -> None:
    params = {"W": random_values(np.random.default_rng(0), (300,), np.dtype(np.float32))}
    gradients = [alike(params, seed=step) for step in range(3)]
    follow(gpu, Names, params, gradients)
    follow(gpu, lambda: Names(capturable=True), params, gradients)


# --- many tensors


@pytest.mark.parametrize(("rule", "count", "clip_norm"), [("Adam", 700, 3.0), ("SGD", 700, None), ("Adam", 3000, None)])
def test_many_tensors(rule: str, count: int, clip_norm: float | None, gpu: GPU) -> None:
    """The rows of a table in device memory are brought there if one has changed, and only then."""
    rng = np.random.default_rng(count)
    shapes = [(int(n) * (i % 7 == 3),) for i, n in enumerate(rng.integers(0, 30, count))]  # shuffles take the host long
    shapes[count // 2] = (5000,)
    params = {f"{i}": random_values(rng, shape, np.dtype(np.float32)) for i, shape in enumerate(shapes)}
    first, second = (alike(params, seed=step, special=0) for step in (1, 2))
    opt, expected_opt = (make_optimizer(rule, clip_norm=clip_norm) for _ in range(2))
    on_gpu, in_place, elsewhere = moved(gpu, params), moved(gpu, first, askew), moved(gpu, second, askew)
    many = rule == "Adam"  # for which 681 rows go by value, for SGD 1,000
    uploads = ["upload"] * (-(-count * 6 // text.UPLOAD_WORDS) if many else 0)
    sums, fold, update = (name + "_many" * many for name in ("sums", "fold", "update"))
    for values, arrays, changed in [
        (first, in_place, uploads),
        (first, in_place, []),
        (second, elsewhere, uploads),
        (second, elsewhere, []),
    ]:
        opt.update(on_gpu, arrays)
        expected_opt.update(params, values)
        norm = [*changed, sums, fold, "prologue"] if clip_norm else []
        assert gpu.take() == [*norm, *changed, update]
    assert_same(gpu, opt, on_gpu, expected_opt, params)


@pytest.mark.parametrize("count", [1, 8, 9, 64, 65, 256, 257, 681, 682])
def test_capacities(count: int, gpu: GPU) -> None:
    """Each size of the table that goes by value, full and with one tensor too many for it."""
    program = traced(make_optimizer("Adam")).programs("float32", "float32")["update"]
    rows = cuda.capacity(program, count)
    assert rows == next((n for n in (8, 64, 256, 681) if count <= n), None)
    params = {f"{i}": np.full(3, i, np.float32) for i in range(count)}
    follow(gpu, lambda: make_optimizer("Adam"), params, [alike(params, seed=1)] * 2)
    assert [name for name in gpu if name != "upload"] == (["update"] if rows else ["update_many"]) * 2


# --- what a step does, and what it does not


def container_kinds() -> dict[str, Callable[[Tree], Any]]:
    return {"dict": dict, "list": lambda tree: list(tree.values())}


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"capturable": True}], ids=["plain", "norm", "capturable"])
@pytest.mark.parametrize("kind", container_kinds())
@pytest.mark.parametrize("layout", ["C", "fortran"])
def test_steps_after_the_first_neither_wait_nor_allocate(
    kind: str, layout: str, options: dict[str, Any], gpu: GPU
) -> None:
    contain, lay = container_kinds()[kind], LAYOUTS[layout]
    params = trees({name: DTYPES[name] for name in ("float16", "float32")}, ((33, 40), (0,), ()), special=0)
    opt, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
    on_gpu, expected = moved(gpu, params, lambda gpu, p, _: gpu.array(lay(p))), contain(params)
    for step in range(6):
        grads = alike(params, seed=step, special=0)
        on_gpu_grads = contain(moved(gpu, grads, lambda gpu, g, _: gpu.array(lay(g))))
        opt.lr = expected_opt.lr = 0.1 / (step + 1)
        expected_opt.update(expected, contain(grads))
        if step == 0:
            opt.update(contain(on_gpu), on_gpu_grads)
        else:
            with gpu.quiet():
                opt.update(contain(on_gpu), on_gpu_grads)
        assert_same_tree(gpu.host(contain(on_gpu)), expected)
    assert_same_tree(gpu.host(opt.state), expected_opt.state)


def test_one_launch_a_step(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)})
    opt, on_gpu = make_optimizer("Adam"), moved(gpu, params)
    for step in range(4):
        opt.update(on_gpu, moved(gpu, alike(params, seed=step)))
        assert gpu.take() == ["update"]


def test_the_least_grids_that_cover_the_tensors(gpu: GPU) -> None:
    """A block for 16 bytes a thread of one tensor, a warp for a chunk of a norm, a block for a tensor's sums."""
    sizes, threads = (0, 1, 1023, 1024, 1025, 9000, 3), 256
    params = {str(size): np.ones(size, np.float32) for size in sizes}
    on_gpu, grads = moved(gpu, params), moved(gpu, params)
    updates = sum(-(-size // (threads * 4)) for size in sizes)
    sums = -(-sum(-(-size // CHUNK) for size in sizes) // (threads // 32))
    with mock.patch.object(driver, "launch", wraps=driver.launch) as launch:
        make_optimizer("Adam", clip_norm=1.0).update(on_gpu, grads)
    grids = {call.args[0].name: call.args[1:3] for call in launch.call_args_list}
    expected = {"sums": (sums, threads), "fold": (len(sizes), 512), "prologue": (1, 1), "update": (updates, threads)}
    assert grids == expected


def test_nothing_to_do_is_no_launch(gpu: GPU) -> None:
    empty = {"a": gpu.array(np.zeros((0, 3), np.float32)), "b": gpu.array(np.zeros(0, np.float32))}
    for options in ({}, {"clip_norm": 1.0}, {"capturable": True}):
        opt = make_optimizer("Adam", **options)
        for step in range(3):
            opt.update(empty, dict(empty))
            assert opt.state["step"] == step + 1
        assert "update" not in gpu.take()
        opt = make_optimizer("Adam", **options)
        opt.update({"a": gpu.array(np.ones(3))}, {"a": None})
        assert not gpu.take()
        assert opt.state["step"] == 1


def test_gradients_are_not_kept_alive(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, ((33, 40), (5,)), special=0)
    for options in ({}, {"clip_norm": 0.5}, {"capturable": True}):
        opt, on_gpu = (
            make_optimizer("Adam", **options),
            moved(gpu, params, lambda gpu, p, _: gpu.array(LAYOUTS["fortran"](p))),
        )
        for step in range(3):
            grads = moved(gpu, alike(params, seed=step, special=0), lambda gpu, g, _: gpu.array(LAYOUTS["fortran"](g)))
            alive = [weakref.ref(g) for g in grads.values()]
            opt.update(on_gpu, grads)
            del grads
            assert not any(ref() is not None for ref in alive)
        alive = [weakref.ref(p) for p in on_gpu.values()]
        del on_gpu
        assert not any(ref() is not None for ref in alive)  # nor parameters


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"capturable": True}], ids=str)
def test_the_same_gradients_none_at_every_step(options: dict[str, Any], gpu: GPU) -> None:
    """Frozen parameters cost neither an allocation nor a wait."""
    arrays = {"a": np.ones(5), "frozen": np.full(7, 3.0), "b": np.full(9, 2.0)}
    params = {key: gpu.array(a) for key, a in arrays.items()}
    opt, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
    for step in range(4):
        g = {key: None if key == "frozen" else np.full(a.shape, step + 1.0) for key, a in arrays.items()}
        on_gpu = {key: None if x is None else gpu.array(x) for key, x in g.items()}
        with gpu.quiet() if step else contextlib.nullcontext():
            opt.update(params, on_gpu)
        expected_opt.update(arrays, g)
    for key, a in arrays.items():
        assert_same_bits(gpu.host(params[key]), a)


def test_gradients_that_are_none(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, special=0)
    for options in ({}, {"clip_norm": 0.5}):
        opt, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
        expected, on_gpu = {key: p.copy() for key, p in params.items()}, moved(gpu, params)
        for step in range(5):
            grads = alike(params, seed=step, special=0)
            left = [None if (step + i) % 3 == 0 else key for i, key in enumerate(grads)]
            given = moved(gpu, grads, askew)
            opt.update(on_gpu, {key: g if key in left else None for key, g in given.items()})
            expected_opt.update(expected, {key: g if key in left else None for key, g in grads.items()})
            assert_same(gpu, opt, on_gpu, expected_opt, expected)


def test_gradients_that_overlap_what_is_written(gpu: GPU) -> None:
    """They act as if they had been copied first: also in a step that is otherwise like the one before."""
    values = random_values(np.random.default_rng(0), (2000,), np.dtype(np.float32))
    for options in ({}, {"clip_norm": 0.5}):
        opt, expected_opt = make_optimizer("Momentum", **options), make_optimizer("Momentum", **options)
        room, expected_room = gpu.array(values), values.copy()
        params = {"W": room[:1000], "b": room[1500:]}
        expected = {"W": expected_room[:1000], "b": expected_room[1500:]}
        apart = {"W": values[:1000] * 2, "b": values[1500:] * 3}
        for step in range(6):
            if step % 2:
                grads = {"W": room[3:1003], "b": room[1000:1500]}
                expected_grads = {"W": expected_room[3:1003].copy(), "b": expected_room[1000:1500].copy()}
            else:
                grads, expected_grads = moved(gpu, apart), apart
            opt.update(params, grads)
            expected_opt.update(expected, expected_grads)
            assert_same(gpu, opt, params, expected_opt, expected)
        slot = opt.state["slots"]["v"]["W"]
        expected_opt.update(expected, {"W": gpu.host(slot), "b": apart["b"]})
        opt.update(params, {"W": slot, "b": gpu.array(apart["b"])})
        assert_same(gpu, opt, params, expected_opt, expected)


def test_parameters_that_share_memory(gpu: GPU) -> None:
    room = gpu.array(np.ones((4, 6), np.float32))
    opt = make_optimizer("Adam")
    whole = {"a": room, "b": room[1]}
    with pytest.raises(ValueError, match=r"params\['a'\] and params\['b'\] share memory"):
        opt.update(whole, dict(whole))
    with pytest.raises(ValueError, match="share memory"):
        opt.update({"a": room, "b": room}, {"a": room, "b": room})
    assert opt.state == {"step": 0, "slots": {}}
    assert not gpu
    columns = {"a": room[:, :3], "b": room[:, 3:]}
    opt.update(columns, {key: gpu.array(np.ones((4, 3), np.float32)) for key in columns})
    assert opt.state["step"] == 1


def test_arrays_that_change_are_seen(gpu: GPU) -> None:
    """A slot or parameter elsewhere, a gradient of another dtype or layout, another order: each in its own step."""
    params = trees({"float32": np.dtype(np.float32)}, ((33, 40), (5,)), special=0)
    opt, expected_opt, on_gpu = make_optimizer("Adam"), make_optimizer("Adam"), moved(gpu, params)
    first, second = params
    for step in range(12):
        dtype = {6: "float16", 7: "bfloat16"}.get(step, "float32")
        grads = alike(params, seed=step, special=0, dtype=DTYPES[dtype])
        given = moved(gpu, grads)
        if step == 2:
            opt.state["slots"]["m"][second] = gpu.array(gpu.host(opt.state["slots"]["m"][second]), 4)
        if step == 4:
            on_gpu[first] = gpu.array(gpu.host(on_gpu[first]))
        if step == 8:
            given[first] = gpu.array(np.asfortranarray(grads[first]))
        if step == 10:
            on_gpu = {key: on_gpu[key] for key in (second, first)}
        opt.update(on_gpu, given)
        expected_opt.update(params, grads)
        assert_same(gpu, opt, on_gpu, expected_opt, params)
    with pytest.raises(ValueError, match="shape"):
        opt.update(
            on_gpu | {second: gpu.array(np.ones(6, np.float32))}, given | {second: gpu.array(np.ones(6, np.float32))}
        )
    on_gpu[second].shape = (5, 1)
    with pytest.raises(ValueError, match="shape"):
        opt.update(on_gpu, given)
    assert opt.state["step"] == 12


def test_containers(gpu: GPU) -> None:
    """Nested ones, lists, and a lone array."""
    values = [random_values(np.random.default_rng(i), (20,), np.dtype(np.float32)) for i in range(4)]
    kinds: dict[str, Callable[[Callable[[np.ndarray], Any]], Any]] = {
        "nested": lambda f: {"a": [f(values[0]), {"b": f(values[1])}], "c": (f(values[2]), f(values[3]))},
        "list": lambda f: [f(v) for v in values],
        "lone": lambda f: f(values[0]),
    }
    for make in kinds.values():
        opt, expected_opt = make_optimizer("Adam"), make_optimizer("Adam")
        params, expected = make(gpu.array), make(np.copy)
        for step in range(3):
            scale = step * 0.5
            opt.update(params, make(lambda v: gpu.array(v * scale)))  # noqa: B023
            expected_opt.update(expected, make(lambda v: v * scale))  # noqa: B023
        flat, expected_flat = ([*_arrays(tree)] for tree in (params, expected))
        assert_same_tree([gpu.host(a) for a in flat], expected_flat)
        assert_same_tree(gpu.host(opt.state), expected_opt.state)
        assert gpu.take() == ["update"] * 3


def _arrays(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _arrays(value)
    else:
        yield tree


def test_apply_leaves_everything_alone(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, special=0)
    for options in ({}, {"clip_norm": 0.5}):
        opt, on_gpu, on_host = make_optimizer("Adam", **options), moved(gpu, params), params
        state, expected_state = opt.init(on_gpu), opt.init(params)
        for step in range(3):
            grads = alike(params, seed=step, special=0)
            given, before = moved(gpu, grads), frozen_on(gpu, on_gpu, state)
            new, new_state = opt.apply(on_gpu, given, state)
            assert frozen_on(gpu, on_gpu, state) == before
            on_host, expected_state = opt.apply(on_host, grads, expected_state)
            on_gpu, state = new, new_state
            assert_same_tree(gpu.host(on_gpu), on_host)
            assert_same_tree(gpu.host(state), expected_state)
        assert opt.state["step"] == 0


def test_numpy_and_cupy_in_one_container(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, special=0)
    for options in ({}, {"clip_norm": 0.5}):
        opt, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
        expected = {key: p.copy() for key, p in params.items()}
        mixed = {key: gpu.array(p) if i % 2 else p.copy() for i, (key, p) in enumerate(params.items())}
        for step in range(3):
            grads = alike(params, seed=step, special=0)
            opt.update(mixed, {key: gpu.array(g) if i % 2 else g for i, (key, g) in enumerate(grads.items())})
            expected_opt.update(expected, grads)
            assert_same(gpu, opt, mixed, expected_opt, expected)


# --- several devices


def test_two_devices(gpu: GPU) -> None:
    """Each tensor is served by its own device; a norm spans them, by way of the host."""
    params = trees({name: DTYPES[name] for name in ("float32", "float64")}, special=0)
    for options in ({}, {"clip_norm": 0.5}, {"capturable": True}):
        opt, expected_opt = make_optimizer("Adam", **options), make_optimizer("Adam", **options)
        expected = {key: p.copy() for key, p in params.items()}
        devices = [i % 2 for i in range(len(params))]
        on_gpus = {key: gpu.array(p, device=d) for d, (key, p) in zip(devices, params.items(), strict=True)}
        for step in range(3):
            grads = alike(params, seed=step, special=0)
            opt.update(
                on_gpus, {key: gpu.array(g, device=d) for d, (key, g) in zip(devices, grads.items(), strict=True)}
            )
            expected_opt.update(expected, grads)
            assert_same(gpu, opt, on_gpus, expected_opt, expected)
            assert sorted(d for d, name in zip(gpu.devices, gpu, strict=True) if name == "update") == [0, 0, 1, 1]
            assert gpu.device == 0
            gpu.take()
        for key, d in zip(params, devices, strict=True):
            assert opt.state["slots"]["m"][key].device.id == d


def on_second(gpu: GPU, values: np.ndarray, number: int = 0) -> Any:
    """An array on device 1, which is never the current one."""
    return gpu.array(values, number % 3 * values.itemsize, device=1)


THREE_OPTIONS = pytest.mark.parametrize(
    "options", [{}, {"clip_norm": 0.5}, {"capturable": True}], ids=["plain", "norm", "capturable"]
)


@THREE_OPTIONS
@pytest.mark.parametrize("layout", ["C", "fortran", "columns"])
def test_second_device_alone(layout: str, options: dict[str, Any], gpu: GPU) -> None:
    """Slots, dense copies and copies in C order are made where the parameters lie, whichever device is current."""
    params = {"W": random_values(np.random.default_rng(0), (30, 170), np.dtype(np.float32))}
    other = {"C": "fortran", "fortran": "C", "columns": "C"}[layout]
    for gradient_layout in (layout, other):
        follow(
            gpu,
            partial(make_optimizer, "Adam", **options),
            params,
            [alike(params, seed=step, special=0) for step in range(3)],
            place=lambda gpu, p, _: gpu.array(LAYOUTS[layout](p), device=1),
            place_gradient=lambda gpu, g, _: gpu.array(LAYOUTS[gradient_layout](g), device=1),  # noqa: B023
        )
        assert set(gpu.devices) == {1}
        assert gpu.device == 0
        gpu.take()


def test_conversions_on_the_second_device(gpu: GPU) -> None:
    """A real gradient of a complex parameter, and a number as the gradient of an array without axes."""
    params = {"z": random_values(np.random.default_rng(0), (50,), np.dtype(np.complex64)), "x": np.array(2.0)}
    opt, expected_opt, on_gpu = make_optimizer("Adam"), make_optimizer("Adam"), moved(gpu, params, on_second)
    for step in range(3):
        g = random_values(np.random.default_rng(step), (50,), np.dtype(np.float32))
        opt.update(on_gpu, {"z": on_second(gpu, g), "x": 0.5})
        expected_opt.update(params, {"z": g, "x": 0.5})
        assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_slots_start_on_the_device_of_their_parameter(gpu: GPU) -> None:
    class Starts(xo.Optimizer):
        slots = {"h": 0.1, "x0": lambda p: p, "ones": lambda p: np.float64(1.0)}  # noqa: RUF012

        @staticmethod
        def rule(xp: Any, p: Any, g: Any, h: Any, x0: Any, ones: Any) -> Any:
            return p - g, h + ones, x0, ones * h

    params = trees({name: DTYPES[name] for name in ("float16", "float32", "complex64")}, special=0)
    gradients = [alike(params, seed=step, special=0) for step in range(3)]
    follow(gpu, Starts, params, gradients, place=on_second, place_gradient=on_second)


def place_on_both(gpu: GPU, values: np.ndarray, number: int) -> Any:
    """On the one device, then on the other, and NumPy arrays between."""
    return values.copy() if number % 3 == 2 else gpu.array(values, device=number % 3)


@THREE_OPTIONS
def test_two_devices_and_the_host(options: dict[str, Any], gpu: GPU) -> None:
    params = trees({name: DTYPES[name] for name in ("float32", "complex64")}, special=0)
    gradients = [alike(params, seed=step, special=0) for step in range(3)]
    make = partial(make_optimizer, "Adam", **options)
    follow(gpu, make, params, gradients, place=place_on_both, place_gradient=place_on_both)


@THREE_OPTIONS
@pytest.mark.parametrize("place", [on_second, place_on_both])
def test_states_on_the_second_device(place: Callable[..., Any], options: dict[str, Any], gpu: GPU) -> None:
    """Copies of a state, and what is made of a pickled one, go on where the parameters lie."""
    params = trees({name: DTYPES[name] for name in ("float32", "complex64")}, special=0)
    params["fortran"] = np.asfortranarray(params["float32 (7, 9)"])
    make = partial(make_optimizer, "Adam", **options)

    def loaded(opt: xo.Optimizer) -> xo.Optimizer:
        new = make()
        new.load_state_dict(opt.state_dict())
        return new

    def pickled(opt: xo.Optimizer) -> xo.Optimizer:
        return pickle.loads(pickle.dumps(opt))

    opt, expected_opt, on_gpu = make(), make(), moved(gpu, params, place)
    for step, renew in enumerate((None, loaded, copy.copy, copy.deepcopy, pickled, None)):
        opt = renew(opt) if renew else opt
        assert gpu.device == 0
        grads = alike(params, seed=step, special=0)
        opt.update(on_gpu, moved(gpu, grads, place))
        expected_opt.update(params, grads)
        assert_same(gpu, opt, on_gpu, expected_opt, params)
        for key, p in on_gpu.items():
            assert opt.state["slots"]["m"][key].device == p.device


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}], ids=["plain", "norm"])
@pytest.mark.parametrize("place", [on_second, place_on_both])
def test_apply_on_the_second_device(place: Callable[..., Any], options: dict[str, Any], gpu: GPU) -> None:
    params = trees({name: DTYPES[name] for name in ("float32", "complex64")}, special=0)
    opt, on_gpu = make_optimizer("Adam", **options), moved(gpu, params, place)
    state, expected_state = opt.init(on_gpu), opt.init(params)
    for step in range(3):
        grads = alike(params, seed=step, special=0)
        on_gpu, state = opt.apply(on_gpu, moved(gpu, grads, place), state)
        params, expected_state = opt.apply(params, grads, expected_state)
        assert_same_tree(gpu.host(on_gpu), params)
        assert_same_tree(gpu.host(state), expected_state)
    assert gpu.device == 0


def test_overlapping_gradients_on_the_second_device(gpu: GPU) -> None:
    values = random_values(np.random.default_rng(0), (2000,), np.dtype(np.float32))
    for options in ({}, {"clip_norm": 0.5}):
        opt, expected_opt = make_optimizer("Momentum", **options), make_optimizer("Momentum", **options)
        room, expected = on_second(gpu, values), values.copy()
        for _ in range(3):
            opt.update({"W": room[:1000]}, {"W": room[3:1003]})
            expected_opt.update({"W": expected[:1000]}, {"W": expected[3:1003].copy()})
            assert_same(gpu, opt, room, expected_opt, expected)
    assert gpu.device == 0


def test_capture_on_the_second_device(gpu: GPU) -> None:
    """Whether a capture is going on is asked of the stream that the step runs on."""
    import cupy

    params = {"W": random_values(np.random.default_rng(0), (50,), np.dtype(np.float32))}
    opt, expected_opt = (make_optimizer("Adam", clip_norm=0.5, capturable=True) for _ in range(2))
    on_gpu, grads = moved(gpu, params, on_second), alike(params, seed=0, special=0)
    buffers = moved(gpu, grads, on_second)
    opt.update(on_gpu, buffers)
    expected_opt.update(params, grads)
    gpu.host(on_gpu)  # the other stream is not ordered behind the first
    with cupy.cuda.Device(1):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream:
            stream.begin_capture()
            with pytest.raises(RuntimeError, match="cannot be captured"), cupy.cuda.Device(0):
                make_optimizer("Adam").update(on_gpu, buffers)
            with cupy.cuda.Device(0):
                opt.update(on_gpu, buffers)
            graph = stream.end_capture()
            for _ in range(2):
                with cupy.cuda.Device(0):
                    opt.prepare_replay()
                graph.launch(stream)
                expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_plain_operations_run_where_the_arrays_lie(gpu: GPU) -> None:
    """The reference engine and plain rules: CuPy's operations are asked for on the device of each parameter."""
    params = {"a": gpu.array(np.ones(3)), "b": on_second(gpu, np.ones(3))}
    asked = []

    def note(name: str, result: Any) -> Any:
        def run(*arguments: Any) -> Any:
            leaf = next(x for x in arguments if hasattr(x, "key"))
            asked.append((name, leaf.key, gpu.device))
            return result(leaf)

        return run

    noted = mock.patch.multiple(
        reference,
        _squares_sum=note("norm", lambda leaf: 1.0),
        _computed=note("computed", lambda leaf: [leaf.p, *leaf.slots]),
        _write=note("write", lambda leaf: None),
    )
    with xo.engine("reference"), noted:
        make_optimizer("Adam", clip_norm=1.0).update(params, dict(params))
    assert {(name, key) for name, key, _ in asked} == {
        (name, key) for name in ("norm", "computed", "write") for key in "ab"
    }
    assert all(device == (key == "b") for _, key, device in asked)


@pytest.mark.parametrize("layout", ["C", "columns"])
def test_dropout_on_the_second_device(layout: str, gpu: GPU) -> None:
    x = random_values(np.random.default_rng(0), (13, 17), np.dtype(np.float32))
    there, here = (xo.Dropout(0.5, seed=1, inverted=True) for _ in range(2))
    on_gpu = gpu.array(LAYOUTS[layout](x), device=1)
    for call in ("forward", "backward"):
        y = getattr(there, call)(on_gpu)
        assert y.device.id == 1
        assert_same_bits(gpu.host(y), getattr(here, call)(x))
    assert_same_bits(gpu.host(there.forward(on_gpu, train_flg=False)), here.forward(x, train_flg=False))
    out = gpu.array(np.zeros((17, 13), np.float32), device=1).T
    there.forward(on_gpu, out=out)
    assert_same_bits(gpu.host(out), here.forward(x))
    all_kept = xo.Dropout(0.0)
    all_kept.forward(on_gpu)
    assert all_kept.mask.device.id == 1
    assert gpu.host(all_kept.mask).all()
    assert set(gpu.devices) == {1}
    assert gpu.device == 0


def test_words_are_drawn_on_the_device_that_is_asked_for(gpu: GPU) -> None:
    """The operations on them too, and those for a mask."""
    import cupy

    devices = []

    def draw(*_: Any) -> Any:
        devices.append(gpu.device)
        return gpu.array(np.ones(6, bool), device=1)

    drop = xo.Dropout(0.5, seed=1)
    drop.forward(on_second(gpu, np.ones(6)))
    with mock.patch.object(xo.random, "_draw", draw):
        xo.random.words(0, 0, 6, cupy, device=cupy.cuda.Device(1))
        assert drop.mask.device.id == 1
    assert devices == [1, 1]


def test_gradient_on_another_device(gpu: GPU) -> None:
    params, grads = {"W": gpu.array(np.ones(3))}, {"W": gpu.array(np.ones(3), device=1)}
    with pytest.raises(ValueError, match=r"grads\['W'\] is on .*1.* but params\['W'\] is on .*0"):
        make_optimizer("SGD").update(params, grads)
    opt = make_optimizer("Adam")
    opt.update(params, {"W": gpu.array(np.ones(3))})
    with pytest.raises(ValueError, match="device"):
        opt.update({"W": gpu.array(np.ones(3), device=1)}, grads)


# --- hyperparameters


def test_schedules_and_changes(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, special=0)
    gradients = [alike(params, seed=step, special=0) for step in range(9)]

    def change(opt: Any, step: int) -> None:
        if step == 2:
            opt.lr = 0.03
        if step == 3:
            opt.weight_decay = lambda step: 0.1 * step
        if step == 4:
            opt.clip_norm = lambda step: 1.0 / step
        if step == 5:
            opt.capturable = True
        if step == 6:
            opt.clip_norm = None
        if step == 7:
            opt.capturable = False

    follow(gpu, lambda: xo.Adam(lr=lambda step: 0.1 / (step + 1), beta2=0.9), params, gradients, before=change)


# --- norms


@pytest.mark.parametrize("layout", ["C", "fortran", "permuted"])
@pytest.mark.parametrize("name", DTYPES)
def test_norm_has_the_bits_of_the_cpu(name: str, layout: str, gpu: GPU) -> None:
    """The norm itself, in float64, whose last bits parameters would hide; summed in C order whatever the layout."""
    lay = LAYOUTS[layout]
    shapes = ((), (0,), (3,), (4096,), (4097,), (61, 201), (3, 4096), (9, 30, 40))
    params = trees({name: DTYPES[name]}, shapes, seed=2, special=0)

    def norm(params: Any, grads: Any) -> float:
        leaves = resolve(pairs(params, grads), writing=True)
        opt = make_optimizer("SGD", clip_norm=1.0, clip_value=40.0)
        prepared = Prepared(traced(opt), leaves, lambda engine: None, capturable=False, in_place=True)
        return prepared.reduced(opt._scalars(0)[1])[-1]

    for g_name in REAL_DTYPES if name in REAL_DTYPES else COMPLEX_DTYPES:
        grads = alike(params, seed=3, special=0, dtype=DTYPES[g_name])
        on_gpu = moved(gpu, params, lambda gpu, p, _: gpu.array(lay(p)))
        given = moved(gpu, grads, lambda gpu, g, i: gpu.array(lay(g), i % 3 * g.itemsize))
        assert norm(on_gpu, given) == norm(params, grads) > 0
    follow(
        gpu, lambda: make_optimizer("SGD", clip_norm=1.0, clip_value=40.0), params, [alike(params, seed=3, special=0)]
    )


@pytest.mark.parametrize("clip_norm", [0.5, np.inf])
def test_a_step_with_a_norm_that_is_not_finite_is_skipped(clip_norm: float, gpu: GPU) -> None:
    params = trees({name: DTYPES[name] for name in ("float16", "float32")}, special=0)
    opt, expected_opt, on_gpu = (*(make_optimizer("Adam", clip_norm=clip_norm) for _ in range(2)), moved(gpu, params))
    bad = [(2, np.nan), (3, np.inf), (5, -np.inf)]
    for step in range(7):
        grads = alike(params, seed=step, special=0)
        for at, value in bad:
            if at == step:
                grads["float32 (7, 9)"][3, 4] = value
        given = moved(gpu, grads)
        if step == 0:
            opt.update(on_gpu, given)
        else:
            with gpu.quiet():
                opt.update(on_gpu, given)
        if step not in dict(bad):
            expected_opt.update(params, grads)
    assert opt.skipped == 3
    with pytest.raises(FloatingPointError, match="3 steps were skipped"):
        opt.check()
    assert opt.state["step"] == 4
    assert_same(gpu, opt, on_gpu, expected_opt, params)
    opt.update(on_gpu, given)
    expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)
    # Without the GPU's count, after a change of options, the count goes on; and the state travels.
    opt.clip_norm = expected_opt.clip_norm = None
    opt.update(on_gpu, given)
    expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


@pytest.mark.parametrize("options", [{}, {"capturable": True}], ids=["plain", "capturable"])
def test_an_infinite_clip_norm_only_checks(options: dict[str, bool], gpu: GPU) -> None:
    """The CPU's bits without the option, also where the norm is 0."""
    params = trees({name: DTYPES[name] for name in ("bfloat16", "float32", "complex128")}, special=0)
    opt, plain, on_gpu = make_optimizer("Adam", clip_norm=np.inf, **options), make_optimizer("Adam"), moved(gpu, params)
    for step in range(4):
        grads = alike(params, seed=step, special=0)
        if step in (0, 2):
            grads = {key: -np.zeros_like(g) for key, g in grads.items()}
        opt.update(on_gpu, moved(gpu, grads))
        plain.update(params, grads)
    assert opt.skipped == 0
    assert_same(gpu, opt, on_gpu, plain, params)


def test_overflowing_norm_is_skipped(gpu: GPU) -> None:
    opt, params = make_optimizer("SGD", clip_norm=1.0), {"W": gpu.array(np.ones(3))}
    opt.update(params, {"W": gpu.array(np.full(3, 1e200))})
    assert (opt.skipped, opt.state["step"]) == (1, 0)
    assert_same_bits(gpu.host(params["W"]), np.ones(3))


def test_norm_that_is_not_finite_on_the_host(gpu: GPU) -> None:
    """On two devices the host fetches the norm, and raises."""
    params = {"a": gpu.array(np.ones(3)), "b": gpu.array(np.ones(3), device=1)}
    opt = make_optimizer("Adam", clip_norm=1.0)
    with pytest.raises(FloatingPointError, match=r"grads\['b'\]"):
        opt.update(params, {"a": gpu.array(np.ones(3)), "b": gpu.array(np.full(3, np.nan), device=1)})
    assert opt.state == {"step": 0, "slots": {}}
    assert_same_bits(gpu.host(params["a"]), np.ones(3))


# --- capture


@pytest.mark.parametrize(
    "options",
    [{}, {"clip_norm": lambda step: 0.5 + step}, {"weight_decay": 0.1, "clip_value": 0.8}],
    ids=["plain", "norm", "others"],
)
@pytest.mark.parametrize("layout", ["C", "fortran"])
def test_capture(layout: str, options: dict[str, Any], gpu: GPU) -> None:
    params = trees(
        {name: DTYPES[name] for name in ("float16", "float32", "complex64")}, ((33, 41), (5,), (0,)), special=0
    )
    capture_and_replay(
        gpu,
        lambda: xo.Adam(lr=lambda step: 0.1 / (step + 1), beta2=0.9, capturable=True, **options),
        params,
        lay=LAYOUTS[layout],
    )


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}], ids=["plain", "norm"])
def test_capture_of_many_tensors(options: dict[str, Any], gpu: GPU) -> None:
    """The table lies in device memory, which ordinary steps and replays write in turn."""
    params = {f"{i}": np.full(3 * (i % 9 == 0), i / 100, np.float32) for i in range(700)}
    capture_and_replay(gpu, lambda: xo.Adam(lr=lambda step: 0.1 / (step + 1), capturable=True, **options), params)


@pytest.mark.parametrize("device", [0, 1])
def test_an_ordinary_step_between_a_capture_and_its_first_replay(device: int, gpu: GPU) -> None:
    """Both with gradients that are new to the table in device memory."""
    import cupy

    def place(gpu: GPU, values: np.ndarray, number: int) -> Any:
        return gpu.array(values, device=device)

    params = {f"{i}": np.full(3 * (i % 9 == 0), i / 100, np.float32) for i in range(700)}
    opt, expected_opt, on_gpu = (*(xo.Adam(capturable=True) for _ in range(2)), moved(gpu, params, place))
    first, second, third = (alike(params, seed=step, special=0) for step in range(3))
    opt.update(on_gpu, moved(gpu, first, place))
    elsewhere = moved(gpu, second, place)
    with cupy.cuda.Device(device):
        stream = cupy.cuda.Stream(non_blocking=True)
        with stream, gpu.capture() as graph, cupy.cuda.Device(0):
            opt.update(on_gpu, elsewhere)
        with stream, cupy.cuda.Device(0):
            opt.update(on_gpu, elsewhere)
            for key, g in third.items():
                gpu.fill(elsewhere[key], g)
            opt.prepare_replay()
        graph.launch(stream)
    for grads in (first, second, third):
        expected_opt.update(params, grads)
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_capturable_is_the_same_without_a_capture(gpu: GPU) -> None:
    params = trees(DTYPES)
    follow(
        gpu,
        lambda: xo.Adam(lr=lambda step: 0.1 / (step + 1), capturable=True),
        params,
        [alike(params, seed=step) for step in range(3)],
    )
    assert gpu == ["prologue", "update"] * (3 * len(DTYPES))


def test_replay_that_is_not_prepared(gpu: GPU) -> None:
    """It takes the hyperparameters of the last step, and counts."""
    params = {"W": random_values(np.random.default_rng(0), (50,), np.dtype(np.float32))}
    opt, expected_opt = (xo.Adam(lr=lambda step: 0.1 / (step + 1), capturable=True) for _ in range(2))
    on_gpu, grads = moved(gpu, params), alike(params, seed=0, special=0)
    buffers = moved(gpu, grads)
    opt.update(on_gpu, buffers)
    expected_opt.update(params, grads)
    with gpu.capture() as graph:
        opt.update(on_gpu, buffers)
    expected_opt.lr = 0.1
    graph.launch()
    expected_opt.update(params, grads)
    opt.prepare_replay()
    graph.launch()
    assert opt.state["step"] == 3


def test_skipped_steps_of_replays(gpu: GPU) -> None:
    params = {"W": random_values(np.random.default_rng(0), (50,), np.dtype(np.float32))}
    opt, expected_opt = (make_optimizer("Adam", clip_norm=0.5, capturable=True) for _ in range(2))
    on_gpu, grads = moved(gpu, params), alike(params, seed=0, special=0)
    buffers = moved(gpu, grads)
    opt.update(on_gpu, buffers)
    expected_opt.update(params, grads)
    with gpu.capture() as graph:
        opt.update(on_gpu, buffers)
    for value in (1.0, np.nan, np.inf, 2.0):
        grads["W"][7] = value
        gpu.fill(buffers["W"], grads["W"])
        opt.prepare_replay()
        graph.launch()
        if np.isfinite(value):
            expected_opt.update(params, grads)
    assert opt.skipped == 2
    assert_same(gpu, opt, on_gpu, expected_opt, params)


def test_the_step_before_a_capture_may_have_insisted_on_kernels(gpu: GPU) -> None:
    """What is prepared under "fused" is what "auto" prepares, and the other way round."""
    for before, then in itertools.permutations(("auto", "fused")):
        opt, params, grads = xo.Adam(capturable=True), {"w": gpu.array(np.zeros(3))}, {"w": gpu.array(np.ones(3))}
        with xo.engine(before):
            opt.update(params, grads)
        with gpu.capture() as graph, xo.engine(then):
            opt.update(params, grads)
        assert "update" in graph.names


def test_what_cannot_be_captured(gpu: GPU) -> None:
    params, grads = {"W": gpu.array(np.ones(3))}, {"W": gpu.array(np.ones(3))}
    for options, first in (({"capturable": True}, False), ({}, True), ({"clip_norm": 1.0}, True)):
        opt = make_optimizer("Adam", **options)
        if first:
            opt.update(params, grads)
        before = frozen_on(gpu, params, opt.state)
        with gpu.capture() as graph, pytest.raises(RuntimeError, match=r"cannot be captured.*capturable=True, and run"):
            opt.update(params, grads)
        assert not graph.names
        assert frozen_on(gpu, params, opt.state) == before
        with pytest.raises(RuntimeError, match="prepare_replay: no update of this optimizer was captured"):
            opt.prepare_replay()
    opt = make_optimizer("Adam", capturable=True)
    opt.update(params, grads)
    strided = {"W": gpu.array(np.ones(6))[::2]}
    with gpu.capture(), pytest.raises(RuntimeError, match="cannot be captured"):
        opt.update(params, strided)


def test_slots_are_not_started_in_a_capture(gpu: GPU) -> None:
    """A function that starts a slot allocates: the capture is refused before it is called."""
    started = []

    class Started(xo.Optimizer):
        slots: ClassVar = {"first": lambda p: started.append(p) or p}

        @staticmethod
        def rule(xp, p, g, first):
            return p - g, first

    opt, params, grads = Started(capturable=True), {"w": gpu.array(np.ones(3))}, {"w": gpu.array(np.ones(3))}
    with gpu.capture() as graph, pytest.raises(RuntimeError, match="cannot be captured"):
        opt.update(params, grads)
    assert started == graph.names == []
    opt.update(params, grads)
    assert gpu.host(opt.state["slots"]["first"]["w"]).tolist() == [1, 1, 1]


def test_options_that_change_after_a_capture(gpu: GPU) -> None:
    params, grads = {"W": gpu.array(np.ones(3))}, {"W": gpu.array(np.ones(3))}
    opt = make_optimizer("Adam", capturable=True)
    opt.update(params, grads)
    with gpu.capture() as graph:
        opt.update(params, grads)
    opt.weight_decay = 0.1
    with pytest.raises(RuntimeError, match="an option was switched on or off since the capture"):
        opt.prepare_replay()
    opt.weight_decay = 0.0
    opt.prepare_replay()
    graph.launch()
    assert opt.state["step"] == 2
    (keeper,) = opt._stepper._keepers.values()
    counted = weakref.ref(keeper._counter.state)
    opt.capturable = False
    opt.update(params, grads)
    with pytest.raises(RuntimeError, match="prepare_replay"):
        opt.prepare_replay()
    assert counted() is not None  # what the graph writes to must stay
    graph.launch()
    assert opt.state["step"] == 3


def test_a_loaded_state_ends_a_capture(gpu: GPU) -> None:
    """The graph writes the slots that were there; to go on with it would step those."""
    params, grads = {"W": gpu.array(np.ones(3))}, {"W": gpu.array(np.ones(3))}
    opt = make_optimizer("Adam", capturable=True)
    opt.update(params, grads)
    with gpu.capture():
        opt.update(params, grads)
    opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match="capture"):
        opt.prepare_replay()


# --- states


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.5}, {"capturable": True}], ids=["plain", "norm", "capturable"])
def test_states_travel_between_numpy_and_cupy(options: dict[str, Any], gpu: GPU) -> None:
    params = trees(DTYPES, special=0)
    params["fortran"] = np.asfortranarray(params["float32 (7, 9)"])
    expected_opt, expected = make_optimizer("Adam", **options), {key: p.copy() for key, p in params.items()}
    opt, here = make_optimizer("Adam", **options), moved(gpu, params)
    gradients = [alike(params, seed=step, special=0) for step in range(8)]
    for step, grads in enumerate(gradients):
        if step in (2, 4, 6):
            state = opt.state_dict() if step != 6 else pickle.loads(pickle.dumps(gpu.host(opt.state_dict())))
            opt = make_optimizer("Adam", **options)
            opt.load_state_dict(state)
            here = gpu.host(here) if step % 4 else moved(gpu, here)
        opt.update(here, moved(gpu, grads) if step % 4 < 2 else grads)
        expected_opt.update(expected, grads)
        assert_same(gpu, opt, here, expected_opt, expected)


def test_state_is_loaded_into_a_running_optimizer(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, special=0)
    for options in ({}, {"capturable": True}):
        opt, on_gpu = make_optimizer("Adam", **options), moved(gpu, params)
        grads = [moved(gpu, alike(params, seed=step, special=0)) for step in range(4)]
        opt.update(on_gpu, grads[0])
        state, kept = opt.state_dict(), gpu.host(on_gpu)
        for g in grads[1:]:
            opt.update(on_gpu, g)
        expected = gpu.host(on_gpu)
        for key, p in kept.items():
            gpu.fill(on_gpu[key], p)
        opt.load_state_dict(state)
        for g in grads[1:]:
            opt.update(on_gpu, g)
        assert_same_tree(gpu.host(on_gpu), expected)
        assert opt.state["step"] == 4


# --- what can go wrong


def test_too_many_scalars_for_the_counter(gpu: GPU) -> None:
    count = 70
    names = [f"h{i}" for i in range(count)]
    code = f"def rule(xp, p, g, *, {', '.join(names)}):\n    return p - g * ({' + '.join(names)})\n"
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    fields = dict.fromkeys(names, 0.5)
    many = type(
        "Many",
        (xo.Optimizer,),
        {**fields, "__annotations__": dict.fromkeys(names, float), "rule": staticmethod(namespace["rule"])},
    )
    params = {"W": np.ones(3)}
    follow(gpu, many, params, [params])
    opt, on_gpu = many(capturable=True), moved(gpu, params)
    with pytest.raises(ValueError, match=r"takes 71 scalars, .* there may be 61"):
        opt.update(on_gpu, moved(gpu, params))
    assert_same_tree(gpu.host(on_gpu), params)


def test_two_threads_with_optimizers_of_their_own(gpu: GPU) -> None:
    params = trees({"float32": np.dtype(np.float32)}, special=0)
    gradients = [alike(params, seed=step, special=0) for step in range(5)]
    failures = []

    def train() -> None:
        try:
            opt, on_gpu = make_optimizer("Adam", weight_decay=0.01), moved(gpu, params)
            for grads in gradients:
                opt.update(on_gpu, moved(gpu, grads))
            results.append(gpu.host(on_gpu))
        except BaseException as error:
            failures.append(error)

    results: list[Any] = []
    threads = [threading.Thread(target=train) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    expected_opt, expected = make_optimizer("Adam", weight_decay=0.01), {key: p.copy() for key, p in params.items()}
    for grads in gradients:
        expected_opt.update(expected, grads)
    for result in results:
        assert_same_tree(result, expected)


@pytest.mark.smoke
@pytest.mark.parametrize("most_bytes", [cuda._MOST_BYTES, 300], ids=["by value", "in memory"])
def test_small_but_complete(most_bytes: int, gpu: GPU) -> None:
    """Every kernel, both tables, and both widths of a vector, at all edges of arrays."""
    params = trees({"float16": np.dtype(np.float16)}, ((), (0,), (1,), (5,), (33, 41), (4099,)), special=0)
    options = {"clip_norm": 0.5, "clip_value": 2.0, "weight_decay": 0.1, "capturable": True}
    with mock.patch.object(cuda, "_MOST_BYTES", most_bytes):
        opt, expected_opt = (make_optimizer("Adam", **options) for _ in range(2))
        on_gpu, buffers = (
            moved(gpu, params, askew),
            moved(gpu, alike(params, seed=0, dtype=np.dtype(np.float32)), askew),
        )
        for step in range(6):
            grads = alike(params, seed=step, special=0, dtype=np.dtype(np.float32))
            for key, g in grads.items():
                gpu.fill(buffers[key], g)
            if step == 3:
                with gpu.capture() as graph:
                    opt.update(on_gpu, buffers)
            if step < 3:
                opt.update(on_gpu, buffers)
            else:
                opt.prepare_replay()
                graph.launch()
            expected_opt.update(params, grads)
            assert_same(gpu, opt, on_gpu, expected_opt, params)
    assert ("upload" in gpu) == (most_bytes == 300)
