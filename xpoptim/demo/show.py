"""The demo as a user sees it: progress while it trains, a table, and the pictures."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

import xpoptim as xo
from xpoptim.demo import DemoError, pictures, surface, training
from xpoptim.demo.training import Backend, Curve, OnStep, Result

PLAIN_WIDTH = 120  # columns, where the output is a file or a pipe that has no width of its own


def main_job(backend_name: str, seed: int, out: Path, steps: int) -> None:
    """Train, print the table, save the pictures; see :func:`xpoptim.demo.run`."""
    start = perf_counter()
    backend = training.open_backend(backend_name)
    make_folder(out)
    console = make_console()
    data = training.load_digits(backend.xp, seed)
    console.print(introduction(backend, data), highlight=False)
    with show_progress(console, steps) as progress:
        results = []
        for entry in training.ENTRIES:
            with progress.task(entry.name, pictures.COLOURS[entry.name]) as on_step:
                results.append(training.compare(backend, entry, data, seed, steps, on_step))
        curves = []
        for title, ratio in (("without Dropout", 0.0), ("with Dropout", training.DEEP_RATIO)):
            with progress.task(title, "none") as on_step:
                curves.append(training.overfit(backend, ratio, seed, steps, on_step))
    console.print(table(results, backend))
    console.print(reading(results, curves), highlight=False)
    files = save_pictures(out, results, curves)
    console.print(f"\nPictures, made in {perf_counter() - start:.0f} s in all:", highlight=False)
    for file in files:
        console.print(f"  {file}", highlight=False, soft_wrap=True)


def make_folder(out: Path) -> None:
    """Make the folder, and find out before the training whether it can be written."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise cannot_write(out, error) from error


def cannot_write(out: Path, error: OSError) -> DemoError:
    reason = error.strerror or str(error)
    return DemoError(f"cannot write pictures to {out} ({reason}): choose another folder with --out")


def make_console() -> Console:
    console = Console(file=sys.stdout)
    return console if console.is_terminal else Console(file=sys.stdout, width=PLAIN_WIDTH)


def introduction(backend: Backend, data: training.Data) -> str:
    sizes = "-".join(map(str, training.SIZES))
    where = f"{backend.name} {backend.xp.__version__}"
    return (
        f"xpoptim {xo.__version__} on {where}: training a {sizes} network with Dropout "
        f"{training.DROPOUT_RATIO:g}\non {len(data.y_train):,} handwritten digits, "
        f"testing on {len(data.y_test)} others; mini-batches of {training.BATCH}."
    )


class Reporter:
    """Progress of the trainings: live bars on a terminal, one line for each finished one elsewhere."""

    def __init__(self, console: Console, steps: int, bars: Progress | None) -> None:
        self.console, self.steps, self.bars = console, steps, bars

    @contextmanager
    def task(self, name: str, colour: str) -> Iterator[OnStep]:
        latest = Curve()
        task = None
        if self.bars is not None:
            style = "default" if colour == "none" else colour
            task = self.bars.add_task(f"[{style}]{name}", total=self.steps, result="")

        def on_step(step: int, curve: Curve) -> None:
            nonlocal latest
            latest = curve
            # Redrawing at every step would take part of the time that is being measured.
            if self.bars is not None and task is not None and (step % 20 == 0 or step == self.steps):
                self.bars.update(task, completed=step, result=summary(curve))

        yield on_step
        if self.bars is None:
            self.console.print(f"{name:<16} {self.steps} steps  {summary(latest)}", highlight=False)


def summary(curve: Curve) -> str:
    return f"loss {curve.loss[-1]:.4f}  test {curve.test_accuracy[-1]:6.2%}" if curve.steps else ""


@contextmanager
def show_progress(console: Console, steps: int) -> Iterator[Reporter]:
    if not console.is_terminal:
        yield Reporter(console, steps, None)
        return
    columns = (
        TextColumn("{task.description:<16}"),
        BarColumn(bar_width=30),
        TextColumn("{task.completed:>5.0f} steps"),
        TextColumn("{task.fields[result]}"),
        TimeElapsedColumn(),
    )
    # No refresh thread of rich's: it would run in the middle of what is timed. Updates redraw by themselves.
    with Progress(*columns, console=console, auto_refresh=False) as bars:
        yield Reporter(console, steps, bars)


def table(results: list[Result], backend: Backend) -> Table:
    """One row per optimizer."""
    fused = "fused" if backend.name == "numpy" else "xpoptim"
    shown = Table(title="Handwritten digits, one row per optimizer", title_style="bold", title_justify="left")
    shown.add_column("optimizer")
    for heading in ("lr", "test accuracy", "train loss", "steps/s", f"{fused} µs", f"plain {backend.name} µs", "faster"):
        shown.add_column(heading, justify="right")
    best = max(result.curve.test_accuracy[-1] for result in results)
    for result in results:
        accuracy = result.curve.test_accuracy[-1]
        shown.add_row(
            Text(result.name, style=pictures.COLOURS[result.name]),
            f"{result.lr:g}",
            Text(f"{accuracy:.2%}", style="bold" if accuracy == best else ""),
            f"{result.curve.loss[-1]:.5f}",
            f"{result.steps_per_second:,.0f}",
            f"{result.fused_us:,.1f}",
            f"{result.plain_us:,.1f}",
            f"{result.plain_us / result.fused_us:.1f} ×",
        )
    return shown
