"""What type checkers and editors say of the package: mypy, pyright and jedi, over ``typed`` and the README.

Whatever of the three is not installed is left out: pyright, which brings Node.js with it, is in ``.[typing]`` alone.
"""

import inspect
import json
import os
import pydoc
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
from importlib import resources, util
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from test_readme import BLOCKS

import xpoptim as xo
from xpoptim import optimizers

TYPED = Path(__file__).parent / "typed"
PACKAGE = Path(str(resources.files("xpoptim"))).parent
README = "\n".join(block for block in BLOCKS if "cupy" not in block)


class Finding(NamedTuple):
    file: str
    line: int
    message: str


def mypy(folder: Path, file: Path, strict: bool = False) -> list[Finding]:
    # Where it is not installed, the package is found on the path: in site-packages that would be an error.
    installed = str(PACKAGE) in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))
    path = {} if installed else {"MYPYPATH": str(PACKAGE)}
    command = [sys.executable, "-m", "mypy", "--config-file=", "--output=json", file, *["--strict"] * strict]
    done = run(command, folder, os.environ | path)
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert bool(found) == (done.returncode != 0), done.stdout + done.stderr
    return [Finding(Path(row["file"]).name, row["line"], row["message"]) for row in found if row["severity"] == "error"]


def pyright(folder: Path, file: Path, strict: bool = False) -> list[Finding]:
    settings = {
        "include": [shutil.copy(file, folder / "checked.py").name],
        "typeCheckingMode": "strict" if strict else "basic",
        "extraPaths": [str(PACKAGE)],
    }
    config = folder / "pyrightconfig.json"
    config.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "--project", config]
    done = run(command, folder, dict(os.environ))
    assert done.stdout.startswith("{"), done.stdout + done.stderr
    found = json.loads(done.stdout)["generalDiagnostics"]
    assert json.loads(done.stdout)["summary"]["filesAnalyzed"] == 1, done.stdout + done.stderr
    return [Finding(Path(row["file"]).name, row["range"]["start"]["line"] + 1, row["message"]) for row in found]


def run(command: list[Any], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=170, check=False
    )


def checker(check: Any) -> Any:
    missing = util.find_spec(check.__name__) is None
    return pytest.param(
        check,
        id=check.__name__,
        marks=pytest.mark.skipif(missing, reason=f"needs {check.__name__}: pip install '.[typing]'"),
    )


