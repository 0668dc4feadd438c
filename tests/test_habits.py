"""Errors for habits of other libraries: each says what to write instead, and changes nothing."""

import inspect
import pydoc
import re
from collections import UserDict, UserList, deque
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from helpers import RULES, make_optimizer, refused, step_count

import xpoptim as xo
from xpoptim.errors.hints import near

ARRAYS = {"W": np.ones(2), "b": np.ones(3)}


class Layer:
    """The book's: arrays and their gradients in attributes of their own."""

    def __init__(self) -> None:
        self.params = {"W": np.ones(2)}
        self.grads = {"W": np.ones(2)}


class Plain:
    def __init__(self) -> None:
        self.W, self.b, self.name = np.ones(2), np.ones(3), "layer"


class Module:
    """As a torch module: it can be called, and gives its parameters by a method."""

    def __call__(self, x: Any) -> Any:
        return x

    def parameters(self) -> Any:
        yield from ARRAYS.values()


class Slotted:
    __slots__ = ("W",)


def generator() -> Any:
    yield from ARRAYS.values()


# ---- Parameters given to the optimizer itself ------------------------------------------------------------------


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(
    "first",
    [
        ARRAYS,
        {},
        list(ARRAYS.values()),
        tuple(ARRAYS.values()),
        ARRAYS.values(),
        ARRAYS.items(),
        generator(),
        iter([np.ones(2)]),
        {1.0},
        np.ones(2),
        np.ones((1, 1)),
        MappingProxyType(ARRAYS),
        Layer(),
        Plain(),
        Module(),
        Module().parameters(),
    ],
    ids=lambda first: type(first).__name__,
)
def test_parameters_as_first_argument(name: str, first: Any) -> None:
    kind = getattr(xo, name)
    for call in (lambda: kind(first, lr=0.1), lambda: kind(first)):
        with pytest.raises(TypeError) as info:
            call()
        assert f"{name} takes no parameters" in str(info.value)
        assert f"opt = {name}(lr=...), then opt.update(params, grads)" in str(info.value)


def test_parameters_for_a_rule_without_hyperparameters() -> None:
    class Bare(xo.Optimizer):
        @staticmethod
        def rule(xp, p, g):
            return p - g

    with pytest.raises(TypeError, match=r"opt = Bare\(\), then"):
        Bare(ARRAYS)


@pytest.mark.parametrize("first", [np.array(0.5), np.float32(0.5), lambda step: 0.5, SimpleNamespace])
def test_hyperparameters_as_first_argument(first: Any) -> None:
    xo.SGD(first)


def test_a_schedule_may_hold_what_it_likes() -> None:
    class Schedule:
        def __init__(self) -> None:
            self.params, self.table = {"base": 0.5}, np.array([0.5, 0.25])

        def __call__(self, step: int) -> float:
            return float(self.table[step])

    opt, params = xo.SGD(Schedule()), [np.ones(1)]
    opt.update(params, [np.ones(1)])
    assert params[0][0] == 0.5


class Fitted:
    """A curve, with what was fitted."""

    def __init__(self, parameters: Any) -> None:
        self.parameters = self.named_parameters = parameters

    def __call__(self, step: int) -> float:
        return 0.5 / (1 + step)


@pytest.mark.parametrize("parameters", [(0.5, 1.0), {"lr": 0.5}, np.ones(2), [np.ones(2)], 2.0], ids=str)
def test_a_schedule_may_have_parameters(parameters: Any) -> None:
    params = [np.ones(1)]
    xo.SGD(Fitted(parameters)).update(params, [np.ones(1)])
    assert params[0][0] == 0.5


@pytest.mark.parametrize("method", ["parameters", "named_parameters"])
@pytest.mark.parametrize("kind", [lambda f: f, staticmethod, classmethod], ids=["plain", "static", "class"])
def test_a_model_that_can_be_called_is_no_schedule(kind: Any, method: str) -> None:
    model = type("Model", (), {"__call__": lambda self, x: x, method: kind(lambda *self: iter(()))})()
    with pytest.raises(TypeError, match="SGD takes no parameters"):
        xo.SGD(model)


class Table(dict[int, float]):
    def __call__(self, step: int) -> float:
        return self[step]


class Steps(list[float]):
    def __call__(self, step: int) -> float:
        return list(self)[step]


