"""The table of rules in the README, made from the classes: ``python tests/readme_table.py`` writes it there."""

import inspect
import re
from pathlib import Path

import xpoptim as xo
from xpoptim import optimizers

README = Path(__file__).parent.parent / "README.md"
HEAD = "| class | signature (behind `*`: keyword-only) | update |\n|---|---|---|\n"


def table() -> str:
    return HEAD + "".join(row(getattr(xo, name)) for name in optimizers.__all__)


def row(rule: type[xo.Optimizer]) -> str:
    return f"| `{rule.__name__}` | `({signature(rule)})` | {formula(rule)} |\n"


def signature(rule: type[xo.Optimizer]) -> str:
    """Without the common options, but for those of which the rule has a default of its own."""
    own = inspect.signature(rule).parameters.values()
    positional = [f"{p.name}={spelled(p.default)}" for p in own if p.kind is p.POSITIONAL_OR_KEYWORD]
    common = inspect.signature(xo.Optimizer).parameters
    options = [f"{p.name}={p.default}" for p in own if p.kind is p.KEYWORD_ONLY and common[p.name].default != p.default]
    return ", ".join([*positional, *(["*", *options] if options else [])])


def spelled(number: float) -> str:
    return re.sub(r"e-0?", "e-", repr(number))


def formula(rule: type[xo.Optimizer]) -> str:
    """The paragraph of the docstring that begins with one."""
    paragraphs = (inspect.getdoc(rule) or "").split("\n\n")
    return " ".join(next(p for p in paragraphs if p.startswith("``")).split()).replace("``", "`").removesuffix(".")


def written(readme: str) -> str:
    """A README with the table in the place of the one that it has."""
    rows = rf"{re.escape(HEAD)}(\| `(?:{'|'.join(optimizers.__all__)})`[^\n]*\n)*"
    return re.sub(rows, lambda _: table(), readme, count=1)


if __name__ == "__main__":
    README.write_text(written(README.read_text(encoding="utf-8")), encoding="utf-8")
