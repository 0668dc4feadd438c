"""The demo as a user sees it: progress while it trains, a table, and the pictures."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from time import perf_counter

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import xpoptim as xo

from ..engines.choose import selected
from ..engines.cpu import native
from . import DemoError, pictures, surface, training
from .training import Backend, Curve, OnStep, Result

PLAIN_WIDTH = 110  # columns, where the output is a file or a pipe that has no width of its own


def main_job(backend_name: str, seed: int, out: Path, steps: int) -> None:
    """Train, print the table, save the pictures; see :func:`xpoptim.demo.run`."""
    start = perf_counter()
    backend = training.open_backend(backend_name)
    make_folder(out)
    console = make_console()
    data = training.load_digits(backend.xp, seed)
    console.print(introduction(backend, data), highlight=False)
    if native.missing():
        console.print(f"This runs {native.WITHOUT} ({native.missing()}).", highlight=False, markup=False)
    with progress_of(console, steps) as reporter:
        results = []
        for entry in training.ENTRIES:
            on_step = reporter(entry.name, pictures.COLOURS[entry.name])
            results.append(training.compare(backend, entry, data, seed, steps, on_step))
        curves = []
        for title, ratio in (("no Dropout", 0.0), (f"Dropout {training.STRONG_RATIO:g}", training.STRONG_RATIO)):
            curves.append(training.overfit(backend, ratio, seed, steps, reporter(title, "default")))
    console.print(table(results))
    console.print(notes(results, backend), highlight=False)
    with console.status("drawing the pictures"):
        files = save_pictures(out, results, curves)
    console.print(f"\nPictures, {perf_counter() - start:.0f} s after the start:", highlight=False)
    for file in files:
        console.print(f"  {escape(str(file))}", highlight=False, soft_wrap=True)


def make_folder(out: Path) -> None:
    """Make the folder, and find out before the training whether it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise cannot_write(out, error) from error


def cannot_write(out: Path, error: OSError) -> DemoError:
    return DemoError(f"cannot write to {out} ({error.strerror or error}): choose another folder with --out")


def make_console() -> Console:
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=PLAIN_WIDTH)


def introduction(backend: Backend, data: training.Data) -> str:
    return (
        f"xpoptim {xo.__version__} on {backend.name} {backend.xp.__version__}\n"
        f"Each optimizer trains a {training.SIZES_SHOWN} network with Dropout {training.DROPOUT_RATIO:g} on "
        f"{len(data.y_train):,} handwritten digits, mini-batches of {training.BATCH}; {len(data.y_test)} other "
        "digits test it."
    )


def summary(curve: Curve) -> str:
    return f"loss {curve.loss[-1]:.4f}  test {curve.test_accuracy[-1]:.1%}" if curve.steps else ""


@contextmanager
def progress_of(console: Console, steps: int) -> Iterator[Callable[[str, str], OnStep]]:
    """A function that makes, of a training's name and colour, what the training calls after each step.

    It shows live bars on a terminal, and a line for each finished training elsewhere.
    """
    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(bar_width=28),
        TextColumn("{task.completed:>5.0f} steps"),
        TextColumn("{task.fields[result]}"),
        TimeElapsedColumn(),
    )
    # rich's own refresh thread would run in the middle of what is timed, so each redraw is asked for.
    bars = Progress(*columns, console=console, auto_refresh=False)

    def reporter(name: str, colour: str) -> OnStep:
        bar = bars.add_task(f"[{colour}]{name}", total=steps, result="")

        def on_step(step: int, curve: Curve) -> None:
            if console.is_terminal:
                if step % 20 == 0 or step == steps:  # to redraw takes longer than to train a step
                    bars.update(bar, completed=step, result=summary(curve), refresh=True)
            elif step == steps:
                console.print(f"{name:<12} {step} steps  {summary(curve)}", highlight=False)

        return on_step

    with bars if console.is_terminal else nullcontext():
        yield reporter


def table(results: list[Result]) -> Table:
    """One row per optimizer; narrow enough for 80 columns."""
    shown = Table("\noptimizer", box=box.HORIZONTALS)
    headings = (
        "\nlr",
        "test\naccuracy",
        "train\nloss",
        "steps\na second",
        "update\nµs",
        "plain\nµs",
        "times\nfaster",
    )
    for heading in headings:
        shown.add_column(heading, justify="right")
    best = max(result.curve.test_accuracy[-1] for result in results)
    for result in results:
        accuracy = result.curve.test_accuracy[-1]
        shown.add_row(
            Text(result.name, style=pictures.COLOURS[result.name]),
            f"{result.lr:g}",
            Text(f"{accuracy:.2%}", style="bold" if accuracy == best else ""),
            f"{result.curve.loss[-1]:.4f}",
            f"{result.steps_per_second:,.0f}",
            *times(result),
        )
    return shown


def times(result: Result) -> tuple[str, str, str]:
    """Of xpoptim, of plain code, and their ratio; dashes where only the first step was made."""
    if result.curve.steps[-1] < 2:
        return ("–", "–", "–")
    # The first step compiles the kernel or allocates the slots, so the medians leave it out.
    fused, plain = (1e6 * median(seconds[1:]) for seconds in (result.fused_seconds, result.plain_seconds))
    return f"{fused:,.1f}", f"{plain:,.1f}", f"{plain / fused:.1f}"


def notes(results: list[Result], backend: Backend) -> str:
    """How to read the table's times."""
    size = f"{results[0].parameters:,} parameters in {results[0].arrays} arrays"
    if backend.name == "numpy":
        kind = "the reference engine" if selected() == "reference" else "the fused optimizer"
        what = f"median time of {kind} for a step over {size}, {xo.get_num_threads()} threads at most"
        peer = "NumPy"
    else:
        what = f"median time of xpoptim's optimizer for a step over {size}, until the GPU has finished"
        peer = "CuPy"
    difference = max(result.difference for result in results)
    close = "are the same to the last bit" if difference == 0 else f"differ by {difference:.1g} at most"
    return (
        f"update: {what}.\nplain: textbook {peer} code, given the same gradients in the same run, in alternating "
        "order.\nThe first step, which compiles, is left out of both. Backpropagation has emptied the cache before "
        f"each\nstep, so that much of both times is the memory's. The parameters that the two reach {close}."
    )


def save_pictures(out: Path, results: list[Result], curves: list[Curve]) -> list[Path]:
    """Draw the four pictures; their files."""
    optimizers = surface.optimizers()
    ways = {name: surface.path(optimizer) for name, optimizer in optimizers.items()}
    rates = {name: optimizer.lr for name, optimizer in optimizers.items()}
    without, with_dropout = curves
    files = [out / f"{name}.png" for name in ("surface", "paths", "training", "dropout")]
    try:
        pictures.surface(files[0])
        pictures.paths(files[1], ways, rates)
        pictures.training_curves(files[2], results)
        pictures.dropout_gap(files[3], without, with_dropout)
    except OSError as error:
        raise cannot_write(Path(str(error.filename)) if error.filename else out, error) from error
    return files
