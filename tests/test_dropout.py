"""Dropout: the definition against a scalar oracle, backends, layouts, calls, resuming, errors, memory."""

import copy
import gc
import inspect
import json
import math
import pickle
import tracemalloc
import weakref

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_random import oracle_words

from xpoptim import random
from xpoptim._dropout.layer import Dropout, dropout

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
REAL_DTYPES = [np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("f8")]
DTYPES = [*REAL_DTYPES, np.dtype("c8"), np.dtype("c16")]
SEED = 0x0123456789ABCDEF


@pytest.fixture(autouse=True)
def _no_global_seed():
    yield
    random.seed(None)


# --- The oracle: one element at a time, from the definition -----------------------------------------------


def oracle_keep(shape, ratio, seed, stream, axes=()):
    reduced = tuple(1 if k in axes or k - len(shape) in axes else n for k, n in enumerate(shape))
    words = oracle_words(seed, stream, math.prod(reduced))
    keep = np.zeros(shape, bool)
    for index in np.ndindex(*shape):
        place = 0
        for i, n in zip(index, reduced, strict=True):
            place = place * n + (i if n > 1 else 0)
        keep[index] = words[place] >= round(ratio * 2**32)
    return keep


def oracle_product(value, scale, dtype):
    """One rounding of the scale, one of the product in the compute dtype, one to storage."""
    if dtype.kind == "c":
        part = np.dtype(f"f{dtype.itemsize // 2}")
        real, imag = (oracle_product(v, scale, part) for v in (value.real, value.imag))
        answer = np.empty((), dtype)
        answer.real, answer.imag = real, imag
        return answer[()]
    compute = np.dtype("f8") if dtype == np.float64 else np.dtype("f4")
    with np.errstate(all="ignore"):
        # Two 24-bit significands have an exact product in float64, which is then rounded once.
        return dtype.type(compute.type(float(value) * float(compute.type(scale))))


def oracle_dropout(x, ratio, seed, stream, inverted=False, axes=()):
    keep = oracle_keep(x.shape, ratio, seed, stream, axes)
    scale = 1 / (1 - ratio) if inverted and ratio < 1 else 1.0
    y = np.zeros(x.shape, x.dtype)
    for index in np.ndindex(*x.shape):
        if keep[index]:
            y[index] = oracle_product(x[index], scale, x.dtype)
    return y


def assert_same_bits(actual, expected):
    """Same type, shape, dtype and bits, where any NaN equals any NaN."""
    assert isinstance(actual, np.ndarray)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    for a, e in zip(real_parts(actual), real_parts(expected), strict=True):
        np.testing.assert_array_equal(np.isnan(a), np.isnan(e))
        same = (a == e) & (np.signbit(a) == np.signbit(e))
        assert (same | np.isnan(e)).all(), (actual, expected)


def real_parts(a):
    return [a.real, a.imag] if a.dtype.kind == "c" else [a]


def values(shape, dtype, *, special=True, seed=0):
    """Normal values with NaN, infinities, zeros of both signs and subnormals among them."""
    rng = np.random.default_rng(seed)
    if dtype.kind == "c":
        part = np.dtype(f"f{dtype.itemsize // 2}")
        x = np.empty(shape, dtype)
        x.real = values(shape, part, special=special, seed=seed)
        x.imag = values(shape, part, special=special, seed=seed + 1)
        return x
    x = np.array(rng.standard_normal(shape)).astype(dtype)
    if special and x.size:
        tiny = float(ml_dtypes.finfo(dtype).smallest_subnormal)
        odd = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, tiny, -3 * tiny, float(ml_dtypes.finfo(dtype).max)])
        chosen = rng.random(x.shape) < 0.4
        x[chosen] = rng.choice(odd, int(chosen.sum())).astype(dtype)
    return x


