"""The public names, their signatures and defaults, and what an import costs."""

import inspect
import subprocess
import sys
from importlib import resources
from typing import Any

import pytest
import readme_table
from cases import CASES

import xpoptim as xo
from xpoptim import optimizers

pytestmark = pytest.mark.smoke

NAMES = {
    *CASES,
    "Dropout",
    "Hyper",
    "dropout",
    "Optimizer",
    "TraceError",
    "engine",
    "get_num_threads",
    "set_num_threads",
    "random",
}
OPTIONS = {
    "weight_decay": 0.0,
    "decoupled": False,
    "clip_norm": None,
    "clip_value": None,
    "maximize": False,
    "capturable": False,
}


def parameters(function: Any, kind: Any) -> dict[str, Any]:
    found = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in found if p.kind is kind and p.name != "self"}


def test_exactly_these_names() -> None:
    assert set(xo.__all__) == NAMES
    assert len(xo.__all__) == len(NAMES)
    public = {name for name in vars(xo) if not name.startswith("_")}
    # Submodules become attributes when they are imported; nothing else may.
    assert {name for name in public - NAMES if not inspect.ismodule(getattr(xo, name))} == set()
    assert isinstance(xo.__version__, str)
    assert {name for name in dir(xo) if not name.startswith("_")} == NAMES


def test_every_rule_has_its_case() -> None:
    assert list(CASES) == optimizers.__all__


def test_the_table_of_rules_in_the_readme() -> None:
    readme = readme_table.README.read_text(encoding="utf-8")
    assert readme_table.table() in readme, "python tests/readme_table.py writes it"
    assert readme_table.written(readme) == readme


@pytest.mark.parametrize("name", CASES)
def test_signatures(name: str) -> None:
    kind = getattr(xo, name)
    defaults, expected = CASES[name].defaults, OPTIONS | CASES[name].options
    positional = parameters(kind, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    assert positional == defaults
    assert list(positional) == list(defaults)
    assert parameters(kind, inspect.Parameter.KEYWORD_ONLY) == expected
    opt = kind()
    for field, default in (defaults | expected).items():
        assert getattr(opt, field) == default
        assert type(getattr(opt, field)) is type(default)


@pytest.mark.parametrize("name", CASES)
def test_positional_arguments(name: str) -> None:
    values = [0.1 + 0.01 * i for i in range(len(CASES[name].defaults))]
    opt = getattr(xo, name)(*values)
    assert [getattr(opt, field) for field in CASES[name].defaults] == values
    with pytest.raises(TypeError):
        getattr(xo, name)(*values, 0.5)


METHODS = {
    "update": ["params", "grads"],
    "init": ["params"],
    "apply": ["params", "grads", "state"],
    "state_dict": [],
    "load_state_dict": ["d"],
    "explain": ["params", "grads"],
    "check": [],
    "prepare_replay": [],
}


@pytest.mark.parametrize("method", METHODS)
def test_methods(method: str) -> None:
    names = list(inspect.signature(getattr(xo.Optimizer, method)).parameters)
    assert names == ["self", *METHODS[method]]


def test_public_members_of_an_optimizer() -> None:
    """Nothing but what is documented: rules and hyperparameters have the names for themselves."""
    expected = {*METHODS, *OPTIONS, "source", "state", "slots", "fused", "skipped"}
    # The others are names of other libraries, which raise an AttributeError that says what to write.
    members = {name for name in dir(xo.Optimizer) if not name.startswith("_")}
    assert {name for name in members if hasattr(xo.Optimizer, name)} == expected
    assert {name for name in dir(xo.SGD()) if not name.startswith("_")} == {*expected, "lr", "rule"}


def test_signatures_of_functions() -> None:
    source = inspect.signature(xo.Optimizer.source).parameters
    assert list(source)[:3] == ["self", "kind", "dtype"]
    assert source["dtype"].default == "float32"
    assert list(inspect.signature(xo.engine).parameters) == ["name"]
    assert list(inspect.signature(xo.set_num_threads).parameters) == ["n"]
    dropout = inspect.signature(xo.Dropout).parameters
    assert next(iter(dropout)) == "dropout_ratio"
    assert dropout["dropout_ratio"].default == 0.5
    assert dropout["inverted"].default is False
    assert dropout["seed"].default is None
    assert list(inspect.signature(xo.random.seed).parameters) == ["s"]


def test_the_import_is_light() -> None:
    heavy = ["llvmlite", "cupy", "matplotlib", "sklearn", "rich", "torch", "jax", "keras", "scipy", "ml_dtypes"]
    code = f"import sys, xpoptim; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.stdout.strip(), done.stderr) == ("[]", "")


def test_the_package_says_that_it_is_typed() -> None:
    assert resources.files("xpoptim").joinpath("py.typed").is_file()
