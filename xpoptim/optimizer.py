"""The optimizer: what the user holds. It checks, keeps the state, and hands leaves to the engines."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from . import hyperparameters, options
from .engines import reference
from .engines.selection import selected
from .errors import TraceError
from .fusion.dtypes import COMPLEX_DTYPES, REAL_DTYPES, slot_dtype
from .fusion.norm import add_in_order
from .leaves import (
    ABSENT,
    Leaf,
    Written,
    copied,
    device_of,
    dtype_name,
    extent,
    named,
    namespace,
    namespace_name,
    overlapping_pair,
    pairs,
    rebuilt,
    resolve_gradient,
    resolve_parameter,
)
from .recipe import Recipe
from .report import Report, Served

State = dict[str, Any]


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
    are static: a rule may branch on them, and on nothing else (``xp.where`` chooses between values).

    The options of every optimizer, keyword-only:

    weight_decay : float or schedule, default 0.0
        L2 decay, added to the gradient, or, if ``decoupled``, ``p *= 1 - lr*weight_decay`` ahead of the rule.
    clip_norm : float or schedule, optional
        Scale all gradients by ``min(1, clip_norm/norm)``, with their global L2 norm. A non-finite norm raises
        ``FloatingPointError`` before anything is written.
    clip_value : float or schedule, optional
        Clamp every gradient element (each part of a complex one) into ``[-clip_value, clip_value]``.
    maximize : bool, default False
        Ascend instead of descend.

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

    slots: ClassVar[tuple[str, ...] | Mapping[str, Any]] = ()
    fused: ClassVar[bool] = True
    rule: ClassVar[Callable[..., Any]]

    _options: ClassVar[tuple[str, ...]] = ("weight_decay", "decoupled", "clip_norm", "clip_value", "maximize")
    _fields: ClassVar[tuple[str, ...]] = ()  # the rule's hyperparameters, in order
    _static: ClassVar[frozenset[str]] = frozenset({"decoupled", "maximize"})
    _takes: ClassVar[tuple[str, ...]] = ()  # the keywords of the rule
    __signature__: ClassVar[inspect.Signature]

    # -----------------------------------------------------------------------------------------------------------------
    # The class: fields, slots and rule

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = {
            name: kind
            for name, kind in inspect.get_annotations(cls).items()
            if "ClassVar" not in str(kind) and name not in cls._options and not name.startswith("_")
        }
        cls._fields = (*cls._fields, *(name for name in own if name not in cls._fields))
        cls._static = cls._static | {name for name, kind in own.items() if kind is bool or kind == "bool"}
        cls.__signature__ = cls._make_signature()
        if "rule" in cls.__dict__:
            cls._takes = cls._inspect_rule()

    @classmethod
    def _make_signature(cls) -> inspect.Signature:
        def parameter(name: str, kind: Any) -> inspect.Parameter:
            default = getattr(cls, name, inspect.Parameter.empty)
            return inspect.Parameter(name, kind, default=default)

        plain = [parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD) for name in cls._fields]
        return inspect.Signature([*plain, *(parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in cls._options)])

    @classmethod
    def _slot_names(cls) -> tuple[str, ...]:
        return tuple(cls.slots)

    @classmethod
    def _inspect_rule(cls) -> tuple[str, ...]:
        """The keywords of the rule, after a check that its arguments are what the class declares."""
        name = f"{cls.__name__}.rule"
        if not isinstance(inspect.getattr_static(cls, "rule"), staticmethod):
            raise TraceError(f"{name} must be a @staticmethod: a rule is a pure function rule(xp, p, g, *slots, *, ...)")
        kinds = list(inspect.signature(cls.rule).parameters.values())
        arrays = [p.name for p in kinds if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        keywords = tuple(p.name for p in kinds if p.kind is p.KEYWORD_ONLY)
        if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in kinds):
            raise TraceError(f"{name} takes *args or **kwargs: name its arrays and, behind a *, its scalars")
        if len(arrays) != 3 + len(cls.slots):
            wanted = ", ".join(("xp", "p", "g", *cls._slot_names()))
            raise TraceError(f"{name} takes ({', '.join(arrays)}) by position, but by its slots it must take ({wanted})")
        for keyword in keywords:
            if keyword != "t" and keyword not in cls._fields:
                known = ", ".join((*cls._fields, "t"))
                raise TraceError(f"{name} takes {keyword!r}, which is no hyperparameter of {cls.__name__} (there are: {known})")
        return keywords

    # -----------------------------------------------------------------------------------------------------------------
    # The object: hyperparameters and state

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        cls = type(self)
        if not hasattr(cls, "rule"):
            raise TypeError(f"{cls.__name__} has no rule: use a subclass such as xpoptim.Adam, or define one with a rule")
        try:
            bound = self.__signature__.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}{self.__signature__}: {error}") from None
        bound.apply_defaults()
        object.__setattr__(self, "_state", {"step": 0, "slots": {}})
        self._forget()
        for name, value in bound.arguments.items():
            setattr(self, name, value)
        if self.decoupled and "lr" not in self._fields:
            raise TypeError(f"{cls.__name__}: decoupled weight decay needs a hyperparameter named lr")

    def _forget(self) -> None:
        """Drop what is derived and can be made again."""
        object.__setattr__(self, "_cached_recipe", None)
        object.__setattr__(self, "_ready", None)
        object.__setattr__(self, "_verified", None)

    def __setattr__(self, name: str, value: Any) -> None:
        cls = type(self)
        if name not in cls._fields and name not in cls._options:
            if name == "state":
                raise AttributeError(f"{cls.__name__}.state cannot be assigned: use load_state_dict")
            known = ", ".join((*cls._fields, *cls._options))
            raise AttributeError(f"{cls.__name__} has no hyperparameter {name!r}; it has {known}")
        optional = getattr(cls, name, 0.0) is None
        value = hyperparameters.checked(cls.__name__, name, value, static=name in cls._static, optional=optional)
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_cached_recipe", None)

    @property
    def state(self) -> State:
        """``{"step": int, "slots": {name: {key: array}}}``: the arrays themselves, not copies.

        ``step`` counts the applied updates. There are no slots before the first.
        """
        return self._state

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self._fields]
        parts += [f"{n}={getattr(self, n)!r}" for n in self._options if getattr(self, n) != getattr(Optimizer, n)]
        return f"{type(self).__name__}({', '.join(parts)})"

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in (*self._fields, *self._options)} | {"_state": self._state}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._forget()
        for name, value in state.items():
            object.__setattr__(self, name, value)

    def __copy__(self) -> Optimizer:
        """A copy with a state of its own: two optimizers must not step the same slots."""
        new = object.__new__(type(self))
        new.__setstate__(self.__getstate__() | {"_state": _copied_state(self._state)})
        return new

    @property
    def _recipe(self) -> Recipe:
        if self._cached_recipe is None:
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
            ready = self._ready
            # The same recipe keeps the same object, so that "has anything changed?" is one comparison.
            object.__setattr__(self, "_cached_recipe", ready.recipe if ready and ready.recipe == recipe else recipe)
        return self._cached_recipe

    def _scalars(self, recipe: Recipe, step: int) -> list[float]:
        """The inputs of the scalar program at a step (0-based): t, then the hyperparameters in the recipe's order."""
        values = [float(step + 1)]
        for name in recipe.hyperparameters:
            value = getattr(self, name)
            values.append(value if type(value) is float else hyperparameters.at(type(self).__name__, name, value, step))
        return values

    # -----------------------------------------------------------------------------------------------------------------
    # Stepping

    def update(self, params: Any, grads: Any) -> None:
        """Update ``params`` in place by one step.

        Parameters
        ----------
        params : dict, list, tuple (nested as you like) or array
            Arrays are written to and never rebound, so that others who hold them see the new values. Python
            floats, NumPy scalars and JAX arrays are replaced in their dict or list.
        grads : the same
            One gradient for each parameter; None leaves it and its slots as they are. Never modified or kept.

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
        self._advance(leaves, self._state, writing=True)
        for leaf in leaves:
            if leaf.p is not leaf.given and _replaced(leaf):
                leaf.home[leaf.index] = _as_given(leaf)

    def init(self, params: Any) -> State:
        """A fresh state for ``params``, which it leaves alone.

        >>> import numpy as np, xpoptim as xo
        >>> xo.Momentum().init({"W": np.ones(2)})
        {'step': 0, 'slots': {'v': {'W': array([0., 0.])}}}
        """
        leaves = pairs(params, ABSENT)
        for leaf in leaves:
            resolve_parameter(leaf, writing=False)
        return {"step": 0, "slots": self._fresh_slots(leaves)}

    def apply(self, params: Any, grads: Any, state: State) -> tuple[Any, State]:
        """One step without side effects: new parameters and a new state; the arguments stay as they are.

        It works on containers of immutable leaves too (tuples, JAX arrays, floats, read-only arrays).

        >>> import numpy as np, xpoptim as xo
        >>> opt = xo.SGD(lr=0.5)
        >>> params = (np.array([1.0]), 2.0)
        >>> state = opt.init(params)
        >>> params, state = opt.apply(params, (np.array([1.0]), -1.0), state)
        >>> params, state["step"]
        ((array([0.5]), 2.5), 1)
        """
        leaves = pairs(params, grads)
        state = _copied_state(_plain_state(type(self), state))
        self._advance(leaves, state, writing=False)
        return rebuilt(params, iter([_as_given(leaf) for leaf in leaves])), state

    def _advance(self, leaves: list[Leaf], state: State, *, writing: bool) -> None:
        """One step over resolved leaves: every check, then every write. Only this method changes a state."""
        recipe = self._recipe
        self._check(leaves, writing)
        slots = self._slots_for(leaves, state)
        self._verify_memory(leaves, writing)
        values = self._scalars(recipe, state["step"])
        fused, others = _divided(recipe, leaves)
        _trace_all(recipe, others)
        plan = self._plan(recipe, fused)
        if recipe.reductions:
            values.append(self._norm(recipe, leaves, fused, others, plan, values))
        state["slots"] = slots
        if plan is not None:
            plan.run(values)
        scalars = dict(zip(recipe.inputs, values, strict=True))
        for leaf in others:
            reference.step(recipe, leaf, scalars)
            for name, value in zip(recipe.slots, leaf.slots, strict=True):
                slots[name][leaf.key] = value
        state["step"] += 1
        if writing:
            self._remember(recipe, leaves, fused, plan)

    def _check(self, leaves: list[Leaf], writing: bool) -> None:
        for leaf in leaves:
            resolve_parameter(leaf, writing=writing)
            resolve_gradient(leaf)
            if not writing and leaf.p is not None and _replaced(leaf) is False:
                leaf.p = copied(leaf.p)

    def _fresh_slots(self, leaves: list[Leaf]) -> dict[str, dict[str, Any]]:
        starts = self.slots if isinstance(self.slots, Mapping) else dict.fromkeys(self.slots, 0.0)
        return {name: {leaf.key: _started(start, leaf, name) for leaf in leaves} for name, start in starts.items()}

    def _slots_for(self, leaves: list[Leaf], state: State) -> dict[str, dict[str, Any]]:
        """The slots of the state, checked against the leaves and handed to them; fresh ones before the first step."""
        slots = state["slots"]
        if not slots and self._slot_names() and state["step"] == 0:
            slots = self._fresh_slots(leaves)
        _check_known(type(self).__name__, leaves, slots, self._slot_names())
        for leaf in leaves:
            leaf.slots = [_fitting(slots[name][leaf.key], leaf, name) for name in self._slot_names()]
        # A slot that was brought to its parameter's namespace is a new array: the state will be told.
        for k, name in enumerate(self._slot_names()):
            if any(leaf.slots[k] is not slots[name][leaf.key] for leaf in leaves):
                slots = slots | {name: {leaf.key: leaf.slots[k] for leaf in leaves}}
        return slots

    def _verify_memory(self, leaves: list[Leaf], writing: bool) -> None:
        """Refuse parameters that share memory; copy gradients that lie in memory to be written."""
        parameters = [(leaf, extent(leaf.p)) for leaf in leaves if leaf.mutable]
        written = [(named("params", leaf.key), memory) for leaf, memory in parameters if memory is not None]
        if writing:
            key = tuple((a.ctypes.data, a.shape, a.strides) for _, a in written)
            if key != self._verified:
                _refuse_identical(leaves)
                pair = overlapping_pair(written)
                if pair:
                    raise ValueError(
                        f"{pair[0]} and {pair[1]} share memory: pass one of them, or copies "
                        "(an update of the one would change the other)"
                    )
                object.__setattr__(self, "_verified", key)
        slots = [extent(slot) for leaf in leaves if leaf.mutable for slot in leaf.slots]
        memory = Written([a for _, a in written] + [a for a in slots if a is not None])
        for leaf in leaves:
            place = extent(leaf.g) if leaf.g is not None else None
            if place is not None and memory.touches(place):
                leaf.g = copied(leaf.g)

    def _plan(self, recipe: Recipe, fused: list[Leaf]) -> Any:
        if not fused:
            return None
        from .engines.cpu import Plan

        return Plan(recipe, fused)

    def _norm(
        self, recipe: Recipe, leaves: list[Leaf], fused: list[Leaf], others: list[Leaf], plan: Any, values: list[float]
    ) -> float:
        scalars = dict(zip(recipe.inputs, values, strict=False))
        sums: dict[str, float] = {}
        if plan is not None:
            odd = {i: x.g for i, x in enumerate(fused) if x.g is not None and not x.g.flags.c_contiguous}
            sums = dict(zip((x.key for x in fused), plan.squares(values, odd).tolist(), strict=True))
        sums |= {leaf.key: reference.squares_sum(recipe, leaf, scalars) for leaf in others}
        return _finite_norm([leaf.key for leaf in leaves], sums)

    def _remember(self, recipe: Recipe, leaves: list[Leaf], fused: list[Leaf], plan: Any) -> None:
        """Keep the plan for the next step, if every leaf was one plain array after the other."""
        object.__setattr__(self, "_ready", None)
        if plan is None or len(fused) != len(leaves) or selected() == "reference":
            return
        from .engines.ready import Ready

        if Ready.possible(leaves):
            object.__setattr__(self, "_ready", Ready(recipe, plan, leaves))

    def _again(self, ready: Any, params: Any, grads: Any) -> bool:
        """The step over arrays that are what they were at the last one: no checks but `Ready`'s. False: do it in full."""
        recipe = self._recipe
        if recipe is not ready.recipe or selected() == "reference":
            return False
        state = self._state
        columns = ready.columns(params, grads, state["slots"])
        if columns is None:
            return False
        values = self._scalars(recipe, state["step"])
        if recipe.reductions:
            sums = ready.plan.squares(values, ready.odd(columns))
            values.append(_finite_norm(ready.keys, dict(zip(ready.keys, sums.tolist(), strict=True))))
        ready.plan.run(values)
        state["step"] += 1
        return True

    # -----------------------------------------------------------------------------------------------------------------
    # Saving

    def state_dict(self) -> dict[str, Any]:
        """A copy of the state as plain data, with the class and the hyperparameters it was made with.

        A schedule is recorded by its value at the present step.

        >>> import xpoptim as xo
        >>> xo.SGD(lr=0.5).state_dict()["hyperparameters"]["lr"]
        0.5
        """
        step = self._state["step"]
        name = type(self).__name__
        values = {n: hyperparameters.at(name, n, getattr(self, n), step) for n in (*self._fields, *self._options)}
        return {"class": name, "hyperparameters": values, **_copied_state(self._state)}

    def load_state_dict(self, d: Mapping[str, Any]) -> None:
        """Restore a state made by `state_dict`; the hyperparameters stay as they are.

        Raises ``ValueError`` if it is of another class, or its keys, shapes or dtypes differ from the present
        state's; the optimizer is then left as it was. Before the first step, they are compared with the parameters
        at the first step.

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
        if d.get("class") != name:
            raise ValueError(f"this state dict is of {d.get('class')!r}, not of {name!r}: load it into that optimizer")
        state = _copied_state(_plain_state(type(self), d))
        if self._state["slots"]:
            _check_same(self._state["slots"], state["slots"])
        object.__setattr__(self, "_state", state)
        object.__setattr__(self, "_ready", None)

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
        self._check(leaves, writing=True)
        self._slots_for(leaves, self._state)
        return Report(Served(leaf.key, *_engine_for(self._recipe, leaf, grads is not None)) for leaf in leaves)

    def source(self, kind: str, dtype: str = "float32", grad_dtype: str | None = None) -> Source:
        """The traced program (``"graph"``) or the code made of it (``"llvm"``) for one parameter dtype, as text.

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
        from .fusion.llvm import assembly

        writers = {"graph": str, "llvm": assembly}
        if kind not in writers:
            raise ValueError(f"source takes {' or '.join(map(repr, writers))}, not {kind!r}")
        for given in (dtype, grad_dtype or dtype):
            if given not in REAL_DTYPES + COMPLEX_DTYPES:
                raise ValueError(f"{given!r} is no parameter dtype: {', '.join(REAL_DTYPES + COMPLEX_DTYPES)}")
        passes = self._recipe.programs(dtype, grad_dtype or dtype).values()
        return Source("\n\n".join(writers[kind](program) for program in passes))


