"""The optimizer: what the user holds. It checks, keeps the state, and hands leaves to the engines."""

from __future__ import annotations

import copy
import ctypes
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

from .arrays.dtypes import COMPLEX_DTYPES, REAL_DTYPES
from .arrays.leaves import ABSENT, Leaf, as_given, pairs, rebuilt, replaced, resolve_parameter
from .engines.choose import selected
from .engines.cuda import driver
from .engines.cuda.turns import Turns
from .errors import TraceError, habits
from .recipe import hyperparameters, options
from .recipe.recipe import Recipe, Traced
from .step.ready import Ready
from .step.report import Report, Served
from .step.state import (
    Signature,
    State,
    check_class,
    check_same,
    check_same_parameters,
    check_signature,
    checked_step,
    copied_state,
    fresh_slots,
    gpus,
    loaded_signature,
    on_host,
    plain_state,
    public_name,
    recorded_signature,
    slots_for,
)
from .step.step import Step, check, check_memory, copy_overlapping_gradients, engine_for, finite_norm
from .sync.guard import Guard, exclusive


class Optimizer:
    """Base class of all optimizers, and of your own.

    A subclass declares its hyperparameters as annotated fields with defaults, its slots, and its rule::

        class Mine(xo.Optimizer):
            lr: float = 1e-2
            beta: float = 0.9
            slots = ("m",)

            @staticmethod
            def rule(xp, p, g, m, *, lr, beta):
                m = beta * m + (1 - beta) * g
                return p - lr * xp.sign(m), m

    ``slots`` is a tuple of names (arrays that start at zero) or a mapping from names to a start value or to a
    function of the parameter. The rule is one pure, elementwise function. It gets ``xp`` (the operations it may use),
    the parameter, the gradient and the slots, and by keyword the hyperparameters it names, and ``t``, the 1-based
    count of the step, if it names that; it returns the new parameter and the new slots. Fields annotated ``bool``
    are static: a rule may branch on them, and on nothing else (``xp.where`` chooses between values). A rule is traced
    once for each optimizer, in its first step, and again when a static field or an option that changes the program is
    assigned: what it takes from outside, a helper, a global or a closure, is fixed then, on every engine.

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

    The options of every optimizer, keyword-only:

    weight_decay : float or schedule, default 0.0
        L2 decay, added to the gradient, or, if ``decoupled``, ``p *= 1 - lr*weight_decay`` ahead of the rule.
    clip_norm : float or schedule, optional
        Scale all gradients by ``min(1, clip_norm/norm)``, with their global L2 norm. A non-finite norm raises
        ``FloatingPointError`` before anything is written; so does one beyond about 1.3e154, whose square overflows
        float64, though all gradients are finite. ``float("inf")`` checks that much and never scales.
    clip_value : float or schedule, optional
        Clamp every gradient element (each part of a complex one) into ``[-clip_value, clip_value]``.
    maximize : bool, default False
        Ascend instead of descend.
    capturable : bool, default False
        For CuPy arrays: keep the step count and the scalars on the GPU, so that `update` can be captured in a CUDA
        graph; see `prepare_replay`. NumPy arrays are served as ever.

    Every float may be a schedule, a function ``step -> float`` that is given 0 at the first update, and may be assigned
    at any time (``opt.lr = 1e-4``).

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
    """

    weight_decay: float = 0.0
    decoupled: bool = False
    clip_norm: float | None = None
    clip_value: float | None = None
    maximize: bool = False
    capturable: bool = False

    slots: ClassVar[tuple[str, ...] | Mapping[str, Any]] = ()
    fused: ClassVar[bool] = True
    rule: ClassVar[Callable[..., Any]]

    _options: ClassVar[tuple[str, ...]] = (
        "weight_decay",
        "decoupled",
        "clip_norm",
        "clip_value",
        "maximize",
        "capturable",
    )
    _fields: ClassVar[tuple[str, ...]] = ()  # the rule's hyperparameters, in order
    _static: ClassVar[frozenset[str]] = frozenset({"decoupled", "maximize", "capturable"})
    _takes: ClassVar[tuple[str, ...]] = ()  # the keywords of the rule
    __signature__: ClassVar[inspect.Signature]

    # Of the object; with leading underscores, so no hyperparameters.
    _state: State
    _version: object  # another object after every assignment
    # What follows from the hyperparameters of a version: the recipe, and their values unless one is a schedule.
    _cached: tuple[object, Recipe, tuple[float, ...] | None]
    _traced: Traced | None  # what the rule did when it was traced, in the first step with this recipe
    _ready: Ready | None  # what the next step can start from
    _guard: Guard
    _known: Signature | None  # what the first update fixed
    _counter: Any  # an `engines.cuda.Counter`, while a GPU counts the steps
    _turns: Turns  # of the work on what is kept on GPUs
    _captured: Any  # the plan that a captured graph runs
    _kept: list[Any]  # plans and states whose memory captured graphs use, replayed or not
    _verified: Any  # the parameters' places in memory that are known not to overlap

    # -----------------------------------------------------------------------------------------------------------------
    # The class: fields, slots and rule

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {
            name: kind
            for name, kind in inspect.get_annotations(cls).items()
            if "ClassVar" not in str(kind) and name not in cls._options and not name.startswith("_")
        }
        cls._check_names(own)
        cls._fields = (*cls._fields, *(name for name in own if name not in cls._fields))
        cls._static = cls._static | {name for name, kind in own.items() if kind is bool or kind == "bool"}
        cls.__signature__ = cls._make_signature()
        if "rule" in cls.__dict__:
            cls._takes = cls._inspect_rule()

    @classmethod
    def _check_names(cls, fields: Mapping[str, Any]) -> None:
        """Names of hyperparameters and slots must not meet each other or ours."""
        taken = {"xp", "p", "g", "t", "norm", *dir(Optimizer)} - {*Optimizer._options, *habits.METHODS}
        bad = sorted(name for name in fields if name in taken)
        slots = () if bad else cls._slot_names()
        bad += [s for s in slots if not s.isidentifier() or s in {"xp", "p", "g", "t", *fields, *cls._fields}]
        bad += sorted({s for s in slots if slots.count(s) > 1})
        if bad:
            raise TypeError(
                f"{cls.__name__}: {bad[0]!r} cannot name a hyperparameter or slot (it is taken): choose another"
            )

    @classmethod
    def _make_signature(cls) -> inspect.Signature:
        def parameter(name: str, kind: Any) -> inspect.Parameter:
            default = getattr(cls, name, inspect.Parameter.empty)
            return inspect.Parameter(name, kind, default=default)

        plain = [parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in cls._fields]
        return inspect.Signature([*plain, *(parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in cls._options)])

    @classmethod
    def _slot_names(cls) -> tuple[str, ...]:
        if isinstance(cls.slots, str):
            raise TypeError(f"{cls.__name__}.slots is {cls.slots!r}: it is a tuple of names, ({cls.slots!r},)")
        return tuple(cls.slots)

    @classmethod
    def _slot_starts(cls) -> Mapping[str, Any]:
        return cls.slots if isinstance(cls.slots, Mapping) else dict.fromkeys(cls.slots, 0.0)

    @classmethod
    def _inspect_rule(cls) -> tuple[str, ...]:
        """The keywords of the rule, after a check that its arguments are what the class declares."""
        name = f"{cls.__name__}.rule"
        if not isinstance(inspect.getattr_static(cls, "rule"), staticmethod):
            raise TraceError(
                f"{name} must be a @staticmethod: a rule is a pure function rule(xp, p, g, *slots, *, ...)"
            )
        kinds = list(inspect.signature(cls.rule).parameters.values())
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in kinds):
            raise TraceError(f"{name} takes *args or **kwargs: name its arrays and, behind a *, its scalars")
        scalars = {"t", *cls._fields}
        arrays = [p.name for p in kinds if p.kind is not p.KEYWORD_ONLY and p.name not in scalars]
        keywords = tuple(p.name for p in kinds if p.name not in arrays)
        if len(arrays) != 3 + len(cls.slots) or [p.name for p in kinds][: len(arrays)] != arrays:
            given, wanted = ", ".join(p.name for p in kinds), ", ".join(("xp", "p", "g", *cls._slot_names()))
            raise TraceError(
                f"{name} takes ({given}), but by the slots of {cls.__name__} it must take ({wanted}), "
                f"then scalars among {', '.join(sorted(scalars))}"
            )
        expected = ("p", "g", *cls._slot_names())
        for given, name_here in zip(arrays[1:], expected, strict=True):
            if given != name_here and given in expected:  # any other name is the author's own
                raise TraceError(
                    f"{name} takes {given!r} where {name_here!r} comes: the order is {', '.join(expected)}"
                )
        for keyword in keywords:
            if keyword not in scalars:
                known = ", ".join(sorted(scalars))
                hint = f"; annotate it: {keyword}: float = ..." if hasattr(cls, keyword) else ""
                raise TraceError(
                    f"{name} takes {keyword!r}, which is no hyperparameter of {cls.__name__} (there are: {known}){hint}"
                )
        return keywords

    # -----------------------------------------------------------------------------------------------------------------
    # The object: hyperparameters and state

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        new = object.__new__(cls)
        object.__setattr__(new, "_state", {"step": 0, "slots": {}})
        object.__setattr__(new, "_known", None)
        new._forget()
        return new

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if not hasattr(cls, "rule"):
            raise TypeError(
                f"{cls.__name__} has no rule: use a subclass such as xpoptim.Adam, or define one with a rule"
            )
        if args:
            habits.refuse_parameters(cls.__name__, f"{cls._fields[0]}=..." if cls._fields else "", args[0])
        known = self.__signature__.parameters
        unknown = [f"{name!r}{habits.keyword(name, known)}" for name in kwargs if name not in known]
        if unknown:
            raise TypeError(f"{cls.__name__}{self.__signature__}: unexpected keyword argument {', '.join(unknown)}")
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}{self.__signature__}: {error}") from None
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            setattr(self, name, value)

    def _forget(self) -> None:
        """Drop what is derived and can be made again."""
        object.__setattr__(self, "_version", object())
        object.__setattr__(self, "_cached", (None, None, None))
        object.__setattr__(self, "_guard", Guard())
        object.__setattr__(self, "_traced", None)
        object.__setattr__(self, "_ready", None)
        object.__setattr__(self, "_verified", None)
        object.__setattr__(self, "_counter", None)
        object.__setattr__(self, "_turns", Turns())
        object.__setattr__(self, "_captured", None)
        object.__setattr__(self, "_kept", [])

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        if name not in cls._fields and name not in cls._options:
            if name == "state":
                raise AttributeError(f"{cls.__name__}.state cannot be assigned: use load_state_dict")
            if name in habits.METHODS:
                getattr(cls, name)  # raises
            known = (*cls._fields, *cls._options)
            hint = habits.keyword(name, known)
            raise AttributeError(f"{cls.__name__} has no hyperparameter {name!r}{hint}; it has {', '.join(known)}")
        optional = name in cls._options and getattr(Optimizer, name) is None
        if name == "decoupled" and value and "lr" not in cls._fields:
            raise TypeError(f"{cls.__name__}: decoupled weight decay needs a hyperparameter named lr")
        value = hyperparameters.checked(cls.__name__, name, value, static=name in cls._static, optional=optional)
        # Before and after: what is derived in between is outdated, and so it is if a signal handler raises in between.
        object.__setattr__(self, "_version", object())
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_version", object())

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in habits.METHODS or hasattr(self, name)]

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted; assign another value")

    @property
    def state(self) -> State:
        """``{"step": int, "slots": {name: {key: array}}}``: the arrays themselves, not copies.

        ``step`` counts the applied updates. There are no slots before the first. Where a GPU counts (``clip_norm`` or
        ``capturable`` with CuPy arrays) reading waits for the last update, whatever stream or thread that is in; once
        an update was captured into a CUDA graph, for all work on that GPU. During a capture it raises ``RuntimeError``.
        """
        self._count_on_gpu()
        return self._state

    @property
    def skipped(self) -> int:
        """The number of steps that a GPU has skipped, as the gradients' norm was not finite. It waits as `state` does.

        >>> import xpoptim as xo
        >>> xo.SGD().skipped
        0
        """
        return self._count_on_gpu()

    def _count_on_gpu(self) -> int:
        """Bring the step count up to date, if a GPU counts; the number of skipped steps."""
        if self._counter is None:
            return 0
        with self._guard.current():  # another thread's step would be counted while this one waits for the GPU
            counter, state = self._counter, self._state
            if counter is None:
                return 0
            written = state["step"] != counter.expected  # by the user: the GPU is told at the next step
            applied, skipped = counter.read(self._turns)
            if not written:
                state["step"] = applied
            return skipped

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

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self._fields]
        parts += [f"{n}={getattr(self, n)!r}" for n in self._options if getattr(self, n) != getattr(type(self), n)]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __del__(self) -> None:
        turns = self.__dict__.get("_turns")  # not there if `__new__` did not come to its end
        if turns is not None and not sys.is_finalizing():
            turns.release()

    @exclusive
    def __getstate__(self) -> dict[str, Any]:
        """For pickles. CuPy's slots are in them as NumPy arrays: they go to the GPU of their parameters again."""
        return self._settings() | {"_state": self._copied_state(on_host)}

    def _copied_state(self, copied: Callable[[State], State] = copied_state) -> State:
        state = self.state
        with self._turns.apart("a state cannot be copied"):
            return copied(state)

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self._fields, *self._options, "_known")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        for name, value in state.items():
            object.__setattr__(self, name, value)
        self._turns.end(gpus(self._state))  # which the slots were just copied on

    @exclusive
    def __copy__(self) -> Optimizer:
        """A copy with a state of its own: two optimizers must not step the same slots."""
        new = type(self).__new__(type(self))
        new.__setstate__(self._settings() | {"_state": self._copied_state()})
        return new

    @exclusive
    def __deepcopy__(self, memo: dict[int, Any]) -> Optimizer:
        memo[id(self)] = new = type(self).__new__(type(self))
        new.__setstate__(copy.deepcopy(self._settings(), memo) | {"_state": self._copied_state()})
        return new

    @property
    def _recipe(self) -> Recipe:
        return self._derived()[1]

    def _derived(self) -> tuple[object, Recipe, tuple[float, ...] | None]:
        """Version, recipe and constants. What a signal handler assigns in the middle of this makes them outdated."""
        if self._cached[0] is self._version:
            return self._cached
        version = self._version
        recipe = Recipe(
            name=f"{type(self).__name__}.rule",
            rule=type(self).rule,
            slots=self._slot_names(),
            takes=self._takes,
            statics=tuple((name, getattr(self, name)) for name in self._fields if name in self._static),
            before=tuple(option for option in options.BEFORE if option.active(self)),
            after=tuple(option for option in options.AFTER if option.active(self)),
            fused=self.fused,
        )
        traced = self._traced
        # The same recipe keeps the same object, so that "has anything changed?" is one comparison.
        recipe = traced.recipe if traced is not None and traced.recipe == recipe else recipe
        values = tuple(getattr(self, name) for name in recipe.hyperparameters)
        derived = version, recipe, values if all(type(value) is float for value in values) else None
        object.__setattr__(self, "_cached", derived)
        return derived

    def _tracing(self) -> Traced:
        """The traced recipe: that of the steps before, unless what changes the program was assigned since."""
        recipe, traced = self._recipe, self._traced
        return traced if traced is not None and traced.recipe is recipe else Traced(recipe)

    def _scalars(self, recipe: Recipe, step: int) -> list[float]:
        """The inputs of the scalar program at a step (0-based): t, then the hyperparameters in the recipe's order."""
        values = [float(step + 1)]
        for name in recipe.hyperparameters:
            value = getattr(self, name)
            values.append(value if type(value) is float else hyperparameters.at(type(self).__name__, name, value, step))
        return values

    # -----------------------------------------------------------------------------------------------------------------
    # Stepping

    @exclusive
    def update(self, params: Any, grads: Any) -> None:
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
        ready = self._ready
        if ready is not None and self._again(ready, params, grads):
            return
        leaves = pairs(params, grads)
        step = self._advance(leaves, self._state, writing=True)
        for leaf in leaves:
            if replaced(leaf) and leaf.g is not None:
                leaf.home[leaf.index] = as_given(leaf)
        object.__setattr__(self, "_ready", step.ready(params, self._state["slots"]))

    def init(self, params: Any) -> State:
        """A fresh state for ``params``, which it leaves alone.

        >>> import numpy as np, xpoptim as xo
        >>> xo.Momentum().init({"W": np.ones(2)})
        {'step': 0, 'slots': {'v': {'W': array([0., 0.])}}}
        """
        leaves = pairs(params, ABSENT)
        for leaf in leaves:
            resolve_parameter(leaf, writing=False)
        return {"step": 0, "slots": fresh_slots(self._slot_starts(), leaves)}

    @exclusive
    def apply(self, params: Any, grads: Any, state: State) -> tuple[Any, State]:
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
        leaves = pairs(params, grads)
        state = copied_state(plain_state(type(self).__name__, self._slot_names(), state))
        self._advance(leaves, state, writing=False)
        return rebuilt(params, iter([as_given(leaf) for leaf in leaves])), state

    def _advance(self, leaves: list[Leaf], state: State, *, writing: bool) -> Step:
        """One step over leaves: every check, then every write. Only this method and `_again` change a state."""
        traced = self._tracing()
        check(leaves, writing=writing)
        devices = {leaf.p.data.device_id for leaf in leaves if leaf.space == "cupy"}
        _refuse_capture(devices)
        if not writing:
            return self._carry_out(traced, leaves, state, writing=False)
        self._turns.release()  # the plan of the last step gives way to another
        with self._turns.taken(devices):
            return self._carry_out(traced, leaves, state, writing=True)

    def _carry_out(self, traced: Traced, leaves: list[Leaf], state: State, *, writing: bool) -> Step:
        known = check_signature(type(self).__name__, self._known, leaves) if writing else None
        slots = slots_for(type(self).__name__, self._slot_starts(), leaves, state)
        if writing:
            object.__setattr__(self, "_verified", check_memory(leaves, self._verified))
        copy_overlapping_gradients(leaves)
        step = self._step(traced, leaves, state, writing)
        if writing and self._counter is not None and step.counter is None:
            _ = self.state  # the host counts again
            step = self._step(traced, leaves, state, writing)
        state["slots"] = slots
        _counted(state, step.run)
        object.__setattr__(self, "_traced", traced)
        for k, name in enumerate(traced.recipe.slots):
            for leaf in step.others:
                slots[name][leaf.key] = leaf.slots[k]
        if writing:
            object.__setattr__(self, "_known", known)
            object.__setattr__(self, "_counter", step.counter)
        return step

    def _step(self, traced: Traced, leaves: list[Leaf], state: State, writing: bool) -> Step:
        values = self._scalars(traced.recipe, checked_step(state))
        if not writing:
            return Step(traced, leaves, values)
        count, counter = state["step"], self._counter
        return Step(traced, leaves, values, count=count, counter=counter, capturable=self.capturable)

    def _again(self, ready: Ready, params: Any, grads: Any) -> bool:
        """The step over arrays that are what they were at the last one, checked by `Ready`. False: do it in full."""
        _, recipe, constants = self._derived()
        if recipe is not ready.recipe or selected() == "reference":
            return False
        state = self._state
        # A schedule may do anything to the containers: it is called after the arrays are held.
        if ready.direct is not None and constants is not None and self._directly(ready, constants, params, grads):
            return True
        columns = ready.columns(params, grads, state["slots"])
        if columns is None:
            return False
        # The schedules come between: the arrays are held by now, and what schedules do to them is seen by the watch.
        values = self._scalars(recipe, checked_step(state))
        if not ready.unchanged(columns):
            return False
        if ready.on_gpu:
            return self._again_on_gpu(ready, values)
        ready.copy(columns)
        if recipe.reductions:
            sums = ready.plan.squares(values, ready.odd(columns))
            values.append(finite_norm(ready.gradient_names, dict(zip(ready.keys, sums.tolist(), strict=True))))
        _counted(state, ready.run, values, params, columns)
        return True

    def _directly(self, ready: Ready, constants: tuple[float, ...], params: Any, grads: Any) -> bool:
        """A step in a single call; False if it was not made, because anything may have changed."""
        state = self._state
        slots = state["slots"]
        if type(slots) is not dict:
            return False
        ready.plan.set_inputs((checked_step(state) + 1, *constants))
        containers = (params, grads, *[slots.get(name) for name in ready.recipe.slots])
        return _counted(state, ready.direct.run, containers)

    def _again_on_gpu(self, ready: Ready, values: list[float]) -> bool:
        """The same for CuPy arrays. While a graph is captured, nothing is done yet, and so nothing is counted."""
        counter, capturing = self._counter, any(map(driver.capturing, ready.plan.devices))
        counted = self.capturable or bool(ready.recipe.reductions)
        if (counter is not None) is not counted:
            return False
        if capturing:
            if not self.capturable or counter.expected != self._state["step"]:
                return False  # an error, which the full step raises
            self._turns.captured = True
            object.__setattr__(self, "_captured", ready.plan)
            self._kept.append(ready.plan)
            ready.plan.run_on_device(values, counter, from_state=True)
            return True
        self._turns.begin(ready.plan.devices)
        try:
            if counter is None:
                ready.plan.run(values)
            else:
                if counter.expected != self._state["step"]:
                    counter.write(self._state["step"])
                ready.plan.run_on_device(values, counter, from_state=False)
            self._state["step"] += 1
            if counter is not None:
                counter.expected += 1
        finally:
            self._turns.end(ready.plan.devices)
        return True

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
        counter, plan = self._counter, self._captured
        if counter is None or plan is None:
            raise RuntimeError(
                "prepare_replay: no update of this optimizer was captured (make it with capturable=True, "
                "run update once on CuPy arrays, then capture one)"
            )
        if plan.recipe != self._recipe:
            raise RuntimeError("prepare_replay: an option was switched on or off since the capture: capture again")
        self._turns.refuse_capture("a replay cannot be prepared", plan.devices)
        with self._turns.taken(plan.devices):
            plan.set_inputs(self._scalars(self._recipe, self._state["step"]), counter)
        self._state["step"] += 1
        counter.expected += 1

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
        step = self.state["step"]
        name = type(self).__name__
        values = {n: hyperparameters.at(name, n, getattr(self, n), step) for n in (*self._fields, *self._options)}
        return {
            "class": public_name(type(self)),
            "hyperparameters": values,
            "parameters": recorded_signature(self._known),
            **self._copied_state(),
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
            raise TypeError(f"{name}.load_state_dict takes the dict that state_dict made, not {type(d).__name__}")
        if "class" not in d:
            raise ValueError(f"{name}.load_state_dict takes what state_dict() returns, which has an entry 'class'")
        check_class(type(self), d["class"])
        state = plain_state(type(self).__name__, self._slot_names(), d)
        with self._turns.apart("a state cannot be loaded", gpus(state)):
            state = copied_state(state)
        known = loaded_signature(name, d)
        if self._state["slots"]:
            check_same(self._state["slots"], state["slots"])
        if self._known is not None and known is not None:
            check_same_parameters(self._known, known)
        object.__setattr__(self, "_known", known if self._known is None else self._known)
        if self._captured is not None:  # a graph writes to the old slots: it must not be replayed, nor its memory freed
            self._kept.append(self._state)
            object.__setattr__(self, "_captured", None)
        self._turns.release()
        object.__setattr__(self, "_state", state)
        object.__setattr__(self, "_ready", None)
        if self._counter is not None:
            with self._turns.taken([self._counter.device]):
                self._counter.write(state["step"])

    # -----------------------------------------------------------------------------------------------------------------
    # Looking inside

    def explain(self, params: Any, grads: Any = None) -> Report:
        """Which engine would serve each leaf in `update`, and why. Changes nothing.

        >>> import numpy as np, xpoptim as xo
        >>> params = {"W": np.ones((4, 3)), "x": 1.0}
        >>> print(xo.Adam().explain(params, {"W": np.ones((4, 3)), "x": 2.0}))
        key  engine  why
        W    fused   dense NumPy arrays of equal layout
        x    fused   a Python float, through an array of its own; replaced in its container
        """
        leaves = pairs(params, ABSENT if grads is None else grads)
        check(leaves, writing=True)
        check_signature(type(self).__name__, self._known, leaves)
        slots_for(type(self).__name__, self._slot_starts(), leaves, self._state)
        return Report(Served(leaf.key, *engine_for(self._recipe, leaf, grads is not None)) for leaf in leaves)

    def source(self, kind: str, dtype: str = "float32", grad_dtype: str | None = None) -> Source:
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

        writers: dict[str, Callable[[Any], str]] = {"graph": str, "llvm": llvm.assembly, "cuda": cuda.source}
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
        passes = self._tracing().programs(dtype, grad_dtype or dtype).values()
        return Source("\n\n".join(writers[kind](program) for program in passes))


# Outside of the class, so that type checkers go on to refuse these names.
for _name in habits.METHODS:
    setattr(Optimizer, _name, habits.Elsewhere(_name))


def _counted(state: State, run: Callable[..., Any], *arguments: Any) -> Any:
    """``run(*arguments, made)``, and the step is counted if it was made: if ``made`` has become 1.

    It is counted first: Ctrl-C during the kernels takes effect after them, and must find the step counted.
    """
    made = ctypes.c_int64()
    state["step"] += 1
    try:
        return run(*arguments, made)
    finally:
        if not made.value:
            state["step"] -= 1


def _refuse_capture(devices: set[int]) -> None:
    """A step that must check, compile or allocate cannot be captured in a CUDA graph."""
    if any(map(driver.capturing, devices)):
        raise RuntimeError(
            "update cannot be captured now: make the optimizer with capturable=True, and run update once on the "
            "same arrays (and with the same options) before the capture"
        )


class Source(str):
    """Text that a prompt shows as it is printed."""

    def __repr__(self) -> str:
        return str(self)
