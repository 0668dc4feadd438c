"""What to write instead of what other libraries' optimizers take: keywords, methods, models."""

from __future__ import annotations

import inspect
from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, Sequence, Set, ValuesView
from typing import NoReturn

from .hints import near

_KEYWORDS = {
    "amsgrad": "it is a rule of its own: write it as a subclass of xo.Optimizer",
    "betas": "the optimizers that have them take beta1=... and beta2=...",
    "momentum": "xo.Momentum has one; Adam's is beta1",
    "nesterov": "xo.Nesterov is an optimizer of its own",
    "params": "parameters are given to every step, opt.update(params, grads)",
}
# Methods and attributes of other libraries' optimizers.
METHODS = {
    "apply_gradients": "opt.update(params, grads) makes a step; it takes dicts or lists, not pairs",
    "minimize": "opt.update(params, grads) makes a step with the gradients that you give",
    "param_groups": "hyperparameters are plain attributes, opt.lr = 0.1",
    "setup": "the parameters are given to every step, opt.update(params, grads)",
    "step": "opt.update(params, grads) makes a step, and opt.state['step'] counts them",
    "zero_grad": "gradients are given to opt.update(params, grads) and never kept, so there are none to clear",
}


class Elsewhere:
    """An attribute that does not exist: asking for it raises an ``AttributeError`` that says what to write."""

    def __init__(self, name: str) -> None:
        self._name = name
        self.__doc__ = f"Not there: {METHODS[name]}."  # `help` shows it

    def __get__(self, instance: object, owner: type) -> NoReturn:
        raise AttributeError(f"{owner.__name__} has no {self._name!r}: {METHODS[self._name]}")


def keyword(name: str, known: Iterable[str]) -> str:
    """What to add to an error about an unknown hyperparameter."""
    return f" ({_KEYWORDS[name]})" if name in _KEYWORDS else near(name, known)


def refuse_parameters(owner: str, field: str, first: object) -> None:
    """An error if an optimizer's first argument is the parameters, which other libraries' optimizers take there."""
    containers = Mapping | list | tuple | Set | Iterator | ValuesView  # other views of dicts are sets
    given = not callable(first) and (isinstance(first, containers) or getattr(first, "shape", None))
    if given or _model(first):
        raise TypeError(
            f"{owner} takes no parameters, they are given to every step: "
            f"write opt = {owner}({field}), then opt.update(params, grads)"
        )


def instead(x: object) -> str:
    """What to pass in place of what is neither an array nor a container, or an empty string."""
    if isinstance(x, dict | list | tuple | str | bytes | bytearray | memoryview) or _has(x, "shape"):
        return ""
    if isinstance(x, KeysView | ValuesView | ItemsView):  # of a dict
        return "pass the dict itself"
    if isinstance(x, Iterator):
        return "it gives its items only once: pass a list of them"
    if isinstance(x, Set):
        return "it has no order: pass a dict or a list"
    if isinstance(x, Mapping):
        return "pass a dict, made by dict(...)"
    if isinstance(x, Sequence):
        return "pass a list, made by list(...)"
    return _model(x)


def _model(x: object) -> str:
    """What to pass in place of a model or a layer, or an empty string. No code of its class is run."""
    if _gives(x, "named_parameters"):  # torch
        return (
            "pass its arrays, params = dict(model.named_parameters()), "
            "and their gradients, grads = {name: p.grad for name, p in params.items()}"
        )
    if _gives(x, "parameters"):
        return "pass its arrays, params = list(model.parameters()), and a list of their gradients"
    if _has(x, "params") and not callable(x):  # the book's networks and layers
        return "pass its arrays, model.params, and a container of their gradients that is nested alike"
    attributes = getattr(x, "__dict__", {})
    arrays = [name for name, value in attributes.items() if getattr(type(value), "shape", None) is not None]
    if not arrays or callable(x):
        return ""
    shown = ", ".join(f"{name!r}: model.{name}" for name in arrays[:3])
    return f"pass its arrays in a dict, {{{shown}{', ...' if len(arrays) > 3 else ''}}}, and their gradients likewise"


def _has(x: object, name: str) -> bool:
    return inspect.getattr_static(x, name, None) is not None


def _gives(x: object, name: str) -> bool:
    """Whether it has this attribute, and that as a method if it can be called itself: a schedule may have any other."""
    method = inspect.getattr_static(x, name, None)
    return method is not None and (not callable(x) or callable(method) or isinstance(method, classmethod))
