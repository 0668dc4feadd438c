"""Do the tests of the rules bite? Every small mistake in a rule or an option must fail the comparison with the oracle.

The mutants are made from the package's own source: each operator exchanged, each operand dropped, each variable
taken for another, each root, power, update of a slot and returned value left out or exchanged. A mutant that cannot be
traced computes nothing and is left aside; every other one must be caught by `helpers.assert_follows_oracle`.
"""

import ast
import copy
import dataclasses
import inspect
import textwrap
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from helpers import (
    ORACLES,
    RULES,
    assert_follows_oracle,
    make_optimizer,
    rule_hyperparameters,
    rule_options,
)

import xpoptim as xo
from xpoptim.recipe import options

Replacement = Callable[[ast.AST], ast.AST]
EXCHANGED: dict[type[ast.operator], tuple[type[ast.operator], ...]] = {
    ast.Add: (ast.Sub, ast.Mult),
    ast.Sub: (ast.Add, ast.Mult),
    ast.Mult: (ast.Div, ast.Add),
    ast.Div: (ast.Mult, ast.Sub),
    ast.Pow: (ast.Mult,),
}


def variants(node: ast.AST, arrays: list[str], scalars: list[str]) -> Iterator[tuple[str, ast.AST]]:
    """The small mistakes that can be made at one node of a function, each with a description."""
    if isinstance(node, ast.BinOp):
        for operation in EXCHANGED[type(node.op)]:
            yield f"operator {operation.__name__}", ast.BinOp(node.left, operation(), node.right)
        yield "left operand alone", node.left
        yield "right operand alone", node.right
        if isinstance(node.op, ast.Sub | ast.Div):
            yield "operands exchanged", ast.BinOp(node.right, node.op, node.left)
    elif isinstance(node, ast.UnaryOp):
        yield "sign dropped", node.operand
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        yield f"{node.func.attr} dropped", node.args[0]
        if node.func.attr == "sqrt":
            yield "squared, not rooted", ast.BinOp(node.args[0], ast.Mult(), node.args[0])
        # Exchanged arguments of minimum and maximum differ for NaN and signed zeros alone: that is no mistake.
        if len(node.args) == 2 and node.func.attr not in ("minimum", "maximum"):
            yield "arguments exchanged", ast.Call(node.func, node.args[::-1], node.keywords)
        if len(node.args) == 3:
            first, second, third = node.args
            yield "arguments exchanged", ast.Call(node.func, [first, third, second], node.keywords)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        kind = next((names for names in (arrays, scalars) if node.id in names), [])
        for other in kind:
            if other != node.id:
                yield f"{other} for {node.id}", ast.Name(other, ast.Load())
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield f"{node.value + 1} for {node.value}", ast.Constant(node.value + 1)
    elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
        values = node.value.elts
        for i in range(1, len(values)):
            exchanged = [*values[: i - 1], values[i], values[i - 1], *values[i + 1 :]]
            yield "returned values exchanged", ast.Return(ast.Tuple(exchanged, ast.Load()))
            stale = [*values[:i], ast.Name(arrays[i + 1], ast.Load()), *values[i + 1 :]]
            if isinstance(values[i], ast.BinOp):
                yield f"{arrays[i + 1]} returned as it was", ast.Return(ast.Tuple(stale, ast.Load()))
    elif isinstance(node, ast.Assign):
        yield "assignment left out", ast.Pass()


class Exchange(ast.NodeTransformer):
    """Puts `new` in the place of the node that stands at one position of the walk."""

    def __init__(self, target: ast.AST, new: ast.AST) -> None:
        self.target, self.new = target, new

    def visit(self, node: ast.AST) -> Any:
        return self.new if node is self.target else self.generic_visit(node)


