"""What a class declares: ranges, static fields, and annotations that are strings."""

from __future__ import annotations

import copy
import inspect
import math
import pickle
import typing
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import annotated_types
import numpy as np
import pytest
import strategies
from annotated_types import Ge, Gt, Interval, Le, Lt, MultipleOf, Predicate
from cases import CASES
from hypothesis import given
from hypothesis import strategies as st

import xpoptim as xo

if TYPE_CHECKING:
    pass

pytestmark = pytest.mark.smoke

Rate = Annotated[xo.Hyper, Ge(0), Le(2)]


class Ranged(xo.Optimizer):
    momentum: float = 1.5
    lr: xo.Hyper = -3.0
    rho: Annotated[xo.Hyper, Ge(0)] = 0.5
    rate: Rate = 1.0
    wide: Annotated[float, Gt(-math.inf), Le(math.inf)] = math.inf
    odds: Annotated[float, Gt(0)] | Annotated[xo.Hyper, Interval(lt=3)] = 2.0

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, *, momentum: Any, lr: Any, rho: Any, rate: Any, wide: Any, odds: Any) -> Any:
        return p + momentum * lr * rho * rate * odds * g + xp.minimum(wide, 0.0)


# (field, what it takes, what it refuses, words of the refusal)
RANGES = [
    ("momentum", [1.5, -1, 1e300], [math.nan, math.inf, -math.inf], "it must be finite"),
    ("lr", [-3, 0], [math.nan, math.inf], "it must be finite"),
    ("rho", [0, 1e300], [-1e-300, -3], "it must be at least 0"),
    ("rate", [0, 2, 1.0], [-0.1, 2.1], "it must be at least 0 and at most 2"),
    ("odds", [1e-9, 2.9], [0, 3], "it must be above 0 and below 3"),
    ("wide", [math.inf, -1e300], [-math.inf, math.nan], "it must be finite"),
]


@pytest.mark.parametrize(("field", "good", "bad", "words"), RANGES)
def test_ranges_are_those_declared(field: str, good: list[float], bad: list[float], words: str) -> None:
    opt = Ranged()
    for value in good:
        setattr(opt, field, value)
        assert getattr(opt, field) == value
        assert getattr(Ranged(**{field: value}), field) == value
    for value in map(float, bad):
        before = getattr(opt, field)
        for refused in (lambda value=value: setattr(opt, field, value), lambda value=value: Ranged(**{field: value})):
            with pytest.raises(ValueError, match=rf"^Ranged: {field} is {value}: {words}$"):
                refused()
        assert getattr(opt, field) == before
        params = {"p": np.ones(2)}
        with pytest.raises(ValueError, match=rf"^Ranged: {field} \(its schedule at step 0\) is {value}: {words}$"):
            Ranged(**{field: lambda step, value=value: value}).update(params, params)


def test_the_refusals_of_the_package_name_range_and_switch() -> None:
    for values, words in [
        ({"beta1": 1}, "Adam: beta1 is 1.0: it must be at least 0 and below 1"),
        ({"lr": -1}, "Adam: lr is -1.0: it must be at least 0"),
        ({"clip_norm": 0}, "Adam: clip_norm is 0.0: it must be above 0 (None switches it off)"),
        ({"clip_norm": math.nan}, "Adam: clip_norm is nan: it must be finite"),
        ({"maximize": 1}, "Adam: maximize is 1: it takes True or False"),
    ]:
        with pytest.raises((ValueError, TypeError)) as info:
            xo.Adam(**values)  # type: ignore[arg-type]
        assert str(info.value) == words


@pytest.mark.parametrize(
    ("limits", "words"),
    [
        ([Ge("a")], "its limits are numbers"),  # type: ignore[arg-type]
        ([Interval(ge=math.nan)], "its limits are numbers"),
        ([Ge], "its limits are numbers"),
        ([Ge(2), Lt(1)], "no number is at least 2 and below 1"),
        ([Gt(math.inf)], "no number is above inf"),
        ([MultipleOf(2)], "is no range"),
    ],
)
def test_a_range_that_is_none_is_refused_where_it_is_declared(limits: list[object], words: str) -> None:
    fields = {"__annotations__": {"rho": Annotated[(xo.Hyper, *limits)]}, "rho": 1.0}
    with pytest.raises(TypeError, match=rf"^Mine\.rho: .*{words}"):
        type("Mine", (xo.SGD,), fields)


