"""Dropout without a stored mask: backward draws the forward's mask again from (seed, stream).

Definition, for element ``i`` in C order and its word of :mod:`xpoptim.random`:

    keep_i = word_i >= round(ratio * 2**32)
    train:   y = where(keep, x * scale, +0)     scale = 1            or 1 / (1 - ratio) if inverted
    test:    y = x * scale                      scale = 1 - ratio    or 1               if inverted

The scale is computed in float64 and rounded once to the compute dtype: float32 for 16-bit types, else x's
own real dtype. The product is rounded once to x's dtype.
"""

from __future__ import annotations

import importlib
import inspect
import numbers
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, NamedTuple, ParamSpec, TypeVar

import numpy as np

from .. import random
from ..arrays.namespaces.lookup import library_behind
from ..arrays.types import Array, Device, Namespace
from ..engines.blocks import Kernel
from ..errors.hints import near
from ..sync.atomic import Atomic
from ..trace.language import Functions, Value
from ..trace.program import Buffer
from ..trace.tracer import trace_blocks
from .arrays import Operand, by_kernel, by_reference, checked

__all__ = ["Dropout", "dropout"]

# --- The definition -------------------------------------------------------------------------------------


_A = TypeVar("_A")  # an array or a scalar
_Named = dict[str, Value]
_V = TypeVar("_V", Array, Value)  # what the definition is carried out on, and what kernels are traced with


class _Settings(NamedTuple):
    """What, beside seed and stream, decides the output."""

    ratio: float
    inverted: bool
    axes: tuple[int, ...]

    def train_scale(self) -> float:
        # Ratio 1 drops everything: no scale is needed, and 1 / 0 must not be computed.
        return 1 / (1 - self.ratio) if self.inverted and self.ratio < 1 else 1.0

    def test_scale(self) -> float:
        return 1.0 if self.inverted else 1 - self.ratio


def _dropped(xp: Any, x: _V, keep: _V | None, scale: _V, zero: _V | float) -> _V:
    """The definition. A keep of None keeps all."""
    return x * scale if keep is None else xp.where(keep, x * scale, zero)