@pytest.mark.smoke
class TestDefinition:
    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("ratio", [0.0, 0.1, 0.5, 0.7, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_against_the_oracle(self, dtype, ratio, inverted):
        x = values((5, 7), dtype)
        stream = 3 << 32 | 9
        y = dropout(x, ratio, seed=SEED, stream=stream, inverted=inverted)
        assert_same_bits(y, oracle_dropout(x, ratio, SEED, stream, inverted))

    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_layer_against_the_oracle(self, dtype, inverted):
        drop = Dropout(0.3, seed=SEED, layer=5, inverted=inverted)
        for call in (1, 2, 3):
            x, dout = values((3, 9), dtype, seed=call), values((3, 9), dtype, seed=call + 10)
            stream = 5 << 32 | call
            assert_same_bits(drop.forward(x), oracle_dropout(x, 0.3, SEED, stream, inverted))
            assert drop.call == call
            assert_same_bits(drop.backward(dout), oracle_dropout(dout, 0.3, SEED, stream, inverted))
            np.testing.assert_array_equal(drop.mask, oracle_keep((3, 9), 0.3, SEED, stream))

    @pytest.mark.parametrize("ratio", [0.0, 0.1, 1 / 3, 1.0])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_test_forward(self, dtype, ratio):
        x = values((4, 5), dtype)
        y = Dropout(ratio, seed=1).forward(x, train_flg=False)
        expected = np.array([oracle_product(v, 1 - ratio, dtype) for v in x.flat], dtype).reshape(x.shape)
        assert_same_bits(y, expected)
        y = Dropout(ratio, seed=1, inverted=True).forward(x, False)
        assert_same_bits(y, x)
        assert y is not x
        assert not np.may_share_memory(x, y)

    def test_a_test_forward_changes_nothing(self):
        drop = Dropout(0.5, seed=1)
        drop.forward(np.ones(8))
        before, mask = drop.state_dict(), drop.mask
        drop.forward(np.ones((3, 3), "f4"), train_flg=False)
        assert drop.state_dict() == before
        np.testing.assert_array_equal(drop.mask, mask)
        np.testing.assert_array_equal(drop.backward(np.ones(8)), mask.astype("f8"))

    def test_a_dropped_inf_or_nan_is_plus_zero(self):
        x = np.array([np.nan, np.inf, -np.inf, -1.0] * 50)
        for inverted in (False, True):
            drop = Dropout(0.5, seed=1, inverted=inverted)
            y = drop.forward(x)
            dropped = y[~drop.mask]
            assert dropped.size > 50
            assert (dropped == 0).all()
            assert not np.signbit(dropped).any()
            np.testing.assert_array_equal(y[drop.mask], x[drop.mask] * (2 if inverted else 1))

    def test_a_complex_element_falls_as_a_whole_and_its_parts_do_not_mix(self):
        x = np.full(64, complex(np.inf, 2.0))
        y = Dropout(0.5, seed=3, inverted=True).forward(x)
        kept = y.real != 0
        assert 10 < kept.sum() < 54
        np.testing.assert_array_equal(y[kept], np.full(kept.sum(), complex(np.inf, 4.0)))
        np.testing.assert_array_equal(y[~kept], 0)

    def test_ratio_zero_and_one(self):
        x = values((6, 6), np.dtype("f4"))
        for inverted in (False, True):
            assert_same_bits(Dropout(0, inverted=inverted).forward(x), x)
            assert_same_bits(Dropout(1, inverted=inverted).forward(x), np.zeros_like(x))

    def test_ratio_zero_counts_a_call(self):
        drop = Dropout(0.0, seed=1)
        drop.forward(np.ones(4))
        drop.dropout_ratio = 0.5
        y = drop.forward(np.ones(40))
        assert drop.call == 2
        np.testing.assert_array_equal(y, oracle_dropout(np.ones(40), 0.5, 1, 2))

    def test_the_mean_is_kept(self):
        x = np.full(200_000, 2.0, "f4")
        for ratio in (0.1, 0.5, 0.9):
            y = Dropout(ratio, seed=4, inverted=True).forward(x)
            sigma = 2 * math.sqrt(ratio / (1 - ratio) / x.size)
            assert abs(float(y.mean(dtype="f8")) - 2) < 5 * sigma

    def test_layers_calls_and_seeds_differ(self):
        x = np.ones(256)
        layers = [Dropout(seed=1), Dropout(seed=1, layer=1), Dropout(seed=2)]
        outputs = [d.forward(x).tobytes() for d in layers for _ in range(2)]
        assert len(set(outputs)) == 6

    @pytest.mark.parametrize("shape", [(), (1,), (0,), (3, 0, 2), (2, 3, 5), (1, 1, 1, 7)])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_shapes(self, dtype, shape):
        drop = Dropout(0.4, seed=2)
        x = values(shape, dtype)
        for call in (1, 2, 3):
            assert_same_bits(drop.forward(x), oracle_dropout(x, 0.4, 2, call))
            assert_same_bits(drop.backward(x), oracle_dropout(x, 0.4, 2, call))
            assert drop.mask.shape == shape
            assert drop.mask.dtype == bool

    def test_many_pieces(self, monkeypatch):
        x = values((7, 3, 5), np.dtype("f4"))
        expected = oracle_dropout(x, 0.3, 1, 1, True)
        for piece in (1, 4, 5, 16, 1000):
            monkeypatch.setattr("xpoptim._dropout.arrays.PIECE", piece)
            assert_same_bits(Dropout(0.3, seed=1, inverted=True).forward(x), expected)
            assert_same_bits(Dropout(0.3, seed=1, inverted=True).forward(x.T).T, oracle_dropout(x.T, 0.3, 1, 1, True).T)

    def test_a_large_array(self):
        x = np.arange(1, 700_004, dtype="f4")
        y = Dropout(0.25, seed=1).forward(x)
        np.testing.assert_array_equal(y, np.where(random.words(1, 1, x.size) >= 2**30, x, 0))


@pytest.mark.smoke
class TestScalars:
    @pytest.mark.parametrize("x", [2.0, np.float64(2), np.float32(2), np.float16(2), BFLOAT16.type(2), 1 + 2j])
    def test_scalars_are_zero_dimensional(self, x):
        drop = Dropout(0.5, seed=SEED, inverted=True)
        seen = set()
        for call in range(1, 20):
            y = drop.forward(x)
            assert isinstance(y, type(x))
            assert np.ndim(y) == 0
            kept = bool(oracle_keep((), 0.5, SEED, call))
            assert y == (2 * x if kept else 0)
            assert drop.backward(x) == y
            seen.add(kept)
        assert seen == {True, False}
        assert drop.forward(x, train_flg=False) == x

    @pytest.mark.parametrize("x", [3, True, np.int64(3), np.bool_(True)])
    def test_integers(self, x):
        with pytest.raises(
            TypeError, match=r"^x has dtype (int64|bool), but Dropout takes float16, .*: convert it first"
        ):
            Dropout().forward(x)


class TestLayouts:
    @given(data=st.data())
    def test_any_strides(self, data):
        x = strided(data, "x")
        axes = tuple(data.draw(st.sets(st.integers(0, x.ndim - 1)))) if x.ndim else ()
        inverted = data.draw(st.booleans())
        drop = Dropout(0.4, seed=7, inverted=inverted, broadcast_axes=axes)
        before = x.copy()
        expected = oracle_dropout(before, 0.4, 7, 1, inverted, axes)
        assert_same_bits(drop.forward(x), expected)
        assert_same_bits(x, before)
        out = strided(data, "out", np.zeros_like(before))
        assert drop.backward(x, out=out) is out
        assert_same_bits(out, expected)
        assert drop.backward(x, out=x) is x
        assert_same_bits(x, expected)

    @pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "c8", "c16"])
    def test_foreign_byte_order_and_misaligned(self, dtype):
        x = values((3, 5), np.dtype(dtype))
        expected = oracle_dropout(x, 0.4, 1, 1, True)
        foreign = x.astype(x.dtype.newbyteorder("S"))
        y = dropout(foreign, 0.4, seed=1, stream=1, inverted=True)
        assert y.dtype == foreign.dtype
        assert_same_bits(y.astype(x.dtype), expected)
        misaligned = np.frombuffer(b"\0" + x.tobytes(), x.dtype, offset=1).reshape(x.shape)
        assert not misaligned.flags.aligned
        assert_same_bits(dropout(misaligned, 0.4, seed=1, stream=1, inverted=True), expected)

    def test_broadcast_and_subclasses(self):
        x = np.broadcast_to(np.float32(2), (4, 6))
        assert_same_bits(dropout(x, 0.5, seed=1, stream=1), oracle_dropout(x, 0.5, 1, 1))

        class Subclass(np.ndarray):
            pass

        given = np.arange(1.0, 7.0).view(Subclass)
        y = dropout(given, 0.5, seed=1, stream=1)
        assert type(y) is np.ndarray
        assert_same_bits(y, oracle_dropout(np.asarray(given), 0.5, 1, 1))
        assert Dropout(0.5, seed=1).forward(given, out=given) is given
        assert_same_bits(np.asarray(given), y)