def mutants(function: Callable[..., Any]) -> Iterator[tuple[str, Callable[..., Any]]]:
    """All mutants of a function with the array arguments by position and the scalars by keyword."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    definition = tree.body[0]
    assert isinstance(definition, ast.FunctionDef)
    definition.decorator_list = []
    for argument in (*definition.args.args, *definition.args.kwonlyargs):
        argument.annotation = None
    definition.returns = None
    arrays = [a.arg for a in definition.args.args[1:]]
    scalars = [a.arg for a in definition.args.kwonlyargs]
    for position, node in enumerate(ast.walk(definition)):
        for description, _ in variants(node, arrays, scalars):
            mutated = copy.deepcopy(tree)
            target = list(ast.walk(mutated.body[0]))[position]
            new = dict(variants(target, arrays, scalars))[description]
            mutated = ast.fix_missing_locations(Exchange(target, new).visit(mutated))
            namespace: dict[str, Any] = dict(function.__globals__)
            exec(compile(mutated, "<mutant>", "exec"), namespace)
            name = f"{ast.unparse(node).splitlines()[0]}: {description}"
            yield name, namespace[definition.name]


def survivors(
    made: Iterator[tuple[str, Callable[..., Any]]], comparison: Callable[[Callable[..., Any]], None]
) -> tuple[int, list[str]]:
    """How many mutants the comparison caught, and the descriptions of those that it did not."""
    caught, alive = 0, []
    for description, mutant in made:
        try:
            comparison(mutant)
        except AssertionError:
            caught += 1
        except (TypeError, UnboundLocalError):  # TraceError, too: it computes nothing, so there is nothing to catch
            continue
        else:
            alive.append(description)
    return caught, alive


def with_rule(name: str, rule: Callable[..., Any]) -> type[xo.Optimizer]:
    """The class with another rule."""
    return type("Mutant", (getattr(xo, name),), {"rule": staticmethod(rule)})


@pytest.mark.parametrize("name", RULES)
def test_the_rewritten_rule_itself_passes(name: str) -> None:
    """The machinery is sound: the source taken apart and put together without a change is the rule."""
    rule = getattr(xo, name).rule
    source = textwrap.dedent(inspect.getsource(rule))
    namespace: dict[str, Any] = dict(rule.__globals__)
    exec(source, namespace)
    kind = with_rule(name, namespace["rule"].__func__)
    options = rule_options(name)
    assert_follows_oracle(kind(**RULES[name]), ORACLES[name], rule_hyperparameters(name), **options)


# At least so many mutants must be real ones: SGD's rule holds four operations' worth of mistakes, Adam's many more.
FEWEST = {"SGD": 10, "Momentum": 20, "Nesterov": 30, "AdaGrad": 25, "RMSprop": 35, "Adam": 80, "AdamW": 80}


@pytest.mark.parametrize("name", RULES)
def test_every_mutant_of_a_rule_is_caught(name: str) -> None:
    options = rule_options(name)

    def comparison(rule: Callable[..., Any]) -> None:
        opt = with_rule(name, rule)(**RULES[name])
        with np.errstate(all="ignore"):
            assert_follows_oracle(opt, ORACLES[name], rule_hyperparameters(name), engine="reference", **options)

    caught, alive = survivors(mutants(getattr(xo, name).rule), comparison)
    assert alive == []
    assert caught >= FEWEST[name]


# Mistakes with a name, written out.


def momentum_misprint(xp, p, g, v, *, lr, momentum):
    v = v + lr * g
    return p + v, v


def momentum_climbing(xp, p, g, v, *, lr, momentum):
    v = momentum * v + lr * g
    return p + v, v


def momentum_damped(xp, p, g, v, *, lr, momentum):
    v = momentum * v - (1 - momentum) * lr * g
    return p + v, v


def nesterov_with_the_new_v(xp, p, g, v, *, lr, momentum):
    v = momentum * v - lr * g
    return p + momentum * momentum * v - (1 + momentum) * lr * g, v


def adagrad_eps_inside(xp, p, g, h, *, lr, eps):
    h = h + g * g
    return p - lr * g / xp.sqrt(h + eps), h


def adagrad_starting_late(xp, p, g, h, *, lr, eps):
    return p - lr * g / (xp.sqrt(h) + eps), h + g * g


def rmsprop_eps_inside(xp, p, g, h, *, lr, decay_rate, eps):
    h = decay_rate * h + (1 - decay_rate) * g * g
    return p - lr * g / xp.sqrt(h + eps), h


def rmsprop_weights_exchanged(xp, p, g, h, *, lr, decay_rate, eps):
    h = (1 - decay_rate) * h + decay_rate * g * g
    return p - lr * g / (xp.sqrt(h) + eps), h


def adam_without_correction(xp, p, g, m, v, *, lr, beta1, beta2, eps):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    return p - lr * m / (xp.sqrt(v) + eps), m, v


def adam_correcting_the_first_moment_only(xp, p, g, m, v, *, t, lr, beta1, beta2, eps):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    return p - lr / (1 - beta1**t) * m / (xp.sqrt(v) + eps), m, v


def adam_correcting_without_powers(xp, p, g, m, v, *, lr, beta1, beta2, eps):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    return p - lr * xp.sqrt(1 - beta2) / (1 - beta1) * m / (xp.sqrt(v) + eps), m, v


def adam_one_step_ahead(xp, p, g, m, v, *, t, lr, beta1, beta2, eps):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    return p - lr * xp.sqrt(1 - beta2 ** (t + 1)) / (1 - beta1 ** (t + 1)) * m / (xp.sqrt(v) + eps), m, v


def adam_with_eps_at_the_corrected_root(xp, p, g, m, v, *, t, lr, beta1, beta2, eps):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    corrected = xp.sqrt(v) / xp.sqrt(1 - beta2**t)
    return p - lr / (1 - beta1**t) * m / (corrected + eps), m, v


def adam_with_eps_inside(xp, p, g, m, v, *, t, lr, beta1, beta2, eps):
    m, v = m + (1 - beta1) * (g - m), v + (1 - beta2) * (g * g - v)
    return p - lr * xp.sqrt(1 - beta2**t) / (1 - beta1**t) * m / xp.sqrt(v + eps), m, v


NAMED = [
    ("Momentum", momentum_misprint),
    ("Momentum", momentum_climbing),
    ("Momentum", momentum_damped),
    ("Nesterov", nesterov_with_the_new_v),
    ("AdaGrad", adagrad_eps_inside),
    ("AdaGrad", adagrad_starting_late),
    ("RMSprop", rmsprop_eps_inside),
    ("RMSprop", rmsprop_weights_exchanged),
    ("Adam", adam_without_correction),
    ("Adam", adam_correcting_the_first_moment_only),
    ("Adam", adam_correcting_without_powers),
    ("Adam", adam_one_step_ahead),
    ("Adam", adam_with_eps_at_the_corrected_root),
    ("Adam", adam_with_eps_inside),
]


@pytest.mark.parametrize(("name", "rule"), NAMED, ids=lambda x: getattr(x, "__name__", x))
def test_known_mistakes_are_caught(name: str, rule: Callable[..., Any]) -> None:
    opt = with_rule(name, rule)(**RULES[name])
    with pytest.raises(AssertionError, match="step"):
        assert_follows_oracle(opt, ORACLES[name], rule_hyperparameters(name))


# The options: each in a setting where it acts at every step.

ALL_ON: dict[str, Any] = {"weight_decay": 0.3, "clip_value": 0.5, "clip_norm": 0.8, "maximize": True}
FEWEST_OF_OPTIONS = {"clip_value": 2, "clip_norm": 5, "maximize": 1, "l2_decay": 5, "decoupled_decay": 8}


def compare_with_options(monkeypatch: pytest.MonkeyPatch, before: tuple[Any, ...], decoupled: bool) -> None:
    """Adam with all options, through the given functions, against the oracle."""
    chosen = ALL_ON | {"decoupled": decoupled}
    with monkeypatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(options, "BEFORE", before)
        assert_follows_oracle(
            make_optimizer("Adam", **chosen),
            ORACLES["Adam"],
            rule_hyperparameters("Adam"),
            engine="reference",
            **chosen,
        )


@pytest.mark.parametrize("name", FEWEST_OF_OPTIONS)
def test_every_mutant_of_an_option_is_caught(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (place,) = [i for i, option in enumerate(options.BEFORE) if option.function.__name__ == name]
    original = options.BEFORE[place]
    decoupled = name == "decoupled_decay"

    def comparison(function: Callable[..., Any]) -> None:
        mutant = dataclasses.replace(original, function=function)
        before = (*options.BEFORE[:place], mutant, *options.BEFORE[place + 1 :])
        compare_with_options(monkeypatch, before, decoupled)

    compare_with_options(monkeypatch, options.BEFORE, decoupled)  # without a mutant it passes
    caught, alive = survivors(mutants(original.function), comparison)
    assert alive == []
    assert caught >= FEWEST_OF_OPTIONS[name]


def test_leaving_out_an_option_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    for place, option in enumerate(options.BEFORE):
        rest = (*options.BEFORE[:place], *options.BEFORE[place + 1 :])
        with pytest.raises(AssertionError, match="step"):
            compare_with_options(monkeypatch, rest, decoupled=option.function.__name__ == "decoupled_decay")


def test_another_order_of_the_options_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neighbours that act on the same value exchanged."""
    names = [option.function.__name__ for option in options.BEFORE]
    assert names == ["clip_value", "clip_norm", "maximize", "l2_decay", "decoupled_decay"]
    for first, second in (("clip_value", "clip_norm"), ("maximize", "l2_decay")):
        order = list(options.BEFORE)
        i, j = names.index(first), names.index(second)
        order[i], order[j] = order[j], order[i]
        with pytest.raises(AssertionError, match="step"):
            compare_with_options(monkeypatch, tuple(order), decoupled=False)


def test_the_defaults_of_adamw_are_caught_when_they_change() -> None:
    for changed in ({"weight_decay": 0.0}, {"decoupled": False}, {"weight_decay": 0.02}):
        with pytest.raises(AssertionError, match="step"):
            assert_follows_oracle(
                xo.AdamW(**(RULES["AdamW"] | changed)),
                ORACLES["AdamW"],
                rule_hyperparameters("AdamW"),
                weight_decay=0.2,
                decoupled=True,
            )