def _block(xp: Functions, numbers: list[Value], block: list[Value], words: _Named, scalars: _Named) -> list[Value]:
    """The same for a block of four elements, which share four words: what the kernels are traced from."""
    counter = (*block, words["stream_low"], words["stream_high"])
    keys = [(words[f"key{r}_low"], words[f"key{r}_high"]) for r in range(random.PHILOX_ROUNDS)]
    drawn = random.philox4x32(counter, keys, xp.multiply_words)
    keep = [random.kept(word, words["limit"]) for word in drawn]
    parts = len(numbers) // 4  # a complex number has two, with one word for both
    return [_dropped(xp, x, keep[i // parts], scalars["scale"], 0.0) for i, x in enumerate(numbers)]


_WORDS = (
    "limit",
    "stream_low",
    "stream_high",
    *(f"key{r}_{half}" for r in range(random.PHILOX_ROUNDS) for half in ("low", "high")),
)


def _scaled_block(xp: Functions, numbers: list[Value], block: list[Value], _: _Named, scalars: _Named) -> list[Value]:
    """A block where all elements are kept."""
    return [_dropped(xp, x, None, scalars["scale"], 0.0) for x in numbers]


@lru_cache
def kernel(dtype: str) -> Kernel:
    """The definition for arrays of a dtype, which draws the mask and applies it in one pass."""
    return _traced("dropout", _block, _WORDS, dtype)


@lru_cache
def scaling_kernel(dtype: str) -> Kernel:
    """The same where all elements are kept."""
    return _traced("scale", _scaled_block, (), dtype)


def _traced(name: str, function: Callable[..., list[Value]], words: tuple[str, ...], dtype: str) -> Kernel:
    buffer = Buffer("x", "param", dtype)
    return Kernel(trace_blocks(function, name=name, buffer=buffer, inputs=("scale",), words=words))


def _train(operand: Operand, settings: _Settings, seed: int, stream: int) -> Array:
    limit, scale = random.threshold(settings.ratio), settings.train_scale()
    shared = _normalised(settings.axes, operand.x.shape)
    with operand.library.on(operand.device):
        if not shared and 0 < limit < 2**32 and operand.takes_kernel:
            keys = [half for pair in random.round_keys(seed) for half in pair]
            words = [limit, stream & random.MASK32, stream >> 32, *keys]
            return by_kernel(operand, kernel(operand.dtype), scale, words)
        keep = _keep(operand.xp, operand.device, operand.x.shape, settings, seed, stream) if limit else None
        return _masked(operand, keep, scale)


def _test(operand: Operand, settings: _Settings) -> Array:
    with operand.library.on(operand.device):
        return _masked(operand, None, settings.test_scale())


def _masked(operand: Operand, keep: Array | None, scale: float) -> Array:
    """The definition with a mask that is there already, or with none."""
    if not operand.takes_kernel:
        return by_reference(operand, keep, scale, _dropped)
    y = by_kernel(operand, scaling_kernel(operand.dtype), scale, [])
    if keep is not None:
        operand.xp.copyto(y, 0, where=~keep)
    return y


def _keep(xp: Namespace, device: Device, shape: tuple[int, ...], settings: _Settings, seed: int, stream: int) -> Array:
    """The mask, True = kept, to be broadcast to the shape: along the shared axes it has length 1."""
    shared = _normalised(settings.axes, shape)
    drawn = tuple(1 if axis in shared else n for axis, n in enumerate(shape))
    return random.keep_mask(seed, stream, drawn, settings.ratio, xp=xp, device=device)


# --- The public form ------------------------------------------------------------------------------------


def dropout(x: _A, ratio: float, *, seed: int, stream: int, inverted: bool = False) -> _A:
    """Dropout in training, as a pure function: ``where(keep, x * scale, +0)``.

    Element ``i`` of ``x``, in C order, is dropped if word ``i`` of ``(seed, stream)`` is below
    ``round(ratio * 2**32)``. The map is linear in ``x``, so its gradient is the same call on the upstream
    gradient.

    Parameters
    ----------
    x : array
        Of any Array API namespace; float16, bfloat16, float32, float64, complex64 or complex128; any shape.
    ratio : float
        The share of elements to drop, in [0, 1].
    seed : int
        In [0, 2**64).
    stream : int
        In [0, 2**63). :class:`Dropout` uses ``layer << 32 | call``.
    inverted : bool, optional
        Scale the kept elements by ``1 / (1 - ratio)``; otherwise they keep their values.

    Returns
    -------
    array
        New, of the shape and dtype of ``x``.

    See Also
    --------
    xpoptim.random.words : the words themselves.

    Examples
    --------
    >>> import numpy as np
    >>> import xpoptim as xo
    >>> xo.dropout(np.arange(1.0, 9.0), 0.5, seed=0, stream=0)
    array([0., 2., 3., 4., 5., 0., 7., 0.])
    """
    settings = _Settings(_checked_ratio("ratio", ratio), _checked_bool("inverted", inverted), ())
    seed = random.checked_int("seed", seed, 2**64)
    stream = random.checked_int("stream", stream, 2**63)
    operand = checked("x", x, None)
    return operand.result(_train(operand, settings, seed, stream))


_P = ParamSpec("_P")
_R = TypeVar("_R")

_RATIO = "write dropout_ratio"
_MODE = "a layer has no mode: write drop.forward(x, train_flg=False) for a test pass; train_flg=True is the default"
_ELSEWHERE = {
    **dict.fromkeys(("p", "rate", "ratio", "prob", "drop_prob", "drop_rate"), _RATIO),
    **dict.fromkeys(("train", "training", "train_flag", "is_training", "is_train", "eval", "deterministic"), _MODE),
    "inplace": "write drop.forward(x, out=x)",
}


def _hint(name: str, known: Iterable[str]) -> str:
    """What to write for a name that other libraries have, or that is nearly one of those known here."""
    return f": {_ELSEWHERE[name]}" if name in _ELSEWHERE else near(name, known)


def _explained(method: Callable[_P, _R]) -> Callable[_P, _R]:
    """A method whose error about an unknown keyword says what to write."""
    known = [name for name in inspect.signature(method).parameters if name != "self"]

    @wraps(method)
    def explained(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        for name in kwargs:
            if name not in known:
                start = f"{method.__qualname__}() got an unexpected keyword argument {name!r}"
                raise TypeError(start + (_hint(name, known) or f"; it takes {', '.join(known)}"))
        return method(*args, **kwargs)

    return explained


class Dropout:
    """Zero a random share of the elements in training; store no mask.

    ::

        training:  y = where(keep, x * scale, +0)        scale = 1, inverted: 1 / (1 - dropout_ratio)
        test:      y = x * (1 - dropout_ratio)           inverted: y = x
        backward:  dx = where(keep, dout * scale, +0)

    ``keep`` depends on the seed, the layer, the call and the shape alone: element ``i`` in C order is
    dropped if word ``i`` of the stream ``layer << 32 | call`` (see :func:`xpoptim.random.words`) is below
    ``round(dropout_ratio * 2**32)``. The mask is the same on every backend.

    Parameters
    ----------
    dropout_ratio : float
        The share of elements to drop, in [0, 1]. 0 returns the values of x, 1 gives zeros. May be reassigned.
    inverted : bool
        Scale in training, so that a test forward returns x. May be reassigned.
    seed : int, optional
        In [0, 2**64). Left out: that of :func:`xpoptim.random.seed`, if it was called, else one drawn from
        the operating system, which ``repr`` shows.
    layer : int, optional
        In [0, 2**31): gives layers of one seed masks of their own, so two layers of one explicit seed need a
        ``layer`` each. Where the seed is that of :func:`xpoptim.random.seed`, 0 stands for the next free number.
    broadcast_axes : int or tuple of int
        Axes that share the mask (spatial dropout: ``(2, 3)`` drops whole channels of an N, C, H, W array).
        The element index runs over the shape that has length 1 there. Negative axes count from the end. May
        be reassigned.

    Attributes
    ----------
    call : int
        The number of the latest training forward; 0 before the first, which is call 1. A forward of ratio 0
        counts; a test forward does not.
    mask : array of bool
        The mask of the latest training forward, True = kept, drawn anew on each access, in the namespace of
        that forward's x.

    Notes
    -----
    Each array may be of any Array API namespace and layout, of float16, bfloat16, float32, float64,
    complex64 or complex128, or a Python or NumPy scalar. A complex element is kept or dropped as a whole.
    Between forward and backward the layer holds a few numbers, never an array.

    Several threads may use one layer. Each training forward takes the next number, with the settings of that
    moment, once its arguments have been checked; no two share a mask, whichever ends first. ``call``, ``mask`` and
    ``backward`` without ``call`` mean the forward that returned last in the calling thread; in a thread where none
    has (since the layer was made, copied or loaded), the highest number of all. Another thread's forward is asked
    for by its number. A forward that raises after the checks, as by an interrupt, has used up its number.

    For NumPy and CuPy arrays one kernel draws the mask and applies it in a single pass (``broadcast_axes`` takes
    a second one), without a temporary if ``out`` and the array lie in C order; the bits are those of the plain
    Array API operations that serve all other namespaces. See :func:`xpoptim.engine`.

    Source: N. Srivastava et al., "Dropout: a simple way to prevent neural networks from overfitting", JMLR
    15 (2014). The default, which scales at test time, is the paper's and that of K. Saito's *Deep Learning
    from Scratch*; torch and Keras use the inverted form. Where dropout is a product with the mask, as in the
    book and in torch, a dropped inf or NaN becomes NaN; here it becomes 0.

    Examples
    --------
    >>> import numpy as np
    >>> import xpoptim as xo
    >>> drop = xo.Dropout(0.5, seed=0)
    >>> x = np.arange(1.0, 9.0)
    >>> drop.forward(x)
    array([1., 2., 0., 4., 5., 6., 0., 0.])
    >>> drop.backward(np.ones(8))
    array([1., 1., 0., 1., 1., 1., 0., 0.])
    >>> drop.forward(x, train_flg=False)
    array([0.5, 1. , 1.5, 2. , 2.5, 3. , 3.5, 4. ])
    """

    @_explained
    def __init__(
        self,
        dropout_ratio: float = 0.5,
        *,
        inverted: bool = False,
        seed: int | None = None,
        layer: int = 0,
        broadcast_axes: int | tuple[int, ...] = (),
    ) -> None:
        settings = _Settings(
            _checked_ratio("dropout_ratio", dropout_ratio),
            _checked_bool("inverted", inverted),
            _checked_axes("broadcast_axes", broadcast_axes),
        )
        layer = random.checked_int("layer", layer, random.MAX_LAYERS)
        if seed is not None:
            seed = random.checked_int("seed", seed, 2**64)
        else:
            seed, layer = random.claim_layer(layer)
        self._state = Atomic(_State(settings, seed, layer, threading.local()))

    @_explained
    def forward(self, x: _A, train_flg: bool = True, out: _A | None = None) -> _A:
        """Dropout of ``x``; in training with the next call's mask. ``drop(x, ...)`` is the same.

        Parameters
        ----------
        x : array or scalar
        train_flg : bool, optional
            False scales for test, draws nothing and changes nothing.
        out : array, optional
            Written and returned: of the shape, dtype, namespace and device of x. It may be x itself, or
            overlap it.

        Raises
        ------
        TypeError
            If x is no array of a supported dtype, or ``out`` is immutable or differs in dtype or namespace.
        ValueError
            If ``out`` has another shape, is read-only, or an axis of ``broadcast_axes`` is none of x's.
        """
        train = _checked_bool("train_flg", train_flg)
        operand = checked("x", x, out)
        if not train:
            return operand.result(_test(operand, self._state.get().settings))
        shape, namespace, device = tuple(operand.x.shape), operand.xp.__name__, operand.device
        state = self._state.change(lambda state: state.counted(shape, namespace, device))
        forward = state.known("forward").forward
        y = operand.result(_train(operand, forward.settings, state.seed, state.stream(forward.call)))
        state.threads.forward = forward
        return y

    @_explained
    def __call__(self, x: _A, train_flg: bool = True, out: _A | None = None) -> _A:
        """The same as :meth:`forward`."""
        return self.forward(x, train_flg, out)

    @_explained
    def backward(self, dout: _A, call: int | None = None, out: _A | None = None) -> _A:
        """The gradient of a training forward: ``where(keep, dout * scale, +0)`` with that forward's mask.

        Parameters
        ----------
        dout : array or scalar
            Of the shape of that forward's x.
        call : int, optional
            Which forward: its ``drop.call``. The calling thread's latest when left out, or, if it has made none,
            the latest of all.
        out : array, optional
            As for :meth:`forward`.

        Raises
        ------
        RuntimeError
            Before the first training forward.
        ValueError
            If ``dout`` has not the shape that x had. The shape of an earlier call is known if no forward
            since, in any thread, had another; otherwise that of ``dout`` is trusted. If ratio, ``inverted`` or
            ``broadcast_axes`` were changed after ``call``, unless it is the calling thread's latest.
        """
        state = self._state.get()
        operand = checked("dout", dout, out)
        shape = tuple(operand.x.shape)
        forward = state.own("backward") if call is None else state.numbered(call, shape)
        forward.check(shape)
        return operand.result(_train(operand, forward.settings, state.seed, state.stream(forward.call)))

    @property
    def mask(self) -> Any:
        """The mask of the latest training forward, True = kept, drawn anew on each access."""
        state = self._state.get()
        forward = state.own("mask")
        shape, settings, xp = forward.shape, forward.settings, importlib.import_module(forward.namespace)
        with library_behind(xp).on(forward.device):
            keep = _keep(xp, forward.device, shape, settings, state.seed, state.stream(forward.call))
            return xp.asarray(xp.broadcast_to(keep, shape), copy=True) if settings.axes else keep

    def state_dict(self) -> dict[str, Any]:
        """The layer as plain data (numbers, strings, lists), enough to go on with its sequence of masks.

        Its latest forward is the latest of all threads.
        """
        state = self._state.get()
        return {
            "class": type(self).__name__,
            **_settings_dict(state.settings),
            "seed": state.seed,
            "layer": state.layer,
            "call": state.call,
            "latest": None if state.latest is None else state.latest.as_dict(),
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on where :meth:`state_dict` was taken: the next forward draws the mask it would have drawn.

        Seed, layer and call are restored, and also ratio, ``inverted`` and ``broadcast_axes``, since the masks
        depend on them. The forwards that threads have made are forgotten. What does not fit raises TypeError or
        ValueError and changes nothing.
        """
        name = type(self).__name__
        state = _checked_keys("state", state, self.state_dict())
        if state["class"] != name:
            raise ValueError(f"state['class'] is {state['class']!r}: this is the state of another class than {name}")
        settings = _settings_from("state", state)
        seed = random.checked_int("state['seed']", state["seed"], 2**64)
        layer = random.checked_int("state['layer']", state["layer"], random.MAX_LAYERS)
        call = random.checked_int("state['call']", state["call"], 2**32)
        latest = None if state["latest"] is None else _Latest.from_dict("state['latest']", state["latest"], call)
        loaded = _State(settings, seed, layer, threading.local(), call, latest)
        self._state.change(lambda _: loaded)

    @property
    def dropout_ratio(self) -> float:
        return self._state.get().settings.ratio

    @dropout_ratio.setter
    def dropout_ratio(self, value: float) -> None:
        self._set(ratio=_checked_ratio("dropout_ratio", value))

    @property
    def inverted(self) -> bool:
        return self._state.get().settings.inverted

    @inverted.setter
    def inverted(self, value: bool) -> None:
        self._set(inverted=_checked_bool("inverted", value))

    @property
    def broadcast_axes(self) -> tuple[int, ...]:
        return self._state.get().settings.axes

    @broadcast_axes.setter
    def broadcast_axes(self, value: int | tuple[int, ...]) -> None:
        self._set(axes=_checked_axes("broadcast_axes", value))

    @property
    def seed(self) -> int:
        return self._state.get().seed

    @property
    def layer(self) -> int:
        return self._state.get().layer

    @property
    def call(self) -> int:
        """The number of the latest training forward; 0 before the first."""
        state = self._state.get()
        forward = state.of_this_thread()
        return state.call if forward is None else forward.call

    def _set(self, **settings: Any) -> None:
        self._state.change(lambda state: state._replace(settings=state.settings._replace(**settings)))

    if not TYPE_CHECKING:  # a checker would take any name for granted

        def __setattr__(self, name: str, value: object) -> None:
            settable = ("dropout_ratio", "inverted", "broadcast_axes")
            if name not in settable and not name.startswith("_"):
                raise AttributeError(
                    f"{type(self).__name__}.{name} cannot be set; {', '.join(settable)} can{_hint(name, settable)}"
                )
            super().__setattr__(name, value)

        def __getattr__(self, name: str) -> Any:
            if name in _ELSEWHERE:
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}{_hint(name, ())}")
            return super().__getattribute__(name)  # which raises what it raised before

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": self._state.get().portable()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _state=Atomic(_State(**state["_state"], threads=threading.local())))

    def __repr__(self) -> str:
        settings, seed, layer, *_ = self._state.get()
        inverted = ", inverted=True" if settings.inverted else ""
        axes = f", broadcast_axes={settings.axes}" if settings.axes else ""
        return f"{type(self).__name__}({settings.ratio}{inverted}, seed={seed}, layer={layer}{axes})"


# --- What is kept from forward to backward --------------------------------------------------------------


class _Forward(NamedTuple):
    """A training forward: a few numbers, never an array."""

    call: int
    shape: tuple[int, ...]
    settings: _Settings
    namespace: str = "numpy"
    device: Device = None

    def check(self, shape: tuple[int, ...]) -> None:
        if shape != self.shape:
            raise ValueError(f"dout has shape {shape} but x had shape {self.shape} in the forward of call {self.call}")


class _Latest(NamedTuple):
    """The training forward of the highest number, and since which call its shape and its settings have been the same.

    This is all that a layer remembers, beside the latest forward of each thread; it does not grow with the number of
    forwards. It follows the numbers: it is written as they are taken, not as the forwards end.
    """

    forward: _Forward
    shape_since: int
    settings_since: int

    @classmethod
    def after(cls, previous: _Latest | None, forward: _Forward) -> _Latest:
        shape_since = settings_since = forward.call
        if previous is not None and previous.forward.shape == forward.shape:
            shape_since = previous.shape_since
        if previous is not None and previous.forward.settings == forward.settings:
            settings_since = previous.settings_since
        return cls(forward, shape_since, settings_since)

    def earlier(self, call: int, shape: tuple[int, ...]) -> _Forward:
        """An earlier forward, of its own shape if that is known, else of the one given."""
        if call < self.settings_since:
            raise ValueError(
                f"dropout_ratio, inverted or broadcast_axes were changed between call {call} and call "
                f"{self.settings_since}, and the old values are not kept: run backward(dout, call={call}) "
                "before the forward that follows such a change"
            )
        return self.forward._replace(call=call, shape=self.forward.shape if call >= self.shape_since else shape)

    def as_dict(self) -> dict[str, Any]:
        return {
            "shape": list(self.forward.shape),
            "shape_since": self.shape_since,
            **_settings_dict(self.forward.settings),
            "settings_since": self.settings_since,
        }

    @classmethod
    def from_dict(cls, name: str, state: object, call: int) -> _Latest:
        pattern = cls(_Forward(0, (), _Settings(0.0, False, ())), 0, 0).as_dict()
        state = _checked_keys(name, state, pattern)
        if not isinstance(state["shape"], (list, tuple)):
            raise TypeError(f"{name}['shape'] must be a list of integers, not {state['shape']!r}")
        shape = tuple(random.checked_int(f"{name}['shape']", n, 2**63) for n in state["shape"])
        since = {}
        for key in ("shape_since", "settings_since"):
            since[key] = random.checked_int(f"{name}[{key!r}]", state[key], 2**32)
            if not 1 <= since[key] <= call:
                raise ValueError(f"{name}[{key!r}] must be a call from 1 to {call}, not {since[key]}")
        settings = _settings_from(name, state)
        _normalised(settings.axes, shape)
        return cls(_Forward(call, shape, settings), since["shape_since"], since["settings_since"])


class _State(NamedTuple):
    """All that a layer is at one moment. It is exchanged as a whole, so that no thread sees half of a change."""

    settings: _Settings
    seed: int
    layer: int
    threads: threading.local  # its `forward` is the one that returned last in the thread that asks
    call: int = 0
    latest: _Latest | None = None

    def counted(self, shape: tuple[int, ...], namespace: str, device: Device) -> _State:
        """The state after one more training forward has taken its number."""
        _normalised(self.settings.axes, shape)
        if self.call + 1 >= 2**32:
            raise OverflowError(
                "this layer has drawn its 2**32 - 1 masks: go on with a layer of another seed or number"
            )
        forward = _Forward(self.call + 1, shape, self.settings, namespace, device)
        return self._replace(call=forward.call, latest=_Latest.after(self.latest, forward))

    def stream(self, call: int) -> int:
        return self.layer << 32 | call

    def known(self, what: str) -> _Latest:
        if self.latest is None:
            raise RuntimeError(f"{what} before a training forward: call forward(x) with train_flg=True first")
        return self.latest

    def of_this_thread(self) -> _Forward | None:
        return getattr(self.threads, "forward", None)

    def own(self, what: str) -> _Forward:
        """The forward that the calling thread means if it gives no number."""
        return self.of_this_thread() or self.known(what).forward

    def numbered(self, call: object, shape: tuple[int, ...]) -> _Forward:
        latest, own = self.known("backward"), self.of_this_thread()
        number = random.checked_int("call", call, 2**32)
        if not 1 <= number <= self.call:
            raise ValueError(f"call must be from 1 to {self.call} (the latest training forward), not {number}")
        return own if own is not None and number == own.call else latest.earlier(number, shape)

    def portable(self) -> dict[str, Any]:
        """The state for a copy, which may be read in another process.

        A device need not pickle, nor exist there: the copy's mask goes to the default device. What threads have made
        stays behind.
        """
        latest = self.latest and self.latest._replace(forward=self.latest.forward._replace(device=None))
        fields = self._replace(latest=latest)._asdict()
        del fields["threads"]
        return fields


def _settings_dict(settings: _Settings) -> dict[str, Any]:
    return {
        "dropout_ratio": settings.ratio,
        "inverted": settings.inverted,
        "broadcast_axes": list(settings.axes),
    }


def _settings_from(name: str, state: Mapping[str, Any]) -> _Settings:
    return _Settings(
        _checked_ratio(f"{name}['dropout_ratio']", state["dropout_ratio"]),
        _checked_bool(f"{name}['inverted']", state["inverted"]),
        _checked_axes(f"{name}['broadcast_axes']", state["broadcast_axes"]),
    )


def _checked_keys(name: str, state: object, pattern: Mapping[str, object]) -> Mapping[str, Any]:
    if not isinstance(state, Mapping):
        raise TypeError(f"{name} must be a dict made by state_dict(), not {type(state).__name__}")
    missing, unknown = pattern.keys() - state.keys(), state.keys() - pattern.keys()
    if missing or unknown:
        differences = [f"lacks {sorted(missing)}"] * bool(missing)
        differences += [f"has the unknown keys {sorted(map(str, unknown))}"] * bool(unknown)
        raise ValueError(f"{name} is no state of a Dropout layer: it {' and '.join(differences)}")
    return state


# --- Checks of arguments --------------------------------------------------------------------------------


def _checked_ratio(name: str, value: object) -> float:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number in [0, 1], not {value!r} of type {type(value).__name__}")
    ratio = float(value)
    if not 0 <= ratio <= 1:  # NaN fails this too
        raise ValueError(f"{name} must be in [0, 1], not {value!r}")
    return ratio


def _checked_bool(name: str, value: object) -> bool:
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{name} must be True or False, not {value!r} of type {type(value).__name__}")
    return bool(value)


def _checked_axes(name: str, value: Any) -> tuple[int, ...]:
    axes = value if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(axis, numbers.Integral) and not isinstance(axis, bool) for axis in axes):
        raise TypeError(f"{name} must be an integer or a tuple of integers, not {value!r}")
    if len(set(axes)) != len(axes):
        raise ValueError(f"{name} names an axis twice: {value!r}")
    return tuple(int(axis) for axis in axes)


def _normalised(axes: tuple[int, ...], shape: tuple[int, ...]) -> set[int]:
    """Axes counted from the front, checked against the array's shape."""
    for axis in axes:
        if not -len(shape) <= axis < len(shape):
            raise ValueError(f"broadcast_axes={axes} names axis {axis}, but the array has shape {tuple(shape)}")
    counted = {axis % len(shape) for axis in axes}
    if len(counted) != len(axes):
        raise ValueError(f"broadcast_axes={axes} names an axis of an array of shape {tuple(shape)} twice")
    return counted
