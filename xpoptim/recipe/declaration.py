"""What a class of optimizers declares, hyperparameters, slots and a rule, and the hyperparameters of one of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Set
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar, Self, dataclass_transform

from ..arrays.types import Array
from ..errors import TraceError, habits
from . import options
from .annotations import resolved
from .hyperparameters import Hyperparameter
from .recipe import Recipe


@dataclass_transform(eq_default=False)
class Declaration:
    """The base of `Optimizer`, whose own fields are the options that every optimizer has.

    To type checkers a subclass is like a dataclass: its annotated fields are the arguments of its constructor.
    """

    capturable: bool  # an option that concerns every engine

    slots: ClassVar[tuple[str, ...] | Mapping[str, complex | Array | Callable[[Any], Any]]] = ()
    fused: ClassVar[bool] = True
    rule: ClassVar[Callable[..., object]]

    _declared_here: ClassVar[Mapping[str, Hyperparameter]] = {}  # by the class itself
    _declared: ClassVar[Mapping[str, Hyperparameter]] = {}  # with those that it inherits
    _options: ClassVar[tuple[str, ...]] = ()
    _hyperparameters: ClassVar[tuple[str, ...]] = ()  # the rule's, in order
    _signature: ClassVar[inspect.Signature]
    _sections: ClassVar[Mapping[str, str]] = {}  # of the docstring, by heading: what the arguments mean
    _reserved: ClassVar[frozenset[str]] = frozenset()  # names that no hyperparameter or slot may have
    _takes: ClassVar[tuple[str, ...]] = ()  # the keywords of the rule
    __signature__: ClassVar[inspect.Signature]

    # With leading underscores, so no hyperparameters.
    _version: object  # another object after every assignment
    # What follows from the hyperparameters of a version: the recipe, and their values unless one is a schedule.
    _derived: tuple[object, Recipe | None, tuple[float, ...] | None]

    # -----------------------------------------------------------------------------------------------------------------
    # The class: fields, slots and rule

    def __init_subclass__(cls, *, options: bool = False, kw_only: bool = False, **kwargs: object) -> None:
        """``options``: the fields are those of every optimizer, and what else the class has is no hyperparameter."""
        super().__init_subclass__(**kwargs)
        annotations = {
            name: kind
            for name, kind in inspect.get_annotations(cls).items()
            if "ClassVar" not in str(kind) and not name.startswith("_")
        }
        own = {}
        for name, kind in resolved(cls, annotations).items():
            before, option = cls._declared.get(name, Hyperparameter()), options or name in cls._options
            try:
                own[name] = Hyperparameter.declared(kind, before, option=option, keyword_only=kw_only or option)
            except TypeError as error:
                raise TypeError(f"{cls.__name__}.{name}: {error}") from None
        cls._declared_here = own
        cls._check_defaults()
        # In the order of dataclasses, and so of type checkers: what is declared again keeps its place.
        bases = [base for base in reversed(cls.__mro__) if issubclass(base, Declaration)]
        cls._declared = {name: declared for base in bases for name, declared in base._declared_here.items()}
        if options:
            cls._options = tuple(own)
            cls._reserved = frozenset({"xp", "p", "g", "t", "norm", *dir(cls)} - {*own, *habits.METHODS})
        else:
            cls._hyperparameters = tuple(name for name in cls._declared if name not in cls._options)
            cls._check_names(own.keys() - {*cls._options})
        cls._signature = cls.__signature__ = cls._make_signature()
        if cls.__init__ is not Declaration.__init__:
            _, *rest = inspect.signature(cls.__init__).parameters.values()
            cls.__signature__ = inspect.Signature(rest)
        cls._document()
        if "rule" in cls.__dict__:
            cls._takes = cls._inspect_rule()

    @classmethod
    def _check_defaults(cls) -> None:
        """What looks like another default of a hyperparameter has to be one."""
        for name, value in vars(cls).items():
            known = {*cls._declared, *cls._declared_here, "fused"}
            plain = isinstance(value, bool | int | float | str | None) and not name.startswith("_")
            hint = habits.near(name, known) if plain and name not in known else ""
            if hint:
                raise TypeError(f"{cls.__name__} has no hyperparameter {name!r}{hint}; annotate it if it is a new one")

    @classmethod
    def _check_names(cls, fields: Set[str]) -> None:
        """Names of hyperparameters and slots must not meet each other or ours."""
        bad = sorted(name for name in fields if name in cls._reserved)
        slots = () if bad else cls._slot_names()
        bad += [s for s in slots if not s.isidentifier() or s in {"xp", "p", "g", "t", *cls._hyperparameters}]
        bad += sorted({s for s in slots if slots.count(s) > 1})
        if bad:
            raise TypeError(
                f"{cls.__name__}: {bad[0]!r} cannot name a hyperparameter or slot (it is taken): choose another"
            )

    @classmethod
    def _make_signature(cls) -> inspect.Signature:
        def parameter(name: str, keyword_only: bool) -> inspect.Parameter:
            kind = inspect.Parameter.KEYWORD_ONLY if keyword_only else inspect.Parameter.POSITIONAL_OR_KEYWORD
            return inspect.Parameter(name, kind, default=getattr(cls, name, inspect.Parameter.empty))

        names = sorted((*cls._hyperparameters, *cls._options), key=lambda name: cls._declared[name].keyword_only)
        parameters = [parameter(name, cls._declared[name].keyword_only) for name in names]
        for before, one in pairwise(one for one in parameters if one.kind is not one.KEYWORD_ONLY):
            if one.default is one.empty is not before.default:
                raise TypeError(
                    f"{cls.__name__}.{one.name} has no default, but comes behind {before.name}, which has one: "
                    "give it one, or declare the class with kw_only=True"
                )
        return inspect.Signature(parameters)

    @classmethod
    def _document(cls) -> None:
        """Give the docstring what it lacks of its bases' arguments: the options are described in `Optimizer` alone."""
        text, sections = inspect.cleandoc(cls.__dict__.get("__doc__") or ""), {}

        def with_own_default(line: re.Match[str]) -> str:
            return f"{line[1]}{getattr(cls, line[2])!r}" if hasattr(cls, line[2]) else line[0]

        for heading in ("Parameters", "Other Parameters"):
            written = re.search(rf"(?ms)^{heading}\n---.*?(?=\n\n|\Z)", text)
            inherited = re.sub(r"(?m)^((\w+) : .*, default ).*", with_own_default, cls._sections.get(heading, ""))
            sections[heading] = written[0] if written else inherited
            text += f"\n\n{inherited}" if text and inherited and not written else ""
        cls._sections, cls.__doc__ = sections, text or None

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
        scalars = {"t", *cls._hyperparameters}
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
                hint = f"; annotate it: {keyword}: xo.Hyper = ..." if hasattr(cls, keyword) else ""
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
            first = next(iter(cls._hyperparameters), "")
            habits.refuse_parameters(cls.__name__, first and f"{first}=...", args[0])
        known = cls._signature.parameters
        unknown = [f"{name!r}{habits.keyword(name, known)}" for name in kwargs if name not in known]
        if unknown:
            raise TypeError(f"{cls.__name__}{cls._signature}: unexpected keyword argument {', '.join(unknown)}")
        try:
            bound = cls._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{cls.__name__}{cls._signature}: {error}") from None
        bound.apply_defaults()
        for name, value in bound.arguments.items():
            setattr(self, name, value)

    if not TYPE_CHECKING:  # a checker would take any name for granted

        def __setattr__(self, name: str, value: object) -> None:
            cls = type(self)
            declared = cls._declared.get(name)
            if declared is None:
                if name == "state":
                    raise AttributeError(f"{cls.__name__}.state cannot be assigned: use load_state_dict")
                if name in habits.METHODS:
                    getattr(cls, name)  # raises
                known = (*cls._hyperparameters, *cls._options)
                hint = habits.keyword(name, known)
                raise AttributeError(f"{cls.__name__} has no hyperparameter {name!r}{hint}; it has {', '.join(known)}")
            if name == "decoupled" and value and "lr" not in cls._hyperparameters:
                raise TypeError(f"{cls.__name__}: decoupled weight decay needs a hyperparameter named lr")
            value = declared.checked(cls.__name__, name, value)
            # Before and after: what is derived in between is outdated, also if a signal handler raises in between.
            object.__setattr__(self, "_version", object())
            object.__setattr__(self, name, value)
            object.__setattr__(self, "_version", object())

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in habits.METHODS or hasattr(self, name)]

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} cannot be deleted; assign another value")

    def __repr__(self) -> str:
        parts = [f"{name}={getattr(self, name)!r}" for name in self._hyperparameters]
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
        values = [self._declared[name].at(owner, name, getattr(self, name), step) for name in recipe.hyperparameters]
        return recipe, [step + 1.0, *values]

    def _derive(self) -> tuple[Recipe, tuple[float, ...] | None]:
        """What a signal handler assigns in the middle of this makes it outdated."""
        version, old = self._version, self._derived[1]
        static = [name for name in self._hyperparameters if self._declared[name].choices]
        recipe = Recipe(
            name=f"{type(self).__name__}.rule",
            rule=type(self).rule,
            slots=self._slot_names(),
            takes=self._takes,
            statics=tuple((name, getattr(self, name)) for name in static),
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
