"""Do the tests bite? A random sample of small mistakes in the package, each of which a test must notice.

    pip install '.[test,mutants]'
    python tests/mutants.py --count 100 --seed 1 --out mutants.json

A mutant is the package with one small change: a comparison, an operator, a number, a condition or a slice exchanged, a
statement, a raise or a returned value left out; in the texts of machine code and CUDA a number, a comparison or an
operation. The working tree is never touched: all happens in copies in a temporary folder. First comes the whole suite
under coverage, which tells what each test runs, in the processes that it starts too. If that is not green, nothing else
is done. Then each mutant of the sample gets tests in this order: those that run its line, those that run any line of
its file (results are cached: who compiles a kernel is not all who use it), all others; and in each of these groups
first one of every function, the fastest first. They run in rounds of some `--seconds`, `--rounds` at most, until one
fails. A round that takes longer than `--limit` counts as noticed.

The verdicts: killed, timeout, survived; "not covered" for a survivor whose line no test runs as far as coverage can
tell (it does not see threads that were started below `threading`, nor processes that were killed); and equivalent for
what stands in `EQUIVALENT`, the survivors that a person has judged to be no mistakes. To look at one again::

    python tests/mutants.py --list                              # all, numbered
    python tests/mutants.py --apply 1234                        # that one as a patch
    python tests/mutants.py --again mutants.json --rounds 99    # the survivors, with all tests that there are

Left out: demo/pictures.py, where a number is a matter of taste; annotations, decorators and docstrings; `strict=` of a
`zip`, which only asserts; what stands in braces in f-strings, which Python 3.11 does not place; words of messages. The
more is installed, the more is tested: without CuPy, torch or JAX their tests are skipped, and mutants survive.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import hashlib
import importlib.util
import json
import os
import queue
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "xpoptim"
LEFT_OUT = ("xpoptim/demo/pictures.py",)
GENERATORS = ("xpoptim/codegen/",)  # every string in files of such a name is code

# Survivors that change nothing that may be relied on: file, the old lines, the new lines, and why.
EQUIVALENT: list[tuple[str, str, str, str]] = [
    (
        "xpoptim/random.py",
        "piece = PIECE_ON_GPU if library.launches(device) else PIECE_ON_HOST",
        "piece = PIECE_ON_GPU if not (library.launches(device)) else PIECE_ON_HOST",
        "how many blocks are drawn at once changes the speed alone",
    ),
    (
        "xpoptim/demo/training.py",
        "rng = np.random.default_rng([seed, 1])",
        "rng = np.random.default_rng([seed, 2])",
        "which numbers the demo draws is a matter of taste, as long as they are others than those of the weights",
    ),
    (
        "xpoptim/engines/cpu/plan.py",
        "self._job = np.array([self._cursors_at, 0, table, rows, self.scalars_at, grain, total, sums], np.int64)",
        "self._job = np.array([self._cursors_at, (-1), table, rows, self.scalars_at, grain, total, sums], np.int64)",
        "whoever runs the job writes the number of workers there",
    ),
    (
        "xpoptim/engines/cpu/plan.py",
        "self._job = np.array([self._cursors_at, 0, table, rows, self.scalars_at, grain, total, sums], np.int64)",
        "self._job = np.array([self._cursors_at, 1, table, rows, self.scalars_at, grain, total, sums], np.int64)",
        "whoever runs the job writes the number of workers there",
    ),
    (
        "xpoptim/random.py",
        "PIECE_ON_HOST = 1 << 14",
        "PIECE_ON_HOST = 1 << 15",
        "how many blocks are drawn at once changes the speed alone",
    ),
    (
        "xpoptim/demo/training.py",
        "difference: float = 0.0  # largest between the parameters of the fused and the plain optimizer, at the end",
        "difference: float = (-1.0)  # largest between the parameters of the fused and the plain optimizer, at the end",
        "the training ends by setting it",
    ),
    (
        "xpoptim/engines/cuda/plan.py",
        'function = kernel(self._groups[0].update.prologue, "set_inputs", self._counter.device)',
        'function = kernel(self._groups[(-1)].update.prologue, "set_inputs", self._counter.device)',
        "in every group's text set_inputs is the same",
    ),
    (
        "xpoptim/codegen/cuda/elementwise.py",
        "MANY_BLOCKS = 2000",
        "MANY_BLOCKS = 2001",
        "from how many blocks on a thread does more changes the speed alone",
    ),
    (
        "xpoptim/step/checks.py",
        "return key",
        "return None",
        "what was found good is remembered to save time alone",
    ),
    (
        "xpoptim/engines/cuda/plan.py",
        "self._prologue(group, table, self._counter, tensors=0, advance=False, from_state=from_state)",
        "self._prologue(group, table, self._counter, tensors=1, advance=False, from_state=from_state)",
        "the program of a norm takes no norm: one total more is read, for nothing",
    ),
    (
        "xpoptim/codegen/cuda/blocks.py",
        "return max(1, 16 // (len(program.lanes) * BYTES[program.buffers[0].real]))",
        "return max(1, 16 // (len(program.lanes) * BYTES[program.buffers[(-1)].real]))",
        "a block program has one buffer",
    ),
    (
        "xpoptim/codegen/llvm/blocks.py",
        "store i64 0, ptr %visited",
        "store i64 -1, ptr %visited",
        "a worker begins with the share before its own and then goes through all: no task is left out, none done twice",
    ),
    (
        "xpoptim/codegen/llvm/elementwise.py",
        "store i64 0, ptr %visited",
        "store i64 -1, ptr %visited",
        "a worker begins with the share before its own and then goes through all: no task is left out, none done twice",
    ),
    (
        "xpoptim/trace/sums.py",
        "return lanes[:, 0]",
        "return lanes[:, (-1)]",
        "one lane is left",
    ),
    (
        "xpoptim/trace/ops.py",
        "exponent = int(abs(n)) if abs(n) < 2.0**62 else 2**62",
        "exponent = int(abs(n)) if abs(n) <= 2.0**62 else 2**62",
        "2**62 is what 2**62 counts as",
    ),
    (
        "xpoptim/_dropout/layer.py",
        "if not shared and 0 < limit < 2**32 and operand.takes_kernel:",
        "if not shared and 0 <= limit < 2**32 and operand.takes_kernel:",
        "of limit 0 the kernel that draws keeps all and scales them, as the one that only scales does, but slower",
    ),
    (
        "xpoptim/engines/cpu/plan.py",
        "_TASKS = 16",
        "_TASKS = 15",
        "into how many tasks a job is cut changes its speed alone",
    ),
    (
        "xpoptim/engines/cpu/plan.py",
        "_TASKS = 16",
        "_TASKS = 17",
        "into how many tasks a job is cut changes its speed alone",
    ),
    (
        "xpoptim/engines/cpu/thread_pool.py",
        "Calls([[0, 0, 0, function, job]], elements).run(ctypes.c_int64())",
        "Calls([[0, (-1), 0, function, job]], elements).run(ctypes.c_int64())",
        "without a prologue nobody reads the inputs and the scalars",
    ),
    (
        "xpoptim/engines/cpu/thread_pool.py",
        "Calls([[0, 0, 0, function, job]], elements).run(ctypes.c_int64())",
        "Calls([[0, 1, 0, function, job]], elements).run(ctypes.c_int64())",
        "without a prologue nobody reads the inputs and the scalars",
    ),
    (
        "xpoptim/engines/cpu/thread_pool.py",
        "Calls([[0, 0, 0, function, job]], elements).run(ctypes.c_int64())",
        "Calls([[0, 0, (-1), function, job]], elements).run(ctypes.c_int64())",
        "without a prologue nobody reads the inputs and the scalars",
    ),
    (
        "xpoptim/engines/cpu/thread_pool.py",
        "Calls([[0, 0, 0, function, job]], elements).run(ctypes.c_int64())",
        "Calls([[0, 0, 1, function, job]], elements).run(ctypes.c_int64())",
        "without a prologue nobody reads the inputs and the scalars",
    ),
    (
        "xpoptim/codegen/cuda/elementwise.py",
        'f"    int head = (int)(-(long long){first} & 15) / {width};",',
        'f"    int head = (int)(-(long long){first} & 14) / {width};",',
        "an element lies at an even address",
    ),
]


# ---------------------------------------------------------------------------------------------------------------------
# Mutants


@dataclass(frozen=True)
class Mutant:
    """One change: characters ``start`` to ``end`` of a file become ``text``."""

    file: str
    line: int
    kind: str
    old: str  # the lines that change, before and after, without indentation
    new: str
    start: int
    end: int
    text: str
    lines: tuple[int, int]  # of the statement, without what it holds
    at_import: bool  # not in a function: it is run once, by whoever imports the file

    def applied(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.old}  ->  {self.new}"


@dataclass(frozen=True)
class Place:
    """Where a node stands: the lines of its statement, and whether they are run at the import."""

    lines: tuple[int, int]
    at_import: bool


class Source:
    """A file's text, its characters found by the lines and UTF-8 columns of Python's syntax trees."""

    def __init__(self, file: str, text: str) -> None:
        self.text, self.generates = text, file.startswith(GENERATORS)
        self._lines = [line.encode() for line in text.splitlines(keepends=True)]
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line.decode()))

    def at(self, line: int, column: int) -> int:
        return self._starts[line - 1] + len(self._lines[line - 1][:column].decode())

    def span(self, node: Any) -> tuple[int, int]:
        return self.at(node.lineno, node.col_offset), self.at(node.end_lineno, node.end_col_offset)

    def of(self, node: Any) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def between(self, left: Any, right: Any, pattern: str) -> tuple[int, int]:
        """Where an operator stands between its operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        found = re.search(pattern, self.text[start:end])
        assert found is not None, self.text[start:end]
        return start + found.start(), start + found.end()