def strided(data, name, x=None):
    """An array that is a stepped, flipped, transposed window of a larger one; given ``x``, of its shape and dtype."""
    if x is None:
        dtype = data.draw(st.sampled_from(DTYPES), label=f"{name}.dtype")
        shape = data.draw(st.lists(st.integers(0, 5), max_size=3).map(tuple), label=f"{name}.shape")
        x = values(shape, dtype, seed=data.draw(st.integers(0, 99)))
    steps = [data.draw(st.sampled_from([1, 2, -1, -3]), label=f"{name}.step") for _ in x.shape]
    order = data.draw(st.permutations(range(x.ndim)), label=f"{name}.order")
    base = np.zeros([x.shape[k] * abs(steps[k]) for k in order], x.dtype)
    window = base[(*(slice(None, None, steps[k]) for k in order), ...)].transpose(np.argsort(order).astype(int))
    assert window.shape == x.shape
    window[...] = x
    return window


class TestOut:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_in_place_is_the_same(self, dtype):
        x = values((6, 7), dtype)
        drop, other = Dropout(0.3, seed=1, inverted=True), Dropout(0.3, seed=1, inverted=True)
        expected = drop.forward(x)
        work = x.copy()
        assert other.forward(work, out=work) is work
        assert_same_bits(work, expected)
        expected = drop.forward(x, False)
        work = x.copy()
        assert other.forward(work, False, work) is work
        assert_same_bits(work, expected)

    @pytest.mark.parametrize("shift", [1, -1])
    def test_partial_overlap_acts_as_if_copied_first(self, shift):
        memory = np.arange(1.0, 300_002.0)
        x, out = (memory[:-1], memory[1:])[::shift]
        expected = dropout(x.copy(), 0.5, seed=1, stream=1)
        Dropout(0.5, seed=1).forward(x, out=out)
        assert_same_bits(out, expected)

    def test_reversed_view_of_x(self):
        x = np.arange(1.0, 200_001.0)
        expected = dropout(x.copy(), 0.5, seed=1, stream=1)
        Dropout(0.5, seed=1).forward(x, out=x[::-1])
        assert_same_bits(x[::-1].copy(), expected)

    def test_zero_dimensional_out_for_a_scalar(self):
        out = np.array(9.0)
        assert Dropout(1.0).forward(2.0, out=out) is out
        assert out == 0

    @pytest.mark.parametrize(
        ("out", "error", "match"),
        [
            (np.zeros(4), ValueError, r"out has shape \(4,\) but x has shape \(2, 3\)"),
            (np.zeros((2, 1)), ValueError, r"out has shape \(2, 1\) but x has shape \(2, 3\)"),
            (np.zeros((2, 3), "f4"), TypeError, "out has dtype float32 but x has dtype float64"),
            ([[0.0] * 3] * 2, TypeError, "out must be a mutable array, not list"),
            (np.float64(1), TypeError, "out must be a mutable array, not float64"),
            (np.broadcast_to(0.0, (2, 3)), ValueError, "out is read-only"),
            (
                np.lib.stride_tricks.as_strided(np.zeros(4), (2, 3), (8, 8)),
                ValueError,
                "out has elements that share their memory",
            ),
            (
                np.lib.stride_tricks.as_strided(np.zeros(4), (2, 3), (0, 8)),
                ValueError,
                "out has elements that share their memory",
            ),
        ],
    )
    def test_bad_out_changes_nothing(self, out, error, match):
        drop = Dropout(0.5, seed=1)
        drop.forward(np.ones((2, 3)))
        before, content = drop.state_dict(), np.array(out)
        with pytest.raises(error, match=match):
            drop.forward(np.ones((2, 3)), out=out)
        with pytest.raises(error, match=match.replace("x has", "dout has")):
            drop.backward(np.ones((2, 3)), out=out)
        assert drop.state_dict() == before
        np.testing.assert_array_equal(np.array(out), content)