class Source(str):
    """Text that a prompt shows as it is printed."""

    def __repr__(self) -> str:
        return str(self)


# ---------------------------------------------------------------------------------------------------------------------
# Leaves and states


def _divided(recipe: Recipe, leaves: list[Leaf]) -> tuple[list[Leaf], list[Leaf]]:
    """The leaves for the fused engine, and those with a gradient for the reference engine."""
    engine = selected()
    fused, others = [], []
    for leaf in leaves:
        reason = _obstacle(recipe, leaf)
        if reason and engine == "fused" and leaf.g is not None:
            raise ValueError(f'{named("params", leaf.key)} cannot take the fused path: {reason} (xo.engine("auto") allows it)')
        if not reason and engine != "reference":
            fused.append(leaf)
        elif leaf.g is not None:
            others.append(leaf)
    return fused, others


def _obstacle(recipe: Recipe, leaf: Leaf) -> str:
    if not recipe.fused:
        return f"{recipe.name} says fused = False: it is plain Array API code"
    if leaf.space != "numpy":
        return f"there is no fused engine for {leaf.space} arrays"
    from .engines.cpu import obstacle

    return obstacle(leaf)


def _engine_for(recipe: Recipe, leaf: Leaf, with_gradient: bool) -> tuple[str, str]:
    if with_gradient and leaf.g is None:
        return "none", "its gradient is None: left as it is"
    if selected() == "reference":
        return "reference", 'chosen by xo.engine("reference") or XPOPTIM_ENGINE'
    reason = _obstacle(recipe, leaf)
    if reason:
        return "reference", reason
    if _replaced(leaf):
        kind = "a Python float" if isinstance(leaf.given, float) and not isinstance(leaf.given, np.generic) else "a NumPy scalar"
        return "fused", f"{kind}, through an array of its own; replaced in its container"
    return "fused", "dense NumPy arrays of equal layout"