Change = tuple[str, int, int, str]  # kind, start, end, text

COMPARISONS: dict[type[ast.cmpop], tuple[str, tuple[str, ...]]] = {
    ast.Lt: ("<", ("<=", ">=")),
    ast.LtE: ("<=", ("<", ">")),
    ast.Gt: (">", (">=", "<=")),
    ast.GtE: (">=", (">", "<")),
    ast.Eq: ("==", ("!=",)),
    ast.NotEq: ("!=", ("==",)),
    ast.Is: (r"\bis\b", ("is not",)),
    ast.IsNot: (r"\bis\s+not\b", ("is",)),
    ast.In: (r"\bin\b", ("not in",)),
    ast.NotIn: (r"\bnot\s+in\b", ("in",)),
}
OPERATORS: dict[type[ast.operator], tuple[str, str]] = {
    ast.Add: ("+", "-"),
    ast.Sub: ("-", "+"),
    ast.Mult: ("*", "+"),
    ast.Div: ("/", "*"),
    ast.FloorDiv: ("//", "*"),
    ast.Mod: ("%", "*"),
    ast.Pow: ("**", "*"),
    ast.LShift: ("<<", ">>"),
    ast.RShift: (">>", "<<"),
    ast.BitAnd: ("&", "|"),
    ast.BitOr: ("|", "&"),
    ast.BitXor: ("^", "&"),
}
EXTREMES = {"min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum"}