class TestBroadcastAxes:
    @pytest.mark.parametrize("axes", [(2, 3), (-1, -2), (0,), 1, (0, 1, 2, 3), [3], (2, -1), (-4,)])
    def test_against_the_oracle(self, axes):
        x = values((2, 3, 4, 5), np.dtype("f4"))
        drop = Dropout(0.4, seed=5, broadcast_axes=axes, inverted=True)
        listed = (axes,) if isinstance(axes, int) else tuple(axes)
        assert drop.broadcast_axes == listed
        assert_same_bits(drop.forward(x), oracle_dropout(x, 0.4, 5, 1, True, listed))
        assert_same_bits(drop.backward(x), oracle_dropout(x, 0.4, 5, 1, True, listed))
        mask = drop.mask
        np.testing.assert_array_equal(mask, oracle_keep(x.shape, 0.4, 5, 1, listed))
        mask[...] = False  # a mask is the caller's own, also when it is shared along axes

    def test_whole_channels_fall(self):
        y = Dropout(0.5, seed=5, broadcast_axes=(2, 3)).forward(np.ones((8, 8, 3, 3)))
        per_channel = y.sum(axis=(2, 3))
        assert set(per_channel.ravel()) == {0.0, 9.0}

    def test_one_word_for_all_equals_the_first_word(self):
        y = Dropout(0.5, seed=6, broadcast_axes=(0, 1)).forward(np.ones((3, 4)))
        assert y.sum() == 12 * (oracle_words(6, 1, 1)[0] >= 2**31)

    @pytest.mark.parametrize(
        ("axes", "match"),
        [
            ((2,), r"broadcast_axes=\(2,\) names axis 2, but the array has shape \(3, 4\)"),
            ((-3,), r"broadcast_axes=\(-3,\) names axis -3, but the array has shape \(3, 4\)"),
            ((1, -1), r"broadcast_axes=\(1, -1\) names an axis of an array of shape \(3, 4\) twice"),
        ],
    )
    def test_axes_that_do_not_fit_the_array(self, axes, match):
        drop = Dropout(0.5, seed=1, broadcast_axes=axes)
        with pytest.raises(ValueError, match=match):
            drop.forward(np.ones((3, 4)))
        assert drop.call == 0

    @pytest.mark.parametrize(
        ("axes", "error"),
        [((1, 1), ValueError), ("01", TypeError), ((1.0,), TypeError), (True, TypeError), (None, TypeError)],
    )
    def test_bad_axes(self, axes, error):
        with pytest.raises(error, match=r"^broadcast_axes "):
            Dropout(broadcast_axes=axes)


class TestCalls:
    def test_backward_of_an_earlier_call(self):
        drop = Dropout(0.5, seed=1)
        x = np.ones(64)
        outputs = {}
        for _ in range(4):
            y = drop.forward(x)
            outputs[drop.call] = y
        assert list(outputs) == [1, 2, 3, 4]
        for call in (2, 4, 1, 3):
            np.testing.assert_array_equal(drop.backward(x, call=call), outputs[call])
        np.testing.assert_array_equal(drop.backward(x), outputs[4])
        assert drop.call == 4

    def test_a_layer_used_twice_on_two_shapes(self):
        drop = Dropout(0.5, seed=1)
        a, b = drop.forward(np.ones(10)), drop.forward(np.ones((4, 5)))
        np.testing.assert_array_equal(drop.backward(np.ones((4, 5)), call=2), b)
        np.testing.assert_array_equal(drop.backward(np.ones(10), call=1), a)

    @pytest.mark.parametrize("call", [0, 3, -1, 2**32])
    def test_no_such_call(self, call):
        drop = Dropout(seed=1)
        drop.forward(np.ones(3))
        drop.forward(np.ones(3))
        with pytest.raises(ValueError, match=r"^call must be"):
            drop.backward(np.ones(3), call=call)
        with pytest.raises(TypeError, match=r"^call must be an integer"):
            drop.backward(np.ones(3), call=1.0)

    def test_backward_and_mask_before_forward(self):
        drop = Dropout(seed=1)
        drop.forward(np.ones(3), train_flg=False)
        with pytest.raises(
            RuntimeError, match=r"^backward before a training forward: call forward\(x\) with train_flg=True first"
        ):
            drop.backward(np.ones(3))
        with pytest.raises(RuntimeError, match=r"^mask before a training forward: call forward\(x\)"):
            _ = drop.mask

    def test_backward_of_another_shape(self):
        drop = Dropout(seed=1)
        drop.forward(np.ones((2, 3)))
        drop.forward(np.ones((2, 3)))
        for call, number in ((None, 2), (1, 1)):
            with pytest.raises(
                ValueError, match=rf"dout has shape \(3, 2\) but x had shape \(2, 3\) in the forward of call {number}"
            ):
                drop.backward(np.ones((3, 2)), call=call)

    def test_changed_settings_hold_from_the_next_forward(self):
        drop = Dropout(0.2, seed=1)
        x = np.ones(50)
        first = drop.forward(x)
        drop.dropout_ratio, drop.inverted = 0.8, True
        np.testing.assert_array_equal(drop.backward(x), first)
        np.testing.assert_array_equal(drop.mask, first == 1)
        second = drop.forward(x)
        np.testing.assert_array_equal(second, oracle_dropout(x, 0.8, 1, 2, True))
        np.testing.assert_array_equal(drop.backward(x), second)
        with pytest.raises(ValueError, match="were changed between call 1 and call 2"):
            drop.backward(x, call=1)

    def test_calls_run_out_before_they_reach_the_layer_number(self):
        drop = Dropout(0.5, seed=1, layer=3)
        drop.load_state_dict({**drop.state_dict(), "call": 2**32 - 2})
        np.testing.assert_array_equal(
            drop.forward(np.ones(9)), oracle_dropout(np.ones(9), 0.5, 1, 3 << 32 | (2**32 - 1))
        )
        with pytest.raises(OverflowError, match=r"has drawn its 2\*\*32 - 1 masks"):
            drop.forward(np.ones(9))
        assert drop.call == 2**32 - 1