CHECKERS = [checker(mypy), checker(pyright)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all, so that mypy reads NumPy's types once."""
    return tmp_path_factory.mktemp("types")


@pytest.mark.parametrize("check", CHECKERS)
def test_bad_lines_are_refused_and_good_ones_taken(check: Any, folder: Path) -> None:
    file = TYPED / "good_and_bad.py"
    lines = file.read_text(encoding="utf-8").splitlines()
    marked = {number for number, line in enumerate(lines, 1) if line.endswith("# error")}
    found = {finding.line: finding.message for finding in check(folder, file)}
    assert len(marked) > 40
    assert {lines[n - 1]: found[n] for n in found.keys() - marked} == {}
    assert [lines[n - 1] for n in sorted(marked - found.keys())] == []


@pytest.mark.parametrize("check", CHECKERS)
def test_nothing_is_found_in_good_code_by_the_strictest_checks(check: Any, folder: Path) -> None:
    assert check(folder, TYPED / "strict.py", strict=True) == []


def test_the_good_code_runs(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(TYPED / "strict.py"))
    assert "program Momentum.rule" in capsys.readouterr().out


@pytest.mark.parametrize("check", CHECKERS)
def test_nothing_is_found_in_the_code_of_the_readme(check: Any, folder: Path) -> None:
    file = folder / "readme.py"
    file.write_text(README, encoding="utf-8")
    assert check(folder, file) == []


# --- what help and editors show

RULES = [xo.Optimizer, *(getattr(xo, name) for name in optimizers.__all__)]


def sections(text: str) -> dict[str, dict[str, tuple[str, str]]]:
    """The entries of a docstring's sections by the rules of numpydoc: their types and texts."""
    found: dict[str, dict[str, tuple[str, str]]] = {}
    for heading, body in re.findall(r"(?ms)^([\w ]+)\n-{3,}\n(.*?)(?=\n\n|\Z)", text):
        entries = re.findall(r"(?m)^(\w+) : (.*)\n((?: {4}.*\n?)+)", body + "\n")
        found[heading] = {name: (kind, " ".join(meaning.split())) for name, kind, meaning in entries}
    return found


@pytest.mark.parametrize("rule", RULES)
def test_docstrings_tell_every_argument_with_its_default_and_meaning(rule: type[xo.Optimizer]) -> None:
    found = sections(inspect.getdoc(rule) or "")
    described = {**found.get("Parameters", {}), **found["Other Parameters"]}
    arguments = inspect.signature(rule).parameters.values()
    assert {name: kind.rpartition(", default ")[2] for name, (kind, _) in described.items()} == {
        argument.name: repr(argument.default) for argument in arguments
    }
    assert list(found.get("Parameters", {})) == [a.name for a in arguments if a.kind is not a.KEYWORD_ONLY]
    assert all(len(meaning) > 15 for _, meaning in described.values())
    for name, (kind, meaning) in described.items():
        bounds = dict(rule._declared[name].bounds)
        assert ("schedule" in kind) == ("bool" not in kind)
        assert ("at least 0" in meaning) == ("ge" in bounds)
        assert ("Above 0" in meaning) == ("gt" in bounds)
        assert ("below 1" in meaning) == ("lt" in bounds)


@pytest.mark.parametrize("rule", RULES)
def test_help_shows_no_private_names(rule: type[xo.Optimizer]) -> None:
    text = pydoc.plain(pydoc.render_doc(rule))
    shown = re.findall(r"(?m)^ \|  (\w+)(?: = |\()", text)
    assert set(inspect.signature(rule).parameters) <= set(shown)
    assert [name for name in shown if name.startswith("_") and not name.endswith("__")] == []
    assert re.findall(r"\b_[a-z]\w*", text.partition("Methods ")[0].replace("__", "")) == []


def test_a_users_class_is_documented_as_well() -> None:
    class Plain(xo.SGD):
        """Half as fast."""

        lr = 0.005
        clip_norm = 1.0

    class Described(xo.Adam):
        """Another.

        Parameters
        ----------
        rho : float
            Of its own.
        """

        rho: float = 1.0

    class Bare(xo.SGD):
        pass

    text = inspect.getdoc(Plain) or ""
    assert text.startswith("Half as fast.\n\nParameters\n----------\nlr : float or schedule, default 0.005\n")
    assert "\nclip_norm : float, schedule or None, default 1.0\n" in text
    found = sections(inspect.getdoc(Described) or "")
    assert found["Parameters"] == {"rho": ("float", "Of its own.")}
    assert found["Other Parameters"] == sections(xo.Optimizer.__doc__ or "")["Other Parameters"]
    assert Bare.__doc__ is None
    assert inspect.getdoc(Bare) == inspect.getdoc(xo.SGD)


@pytest.mark.parametrize("name", ["Optimizer", *optimizers.__all__])
def test_an_editor_completes_the_arguments_of_a_constructor(name: str) -> None:
    """From the sources alone, as jedi reads them, and in a prompt, where it has the objects themselves."""
    jedi = pytest.importorskip("jedi", reason="needs jedi: pip install '.[typing]'")
    expected = set(inspect.signature(getattr(xo, name)).parameters)
    project = jedi.Project(PACKAGE, sys_path=[str(PACKAGE), *sys.path], load_unsafe_extensions=False)
    read = jedi.Script(f"import xpoptim as xo\nxo.{name}(", path=PACKAGE / f"{name}.py", project=project)
    live = jedi.Interpreter(f"xo.{name}(", [{"xo": xo}])
    for shown in (read, live):
        (signature,) = shown.get_signatures()
        assert {param.name for param in signature.params} == expected
        completed = {completion.name.removesuffix("=") for completion in shown.complete()}
        assert expected <= completed
        assert {name for name in completed if name.startswith("_") and not name.startswith("__")} == set()
        told = sections(signature.docstring())
        described = {*told.get("Parameters", {}), *told.get("Other Parameters", {})}
        assert described == expected if shown is live else described <= expected