def _trace_all(recipe: Recipe, leaves: list[Leaf]) -> None:
    """Trace the rule for leaves that no kernel is made for: what cannot be traced is an error on every engine."""
    if not recipe.fused or not leaves:
        return
    for dtype, g_dtype in {(leaf.dtype, leaf.g_dtype) for leaf in leaves}:
        recipe.programs(dtype, g_dtype)


def _replaced(leaf: Leaf) -> bool:
    """Whether the leaf is a number or an immutable array, which `update` replaces in its container."""
    return isinstance(leaf.given, float | np.generic) or not leaf.mutable


def _as_given(leaf: Leaf) -> Any:
    """The new value in the form that the user gave: a float for a float, a NumPy scalar for one, else the array."""
    if isinstance(leaf.given, np.generic):
        return leaf.p[()]
    return float(leaf.p) if isinstance(leaf.given, float) else leaf.p


def _started(start: Any, leaf: Leaf, name: str) -> Any:
    """A slot's first value, in the slot's dtype and the parameter's shape, layout and device."""
    xp = namespace(leaf.p)
    dtype = getattr(xp, slot_dtype(leaf.dtype))
    value = start(leaf.p) if callable(start) else start
    zeros = np.zeros_like(leaf.p, dtype=dtype, order="K") if leaf.space == "numpy" else xp.zeros_like(leaf.p, dtype=dtype)
    if isinstance(value, int | float) and value == 0:
        return zeros
    if not hasattr(value, "shape"):
        return xp.full_like(zeros, value)
    if tuple(value.shape) not in ((), tuple(leaf.p.shape)):
        raise ValueError(
            f"slot {name!r} of {named('params', leaf.key)} starts with shape {tuple(value.shape)}, "
            f"but the parameter has shape {tuple(leaf.p.shape)}"
        )
    if not leaf.mutable:
        return xp.astype(xp.broadcast_to(value, leaf.p.shape), dtype)
    zeros[...] = xp.astype(xp.asarray(value), dtype)
    return zeros


