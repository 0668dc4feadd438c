"""What a class of optimizers declares, hyperparameters, slots and a rule, and the hyperparameters of one of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import ClassVar, Self

from ..errors import TraceError, habits
from . import hyperparameters, options
from .recipe import Recipe


class Declaration:
    """The base of `Optimizer`, whose own fields are the options that every optimizer has."""

    capturable: bool  # an option that concerns every engine

    slots: ClassVar[tuple[str, ...] | Mapping[str, object]] = ()
    fused: ClassVar[bool] = True
    rule: ClassVar[Callable[..., object]]

    _options: ClassVar[tuple[str, ...]] = ()
    _optional: ClassVar[frozenset[str]] = frozenset()  # options that None switches off
    _reserved: ClassVar[frozenset[str]] = frozenset()  # names that no hyperparameter or slot may have
    _fields: ClassVar[tuple[str, ...]] = ()  # the rule's hyperparameters, in order
    _static: ClassVar[frozenset[str]] = frozenset()
    _takes: ClassVar[tuple[str, ...]] = ()  # the keywords of the rule
    __signature__: ClassVar[inspect.Signature]

    # With leading underscores, so no hyperparameters.
    _version: object  # another object after every assignment
    # What follows from the hyperparameters of a version: the recipe, and their values unless one is a schedule.
    _derived: tuple[object, Recipe | None, tuple[float, ...] | None]

    # -----------------------------------------------------------------------------------------------------------------
    # The class: fields, slots and rule

    def __init_subclass__(cls, *, options: bool = False, **kwargs: object) -> None:
        """``options``: the fields are those of every optimizer, and what else the class has is no hyperparameter."""
        super().__init_subclass__(**kwargs)
        own = {
            name: kind
            for name, kind in inspect.get_annotations(cls).items()
            if "ClassVar" not in str(kind) and name not in cls._options and not name.startswith("_")
        }
        cls._static = cls._static | {name for name, kind in own.items() if kind is bool or kind == "bool"}
        if options:
            cls._options = tuple(own)
            cls._optional = frozenset(name for name in own if getattr(cls, name) is None)
            cls._reserved = frozenset({"xp", "p", "g", "t", "norm", *dir(cls)} - {*own, *habits.METHODS})
            cls.__signature__ = cls._make_signature()
            return
        cls._check_names(own)
        cls._fields = (*cls._fields, *(name for name in own if name not in cls._fields))
        cls.__signature__ = cls._make_signature()
        if "rule" in cls.__dict__:
            cls._takes = cls._inspect_rule()

    @classmethod
    def _check_names(cls, fields: Mapping[str, object]) -> None:
        """Names of hyperparameters and slots must not meet each other or ours."""
        bad = sorted(name for name in fields if name in cls._reserved)
        slots = () if bad else cls._slot_names()
        bad += [s for s in slots if not s.isidentifier() or s in {"xp", "p", "g", "t", *fields, *cls._fields}]
        bad += sorted({s for s in slots if slots.count(s) > 1})
        if bad:
            raise TypeError(
                f"{cls.__name__}: {bad[0]!r} cannot name a hyperparameter or slot (it is taken): choose another"
            )

    @classmethod
    def _make_signature(cls) -> inspect.Signature:
        def parameter(name: str, kind: inspect._ParameterKind) -> inspect.Parameter:
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
    def _slot_starts(cls) -> Mapping[str, object]:
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
    # The object: hyperparameters

    def __new__(cls, *args: object, **kwargs: object) -> Self:
        new = object.__new__(cls)
        object.__setattr__(new, "_version", object())
        object.__setattr__(new, "_derived", (None, None, None))
        return new

    def __init__(self, *args: object, **kwargs: object) -> None:
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

    def __setattr__(self, name: str, value: object) -> None:
        cls = type(self)
        if name not in cls._fields and name not in cls._options:
            if name == "state":
                raise AttributeError(f"{cls.__name__}.state cannot be assigned: use load_state_dict")
            if name in habits.METHODS:
                getattr(cls, name)  # raises
            known = (*cls._fields, *cls._options)
            hint = habits.keyword(name, known)
            raise AttributeError(f"{cls.__name__} has no hyperparameter {name!r}{hint}; it has {', '.join(known)}")
        if name == "decoupled" and value and "lr" not in cls._fields:
            raise TypeError(f"{cls.__name__}: decoupled weight decay needs a hyperparameter named lr")
        value = hyperparameters.checked(
            cls.__name__, name, value, static=name in cls._static, optional=name in cls._optional
        )
        # Before and after: what is derived in between is outdated, and so it is if a signal handler raises in between.
        object.__setattr__(self, "_version", object())
        object.__setattr__(self, name, value)
        object.__setattr__(self, "_version", object())

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in habits.METHODS or hasattr(self, name)]

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted; assign another value")

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self._fields]
        parts += [f"{n}={getattr(self, n)!r}" for n in self._options if getattr(self, n) != getattr(type(self), n)]
        return f"{type(self).__name__}({', '.join(parts)})"

    @property
    def _recipe(self) -> Recipe:
        """What a step computes with the present hyperparameters."""
        return self._derive()[0]

    def _scalars(self, step: int) -> tuple[Recipe, list[float]]:
        """The recipe, and its inputs at a step (0-based): t, then the hyperparameters in the recipe's order."""
        version, recipe, constants = self._derived
        if recipe is None or version is not self._version:
            recipe, constants = self._derive()
        if constants is not None:
            return recipe, [step + 1.0, *constants]
        owner = type(self).__name__
        values = [hyperparameters.at(owner, name, getattr(self, name), step) for name in recipe.hyperparameters]
        return recipe, [step + 1.0, *values]

    def _derive(self) -> tuple[Recipe, tuple[float, ...] | None]:
        """What a signal handler assigns in the middle of this makes it outdated."""
        version, old = self._version, self._derived[1]
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
        # The same recipe keeps the same object, so that "has anything changed?" is one comparison.
        recipe = old if old is not None and old == recipe else recipe
        values = tuple(getattr(self, name) for name in recipe.hyperparameters)
        constants = values if all(type(value) is float for value in values) else None
        object.__setattr__(self, "_derived", (version, recipe, constants))
        return recipe, constants