def changes(node: ast.AST, source: Source) -> Iterator[Change]:
    """The small mistakes that can be made at one node."""
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, operator, right in zip(operands[:-1], node.ops, operands[1:], strict=True):
            pattern, others = COMPARISONS[type(operator)]
            for other in others:
                yield "comparison", *source.between(left, right, pattern), other
    elif isinstance(node, ast.BoolOp):
        word, other = ("and", "or") if isinstance(node.op, ast.And) else ("or", "and")
        for left, right in zip(node.values[:-1], node.values[1:], strict=True):
            yield "and/or", *source.between(left, right, rf"\b{word}\b"), other
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        yield "not", *source.span(node), source.of(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
        sign, other = OPERATORS[type(node.op)]
        yield "operator", *source.between(node.left, node.right, re.escape(sign)), other
    elif isinstance(node, ast.AugAssign):
        sign, other = OPERATORS[type(node.op)]
        yield "operator", *source.between(node.target, node.value, re.escape(sign) + "="), other + "="
        yield "statement left out", *source.span(node), "pass"
    elif isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if name in EXTREMES:
            end = source.span(node.func)[1]
            yield "min/max", end - len(name), end, EXTREMES[name]
    elif isinstance(node, ast.Slice):
        for bound in filter(None, (node.lower, node.upper, node.step)):
            yield "slice", *source.span(bound), ""
    elif isinstance(node, ast.Constant | ast.JoinedStr):
        yield from _changes_of_a_constant(node, source)
    else:
        yield from _changes_of_a_statement(node, source)
    if isinstance(node, ast.If | ast.While | ast.IfExp):
        yield from _negated(node.test, source)
    elif isinstance(node, ast.comprehension):
        for condition in node.ifs:
            yield from _negated(condition, source)


def _negated(test: ast.expr, source: Source) -> Iterator[Change]:
    """But for conditions whose one operator is negated anyway."""
    single = isinstance(test, ast.Compare) and len(test.ops) == 1
    if not single and not (isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not)):
        yield "condition negated", *source.span(test), f"not ({source.of(test)})"