def _check_known(owner: str, leaves: list[Leaf], slots: dict[str, dict[str, Any]], names: tuple[str, ...]) -> None:
    """The set of keys is fixed by the first step."""
    keys = {leaf.key for leaf in leaves}
    for name in names:
        known = set(slots.get(name, ()))
        if keys != known:
            added, lost = sorted(keys - known), sorted(known - keys)
            change = "; ".join(f"{what} {', '.join(k)}" for what, k in (("new:", added), ("missing:", lost)) if k)
            raise ValueError(
                f"the parameters are not those of {owner}'s state ({change}): they are fixed by the first step; "
                "make a new optimizer for another set"
            )


def _fitting(slot: Any, leaf: Leaf, name: str) -> Any:
    """The slot as an array beside its parameter, if it fits."""
    place = f"slot {name!r} of {named('params', leaf.key)}"
    if not hasattr(slot, "shape"):
        raise ValueError(f"{place} is {type(slot).__name__}, not an array: the state was changed or is of another optimizer")
    if tuple(slot.shape) != tuple(leaf.p.shape) or dtype_name(slot) != slot_dtype(leaf.dtype):
        raise ValueError(
            f"{place} has shape {tuple(slot.shape)} and dtype {dtype_name(slot)}, but the parameter asks for shape "
            f"{tuple(leaf.p.shape)} and dtype {slot_dtype(leaf.dtype)}: shapes and dtypes are fixed by the first step"
        )
    space = namespace_name(slot)
    if space == leaf.space:
        if space != "numpy" and device_of(slot) != device_of(leaf.p):
            raise ValueError(f"{place} is on {device_of(slot)} but the parameter is on {device_of(leaf.p)}")
        return slot
    if space != "numpy":
        raise ValueError(f"{place} is a {space} array but the parameter is a {leaf.space} array: the namespace is fixed by the first step")
    return namespace(leaf.p).asarray(np.array(slot), dtype=getattr(namespace(leaf.p), dtype_name(slot)), device=device_of(leaf.p))