class TestSeeds:
    def test_global_seed(self):
        random.seed(11)
        layers = [Dropout(), Dropout(0.3), Dropout(seed=11), Dropout(layer=7), Dropout()]
        assert [(d.seed, d.layer) for d in layers] == [(11, 0), (11, 1), (11, 0), (11, 7), (11, 8)]

    def test_explicit_seed(self):
        random.seed(11)
        assert (Dropout(seed=3).layer, Dropout(seed=3).layer, Dropout(seed=3, layer=2).layer) == (0, 0, 2)
        assert Dropout().layer == 0

    def test_seed_of_the_operating_system_is_shown(self):
        a, b = Dropout(), Dropout(layer=4)
        assert a.seed != b.seed
        assert repr(a) == f"Dropout(0.5, seed={a.seed}, layer=0)"
        again = eval(repr(b))
        x = np.ones(100)
        np.testing.assert_array_equal(again.forward(x), b.forward(x))

    def test_repr_of_every_setting(self):
        drop = Dropout(0.25, inverted=True, seed=2**64 - 1, layer=2**31 - 1, broadcast_axes=(1, -1))
        assert repr(drop) == (
            "Dropout(0.25, inverted=True, seed=18446744073709551615, layer=2147483647, broadcast_axes=(1, -1))"
        )
        assert repr(eval(repr(drop))) == repr(drop)

    def test_the_largest_seed_and_layer(self):
        x = np.ones(33)
        y = Dropout(0.5, seed=2**64 - 1, layer=2**31 - 1).forward(x)
        np.testing.assert_array_equal(y, oracle_dropout(x, 0.5, 2**64 - 1, (2**31 - 1) << 32 | 1))


class TestArguments:
    @pytest.mark.parametrize("ratio", [-0.1, 1.1, math.nan, math.inf, np.float32(2)])
    def test_ratio_out_of_range(self, ratio):
        drop = Dropout(0.5)
        with pytest.raises(ValueError, match=r"^dropout_ratio must be in \[0, 1\]"):
            Dropout(ratio)
        with pytest.raises(ValueError, match=r"^dropout_ratio must be in \[0, 1\]"):
            drop.dropout_ratio = ratio
        with pytest.raises(ValueError, match=r"^ratio must be in \[0, 1\]"):
            dropout(np.ones(3), ratio, seed=0, stream=0)
        assert drop.dropout_ratio == 0.5

    @pytest.mark.parametrize("ratio", [True, "0.5", None, 0.5 + 0j, np.bool_(False), np.array([0.5])])
    def test_ratio_of_another_type(self, ratio):
        with pytest.raises(TypeError, match=r"^dropout_ratio must be a number in \[0, 1\]"):
            Dropout(ratio)

    @pytest.mark.parametrize("ratio", [0, 1, np.float32(0.5), np.float64(0.25), np.int8(1)])
    def test_ratio_becomes_a_float(self, ratio):
        drop = Dropout(ratio)
        assert type(drop.dropout_ratio) is float
        assert drop.dropout_ratio == ratio
        assert drop.forward(np.ones(5, "f4")).dtype == np.float32

    @pytest.mark.parametrize(("name", "limit"), [("seed", 2**64), ("layer", 2**31)])
    def test_seed_and_layer(self, name, limit):
        for value in (-1, limit):
            with pytest.raises(ValueError, match=rf"^{name} must be an integer in"):
                Dropout(**{name: value})
        for value in (1.0, "1", True):
            with pytest.raises(TypeError, match=rf"^{name} must be an integer in"):
                Dropout(**{name: value})

    def test_functional_seed_and_stream(self):
        x = np.ones(3)
        with pytest.raises(ValueError, match=r"^stream must be an integer in \[0, 2\*\*63\)"):
            dropout(x, 0.5, seed=0, stream=2**63)
        with pytest.raises(ValueError, match=r"^seed must be an integer in \[0, 2\*\*64\)"):
            dropout(x, 0.5, seed=2**64, stream=0)
        with pytest.raises(TypeError, match=r"^inverted must be True or False"):
            dropout(x, 0.5, seed=0, stream=0, inverted=1)

    def test_unknown_names(self):
        with pytest.raises(TypeError, match="unexpected keyword argument 'p'"):
            Dropout(p=0.5)
        drop = Dropout()
        for name in ("p", "seed", "layer", "call", "mask"):
            with pytest.raises(AttributeError, match=rf"Dropout.{name} cannot be set; dropout_ratio, inverted, broad"):
                setattr(drop, name, 1)
        with pytest.raises(TypeError, match=r"^inverted must be True or False"):
            drop.inverted = 1
        with pytest.raises(ValueError, match=r"^broadcast_axes names an axis twice"):
            drop.broadcast_axes = (0, 0)
        with pytest.raises(TypeError, match="positional argument"):
            Dropout(0.5, True)

    @pytest.mark.parametrize("dtype", ["i4", "u1", "?", "O", "S3", "datetime64[s]"])
    def test_dtypes_that_are_not_floating_point(self, dtype):
        drop = Dropout()
        with pytest.raises(
            TypeError, match=r"^x has dtype .*, but Dropout takes float16, bfloat16, .* convert it first"
        ):
            drop.forward(np.zeros(3, dtype))
        drop.forward(np.ones(3))
        with pytest.raises(TypeError, match=r"^dout has dtype"):
            drop.backward(np.zeros(3, dtype))
        assert drop.call == 1

    @pytest.mark.parametrize("x", [[1.0, 2.0], "x", None, {"a": np.ones(2)}])
    def test_no_array(self, x):
        with pytest.raises(TypeError, match=r"^x must be an array or a scalar, not "):
            Dropout().forward(x)

    def test_train_flg_is_no_array(self):
        x = np.ones(3)
        with pytest.raises(TypeError, match=r"^train_flg must be True or False"):
            Dropout().forward(x, x)


