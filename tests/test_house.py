"""The house: rooms in one order, folders whose `__init__` is their map, and files that fit on a few screens."""

import ast
import graphlib
import io
import re
import tokenize
from importlib import resources
from pathlib import Path

import pytest

ROOT = Path(str(resources.files("xpoptim")))
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))
FOLDERS = sorted({path.parent for path in FILES if path.parent != Path()})

# Imports point one way: a room knows those before it.
ORDER = (
    "errors",
    "sync",
    "arrays",
    "trace",
    "recipe",
    "codegen",
    "engines",
    "step",
    "optimizer",
    "optimizers",
    "random",
    "_dropout",
    "xpoptim",
    "demo",
    "__main__",
)


def room(module: str) -> str:
    """Of a dotted name within the package; the package itself is its `__init__`."""
    return module.partition(".")[0] or "xpoptim"


def module_of(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix("__init__").rstrip(".")


MODULES = {module_of(path) for path in FILES}


def imported(path: Path) -> set[str]:
    """The package's own modules that a file imports, also inside functions."""
    package = ("xpoptim", *path.parts[:-1])
    found = set()
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            parent = ".".join([*base, *([node.module] if node.module else [])])
            found |= {f"{parent}.{alias.name}" for alias in node.names}
    ours = {name.removeprefix("xpoptim").lstrip(".") for name in found if name.split(".")[0] == "xpoptim"}
    return {name if name in MODULES else name.rpartition(".")[0] for name in ours}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_point_one_way(path: Path) -> None:
    own = room(module_of(path))
    allowed = ORDER[: ORDER.index(own) + 1]
    assert {name for name in imported(path) if room(name) not in allowed} == set()


def test_every_room_has_its_place_in_the_order() -> None:
    assert {room(name) for name in MODULES} == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_no_circles_within_a_room(name: str) -> None:
    paths = {module_of(path): path for path in FILES if room(module_of(path)) == name}
    graph = {module: {other for other in imported(path) if other in paths} for module, path in paths.items()}
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("folder", FOLDERS, ids=str)
def test_an_init_is_the_map_of_its_folder(folder: Path) -> None:
    text = ast.get_docstring(ast.parse((ROOT / folder / "__init__.py").read_text(encoding="utf-8")))
    assert text is not None
    inside = {path.stem for path in FILES if path.parent == folder} | {f.name for f in FOLDERS if f.parent == folder}
    assert set(re.findall(r"^- ``(\w+)``:", text, re.MULTILINE)) == inside - {"__init__"}


# Where a library may be asked for by its name: its engine's folder, the namespaces, and what shows things to a user.
KNOW_LIBRARIES = ("arrays/namespaces", "engines/cpu", "engines/cuda", "engines/registry.py", "demo", "__main__.py")
LIBRARIES = {"numpy", "cupy", "torch", "jax", "array_api_strict"}


@pytest.mark.parametrize("path", [path for path in FILES if not path.as_posix().startswith(KNOW_LIBRARIES)], ids=str)
def test_nothing_else_asks_which_library_an_array_is_of(path: Path) -> None:
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert {alias.name.split(".")[0] for alias in node.names} & LIBRARIES <= {"numpy"}
        elif isinstance(node, ast.Compare):
            compared = [node.left, *node.comparators]
            assert not {x.value for x in compared if isinstance(x, ast.Constant)} & LIBRARIES, ast.unparse(node)
            assert not {x.id for x in compared if isinstance(x, ast.Name)} & {"NUMPY", "CUPY"}, ast.unparse(node)


def code_lines(path: Path) -> set[int]:
    """The lines of a file that are neither empty, nor comments, nor docstrings."""
    text = (ROOT / path).read_text(encoding="utf-8")
    skipped = {
        tokenize.COMMENT,
        tokenize.NL,
        tokenize.NEWLINE,
        tokenize.INDENT,
        tokenize.DEDENT,
        tokenize.ENDMARKER,
    }
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        has_body = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if has_body and ast.get_docstring(node) is not None:
            first = node.body[0]
            assert first.end_lineno is not None
            lines -= set(range(first.lineno, first.end_lineno + 1))
    return lines


@pytest.mark.parametrize("path", FILES, ids=str)
def test_files_and_classes_are_of_a_size_to_be_read(path: Path) -> None:
    lines = code_lines(path)
    assert len(lines) <= 500
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ClassDef):
            assert node.end_lineno is not None
            assert len(lines & set(range(node.lineno, node.end_lineno + 1))) <= 300, node.name