class Values(np.ndarray):
    def __call__(self, step: int) -> float:
        return float(self[step])


@pytest.mark.parametrize(
    "schedule", [Table({0: 0.5}), Steps([0.5]), np.array([0.5, 0.25]).view(Values)], ids=lambda x: type(x).__name__
)
def test_a_schedule_may_be_a_container(schedule: Any) -> None:
    params = [np.ones(1)]
    xo.SGD(schedule).update(params, [np.ones(1)])
    assert params[0][0] == 0.5


# ---- Names ------------------------------------------------------------------------------------------------------

KEYWORDS = [
    ("SGD", "learning_rate", "'lr'"),
    ("SGD", "learn_rate", "'lr'"),
    ("SGD", "LR", "'lr'"),
    ("SGD", "momentum", "xo.Momentum"),
    ("SGD", "wd", "'weight_decay'"),
    ("Momentum", "nesterov", "xo.Nesterov"),
    ("Adam", "betas", "beta1=... and beta2=..."),
    ("Adam", "beta_1", "'beta1'"),
    ("Adam", "beta_2", "'beta2'"),
    ("Adam", "b2", "'beta2'"),
    ("Adam", "epsilon", "'eps'"),
    ("Adam", "alpha", "'lr'"),
    ("Adam", "amsgrad", "subclass of xo.Optimizer"),
    ("Adam", "clipvalue", "'clip_value'"),
    ("Adam", "global_clipnorm", "'clip_norm'"),
    ("Adam", "params", "opt.update(params, grads)"),
    ("RMSprop", "alpha", "'decay_rate'"),
    ("RMSprop", "rho", "'decay_rate'"),
    ("RMSprop", "decay", "'decay_rate'"),
    ("AdaGrad", "esp", "'eps'"),
    ("Adam", "colour", ""),
]


@pytest.mark.parametrize(("name", "keyword", "words"), KEYWORDS)
def test_an_unknown_keyword_names_the_near_one(name: str, keyword: str, words: str) -> None:
    kind = getattr(xo, name)
    with pytest.raises(TypeError) as info:
        kind(**{keyword: 0.1})
    assert f"unexpected keyword argument {keyword!r}" in str(info.value)
    assert words in str(info.value)
    assert bool(words) == ("(" in str(info.value).partition(repr(keyword))[2])
    assert "lr=" in str(info.value)


@pytest.mark.parametrize(("name", "keyword", "words"), KEYWORDS)
def test_an_unknown_attribute_names_the_near_one(name: str, keyword: str, words: str) -> None:
    opt = getattr(xo, name)()
    with refused(opt, error=AttributeError, names=f"{name} {keyword!r} {words}"):
        setattr(opt, keyword, 0.1)
    assert not hasattr(opt, keyword)


def test_several_unknown_keywords_are_all_named() -> None:
    with pytest.raises(TypeError) as info:
        xo.Adam(lr=1e-3, betas=(0.9, 0.999), epsilon=1e-8, colour=1)  # type: ignore[call-arg]
    for words in ("'betas' (the", "'epsilon' (did you mean 'eps'?)", "'colour'"):
        assert words in str(info.value)


def test_near_names() -> None:
    assert near("lr", ["beta"]) == ""
    assert near("learning_rate", iter(["eps", "lr"])) == " (did you mean 'lr'?)"
    assert near("learning_rate", ["learning_rates"]) == " (did you mean 'learning_rates'?)"
    assert near("x", []) == near("", ["lr"]) == ""


# ---- Methods ----------------------------------------------------------------------------------------------------

METHODS = {
    "step": "opt.update(params, grads)",
    "zero_grad": "never kept",
    "minimize": "opt.update(params, grads)",
    "apply_gradients": "opt.update(params, grads)",
    "setup": "opt.update(params, grads)",
    "param_groups": "opt.lr = 0.1",
}


@pytest.mark.parametrize("method", METHODS)
def test_methods_of_other_libraries(method: str) -> None:
    opt: Any = xo.Adam()
    with refused(opt, error=AttributeError) as info:
        getattr(opt, method)()
    assert f"Adam has no '{method}': " in str(info.value)
    assert METHODS[method] in str(info.value)
    with refused(opt, error=AttributeError) as info:
        setattr(opt, method, 1)
    assert METHODS[method] in str(info.value)
    assert not hasattr(opt, method)
    assert not hasattr(xo.Adam, method)
    assert method not in dir(opt)


