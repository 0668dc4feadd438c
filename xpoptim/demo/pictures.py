"""The demo's four pictures. Nothing here trains: numbers in, PNG files out."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from xpoptim.demo import training
from xpoptim.demo.surface import START, UPDATES, height
from xpoptim.demo.training import Curve, Result

# Okabe and Ito's palette: told apart with any kind of colour vision. One colour per optimizer everywhere.
COLOURS = {
    "SGD": "#4d4d4d",
    "Momentum": "#0072b2",
    "Nesterov": "#56b4e9",
    "AdaGrad": "#009e73",
    "RMSprop": "#e69f00",
    "Adam": "#d55e00",
    "AdamW": "#cc79a7",
}
DASHED = {"Nesterov", "AdamW"}  # they run close to Momentum and Adam, and would hide them
INK, FAINT = "#222222", "#8a8a8a"

STYLE: dict[str, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e6e6e6",
    "grid.linewidth": 0.8,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "lines.solid_capstyle": "round",
}


def style() -> AbstractContextManager[None]:
    """The look of all pictures, without touching the settings of a program that calls the demo."""
    return mpl.rc_context(STYLE)


def surface(file: Path) -> None:
    """The valley in 3-D, with its contours on the floor below."""
    with style():
        figure = Figure(figsize=(9, 6.6))
        axes: Any = figure.add_axes((0.0, 0.02, 1.0, 0.9), projection="3d")
        x, y = np.meshgrid(np.linspace(-10, 10, 121), np.linspace(-5, 5, 121))
        z = height(x, y)
        floor = -14.0
        axes.contourf(x, y, z, levels=np.linspace(0, 30, 31), zdir="z", offset=floor, cmap="viridis", alpha=0.85)
        axes.plot_surface(
            x, y, z, cmap="viridis", rstride=3, cstride=3, edgecolor=(1, 1, 1, 0.25), linewidth=0.3
        )
        axes.set(xlabel="x", ylabel="y", zlabel="z", xlim=(-10, 10), ylim=(-5, 5), zlim=(floor, 30))
        axes.set_zticks([0, 10, 20, 30])
        axes.set_box_aspect((1.5, 1.1, 0.85), zoom=1.05)
        axes.view_init(elev=24, azim=-56)
        for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
            axis.set_pane_color((0.97, 0.97, 0.97, 1.0))
        figure.text(0.05, 0.93, "A valley: z = x²/20 + y²", fontsize=16, weight="bold")
        figure.text(
            0.05, 0.885, "Steep across, almost flat along: the gradient hardly ever points to the minimum at (0, 0)."
        )
        figure.savefig(file)


def paths(file: Path, ways: dict[str, list[tuple[float, float]]]) -> None:
    """The valley from above with the way of each optimizer, one panel each."""
    x, y = np.meshgrid(np.linspace(-10, 10, 201), np.linspace(-10, 10, 201))
    levels = np.array([0.05, 0.2, 0.5, 1, 2, 4, 7, 11, 16, 22, 29, 37, 46, 56, 67, 79])
    with style():
        figure = Figure(figsize=(11, 8.2), layout="constrained")
        figure.suptitle(
            f"Four ways down z = x²/20 + y²  ({UPDATES} updates from (−7, 2))", fontsize=16, weight="bold", x=0.01, ha="left"
        )
        panels = figure.subplots(2, 2, sharex=True, sharey=True)
        for axes, (title, points) in zip(panels.flat, ways.items(), strict=True):
            name = title.split(" ")[0]
            xs, ys = np.array(points).T
            axes.grid(visible=False)
            axes.contourf(x, y, height(x, y), levels=[0, *levels], cmap="Greys", alpha=0.28, norm="asinh")
            axes.contour(x, y, height(x, y), levels=levels, colors="#9a9a9a", linewidths=0.6)
            axes.plot(xs, ys, "-", color=COLOURS[name], linewidth=1.8)
            axes.plot(xs, ys, "o", color=COLOURS[name], markersize=5, markeredgecolor="white", markeredgewidth=0.7)
            axes.plot(0, 0, marker="*", color=INK, markersize=15, markeredgecolor="white", zorder=5)
            axes.plot(*START, marker="s", color=INK, markersize=7, markeredgecolor="white", zorder=5)
            halo = [patheffects.withStroke(linewidth=3, foreground="white")]
            axes.annotate("start", START, (-8, 8), textcoords="offset points", ha="right", path_effects=halo)
            end = height(*points[-1])
            axes.set_title(title, color=COLOURS[name])
            axes.text(
                0.98, 0.03, f"z = {end:.2g} after {len(points) - 1} updates", transform=axes.transAxes, ha="right",
                path_effects=halo,
            )
            axes.set(xlim=(-9.5, 9.5), ylim=(-5, 5))
        for axes in panels[1]:
            axes.set_xlabel("x")
        for axes in panels[:, 0]:
            axes.set_ylabel("y", rotation=0, labelpad=12)
        figure.savefig(file)


def training_curves(file: Path, results: list[Result]) -> None:
    """Training loss and test accuracy of every optimizer along the training."""
    with style():
        figure = Figure(figsize=(12, 5.6), layout="constrained")
        figure.suptitle(
            "Seven optimizers, one network: the same start, the same mini-batches",
            fontsize=16, weight="bold", x=0.01, ha="left",
        )
        left, right = figure.subplots(1, 2)
        for result in results:
            line = "--" if result.name in DASHED else "-"
            label = f"{result.name}  (lr {result.lr:g})"
            curve, colour = result.curve, COLOURS[result.name]
            left.plot(curve.steps, curve.loss, line, color=colour, label=label)
            right.plot(curve.steps, curve.test_accuracy, line, color=colour, label=label)
        left.set_title("Loss on the training images")
        left.set(yscale="log", ylabel="mean cross-entropy")
        right.set_title("Accuracy on the test images")
        right.set(ylabel="correctly read")
        right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        for axes in (left, right):
            axes.set(xscale="log", xlabel="training step")
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        right.legend(loc="lower right")
        figure.savefig(file)


def dropout_gap(file: Path, without: Curve, with_dropout: Curve) -> None:
    """Training and test accuracy, without Dropout and with it side by side; the gap between them is shaded."""
    right_labels = 1 - training.WRONG_LABELS / training.SMALL_IMAGES
    sizes = "-".join(map(str, training.DEEP_SIZES))
    facts = (
        f"A {sizes} network, Adam, {training.SMALL_IMAGES} training images of which "
        f"{training.WRONG_LABELS} carry a wrong label on purpose; all test labels are right."
    )
    train_colour, test_colour = COLOURS["Momentum"], COLOURS["Adam"]
    with style():
        figure = Figure(figsize=(12, 5.8), layout="constrained")
        figure.suptitle("Dropout against learning by heart\n", fontsize=16, weight="bold", x=0.01, ha="left")
        figure.text(0.01, 0.905, facts)
        panels = figure.subplots(1, 2, sharex=True, sharey=True)
        titles = ("Without Dropout", f"With Dropout, ratio {training.DEEP_RATIO:g}")
        for axes, title, curve in zip(panels, titles, (without, with_dropout), strict=True):
            train, test = curve.train_accuracy, curve.test_accuracy
            axes.axhline(right_labels, color=FAINT, linewidth=1, linestyle=":")
            axes.fill_between(curve.steps, train, test, color=FAINT, alpha=0.16, linewidth=0)
            axes.plot(curve.steps, train, color=train_colour, label="training images, labels as given")
            axes.plot(curve.steps, test, color=test_colour, label="test images")
            gap = 100 * (train[-1] - test[-1])
            axes.set_title(f"{title}: gap {gap:+.1f} points, test {test[-1]:.1%}".replace("-", "−"))
            axes.set(xlabel="training step", xlim=(0, curve.steps[-1]), ylim=(0, 1.03))
            axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panels[0].set_ylabel("accuracy")
        panels[0].text(
            without.steps[-1] * 0.99, right_labels - 0.012, "share of training labels that are right",
            ha="right", va="top", color="#555555", fontsize=9.5,
        )
        panels[0].legend(loc="lower right")
        figure.savefig(file)