class TestHabits:
    """What people write who come from another library, and what the error says to write here."""

    @pytest.mark.parametrize("train_flg", [True, False])
    def test_calling_a_layer_is_its_forward(self, train_flg):
        x, out = np.arange(1.0, 10.0), np.zeros(9)
        drop, other = Dropout(0.5, seed=1), Dropout(0.5, seed=1)
        assert_same_bits(drop(x, train_flg), other.forward(x, train_flg))
        assert_same_bits(drop(x, train_flg=train_flg), other.forward(x, train_flg=train_flg))
        assert drop(x, train_flg, out) is out
        assert_same_bits(out, other.forward(x, train_flg))
        assert_same_bits(drop(x), other.forward(x))
        assert drop.state_dict() == other.state_dict()
        assert inspect.signature(Dropout.__call__) == inspect.signature(Dropout.forward)

    def test_calling_a_subclass(self):
        class Doubled(Dropout):
            def forward(self, x, train_flg=True, out=None):
                return 2 * super().forward(x, train_flg, out)

        np.testing.assert_array_equal(Doubled(0.0)(np.ones(3)), 2 * np.ones(3))

    @pytest.mark.parametrize("name", ["train", "training", "train_flag", "is_training"])
    def test_the_flag_by_other_names(self, name):
        drop = Dropout(0.5)
        for method in (drop.forward, drop):
            with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}': .*x, train_flg=False\)"):
                method(np.ones(3), **{name: False})
        with pytest.raises(TypeError, match=rf"unexpected keyword argument '{name}': .*x, train_flg=False\)"):
            Dropout(0.5, **{name: False})
        with pytest.raises(AttributeError, match=rf"Dropout.{name} cannot be set; .*x, train_flg=False\)"):
            setattr(drop, name, False)
        assert drop.call == 0

    @pytest.mark.parametrize("name", ["eval", "train"])
    def test_a_mode(self, name):
        drop = Dropout()
        with pytest.raises(AttributeError, match=rf"'Dropout' object has no attribute '{name}': .*train_flg=False\)"):
            getattr(drop, name)()
        assert not hasattr(drop, name)

    @pytest.mark.parametrize("name", ["p", "rate", "ratio"])
    def test_the_ratio_by_other_names(self, name):
        with pytest.raises(TypeError, match=rf"argument '{name}': write dropout_ratio$"):
            Dropout(**{name: 0.5})
        with pytest.raises(AttributeError, match=rf"no attribute '{name}': write dropout_ratio$"):
            getattr(Dropout(), name)
        with pytest.raises(AttributeError, match=rf"Dropout.{name} cannot be set; .*: write dropout_ratio$"):
            setattr(Dropout(), name, 0.5)

    def test_in_place(self):
        drop, x = Dropout(), np.ones(3)
        for call in (
            lambda: Dropout(0.5, inplace=True),
            lambda: drop(x, inplace=True),
            lambda: drop.backward(x, inplace=1),
        ):
            with pytest.raises(TypeError, match=r"argument 'inplace': write drop.forward\(x, out=x\)$"):
                call()

    def test_a_name_that_is_nearly_right(self):
        drop, x = Dropout(), np.ones(3)
        with pytest.raises(
            TypeError, match=r"^Dropout.__init__\(\) got an .* 'dropout_rate' \(did you mean 'dropout_ratio'\?\)$"
        ):
            Dropout(dropout_rate=0.5)
        with pytest.raises(
            TypeError, match=r"^Dropout.forward\(\) got an .* 'train_flgs' \(did you mean 'train_flg'\?\)$"
        ):
            drop.forward(x, train_flgs=True)
        with pytest.raises(TypeError, match=r"^Dropout.backward\(\) got an .* 'calls' \(did you mean 'call'\?\)$"):
            drop.backward(x, calls=1)
        with pytest.raises(AttributeError, match=r" can \(did you mean 'inverted'\?\)$"):
            drop.invert = True

    def test_a_name_like_no_other(self):
        with pytest.raises(TypeError, match=r"argument 'zzz'; it takes x, train_flg, out$"):
            Dropout().forward(np.ones(3), zzz=1)
        with pytest.raises(AttributeError, match=r"^'Dropout' object has no attribute 'zzz'$"):
            _ = Dropout().zzz

    def test_an_error_within_a_property_is_shown(self):
        class Broken(Dropout):
            @property
            def shape(self):
                return self.zzz

        with pytest.raises(AttributeError, match=r"^'Broken' object has no attribute 'zzz'$"):
            _ = Broken().shape


