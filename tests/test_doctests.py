"""The examples in the docstrings of every module of the package run, and warnings in them are errors."""

import doctest
import importlib
import inspect
import pkgutil

import pytest

import xpoptim as xo
from xpoptim.engines.cpu import engine

pytestmark = pytest.mark.smoke

MODULES = ["xpoptim", *(module.name for module in pkgutil.walk_packages(xo.__path__, "xpoptim."))]
DEMO_EXTRA = ("rich", "matplotlib", "sklearn")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_a_module(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails when the module cannot be imported, too: none but the demo's may need an optional package for that."""
    monkeypatch.setattr(engine, "missing", lambda: "")  # what `explain` says is shown as where the extension is
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if name.startswith("xpoptim.demo") and error.name in DEMO_EXTRA:
            pytest.skip(f"{error.name} is not installed")
        raise
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output: list[str] = []
    for test in doctest.DocTestFinder(exclude_empty=True).find(module):
        runner.run(test, out=output.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(output)


PUBLIC = [name for name in xo.__all__ if inspect.isclass(getattr(xo, name)) or inspect.isfunction(getattr(xo, name))]


@pytest.mark.parametrize("name", PUBLIC)
def test_public_names_have_docstrings(name: str) -> None:
    text = inspect.getdoc(getattr(xo, name))
    assert text
    assert text.strip()


@pytest.mark.parametrize(
    "name", ["Optimizer", "SGD", "Momentum", "Nesterov", "AdaGrad", "RMSprop", "Adam", "AdamW", "Dropout"]
)
def test_public_classes_have_an_example_of_their_own(name: str) -> None:
    """Of its own: an inherited docstring does not count."""
    kind = getattr(xo, name)
    assert ">>>" in (kind.__doc__ or ""), f"{name} has no example"