def test_a_field_without_default_behind_one_with_a_default_is_named() -> None:
    with pytest.raises(TypeError, match=r"^Mine\.rho has no default, but comes behind lr, .*kw_only=True"):

        class Mine(xo.SGD):
            rho: float

    class Other(xo.SGD, kw_only=True):
        rho: float

    assert Other(rho=1.0).rho == 1.0  # type: ignore[attr-defined]


@pytest.mark.parametrize("wrong", [MultipleOf(2), Predicate(math.isfinite)], ids=["multiple", "predicate"])
def test_metadata_that_would_not_be_checked_is_refused(wrong: object) -> None:
    with pytest.raises(TypeError, match="Ge, Gt, Le, Lt or Interval of annotated-types"):
        type("Bad", (xo.Optimizer,), {"__annotations__": {"x": Annotated[float, wrong]}, "x": 1.0})


def test_other_metadata_is_left_alone() -> None:
    kind = Annotated[float, "metres", annotated_types.doc("how far"), len]
    made = type("Good", (xo.SGD,), {"__annotations__": {"x": kind}, "x": 1.0})
    assert made(x=-1).x == -1


def test_an_inherited_range_stays_with_another_default_and_gives_way_to_another_range() -> None:
    class Defaults(xo.Momentum):
        lr = 0.5
        momentum: float = 0.5

    class Wider(xo.Momentum):
        momentum: Annotated[float, Interval(ge=0, le=1)] = 1.0
        clip_norm: float = 1.0  # type: ignore[assignment]

    assert (Defaults().lr, Defaults().momentum, Wider(momentum=1.0).momentum) == (0.5, 0.5, 1.0)
    assert Wider(clip_norm=None).clip_norm is None  # type: ignore[arg-type]
    for refused in (lambda: Defaults(momentum=1.0), lambda: Defaults(lr=-1), lambda: Wider(momentum=1.1)):
        with pytest.raises(ValueError, match="it must be"):
            refused()


def test_the_packages_declarations_can_be_read_by_other_tools() -> None:
    """They are in annotated-types' own protocol, which hypothesis and pydantic read."""
    for name, expected in (("lr", [Ge(0)]), ("beta1", [Ge(0), Lt(1)])):
        kind = typing.get_type_hints(xo.Adam, include_extras=True)[name]
        (group,) = kind.__metadata__
        assert isinstance(group, annotated_types.GroupedMetadata)
        assert list(group) == expected


# --- static fields


class Modes(xo.Optimizer):
    lr: float = 0.5
    mode: Literal["plain", "sign", 3] = "plain"
    turned: bool | None = None
    slots = ("m",)
    seen: ClassVar[list[object]] = []

    @staticmethod
    def rule(xp: Any, p: Any, g: Any, m: Any, *, lr: Any, mode: object, turned: bool | None) -> Any:
        Modes.seen.append((mode, turned))
        g = -g if turned else g
        return p - lr * (xp.sign(g) if mode == "sign" else g * 3 if mode == 3 else g), m


def test_a_rule_may_branch_on_literals_and_is_traced_again_when_they_change() -> None:
    Modes.seen.clear()
    opt, params = Modes(), {"p": np.zeros(1)}
    steps = [("plain", None, -1.0), ("sign", None, -0.5), (3, None, -3.0), (3, True, 3.0), ("sign", False, -0.5)]
    for engine in ("fused", "reference"):
        for mode, turned, change in steps:
            opt.mode, opt.turned = mode, turned  # type: ignore[assignment]
            for _ in range(2):
                params["p"][:] = 0
                with xo.engine(engine):
                    opt.update(params, {"p": np.array([2.0])})
                assert params["p"][0] == change
    assert set(Modes.seen) == {(mode, turned) for mode, turned, _ in steps}
    assert len(Modes.seen) <= 2 * len(steps)