class TestState:
    def run_on(self, drop, steps=3):
        return [drop.forward(np.ones(40)).tobytes() for _ in range(steps)]

    def make(self):
        drop = Dropout(0.3, inverted=True, seed=9, layer=2, broadcast_axes=(0,))
        drop.broadcast_axes = ()
        self.run_on(drop)
        return drop

    def test_resume(self):
        drop = self.make()
        state = json.loads(json.dumps(drop.state_dict()))
        other = Dropout()
        other.load_state_dict(state)
        dout = np.arange(1.0, 41.0)
        np.testing.assert_array_equal(other.backward(dout), drop.backward(dout))
        np.testing.assert_array_equal(other.backward(dout, call=1), drop.backward(dout, call=1))
        np.testing.assert_array_equal(other.mask, drop.mask)
        assert repr(other) == repr(drop)
        assert self.run_on(other) == self.run_on(drop)
        assert other.state_dict() == drop.state_dict()

    def test_a_fresh_state(self):
        state = Dropout(0.3, seed=9).state_dict()
        other = self.make()
        other.load_state_dict(state)
        assert other.call == 0
        with pytest.raises(RuntimeError, match=r"^backward before a training forward"):
            other.backward(np.ones(40))
        assert self.run_on(other) == self.run_on(Dropout(0.3, seed=9))

    def test_the_state_is_a_copy(self):
        drop = self.make()
        state = drop.state_dict()
        state["latest"]["shape"].append(3)
        state["call"] = 99
        assert drop.call == 3
        drop.backward(np.ones(40))

    @pytest.mark.parametrize(
        "again",
        [copy.copy, copy.deepcopy, *(lambda d, p=p: pickle.loads(pickle.dumps(d, p)) for p in range(6))],
    )
    def test_copies(self, again):
        drop = self.make()
        other = again(drop)
        dout = np.arange(1.0, 41.0)
        np.testing.assert_array_equal(other.backward(dout), drop.backward(dout))
        np.testing.assert_array_equal(other.mask, drop.mask)
        assert self.run_on(other) == self.run_on(drop)
        other.dropout_ratio = 0.9
        assert drop.dropout_ratio == 0.3

    BAD = (
        ({"class": "Adam"}, ValueError, r"state\['class'\] is 'Adam'"),
        ({"seed": -1}, ValueError, r"state\['seed'\] must be"),
        ({"seed": 1.5}, TypeError, r"state\['seed'\] must be"),
        ({"layer": 2**31}, ValueError, r"state\['layer'\] must be"),
        ({"call": 2**32}, ValueError, r"state\['call'\] must be"),
        ({"call": "3"}, TypeError, r"state\['call'\] must be"),
        ({"dropout_ratio": 2}, ValueError, r"state\['dropout_ratio'\] must be in"),
        ({"inverted": "no"}, TypeError, r"state\['inverted'\] must be"),
        ({"broadcast_axes": [0, 0]}, ValueError, r"state\['broadcast_axes'\] names an axis twice"),
        ({"extra": 1}, ValueError, r"has the unknown keys \['extra'\]"),
        ({"latest": 3}, TypeError, r"state\['latest'\] must be a dict"),
        ({"latest": {}}, ValueError, r"state\['latest'\] is no state of a Dropout layer: it lacks \['broadcast_axes'"),
        ({"call": 0}, ValueError, r"state\['latest'\]\['shape_since'\] must be a call from 1 to 0"),
    )
    BAD_LATEST = (
        ({"shape": 40}, TypeError, r"\['shape'\] must be a list"),
        ({"shape": [-1]}, ValueError, r"\['shape'\] must be an integer"),
        ({"shape_since": 0}, ValueError, r"\['shape_since'\] must be a call from 1 to 3"),
        ({"settings_since": 4}, ValueError, r"\['settings_since'\] must be a call from 1 to 3"),
        ({"broadcast_axes": [1]}, ValueError, "names axis 1, but the array has shape"),
        ({"inverted": None}, TypeError, r"\['inverted'\] must be"),
    )

    @pytest.mark.parametrize(("change", "error", "match"), [*BAD, *(({"latest": c}, e, m) for c, e, m in BAD_LATEST)])
    def test_a_bad_state_changes_nothing(self, change, error, match):
        drop, bad = self.make(), self.make().state_dict()
        before = drop.state_dict()
        if (change, error, match) not in self.BAD:
            change = {"latest": bad["latest"] | change["latest"]}
        with pytest.raises(error, match=match):
            drop.load_state_dict(bad | change)
        assert drop.state_dict() == before

    def test_a_missing_key_or_no_dict(self):
        drop, bad = self.make(), self.make().state_dict()
        del bad["seed"], bad["call"]
        with pytest.raises(ValueError, match=r"lacks \['call', 'seed'\]"):
            drop.load_state_dict(bad)
        with pytest.raises(TypeError, match=r"state must be a dict made by state_dict\(\), not list"):
            drop.load_state_dict([1])


class TestMemory:
    def test_nothing_of_the_activation_is_kept(self):
        drop = Dropout(0.5, seed=1)
        x = np.ones(100_000)
        y = drop.forward(x)
        kept = [weakref.ref(x), weakref.ref(y)]
        del x, y
        gc.collect()
        assert [ref() for ref in kept] == [None, None]
        assert len(pickle.dumps(drop)) < 1_000
        assert drop.backward(np.ones(100_000)).sum() == drop.mask.sum()

    def test_nothing_grows_on_training_forwards(self):
        drop, x = Dropout(0.5, seed=1), np.ones(3)
        sizes = set()
        for call in range(300, 1300):
            drop.dropout_ratio = 0.25 + (call % 2) / 2
            drop.forward(x)
            if call >= 600:  # from here on the pickled numbers have the same length
                sizes.add(len(pickle.dumps(drop)))
        assert len(sizes) == 1

    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("dtype", ["f2", "f4"])
    @pytest.mark.parametrize("shape", [(4_000_000,), (1, 4_000_000), (2, 2, 1_000_000, 1), (400_000, 10)])
    def test_temporaries_are_bounded(self, shape, dtype, inverted):
        """In place: a byte an element while it runs, and pieces of constant size."""
        n = 4_000_000
        drop, x = Dropout(0.5, seed=1, inverted=inverted), np.ones(shape, dtype)
        drop.forward(np.ones(9, dtype))
        tracemalloc.start()
        try:
            drop.forward(x, out=x)
            held, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak < n + 4_000_000
        assert held < 100_000


# --- Other namespaces --------------------------------------------------------------------------------------


def namespace(name):
    return pytest.importorskip(name, reason=f"{name} is not installed")


def to_numpy(array):
    if "torch" in type(array).__module__ and str(array.dtype) == "torch.bfloat16":
        return array.view(dtype=namespace("torch").int16).numpy().view(BFLOAT16)
    return np.asarray(array)


def of(name, x):
    xp = namespace(name)
    if name == "torch" and x.dtype == BFLOAT16:
        return xp.asarray(x.view(np.int16)).view(xp.bfloat16)
    return xp.asarray(x)


SUPPORTED = {
    "array_api_strict": [np.dtype(d) for d in ("f4", "f8", "c8", "c16")],
    "torch": DTYPES,
    "jax.numpy": [np.dtype("f2"), BFLOAT16, np.dtype("f4"), np.dtype("c8")],  # without x64
}