def _changes_of_a_constant(node: ast.Constant | ast.JoinedStr, source: Source) -> Iterator[Change]:
    span = source.span(node)
    value = node.value if isinstance(node, ast.Constant) else ""
    if isinstance(value, bool):
        yield "constant", *span, str(not value)
    elif isinstance(value, int | float):
        for other in (value + 1, value - 1):
            yield "constant", *span, repr(other) if other >= 0 else f"({other!r})"
    elif isinstance(value, str) and (source.generates or '"""' in source.of(node)):
        for kind, start, end, text in _changes_of_a_text(source.of(node)):
            yield kind, span[0] + start, span[0] + end, text


def _changes_of_a_statement(node: ast.AST, source: Source) -> Iterator[Change]:
    if isinstance(node, ast.Return):
        # None in the place of False is as false, and the type checker notices it.
        nothing = isinstance(node.value, ast.Constant) and (node.value.value is None or node.value.value is False)
        if node.value is not None and not nothing:
            yield "None returned", *source.span(node.value), "None"
    elif isinstance(node, ast.Raise):
        yield "raise left out", *source.span(node), "pass"
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "statement left out", *source.span(node), "pass"
    elif isinstance(node, ast.Assign | ast.AnnAssign):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Attribute | ast.Subscript) for target in targets):
            yield "statement left out", *source.span(node), "pass"


# In texts of LLVM's assembly and CUDA's C++, outside of comments and of braces: what is exchanged for what.
PREDICATES = {"eq": "ne", "ne": "eq", "slt": "sle", "sle": "slt", "sgt": "sge", "sge": "sgt"}
PREDICATES |= {"ult": "ule", "ule": "ult", "ugt": "uge", "uge": "ugt"}
INSTRUCTIONS = {"add": "sub", "sub": "add", "mul": "add", "and": "or", "or": "and", "xor": "or"}
SIGNS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "&&": "||", "||": "&&"}
SIGNS |= {"+": "-", "-": "+", "*": "+", "/": "*", "%": "*", "&": "|", "|": "&", "<<": ">>", ">>": "<<"}
IN_TEXTS: list[tuple[str, str, dict[str, str]]] = [
    ("comparison", rf"(?<=icmp )({'|'.join(PREDICATES)})\b", PREDICATES),
    ("operator", rf"(?<== )({'|'.join(INSTRUCTIONS)})(?= i)", INSTRUCTIONS),
    ("operator", rf"(?<=[\w)\]] )({'|'.join(map(re.escape, sorted(SIGNS, key=len, reverse=True)))})(?= [\w(])", SIGNS),
]


def _changes_of_a_text(text: str) -> Iterator[Change]:
    at = 0
    for line in text.splitlines(keepends=True):
        # Words in braces are Python's, doubled braces the text's own.
        code = re.sub(r"(?<!{){[^{}]*}(?!})", lambda found: "~" * len(found[0]), re.split("//|;(?= |$)", line)[0])
        for kind, pattern, others in IN_TEXTS:
            for found in re.finditer(pattern, code):
                yield f"{kind} in a text", at + found.start(), at + found.end(), others[found[0]]
        for found in re.finditer(r"(?<![\w%@.~#\"-])\d+(?![\w.~:\"])", code):
            for other in (int(found[0]) + 1, int(found[0]) - 1):
                yield "constant in a text", at + found.start(), at + found.end(), str(other)
        at += len(line)


def places(node: ast.AST, place: Place) -> Iterator[tuple[ast.AST, Place]]:
    """Every node in which a change is a mistake, with its place."""
    yield node, place
    if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.keyword) and node.arg == "strict"):
        return
    for field, value in ast.iter_fields(node):
        if field in ("annotation", "returns", "decorator_list"):
            continue
        inside = isinstance(node, ast.FunctionDef | ast.Lambda) and field == "body"
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant):
                continue  # a docstring
            if isinstance(child, ast.stmt):
                yield from places(child, Place(_own_lines(child), place.at_import and not inside))
            elif isinstance(child, ast.AST):
                yield from places(child, Place(place.lines, place.at_import and not inside))