@pytest.mark.parametrize(
    ("value", "error"),
    [("other", ValueError), (4, ValueError), (True, TypeError), (3.0, TypeError), (None, TypeError), ([], TypeError)],
)
def test_another_value_than_the_literals(value: Any, error: type[Exception]) -> None:
    opt = Modes(mode="sign")
    for refused in (lambda: Modes(mode=value), lambda: setattr(opt, "mode", value)):
        with pytest.raises(error, match=r"^Modes: mode is .*: it takes 'plain', 'sign' or 3$"):
            refused()
    assert opt.mode == "sign"
    with pytest.raises(TypeError, match=r"turned is 1: it takes True, False or None$"):
        Modes(turned=1)  # type: ignore[arg-type]


def test_literals_are_kept() -> None:
    opt = Modes(mode=np.str_("sign"), turned=np.bool_(True))  # type: ignore[arg-type]
    assert (type(opt.mode), type(opt.turned)) == (str, bool)
    assert repr(opt) == "Modes(lr=0.5, mode='sign', turned=True)"
    assert opt.state_dict()["hyperparameters"] | {"mode": "sign", "turned": True} == opt.state_dict()["hyperparameters"]
    for again in (copy.copy(opt), copy.deepcopy(opt), pickle.loads(pickle.dumps(opt))):
        assert (again.mode, again.turned, repr(again)) == ("sign", True, repr(opt))


# --- what annotations name


def test_annotations_may_name_what_is_local() -> None:
    """This module's are strings, as ``from __future__ import annotations`` makes them."""
    Local = Annotated[xo.Hyper, Ge(0)]
    Mode = Literal["a", "b"]

    def make() -> type[xo.Optimizer]:
        Inner = Annotated[xo.Hyper, Lt(1)]

        class Made(xo.SGD):
            x: Local = 0.5
            y: Inner = 0.5
            mode: Mode = "a"
            flag: bool = False

        return Made

    made: Any = make()
    assert made(mode="b", flag=True, x=2.0).mode == "b"
    for bad in ({"x": -1}, {"y": 1}, {"mode": "c"}):
        with pytest.raises(ValueError, match=r"it must be|it takes"):
            made(**bad)


def test_annotations_of_code_that_is_no_module() -> None:
    """As in a notebook or a doctest: names are found where the class statement runs."""
    code = "from __future__ import annotations\nimport xpoptim as xo\nfrom typing import Literal\nKind = Literal['a']\n"
    names: dict[str, Any] = {}
    exec(code + "class Made(xo.SGD):\n    kind: Kind = 'a'\n", names)
    with pytest.raises(ValueError, match="it takes 'a'"):
        names["Made"](kind="b")


def test_annotations_with_strings_inside() -> None:
    kind = Annotated["float", Ge(0)]
    made: Any = type("Made", (xo.SGD,), {"__annotations__": {"x": kind, "f": "bool"}, "x": 1.0, "f": False})
    assert made(x=2.0, f=True).f is True
    with pytest.raises(ValueError, match="at least 0"):
        made(x=-1)


@pytest.mark.parametrize("annotation", ["Unknown", "xo.unknown", "ForCheckersAlone", "float |", "1 / 0"])
def test_an_annotation_that_cannot_be_evaluated(annotation: str) -> None:
    with pytest.raises(TypeError, match=r"^Bad\.x is annotated .*, which cannot be evaluated .*: import or define"):
        type("Bad", (xo.SGD,), {"__annotations__": {"x": annotation}, "x": 1.0})


def test_what_is_no_hyperparameter_may_be_annotated_as_one_likes() -> None:
    class Made(xo.SGD):
        _own: Unknown = 3  # type: ignore[name-defined]  # noqa: F821
        other: ClassVar[Unknown] = 4  # type: ignore[name-defined]  # noqa: F821

    assert list(inspect.signature(Made).parameters)[:2] == ["lr", "weight_decay"]


# --- arguments of the constructor


def kinds(made: type) -> list[tuple[str, bool]]:
    """Of the arguments that are not options."""
    found = inspect.signature(made).parameters
    return [(p.name, p.kind is p.KEYWORD_ONLY) for p in found.values() if not hasattr(xo.Optimizer, p.name)]