@pytest.mark.parametrize(("name", "dtype"), [(n, d) for n, ds in SUPPORTED.items() for d in ds], ids=str)
class TestNamespaces:
    def test_same_bits_as_numpy(self, name, dtype):
        x, dout = (values((3, 4, 5), dtype, special=False, seed=s) for s in (0, 1))
        for inverted in (False, True):
            layers = [Dropout(0.3, seed=SEED, layer=2, inverted=inverted, broadcast_axes=axes) for axes in ((), (-1,))]
            for reference in layers:
                drop = copy.copy(reference)
                for _ in range(2):
                    y = drop.forward(of(name, x))
                    assert type(y) is type(of(name, x))
                    assert y.dtype == of(name, x).dtype
                    assert_same_bits(to_numpy(y), reference.forward(x))
                    assert_same_bits(to_numpy(drop.backward(of(name, dout))), reference.backward(dout))
                    assert type(drop.mask) is type(y)
                    np.testing.assert_array_equal(np.asarray(drop.mask), reference.mask)
                    test = drop.forward(of(name, x), train_flg=False)
                    assert_same_bits(to_numpy(test), reference.forward(x, train_flg=False))

    def test_dropped_inf_and_nan(self, name, dtype):
        special = np.array([np.nan, np.inf, -np.inf, -0.0] * 20).astype(dtype)
        expected = dropout(special, 0.5, seed=1, stream=1, inverted=True)
        y = dropout(of(name, special), 0.5, seed=1, stream=1, inverted=True)
        assert_same_bits(to_numpy(y), expected)

    def test_zero_dimensional_and_empty(self, name, dtype):
        for shape in ((), (0,), (2, 0)):
            x = values(shape, dtype, special=False)
            y = Dropout(0.5, seed=3, inverted=True).forward(of(name, x))
            assert tuple(y.shape) == shape
            assert_same_bits(to_numpy(y), dropout(x, 0.5, seed=3, stream=1, inverted=True))

    def test_out(self, name, dtype):
        x = values((3, 5), dtype, special=False)
        drop, work = Dropout(0.5, seed=1, inverted=True), of(name, x.copy())
        if name == "jax.numpy":
            with pytest.raises(TypeError, match="JAX arrays are immutable: use the value that is returned"):
                drop.forward(work, out=work)
            assert drop.call == 0
            return
        expected = dropout(x, 0.5, seed=1, stream=1, inverted=True)
        assert drop.forward(work, out=work) is work
        assert_same_bits(to_numpy(work), expected)
        out, source = of(name, np.zeros_like(x)), of(name, x.copy())
        assert drop.backward(source, out=out) is out
        assert_same_bits(to_numpy(out), expected)
        assert_same_bits(to_numpy(source), x)

    def test_copies_know_the_namespace(self, name, dtype):
        drop = Dropout(0.5, seed=1)
        y = drop.forward(of(name, values((3, 5), dtype)))
        assert type(pickle.loads(pickle.dumps(drop)).mask) is type(y)


class TestTorch:
    def test_strides_and_overlap(self):
        torch = namespace("torch")
        base = torch.arange(1.0, 41.0).reshape(5, 8)
        expected = dropout(base.numpy().T[::2].copy(), 0.5, seed=1, stream=1)
        x = base.T[::2]
        assert_same_bits(Dropout(0.5, seed=1).forward(x).numpy(), expected)
        memory = torch.arange(1.0, 200_002.0)
        expected = dropout(memory[:-1].numpy().copy(), 0.5, seed=1, stream=1)
        Dropout(0.5, seed=1).forward(memory[:-1], out=memory[1:])
        assert_same_bits(memory[1:].numpy(), expected)

    def test_arrays_that_numpy_and_torch_share(self):
        torch = namespace("torch")
        memory = np.arange(1.0, 200_002.0)
        expected = dropout(memory[:-1].copy(), 0.5, seed=1, stream=1)
        Dropout(0.5, seed=1).forward(torch.from_numpy(memory[:-1]), out=torch.from_numpy(memory[1:]))
        assert_same_bits(memory[1:], expected)

    def test_out_that_overlaps_itself(self):
        torch = namespace("torch")
        with pytest.raises(ValueError, match="out has elements that share their memory"):
            Dropout().forward(torch.ones(3, 4), out=torch.zeros(4).expand(3, 4))

    def test_namespaces_do_not_mix(self):
        torch = namespace("torch")
        with pytest.raises(TypeError, match=r"out is of torch but x is of numpy"):
            Dropout().forward(np.ones(3), out=torch.ones(3, dtype=torch.float64))

    def test_integers(self):
        torch = namespace("torch")
        with pytest.raises(TypeError, match=r"^x has dtype int64, but Dropout takes"):
            Dropout().forward(torch.arange(3))

    def test_autograd_agrees_with_backward(self):
        torch = namespace("torch")
        x, dout = torch.ones(4, 9, requires_grad=True), torch.randn(4, 9)
        drop = Dropout(0.4, seed=1, inverted=True)
        drop.forward(x).backward(dout)
        np.testing.assert_array_equal(x.grad.numpy(), drop.backward(dout).numpy())


class TestJax:
    def test_under_jit_and_grad(self):
        jax, jnp = namespace("jax"), namespace("jax.numpy")

        def loss(x):
            return (dropout(x, 0.4, seed=1, stream=2, inverted=True) ** 2).sum()

        x = np.arange(1, 25, dtype="f4").reshape(4, 6)
        y = dropout(x, 0.4, seed=1, stream=2, inverted=True)
        np.testing.assert_allclose(jax.jit(loss)(jnp.asarray(x)), (y**2).sum(), rtol=1e-6)
        gradient = jax.jit(jax.grad(loss))(jnp.asarray(x))
        np.testing.assert_allclose(gradient, dropout(2 * y, 0.4, seed=1, stream=2, inverted=True), rtol=1e-6)


class TestStrict:
    def test_a_device_is_kept(self):
        strict = namespace("array_api_strict")
        device = strict.Device("device1")
        x = strict.asarray(values((3, 5), np.dtype("c8"), special=False), device=device)
        drop = Dropout(0.5, seed=1, inverted=True, broadcast_axes=0)
        y = drop.forward(x)
        assert y.device == drop.mask.device == device
        with pytest.raises(ValueError, match=r"out is on .*CPU_DEVICE.* but x is on .*device1"):
            drop.forward(x, out=strict.zeros((3, 5), dtype=strict.complex64))

    def test_overlapping_out(self):
        strict = namespace("array_api_strict")
        memory = strict.asarray(np.arange(1.0, 200_002.0))
        expected = dropout(np.arange(1.0, 200_001.0), 0.5, seed=1, stream=1)
        Dropout(0.5, seed=1).forward(memory[:-1], out=memory[1:])
        assert_same_bits(np.asarray(memory[1:]), expected)
