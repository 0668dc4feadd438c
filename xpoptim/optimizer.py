"""The optimizer: what the user holds."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from .arrays.dtypes import COMPLEX_DTYPES, REAL_DTYPES, ComplexName, RealName
from .errors import habits
from .recipe.declaration import Declaration
from .recipe.hyperparameters import NonNegative, Positive, PositiveOrInfinite
from .step.report import Report
from .step.state import (
    State,
    check_class,
    loaded_signature,
    on_host,
    plain_state,
    public_name,
    recorded_signature,
)
from .step.stepper import Stepper, initial_slots
from .sync.guard import Guard, exclusive
from .trace.program import Program

_P = TypeVar("_P")
Code: TypeAlias = Literal["graph", "llvm", "cuda"]
DTypeName: TypeAlias = RealName | ComplexName


class Optimizer(Declaration, options=True, kw_only=True):
    """Base class of all optimizers, and of your own.

    A subclass declares its hyperparameters as annotated fields with defaults, its slots, and its rule::

        class Mine(xo.Optimizer):
            lr: xo.Hyper = 1e-2
            beta: Annotated[xo.Hyper, Interval(ge=0, lt=1)] = 0.9
            slots = ("m",)

            @staticmethod
            def rule(xp, p, g, m, *, lr, beta):
                m = beta * m + (1 - beta) * g
                return p - lr * xp.sign(m), m

    A field is a number or a schedule, a function ``step -> float`` that is given 0 at the first update; both may be
    assigned at any time (``opt.lr = 1e-4``). ``xo.Hyper`` says so to type checkers, for which one annotated ``float``
    takes no schedule, and which want ``opt.lr *= 0.5`` only where they know that it is a float. Numbers are finite. A
    narrower range is declared with ``annotated_types`` (``Ge``, ``Gt``, ``Le``, ``Lt``, ``Interval``), and one that
    includes infinity, as ``Le(math.inf)``, allows that. Fields are arguments of the constructor, by position too unless
    the class says so, ``class Mine(xo.Optimizer, kw_only=True)``. To give an inherited one another default, assign it
    without an annotation.

    ``slots`` is a tuple of names (arrays that start at zero) or a mapping from names to a start value or to a
    function of the parameter. The rule is one pure, elementwise function. It gets ``xp`` (the operations it may use),
    the parameter, the gradient and the slots, and by keyword the hyperparameters it names, and ``t``, the 1-based
    count of the step, if it names that; it returns the new parameter and the new slots. Fields annotated ``bool`` or
    ``Literal[...]`` are static: a rule may branch on them, and on nothing else (``xp.where`` chooses between values).
    A rule is traced once for each optimizer, in its first step, and again when a static field or an option that
    changes the program is assigned: what it takes from outside, as a helper or a global, is fixed then, on every
    engine.

    A complex array goes through the rule as its real and its imaginary part, each on its own. Its gradient is
    ``dL/d(re) + 1j*dL/d(im)``, as torch gives it: pass that as it comes. JAX and HIPS autograd give the conjugate: pass
    ``np.conj(g)`` (``jnp.conj(g)`` for a JAX array), or the imaginary parts climb. A finite difference tells which of
    the two a gradient is:

    >>> import numpy as np
    >>> def loss(z): return (abs(z - 2j) ** 2).sum()
    >>> z = np.array([3 + 1j, 1 + 4j])
    >>> g = 2 * (z - 2j)
    >>> bool(np.isclose((loss(z + 1e-6j) - loss(z - 1e-6j)) / 2e-6, g.imag.sum()))
    True

    A class with ``fused = False`` has a rule of plain Array API code instead, which may do more than elementwise
    operations (``xp`` is then the arrays' namespace) and is run as it stands.

    >>> import numpy as np, xpoptim as xo
    >>> class Mine(xo.Optimizer):
    ...     lr: float = 1e-2
    ...     beta: float = 0.9
    ...     slots = ("m",)
    ...     @staticmethod
    ...     def rule(xp, p, g, m, *, lr, beta):
    ...         m = beta * m + (1 - beta) * g
    ...         return p - lr * xp.sign(m), m
    >>> params = {"W": np.array([1.0, 2.0])}
    >>> Mine(lr=0.5).update(params, {"W": np.array([3.0, -4.0])})
    >>> params["W"]
    array([0.5, 2.5])

    Other Parameters
    ----------------
    weight_decay : float or schedule, default 0.0
        Decay towards zero, at least 0: ``weight_decay*p`` is added to the gradient (L2 decay), or, if ``decoupled``,
        ``p *= 1 - lr*weight_decay`` comes ahead of the rule.
    decoupled : bool, default False
        Which of the two the decay is.
    clip_norm : float, schedule or None, default None
        Above 0. Scale all gradients by ``min(1, clip_norm/norm)``, with their global L2 norm. A non-finite norm raises
        ``FloatingPointError`` before anything is written; so does one beyond about 1.3e154, whose square overflows
        float64, though all gradients are finite. ``float("inf")`` checks that much and never scales. None: off.
    clip_value : float, schedule or None, default None
        Above 0. Clamp every gradient element (each part of a complex one) to ``[-clip_value, clip_value]``. None: off.
    maximize : bool, default False
        Ascend instead of descend.
    capturable : bool, default False
        For CuPy arrays: keep the step count and the scalars on the GPU, so that `update` can be captured in a CUDA
        graph; see `prepare_replay`. NumPy arrays are served as ever.
    """

    weight_decay: NonNegative = 0.0
    decoupled: bool = False
    clip_norm: PositiveOrInfinite | None = None
    clip_value: Positive | None = None
    maximize: bool = False
    capturable: bool = False

    # Of the object; but to type checkers other annotated names are arguments of the constructor.
    _stepper: ClassVar[Stepper]
    _guard: ClassVar[Guard]

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        new = super().__new__(cls)
        object.__setattr__(new, "_stepper", Stepper())
        object.__setattr__(new, "_guard", Guard())
        return new

    # -----------------------------------------------------------------------------------------------------------------
    # The state

    @property
    def state(self) -> State:
        """``{"step": int, "slots": {name: {key: array}}}``: the arrays themselves, not copies.

        ``step`` counts the applied updates. There are no slots before the first. Where a GPU counts (``clip_norm`` or
        ``capturable`` with CuPy arrays) reading waits for the last update, whatever stream or thread that is in; once
        an update was captured into a CUDA graph, for all work on that GPU. During a capture it raises ``RuntimeError``.
        """
        self._count()
        return self._stepper.state

    @property
    def skipped(self) -> int:
        """The number of steps that a GPU has skipped, as the gradients' norm was not finite. It waits as `state` does.

        >>> import xpoptim as xo
        >>> xo.SGD().skipped
        0
        """
        return self._count()

    def _count(self) -> int:
        """Bring the step count up to date, if a GPU counts; the number of skipped steps."""
        if not self._stepper.counts_elsewhere:
            return 0
        with self._guard.current():  # another thread's step would be counted while this one waits for the GPU
            return self._stepper.count()

    def check(self) -> None:
        """Raise ``FloatingPointError`` if a GPU has skipped steps. On NumPy arrays `update` itself raises.

        >>> import xpoptim as xo
        >>> xo.SGD().check()
        """
        skipped = self.skipped
        if skipped:
            raise FloatingPointError(
                f"{skipped} steps were skipped, since the norm of the gradients was not finite; "
                "parameters and state are those of the applied steps"
            )

    def __del__(self) -> None:
        stepper = self.__dict__.get("_stepper")  # not there if `__new__` did not come to its end
        if stepper is not None and not sys.is_finalizing():
            stepper.release()

    @exclusive
    def __getstate__(self) -> dict[str, object]:
        """For pickles. CuPy's slots are in them as NumPy arrays: they go to the GPU of their parameters again."""
        return self._settings() | {"_known": self._stepper.known, "_state": self._stepper.copied(on_host)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        settings = dict(state)
        stepper = Stepper()
        stepper.take(settings.pop("_state"), settings.pop("_known"))
        object.__setattr__(self, "_stepper", stepper)
        object.__setattr__(self, "_version", object())
        for name, value in settings.items():
            object.__setattr__(self, name, value)

    def _settings(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in self._declared}

    @exclusive
    def __copy__(self) -> Optimizer:
        """A copy with a state of its own: two optimizers must not step the same slots."""
        return self._copied(self._settings())

    @exclusive
    def __deepcopy__(self, memo: dict[int, object]) -> Optimizer:
        return self._copied(copy.deepcopy(self._settings(), memo), memo)

    def _copied(self, settings: dict[str, object], memo: dict[int, object] | None = None) -> Optimizer:
        new = type(self).__new__(type(self))
        if memo is not None:
            memo[id(self)] = new
        new.__setstate__(settings | {"_known": self._stepper.known, "_state": self._stepper.copied()})
        return new

    # -----------------------------------------------------------------------------------------------------------------
    # Stepping

    @exclusive
    def update(self, params: object, grads: object) -> None:
        """Update ``params`` in place by one step.

        Parameters
        ----------
        params : dict, list, tuple (nested as you like) or array
            Arrays are written to and never rebound, so that others who hold them see the new values. Python
            floats, NumPy scalars and JAX arrays are replaced in their dict or list. An empty container is fine: the
            step is one over nothing, and counts.
        grads : the same
            One gradient for each parameter; None leaves it and its slots as they are. Never modified or kept. A
            container among the parameters that holds nothing, or nothing but such ones, needs none.

        Raises
        ------
        TypeError, ValueError
            Anything that does not fit: the message names the leaf. Nothing has been changed then.
        FloatingPointError
            The gradients' norm is not finite (only with ``clip_norm``). Nothing has been changed.

        Examples
        --------
        >>> import numpy as np, xpoptim as xo
        >>> params = {"W": np.array([1.0, 2.0])}
        >>> opt = xo.SGD(lr=0.5)
        >>> opt.update(params, {"W": np.array([1.0, -1.0])})
        >>> params["W"]
        array([0.5, 2.5])
        """
        self._stepper.update(self, params, grads)

    def init(self, params: object) -> State:
        """A fresh state for ``params``, which it leaves alone.

        >>> import numpy as np, xpoptim as xo
        >>> xo.Momentum().init({"W": np.ones(2)})
        {'step': 0, 'slots': {'v': {'W': array([0., 0.])}}}
        """
        return {"step": 0, "slots": initial_slots(self, params)}

    @exclusive
    def apply(self, params: _P, grads: object, state: Mapping[str, object]) -> tuple[_P, State]:
        """One step without side effects: new parameters and a new state; the arguments stay as they are.

        It works on containers of immutable leaves too (tuples, JAX arrays, floats, read-only arrays). A leaf keeps its
        class, a subclass of ndarray with its attributes; but of a ``np.memmap`` the new value is an array in memory, as
        in NumPy's own arithmetic.

        >>> import numpy as np, xpoptim as xo
        >>> opt = xo.SGD(lr=0.5)
        >>> params = (np.array([1.0]), 2.0)
        >>> state = opt.init(params)
        >>> params, state = opt.apply(params, (np.array([1.0]), -1.0), state)
        >>> params, state["step"]
        ((array([0.5]), 2.5), 1)
        """
        return self._stepper.apply(self, params, grads, state)

    @exclusive
    def prepare_replay(self) -> None:
        """Before a replay of a captured `update`: hand the present hyperparameters to the GPU, in stream order.

        The step count advances by itself; schedules are evaluated here, for the step that the replay will be. Without
        this call a replay uses the hyperparameters of the last one. Raises ``RuntimeError`` if nothing was captured, or
        if what is computed has changed since (an option was switched on or off). Call it on the stream of the replay,
        which then also comes behind all that was done with the optimizer before; what comes behind a replay on another
        stream is yours to order, since graphs are launched without the optimizer's knowledge::

            opt = xo.Adam(lr=schedule, capturable=True)
            opt.update(params, grads)                    # compiles and allocates
            stream = cupy.cuda.Stream(non_blocking=True)
            with stream:
                stream.begin_capture()
                opt.update(params, grads)                # recorded, not run
                graph = stream.end_capture()
                for batch in batches:
                    ...                                  # fill the same gradient arrays
                    opt.prepare_replay()
                    graph.launch(stream)
        """
        if not self._stepper.prepare_replay(self):
            raise RuntimeError(
                "prepare_replay: no update of this optimizer was captured (make it with capturable=True, "
                "run update once on CuPy arrays, then capture one)"
            )

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    @exclusive
    def state_dict(self) -> dict[str, Any]:
        """A copy of the state as plain data, with the class and the hyperparameters it was made with.

        The class is recorded by its public name, a user's own by its module and qualified name, and a schedule by its
        value at the present step.

        >>> import xpoptim as xo
        >>> saved = xo.SGD(lr=0.5).state_dict()
        >>> saved["class"], saved["hyperparameters"]["lr"]
        ('xpoptim.SGD', 0.5)
        """
        name, state = type(self).__name__, self._stepper.copied()
        step, names = state["step"], (*self._hyperparameters, *self._options)
        values = {n: self._declared[n].at(name, n, getattr(self, n), step) for n in names}
        return {
            "class": public_name(type(self)),
            "hyperparameters": values,
            "parameters": recorded_signature(self._stepper.known),
            **state,
        }

    @exclusive
    def load_state_dict(self, d: Mapping[str, Any]) -> None:
        """Restore a state made by `state_dict`; the hyperparameters stay as they are.

        Raises ``ValueError`` if it is of another class, or its keys, shapes or dtypes differ from the present
        state's; the optimizer is then left as it was. Before the first step, they are compared with the parameters
        at the first step. A class named without its module, as ``"SGD"``, matches by that name.

        >>> import numpy as np, xpoptim as xo
        >>> opt, params = xo.Momentum(), {"W": np.ones(2)}
        >>> opt.update(params, {"W": np.ones(2)})
        >>> new = xo.Momentum()
        >>> new.load_state_dict(opt.state_dict())
        >>> new.state["step"]
        1
        """
        name = type(self).__name__
        if not isinstance(d, Mapping):
            inside = ": pass its .item()" if getattr(d, "shape", None) == () else ""  # as numpy.load gives it
            raise TypeError(
                f"{name}.load_state_dict takes the dict that state_dict made, not {type(d).__name__}{inside}"
            )
        if "class" not in d:
            raise ValueError(f"{name}.load_state_dict takes what state_dict() returns, which has an entry 'class'")
        check_class(type(self), d["class"])
        state = plain_state(name, self._slot_names(), d)
        self._stepper.load(state, loaded_signature(name, d))

    # -----------------------------------------------------------------------------------------------------------------
    # Looking inside

    def explain(self, params: object, grads: object = None) -> Report:
        """Which engine would serve each leaf in `update`, and why. Changes nothing.

        >>> import numpy as np, xpoptim as xo
        >>> params = {"W": np.ones((4, 3)), "x": 1.0}
        >>> print(xo.Adam().explain(params, {"W": np.ones((4, 3)), "x": 2.0}))  # doctest: +ELLIPSIS
        key  engine  why
        W    fused   dense NumPy arrays of equal layout...
        x    fused   a Python float, through an array of its own; replaced in its container...
        """
        return self._stepper.explain(self, params, grads)

    def source(self, kind: Code, dtype: DTypeName = "float32", grad_dtype: DTypeName | None = None) -> Source:
        """The traced program (``"graph"``), or the code made of it (``"llvm"``, ``"cuda"``), for one parameter dtype.

        >>> import xpoptim as xo
        >>> print(xo.SGD().source("graph"))
        program SGD.rule in float32
          param  p: float32
          grad   g: float32
        scalars, in float64
          %3 = lr
        for every element
          %0 = p
          %1 = g
          %4 = round(%3)
          %5 = %4 * %1
          %6 = %0 - %5
          p <- %6
        """
        from .codegen.cuda import elementwise as cuda
        from .codegen.llvm import elementwise as llvm

        writers: dict[str, Callable[[Program], str]] = {"graph": str, "llvm": llvm.assembly, "cuda": cuda.source}
        if kind not in writers:
            raise ValueError(f"source takes {', '.join(map(repr, writers))}, not {kind!r}")
        for given in (dtype, grad_dtype or dtype):
            if given not in REAL_DTYPES + COMPLEX_DTYPES:
                raise ValueError(f"{given!r} is no parameter dtype: {', '.join(REAL_DTYPES + COMPLEX_DTYPES)}")
        if ((grad_dtype or dtype) in COMPLEX_DTYPES) != (dtype in COMPLEX_DTYPES):
            raise ValueError(
                f"no kernel takes {grad_dtype} gradients for {dtype} parameters: both real or both complex"
            )
        if not self.fused:
            raise ValueError(
                f"{type(self).__name__} says fused = False: its rule is plain code, of which no program is made"
            )
        passes = self._stepper.traced(self).programs(dtype, grad_dtype or dtype).values()
        return Source("\n\n".join(writers[kind](program) for program in passes))


# Outside of the class, so that type checkers go on to refuse these names.
for _name in habits.METHODS:
    setattr(Optimizer, _name, habits.Elsewhere(_name))


class Source(str):
    """Text that a prompt shows as it is printed."""

    def __repr__(self) -> str:
        return str(self)
