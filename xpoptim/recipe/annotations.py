"""What the annotations of a class say, whether they are types, strings or hold strings."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Mapping
from types import FrameType, SimpleNamespace, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints


def resolved(owner: type, annotations: dict[str, object]) -> dict[str, object]:
    """With the types that strings stand for, as all are behind ``from __future__ import annotations``."""
    names = _names(owner, local=any(isinstance(kind, str) for kind in annotations.values()))
    types = {}
    for name, kind in annotations.items():
        try:
            holder = SimpleNamespace(__annotations__={name: kind})
            types[name] = get_type_hints(holder, names, names, include_extras=True)[name]
        except Exception as error:
            raise TypeError(
                f"{owner.__name__}.{name} is annotated {kind!r}, which cannot be evaluated ({error}): "
                "import or define what it names where the class is, and not under TYPE_CHECKING"
            ) from error
    return types


def _names(owner: type, *, local: bool) -> dict[str, Any]:
    """What is defined where the class is: in its module, in the function it is in, and in the callers of that.

    A function around that function can be found if it is among the callers, as it mostly is. Without strings there is
    no need to look: on older Pythons to do so keeps alive for a while what the functions hold.
    """
    frame: FrameType | None = sys._getframe() if local else None
    scopes: list[Mapping[str, Any]] = [vars(owner)]
    while frame := frame and frame.f_back:
        if frame.f_globals.get("__name__", "builtins") == owner.__module__:
            scopes += [frame.f_locals, frame.f_globals]
    names = dict(vars(sys.modules.get(owner.__module__, builtins)))
    for scope in reversed(scopes):
        names.update(scope)
    return names


def parts(annotation: Any) -> tuple[tuple[object, ...], tuple[object, ...]]:
    """The members of a union, or the type itself, and the metadata of ``Annotated`` anywhere in it."""
    annotation = getattr(annotation, "__value__", annotation)  # of ``type Rate = ...``
    if get_origin(annotation) is Annotated:
        inner, *metadata = get_args(annotation)
        kinds, more = parts(inner)
        return kinds, (*more, *metadata)
    if get_origin(annotation) in (Union, UnionType):
        members = [parts(member) for member in get_args(annotation)]
        return tuple(k for kinds, _ in members for k in kinds), tuple(m for _, metadata in members for m in metadata)
    return (annotation,), ()