@pytest.mark.parametrize("method", METHODS)
def test_hyperparameters_may_have_such_names(method: str) -> None:
    namespace = {
        "__annotations__": {method: float},
        method: 0.5,
        "rule": staticmethod(eval(f"lambda xp, p, g, *, {method}: p - {method} * g")),
    }
    kind: Any = type("Mine", (xo.Optimizer,), namespace)
    opt, params = kind(), [np.ones(2)]
    setattr(opt, method, 0.25)
    opt.update(params, [np.ones(2)])
    assert getattr(opt, method) == 0.25
    assert params[0].tolist() == [0.75, 0.75]
    del namespace[method]
    assert str(inspect.signature(type("Mine", (xo.Optimizer,), namespace))).startswith(f"({method},")


def test_a_subclass_may_have_such_methods() -> None:
    class Stepping(xo.SGD):
        def step(self) -> str:
            return "made"

    opt = Stepping()
    assert opt.step() == "made"
    assert "step" in dir(opt)
    with pytest.raises(AttributeError, match="no hyperparameter 'step'"):
        opt.step = 1  # type: ignore[method-assign, assignment]


def test_help_says_what_to_write() -> None:
    text = pydoc.render_doc(xo.Adam, renderer=pydoc.plaintext)
    assert re.search(r"zero_grad\W+Not there: gradients are given to opt.update\(params, grads\)", text)


def test_there_is_no_getattr() -> None:
    """It would cost every step, and type checkers would take any attribute for one that exists."""
    assert not any("__getattr__" in vars(kind) for kind in xo.Adam.__mro__)


# ---- What is passed to update -----------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["update", "apply", "init", "explain"])
def test_none_after_an_assignment_of_what_update_returns(call: str) -> None:
    opt = xo.SGD()
    arguments: dict[str, Any] = {"update": (ARRAYS,), "apply": (ARRAYS, {"step": 0, "slots": {}})}
    with refused(opt, error=TypeError) as info:
        getattr(opt, call)(None, *arguments.get(call, ()))
    assert "params is None: update writes into the arrays and returns None" in str(info.value)
    assert "write opt.update(params, grads) by itself" in str(info.value)
    with pytest.raises(TypeError) as info:
        opt.init({"W": None})
    assert "update writes" not in str(info.value)


NOT_CONTAINERS = [
    (lambda: ARRAYS.values(), "pass the dict itself"),
    (lambda: ARRAYS.items(), "pass the dict itself"),
    (lambda: ARRAYS.keys(), "pass the dict itself"),
    (generator, "gives its items only once: pass a list"),
    (lambda: iter([np.ones(2)]), "gives its items only once: pass a list"),
    (lambda: map(np.ones, [2]), "gives its items only once: pass a list"),
    (lambda: {1.0, 2.0}, "it has no order: pass a dict or a list"),
    (lambda: MappingProxyType(ARRAYS), "pass a dict, made by dict(...)"),
    (lambda: UserDict(ARRAYS), "pass a dict, made by dict(...)"),
    (lambda: deque([np.ones(2)]), "pass a list, made by list(...)"),
    (lambda: UserList([np.ones(2)]), "pass a list, made by list(...)"),
    (Layer, "model.params"),
    (Plain, "{'W': model.W, 'b': model.b}"),
    (Module, "list(model.parameters())"),
    (Slotted, "nested in dicts, lists and tuples"),
    (object, "nested in dicts, lists and tuples"),
]