def _own_lines(statement: ast.stmt) -> tuple[int, int]:
    body = getattr(statement, "body", None)
    end = body[0].lineno - 1 if body else statement.end_lineno or statement.lineno
    return statement.lineno, max(statement.lineno, end)


def mutants_of(file: str, text: str) -> list[Mutant]:
    """All mutants of a file, in its order."""
    source, found = Source(file, text), {}
    for node, place in places(ast.parse(text), Place((1, 1), True)):
        for kind, start, end, new in changes(node, source):
            first, last = text.rfind("\n", 0, start) + 1, text.find("\n", end)
            mutated = text[:start] + new + text[end:]
            old_lines, new_lines = text[first:last], mutated[first : last + len(new) - (end - start)]
            line = text.count("\n", 0, start) + 1
            try:
                compile(mutated, file, "exec")
            except SyntaxError:
                continue
            lines = place.lines if place.lines[0] <= line <= place.lines[1] else (line, line)
            found[start, end, new] = Mutant(
                file, line, kind, _joined(old_lines), _joined(new_lines), start, end, new, lines, place.at_import
            )
    return [found[key] for key in sorted(found)]


def _joined(lines: str) -> str:
    return " ".join(line.strip() for line in lines.splitlines() if line.strip())


def all_mutants(root: Path, patterns: list[str]) -> list[Mutant]:
    """The mutants of the package's files that fit a pattern; all files if there is none."""
    files = sorted(path.relative_to(root) for path in (root / PACKAGE).rglob("*.py"))
    chosen = [f for f in files if not patterns or any(f.match(p) for p in patterns)]
    return [
        mutant
        for file in chosen
        if file.as_posix() not in LEFT_OUT
        for mutant in mutants_of(file.as_posix(), (root / file).read_text())
    ]


def patch(root: Path, mutant: Mutant) -> str:
    source = (root / mutant.file).read_text()
    before, after = (text.splitlines(keepends=True) for text in (source, mutant.applied(source)))
    return "".join(difflib.unified_diff(before, after, f"a/{mutant.file}", f"b/{mutant.file}"))


# ---------------------------------------------------------------------------------------------------------------------
# Running tests: this file is also a plugin of the pytest that does it

ORDER, REPORT, CONTEXT, WATCH = "MUTANTS_ORDER", "MUTANTS_REPORT", "MUTANTS_CONTEXT", "COVERAGE_PROCESS_START"
# Tests whose own processes coverage must leave alone: interrupted at every moment, it loses its way.
UNWATCHED = ("test_steps_are_counted_whatever_a_signal_handler_raises",)
_seconds: dict[str, float] = defaultdict(float)
_failed: list[str] = []


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The tests that the environment names, in its order."""
    if os.environ.get(ORDER):
        found = {item.nodeid: item for item in items}
        items[:] = [found[name] for name in json.loads(Path(os.environ[ORDER]).read_text()) if name in found]


def pytest_collection_finish(session: pytest.Session) -> None:
    if os.environ.get(REPORT):
        session.stash[_NUMBERS] = {item.nodeid: str(number) for number, item in enumerate(session.items)}


_NUMBERS = pytest.StashKey[dict[str, str]]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Tell coverage which test it is, also in the processes that the test starts."""
    coverage = sys.modules.get("coverage")
    current = coverage.Coverage.current() if coverage is not None else None
    if current is None:
        return (yield)
    os.environ[CONTEXT] = item.session.stash[_NUMBERS][item.nodeid]
    current.switch_context(os.environ[CONTEXT])
    watch = os.environ[WATCH]
    if getattr(item, "originalname", "") in UNWATCHED:
        del os.environ[WATCH]
    try:
        return (yield)
    finally:
        os.environ[WATCH] = watch


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.nodeid] += report.duration
    if report.failed:
        _failed.append(report.nodeid)


def pytest_collectreport(report: pytest.CollectReport) -> None:
    if report.failed:
        _failed.append(report.nodeid)