def test_keyword_only_fields() -> None:
    class Made(xo.Momentum, kw_only=True):
        rho: float = 1.0
        weight_decay: float = 0.5

    class Further(Made):
        tau: float = 2.0
        weight_decay: float = 0.25

    assert kinds(Made) == [("lr", False), ("momentum", False), ("rho", True)]
    assert kinds(Further) == [("lr", False), ("momentum", False), ("tau", False), ("rho", True)]
    assert (Further(0.1, 0.2, 3.0).tau, Further().weight_decay, Made(rho=3.0).rho) == (3.0, 0.25, 3.0)
    with pytest.raises(TypeError, match="too many positional"):
        Made(0.1, 0.2, 0.3)  # type: ignore[misc]
    assert repr(Further(0.1)).startswith("Further(lr=0.1, momentum=0.9, rho=1.0, tau=2.0")


def test_fields_of_several_bases() -> None:
    """In the order of dataclasses, which type checkers take."""

    class A(xo.SGD):
        a: float = 1.0

    class B(xo.SGD):
        b: Annotated[float, Ge(0)] = 2.0
        lr: float = 0.5

    class Both(A, B):
        @staticmethod
        def rule(xp: Any, p: Any, g: Any, *, lr: Any, a: Any, b: Any) -> Any:
            return p - lr * a * b * g

    assert kinds(Both) == [("lr", False), ("b", False), ("a", False)]
    assert (Both().lr, Both(0.1, 0.2, 0.3).b) == (0.5, 0.2)
    with pytest.raises(ValueError, match="at least 0"):
        Both(b=-1)


def test_a_constructor_of_ones_own() -> None:
    class Made(xo.Adam):
        def __init__(self, size: int, *, lr: float = 0.5) -> None:
            super().__init__(lr=lr / size, weight_decay=0.1)

    assert str(inspect.signature(Made)) == "(size: 'int', *, lr: 'float' = 0.5)"
    opt = Made(2)
    assert (opt.lr, opt.weight_decay, opt.beta1) == (0.25, 0.1, 0.9)
    assert pickle.loads(pickle.dumps(xo.Adam(lr=0.25))).lr == copy.deepcopy(opt).lr == 0.25
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        xo.Adam.__init__(opt, size=3)  # type: ignore[call-arg]


def test_a_required_argument() -> None:
    class Needed(xo.Optimizer):
        lr: float

        @staticmethod
        def rule(xp: Any, p: Any, g: Any, *, lr: Any) -> Any:
            return p - lr * g

    assert Needed(0.5).lr == 0.5
    with pytest.raises(TypeError, match="missing a required argument: 'lr'"):
        Needed()  # type: ignore[call-arg]


ARGUMENTS = [(name, field) for name in CASES for field in inspect.signature(getattr(xo, name)).parameters]


@given(st.sampled_from(ARGUMENTS), st.data())
def test_whatever_is_declared_is_taken(argument: tuple[str, str], data: st.DataObject) -> None:
    name, field = argument
    value = data.draw(strategies.values(getattr(xo, name), field))
    opt = getattr(xo, name)(**{field: value})
    assert getattr(opt, field) == value
    setattr(opt, field, value)
    if type(value) is float and math.isfinite(value):
        declared = opt._declared[field]
        above = math.nextafter(declared.high, math.inf) if math.isfinite(declared.high) else math.nan
        for beyond in (math.nextafter(declared.low, -math.inf), above):
            with pytest.raises(ValueError, match=field):
                setattr(opt, field, beyond)
        assert getattr(opt, field) == value


def test_a_default_under_a_misspelt_name_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Mine has no hyperparameter 'wieght_decay'.*weight_decay.*annotate it"):

        class Mine(xo.Adam):
            wieght_decay = 0.3


def test_constants_of_other_names_and_private_ones_are_the_classs_own() -> None:
    class Mine(xo.Adam):
        weight_decay = 0.1
        rounds = 7
        _lr = 1.0

    assert Mine().weight_decay == 0.1
    assert Mine.rounds == 7