@pytest.mark.parametrize(("make", "words"), NOT_CONTAINERS)
def test_what_is_no_container_of_parameters(make: Any, words: str) -> None:
    opt = xo.Momentum()
    for params, place in ((make(), "params"), ([np.ones(2), make()], "params['1']")):
        grads = ARRAYS if place == "params" else [np.ones(2), np.ones(2)]
        for call in (lambda p=params, g=grads: opt.update(p, g), lambda p=params: opt.init(p)):
            with refused(opt, error=TypeError) as info:
                call()
            assert str(info.value).startswith(f"{place} is a")
            assert words in str(info.value)


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("make", "words"), NOT_CONTAINERS[:-2])
def test_what_is_no_container_of_gradients(make: Any, words: str, later: bool) -> None:
    for params in ({"W": np.ones(2), "b": np.ones(3)}, [np.ones(2), np.ones(3)], np.ones(2), [[np.ones(2)], [1.0]]):
        opt = xo.Momentum()
        if later:
            opt.update(params, params)
        with refused(opt, params, error=TypeError) as info:
            opt.update(params, make())
        assert "grads is a" in str(info.value)
        assert words in str(info.value)
    opt = xo.Momentum()
    with refused(opt, error=TypeError, names="grads['b']") as info:
        opt.update({"W": np.ones(2), "b": np.ones(3)}, {"W": np.ones(2), "b": make()})
    assert words in str(info.value)


@pytest.mark.parametrize("kind", [str, bytes, bytearray, memoryview])
def test_text_and_bytes_are_no_arrays(kind: Any) -> None:
    """Nor lists, though they are sequences."""
    given = kind("W") if kind is str else kind(b"W")
    opt = xo.Momentum()
    for wrong in (given, [np.ones(2), given]):
        with refused(opt, error=TypeError, names=f"is a {kind.__name__}: a parameter is an array") as info:
            opt.update(wrong, [np.ones(2), np.ones(2)])
        assert "list(" not in str(info.value)
    for params, wrong in ((np.ones(1), given), ({"W": np.ones(1)}, {"W": given}), ([1.0], [given])):
        with refused(opt, error=TypeError) as info:
            opt.update(params, wrong)
        words = f"is a {kind.__name__}: a gradient is an array like its parameter, or None"
        assert str(info.value).startswith("grads")
        assert str(info.value).endswith(words)
    with refused(opt, error=TypeError, names=f"grads is a {kind.__name__}: nest them alike"):
        opt.update({"W": np.ones(1)}, given)


def test_an_array_that_holds_arrays_is_no_model() -> None:
    class Noted(np.ndarray):
        pass

    grads = np.ones(2).view(Noted)
    grads.note = np.ones(3)  # type: ignore[attr-defined]
    with pytest.raises(TypeError, match="grads is a Noted: nest them alike"):
        xo.SGD().update({"W": np.ones(2)}, grads)
    for params, wrong in (([np.ones(2)], {"0": np.ones(2)}), ({"0": np.ones(2)}, [np.ones(2)])):
        with pytest.raises(TypeError, match="nest them alike"):
            xo.SGD().update(params, wrong)
        with pytest.raises(TypeError, match="a gradient is an array like its parameter"):
            xo.SGD().update(np.ones(2), wrong)


def test_properties_of_a_model_are_not_asked() -> None:
    class Careful:
        @property
        def parameters(self) -> Any:
            raise RuntimeError("asked")

        @property
        def params(self) -> Any:
            raise RuntimeError("asked")

    with pytest.raises(TypeError, match="params is a Careful"):
        xo.SGD().update(Careful(), ARRAYS)


def test_torch_modules_and_their_parameters() -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    model = torch.nn.Linear(2, 1)
    with pytest.raises(TypeError, match="Adam takes no parameters"):
        xo.Adam(model.parameters(), lr=1e-3)
    with pytest.raises(TypeError, match="Adam takes no parameters"):
        xo.Adam(model)
    opt = xo.Adam()
    with pytest.raises(TypeError, match=r"dict\(model.named_parameters\(\)\)"):
        opt.update(model, model)
    with pytest.raises(TypeError, match="only once: pass a list"):
        opt.update(model.parameters(), [])
    model(torch.ones(1, 2)).sum().backward()
    params = dict(model.named_parameters())  # what the message says
    opt.update(params, {name: p.grad for name, p in params.items()})
    assert step_count(opt) == 1


@pytest.mark.parametrize("name", RULES)
def test_what_the_messages_say_works(name: str) -> None:
    layer, plain, opt = Layer(), Plain(), make_optimizer(name)
    opt.update(layer.params, layer.grads)
    make_optimizer(name).update({"W": plain.W, "b": plain.b}, {"W": np.ones(2), "b": np.ones(3)})
    make_optimizer(name).update(list(generator()), [None, None])
    assert (layer.params["W"] != 1).all()
    assert (plain.b != 1).all()