def pytest_sessionfinish() -> None:
    if os.environ.get(REPORT):
        Path(os.environ[REPORT]).write_text(json.dumps({"seconds": _seconds, "failed": _failed}))


# ---------------------------------------------------------------------------------------------------------------------
# From here on, the script


class Copy:
    """A copy of the tree, in which one mutant at a time stands and tests are run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.root = folder, folder / "tree"
        skipped = shutil.ignore_patterns(".git", "__pycache__", ".*_cache", ".hypothesis", "*venv*", "build", "dist")
        shutil.copytree(ROOT, self.root, ignore=skipped)
        extension = importlib.util.find_spec("xpoptim.engines.cpu._native")  # of the installed package
        if extension is not None and extension.origin is not None:
            shutil.copy(extension.origin, self.root / "xpoptim" / "engines" / "cpu")

    @contextlib.contextmanager
    def holding(self, mutant: Mutant) -> Iterator[None]:
        path = self.root / mutant.file
        original = path.read_text()
        try:
            self._write(path, mutant.applied(original))
            yield
        finally:
            self._write(path, original)

    def _write(self, path: Path, text: str) -> None:
        """Python tells a file by time and size, which do not always change: so the compiled one goes, too."""
        path.write_text(text)
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)

    def pytest(self, tests: list[str], limit: float, *options: str, **environment: str) -> dict[str, Any] | None:
        """Run tests, or all if none are named: times, failures, exit status, output. None: it took too long."""
        order, report, log = (self.folder / name for name in ("order.json", "report.json", "log.txt"))
        order.write_text(json.dumps(tests))
        report.unlink(missing_ok=True)
        files = sorted({name.split("::")[0] for name in tests})
        command = [sys.executable, "-m", "pytest", "-q", "-p", "mutants", "-p", "no:cacheprovider", *options, *files]
        path = os.pathsep.join(map(str, (self.root, self.root / "tests")))
        own = {"PYTHONPATH": path, REPORT: str(report), ORDER: str(order) if tests else ""}
        with log.open("w") as output:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                env=os.environ | own | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                status = process.wait(limit)
            except subprocess.TimeoutExpired:
                return None
            finally:
                with contextlib.suppress(ProcessLookupError):  # what it started must not outlive it either
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        result = json.loads(report.read_text()) if report.exists() else {"seconds": {}, "failed": []}
        return result | {"status": status, "log": log.read_text(errors="replace")}


class Baseline:
    """Every test with its time, and by which tests each line of the package is run."""

    def __init__(self, tests: list[str], seconds: list[float], lines: dict[str, dict[int, list[int]]]) -> None:
        self.tests, self.seconds, self.lines = tests, seconds, lines

    def order(self, mutant: Mutant) -> tuple[list[str], bool]:
        """All tests, those that are the likeliest to notice the mutant first; and whether any runs its line."""
        by_line = self.lines.get(mutant.file, {})
        of_file = {test for tests in by_line.values() for test in tests}
        first, last = mutant.lines
        closest = set(by_line.get(mutant.line, ())) or {t for n in range(first, last + 1) for t in by_line.get(n, ())}
        closest = of_file if mutant.at_import else closest
        groups = (closest, of_file - closest, set(range(len(self.tests))) - of_file - closest)
        return [self.tests[test] for group in groups for test in self._one_of_each_first(group)], bool(closest)

    def _one_of_each_first(self, tests: set[int]) -> list[int]:
        """The fastest case of every test function, then the second of every one, and so on."""
        seen: dict[str, int] = defaultdict(int)
        ranks = []
        for test in sorted(tests, key=lambda t: (self.seconds[t], t)):
            function = self.tests[test].split("[")[0]
            ranks.append((seen[function], self.seconds[test], test))
            seen[function] += 1
        return [test for _, _, test in sorted(ranks)]

    def rounds(self, tests: list[str], seconds: float) -> Iterator[list[str]]:
        times = dict(zip(self.tests, self.seconds, strict=True))
        part: list[str] = []
        left = seconds
        for test in tests:
            if part and times[test] > left:
                yield part
                part, left = [], seconds
            part.append(test)
            left -= times[test]
        if part:
            yield part

    def write(self, path: Path, digest: str) -> None:
        path.write_text(json.dumps({"digest": digest, **vars(self)}))

    @classmethod
    def read(cls, path: Path, digest: str) -> Baseline | None:
        """What was written of the very same files, or None."""
        found = json.loads(path.read_text()) if path.exists() else {}
        if found.pop("digest", "") != digest:
            return None
        found["lines"] = {file: {int(n): t for n, t in lines.items()} for file, lines in found["lines"].items()}
        return cls(**found)


def digest_of(root: Path) -> str:
    total = hashlib.sha256(sys.version.encode())
    for path in sorted([*(root / PACKAGE).rglob("*.py"), *(root / "tests").rglob("*.*")]):
        if path.is_file() and "__pycache__" not in path.parts and path.name != Path(__file__).name:
            total.update(repr((path.relative_to(root).as_posix(), path.read_bytes())).encode())
    return total.hexdigest()


COVERAGE = """\
[run]
core = ctrace
source = {root}/xpoptim
data_file = {folder}/coverage/data
parallel = true
patch = _exit
context = ${{MUTANTS_CONTEXT-}}
disable_warnings = no-data-collected,module-not-imported,module-not-measured,already-imported,no-ctracer
"""


def measured(copy: Copy, limit: float) -> Baseline:
    """Run the whole suite under coverage. `SystemExit` if it is not green."""
    import coverage

    config = copy.folder / "coverage.ini"
    (copy.folder / "coverage").mkdir()
    config.write_text(COVERAGE.format(root=copy.root, folder=copy.folder))
    result = copy.pytest([], limit, **{WATCH: str(config)})
    if result is None or not result["seconds"]:
        raise SystemExit(f"the tests did not end:\n{(copy.folder / 'log.txt').read_text()[-3000:]}")
    if result["failed"]:  # being watched may have been too much for some
        again = copy.pytest(result["failed"], limit)
        if again is None or again["status"] != 0:
            raise SystemExit(f"without any change these fail: {result['failed']}\n{again and again['log'][-3000:]}")
        print(f"not green while they are watched, but else: {', '.join(result['failed'])}", flush=True)
    tests = list(result["seconds"])
    cov = coverage.Coverage(config_file=str(config))
    cov.combine([str(copy.folder / "coverage")])
    data = cov.get_data()
    lines: dict[str, dict[int, list[int]]] = {}
    for path in data.measured_files():
        by_line = data.contexts_by_lineno(path)
        file = Path(path).resolve().relative_to(copy.root.resolve()).as_posix()
        lines[file] = {line: sorted({int(c) for c in found if c}) for line, found in by_line.items()}
    return Baseline(tests, [result["seconds"][test] for test in tests], lines)


def verdict_of(mutant: Mutant, copy: Copy, baseline: Baseline, options: argparse.Namespace) -> dict[str, Any]:
    """Run tests until one notices the mutant."""
    start = time.monotonic()
    order, covered = baseline.order(mutant)
    run = 0
    verdict, by = ("survived" if covered else "not covered"), ""
    with copy.holding(mutant):
        for number, tests in enumerate(baseline.rounds(order, options.seconds)):
            if number == options.rounds:
                break
            run += len(tests)
            result = copy.pytest(tests, options.limit, "-x")
            if result is None:
                verdict = "timeout"
                break
            if result["status"] == 4:
                raise SystemExit(result["log"])
            if result["status"] not in (0, 5):
                verdict, by = "killed", next(iter(result["failed"]), f"exit status {result['status']}")
                break
    seconds = round(time.monotonic() - start, 1)
    return asdict(mutant) | {"verdict": verdict, "by": by, "tests": run, "of": len(order), "seconds": seconds}


def judged(mutant: Mutant) -> str:
    """Why a mutant is equivalent, or nothing."""
    return next((why for *known, why in EQUIVALENT if known == [mutant.file, mutant.old, mutant.new]), "")


def run(sample: list[Mutant], options: argparse.Namespace) -> list[dict[str, Any]]:
    """The verdicts on the mutants of a sample, each printed as it comes."""
    verdicts = [asdict(m) | {"verdict": "equivalent", "by": judged(m)} for m in sample if judged(m)]
    rest = [m for m in sample if not judged(m)]
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies: queue.Queue[Copy] = queue.Queue()
        for number in range(options.jobs):
            copies.put(Copy(Path(folder, str(number))))
        baseline = known_baseline(copies.queue[0], options)

        def one(mutant: Mutant) -> dict[str, Any]:
            copy = copies.get()
            try:
                return verdict_of(mutant, copy, baseline, options)
            finally:
                copies.put(copy)

        with ThreadPoolExecutor(options.jobs) as pool:
            pending = {pool.submit(one, mutant): mutant for mutant in rest}
            for done in as_completed(pending):
                verdicts.append(done.result())
                end = f"{verdicts[-1]['verdict']} ({verdicts[-1]['seconds']:.0f} s)"
                print(f"[{len(verdicts)}/{len(sample)}] {end}: {pending[done]}", flush=True)
                if options.out:
                    write(options, verdicts)
    return verdicts


def known_baseline(copy: Copy, options: argparse.Namespace) -> Baseline:
    digest = digest_of(copy.root)
    baseline = Baseline.read(options.baseline, digest) if options.baseline else None
    if baseline is None:
        start = time.monotonic()
        baseline = measured(copy, options.baseline_limit)
        print(f"green: {len(baseline.tests)} tests in {time.monotonic() - start:.0f} s", flush=True)
        if options.baseline:
            baseline.write(options.baseline, digest)
    return baseline


def write(options: argparse.Namespace, verdicts: list[dict[str, Any]]) -> None:
    counts: dict[str, int] = defaultdict(int)
    for verdict in verdicts:
        counts[verdict["verdict"]] += 1
    head = {"seed": options.seed, "rounds": options.rounds, "seconds": options.seconds, "python": sys.version}
    options.out.write_text(json.dumps({**head, "counts": counts, "mutants": verdicts}, indent=1))


def survivors_of(path: Path, mutants: list[Mutant]) -> list[Mutant]:
    """The survivors of a run, as far as their lines still stand."""
    found = [m for m in json.loads(path.read_text())["mutants"] if m["verdict"] in ("survived", "not covered")]
    keys = {(m["file"], m["old"], m["new"]) for m in found}
    return [m for m in mutants if (m.file, m.old, m.new) in keys]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--count", type=int, default=100, help="mutants in the sample (default: 100)")
    parser.add_argument("--seed", type=int, default=0, help="of the sample (default: 0)")
    parser.add_argument("--files", nargs="+", default=[], help="patterns, as 'engines/*.py' (default: all)")
    parser.add_argument("--jobs", type=int, default=1, help="mutants at a time (default: 1)")
    parser.add_argument("--seconds", type=float, default=40, help="of tests in a round (default: 40)")
    parser.add_argument("--rounds", type=int, default=3, help="for each mutant, at most (default: 3)")
    parser.add_argument("--limit", type=float, default=150, help="seconds that a round may take (default: 150)")
    parser.add_argument("--baseline", type=Path, help="a file to keep the first run in, for the same files")
    parser.add_argument("--baseline-limit", type=float, default=7200, help="seconds that it may take (default: 7200)")
    parser.add_argument("--out", type=Path, help="a file for the results, as JSON")
    parser.add_argument("--again", type=Path, metavar="RESULTS", help="instead of a sample, the survivors of a run")
    parser.add_argument("--list", action="store_true", help="print all mutants, numbered, and run none")
    parser.add_argument("--apply", type=int, metavar="N", help="print the mutant of that number as a patch")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    mutants = all_mutants(ROOT, options.files)
    if options.list:
        print("\n".join(f"{number}  {mutant.kind}  {mutant}" for number, mutant in enumerate(mutants)))
        return 0
    if options.apply is not None:
        print(patch(ROOT, mutants[options.apply]), end="")
        return 0
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # some mutants end their process
    if options.again:
        sample = survivors_of(options.again, mutants)
    else:
        sample = random.Random(options.seed).sample(mutants, min(options.count, len(mutants)))
    print(f"{len(sample)} of {len(mutants)} mutants", flush=True)
    verdicts = run(sample, options)
    alive = [v for v in verdicts if v["verdict"] in ("survived", "not covered")]
    print(f"\n{len(alive)} of {len(verdicts)} survived")
    for v in sorted(alive, key=lambda v: (v["file"], v["line"])):
        print(f"{v['file']}:{v['line']} ({v['verdict']}, {v['tests']} of {v['of']} tests): {v['old']}  ->  {v['new']}")
    if options.out:
        write(options, verdicts)
    return 1 if alive else 0


if __name__ == "__main__":
    sys.exit(main())