def _refuse_identical(leaves: list[Leaf]) -> None:
    """One mutable array under two keys, also where the library does not tell where its memory lies."""
    seen: dict[int, str] = {}
    for leaf in leaves:
        if leaf.mutable and not _replaced(leaf):
            if id(leaf.given) in seen and leaf.given.shape != () and 0 not in leaf.given.shape:
                first, second = named("params", seen[id(leaf.given)]), named("params", leaf.key)
                raise ValueError(f"{first} and {second} are the same array: they share memory; pass it once")
            seen[id(leaf.given)] = leaf.key


def _finite_norm(keys: list[str], sums: dict[str, float]) -> float:
    """The global norm from each leaf's sum of squares; an error that names the first bad leaf if it is not finite."""
    total = add_in_order([sums[key] for key in sorted(sums)])
    if not np.isfinite(total):
        bad = next((key for key in keys if not np.isfinite(sums.get(key, 0.0))), None)
        place = f"{named('grads', bad)} holds inf or NaN, or values too large to square" if bad else "their sum overflows"
        raise FloatingPointError(f"the norm of the gradients is {np.sqrt(total)}: {place}; nothing was changed")
    return float(np.sqrt(total))


def _plain_state(owner: type[Optimizer], state: Any) -> State:
    """A state as it should be, or a clear error."""
    name, slots = owner.__name__, owner._slot_names()
    if not isinstance(state, Mapping) or "step" not in state or "slots" not in state:
        raise ValueError(f"{name}: this is no optimizer state: it needs the entries 'step' and 'slots' (see init)")
    step = state["step"]
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ValueError(f"{name}: the state's step is {step!r}: it must be an int of at least 0")
    if not isinstance(state["slots"], Mapping) or (set(state["slots"]) != set(slots) and (state["slots"] or step)):
        found = ", ".join(state["slots"]) if isinstance(state["slots"], Mapping) else type(state["slots"]).__name__
        raise ValueError(f"the state has slots {found or 'none'}, but {name} has {', '.join(slots) or 'none'}: it is of another optimizer")
    if any(set(state["slots"][n]) != set(state["slots"][slots[0]]) for n in state["slots"]):
        raise ValueError(f"{name}: the slots of this state have different keys")
    return {"step": int(step), "slots": {n: dict(state["slots"][n]) for n in slots if n in state["slots"]}}


def _copied_state(state: State) -> State:
    return copy.deepcopy({k: v for k, v in state.items() if k != "slots"}) | {
        "slots": {name: {key: copied(a) for key, a in arrays.items()} for name, arrays in state["slots"].items()}
    }


def _check_same(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> None:
    """Two sets of slots must have the same keys, shapes and dtypes."""
    for name in old:
        if set(old[name]) != set(new.get(name, ())):
            raise ValueError(
                f"the state dict has slot {name!r} for {', '.join(sorted(new.get(name, ()))) or 'nothing'}, "
                f"but this optimizer has it for {', '.join(sorted(old[name]))}"
            )
        for key, a in old[name].items():
            b = new[name][key]
            if tuple(a.shape) != tuple(b.shape) or dtype_name(a) != dtype_name(b):
                raise ValueError(
                    f"slot {name!r} of {key!r} has shape {tuple(b.shape)} and dtype {dtype_name(b)} in the state dict, "
                    f"but shape {tuple(a.shape)} and dtype {dtype_name(a)} in this optimizer"
                )
