"""The demo's four pictures. Nothing here trains: numbers in, PNG files out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib import patheffects
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure  # drawn by Agg, without pyplot: no display and no global state
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, NullFormatter, PercentFormatter

from .. import Hyper
from . import training
from .surface import START, UPDATES, height
from .training import Curve, Result

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
INK, GREY = "#222222", "#8a8a8a"
PAPER = LinearSegmentedColormap.from_list("paper", ["#fffdf6", "#f1ead8", "#d9d3c4"])

# The look of all pictures; the settings of a program that calls the demo stay as they are.
STYLE: Any = {
    "savefig.dpi": 150,
    "figure.facecolor": "white",
    "font.size": 11,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
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


def titled(width: float, height: float, title: str, subtitle: str) -> Figure:
    """A figure of so many inches with a heading; what is drawn in it keeps clear of the heading."""
    top = 1 - 0.95 / height
    layout = ConstrainedLayoutEngine(rect=(0.015, 0.02, 0.965, top - 0.02), wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(width, height), layout=layout)
    figure.text(0.02, 1 - 0.45 / height, title, fontsize=17, weight="bold")
    figure.text(0.02, 1 - 0.74 / height, subtitle, color="#555555")
    return figure


@mpl.rc_context(STYLE)
def surface(file: Path) -> None:
    """The valley in 3-D, with its contours on the floor below."""
    subtitle = "Steep across and almost flat along: the gradient hardly ever points to the minimum at (0, 0)."
    figure = titled(9, 7, "A valley: z = x²/20 + y²", subtitle)
    axes = figure.add_subplot(projection="3d")
    x, y = np.meshgrid(np.linspace(-10, 10, 81), np.linspace(-5, 5, 81))
    z = height(x, y)
    floor = -16.0
    rings = np.linspace(0.6, 4.9, 10) ** 2
    axes.contour(x, y, z, levels=rings, zdir="z", offset=floor, cmap="viridis", linewidths=1.6)
    axes.plot([0], [0], [floor], marker="*", markersize=11, color=INK, markeredgewidth=0)
    shape = axes.plot_surface(x, y, z, cmap="viridis", rstride=2, cstride=2, edgecolor="#ffffff38", linewidth=0.4)
    shape.set_clip_on(False)  # seen this close, its corners stick out of the flat box that axes clip to
    axes.set(xlabel="x", ylabel="y", zlabel="z", xlim=(-10, 10), ylim=(-5, 5), zlim=(floor, 30))
    axes.set(xticks=[-10, -5, 0, 5, 10], yticks=[-4, -2, 0, 2, 4], zticks=[0, 10, 20, 30])
    axes.set_box_aspect((1.5, 1.1, 0.95), zoom=1.12)
    axes.view_init(elev=26, azim=-64)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color((0.98, 0.98, 0.98, 1.0))
    figure.savefig(file)


@mpl.rc_context(STYLE)
def paths(file: Path, ways: dict[str, list[tuple[float, float]]], rates: dict[str, Hyper]) -> None:
    """The valley from above with the way of each optimizer, one panel each."""
    x, y = np.meshgrid(np.linspace(-9.5, 9.5, 201), np.linspace(-5, 5, 201))
    levels = np.linspace(0, 5.6, 15) ** 2 / 1.05  # even steps of the root: even rings
    halo = [patheffects.withStroke(linewidth=3, foreground="white")]
    subtitle = f"{UPDATES} updates from (−7, 2); each ring is a line of equal height, the star is the minimum."
    figure = titled(12, 8, "Four ways down the valley z = x²/20 + y²", subtitle)
    panels = figure.subplots(2, 2, sharex=True, sharey=True)
    for axes, (name, points) in zip(panels.flat, ways.items(), strict=True):
        xs, ys = np.array(points).T
        axes.grid(visible=False)
        axes.contourf(x, y, np.sqrt(height(x, y)), levels=40, cmap=PAPER)
        axes.contour(x, y, height(x, y), levels=levels[1:], colors="#a39c8c", linewidths=0.6)
        axes.plot(xs, ys, color=COLOURS[name], linewidth=1.6)
        axes.plot(xs, ys, "o", color=COLOURS[name], markersize=4.6, markeredgecolor="white", markeredgewidth=0.5)
        axes.plot(0, 0, marker="*", color=INK, markersize=14, markeredgecolor="white", markeredgewidth=0.8, zorder=5)
        axes.plot(*START, marker="s", color=INK, markersize=7, markeredgecolor="white", zorder=5)
        axes.annotate("start", START, (-8, 8), textcoords="offset points", ha="right", path_effects=halo)
        axes.set_title(f"{name}, learning rate {rates[name]}", color=COLOURS[name])
        end = f"z = {height(*points[-1]):.2g} at the end"
        axes.text(0.98, 0.04, end, transform=axes.transAxes, ha="right", path_effects=halo)
        axes.set(xlim=(-9.5, 9.5), ylim=(-5, 5), xticks=range(-8, 9, 4), yticks=range(-4, 5, 2))
    for axes in panels[1]:
        axes.set_xlabel("x")
    for axes in panels[:, 0]:
        axes.set_ylabel("y", rotation=0, labelpad=10)
    figure.savefig(file)


@mpl.rc_context(STYLE)
def training_curves(file: Path, results: list[Result]) -> None:
    """Training loss and test accuracy of every optimizer along the training."""
    subtitle = (
        f"A {training.SIZES_SHOWN} network with Dropout {training.DROPOUT_RATIO:g} on handwritten digits: "
        "same start, same mini-batches and same masks for all."
    )
    figure = titled(12, 6.2, "Seven optimizers, one network", subtitle)
    left, right = figure.subplots(1, 2)
    for result in results:
        line = (0, (3.5, 2)) if result.name in DASHED else "-"
        label = f"{result.name}, {result.lr:g}"
        curve, colour = result.curve, COLOURS[result.name]
        left.plot(curve.steps, curve.loss, linestyle=line, color=colour, label=label)
        right.plot(curve.steps, curve.test_accuracy, linestyle=line, color=colour, label=label)
    left.set_title("Loss on the training images")
    left.set(yscale="log", ylabel="mean cross-entropy")
    right.set_title("Accuracy on the test images")
    right.set(ylabel="images read correctly", ylim=(0, 1.03))
    right.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    for axes in (left, right):
        axes.set(xscale="log", xlabel="training step")
        axes.margins(x=0.01)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
    right.legend(loc="lower right", title="optimizer, learning rate", alignment="left")
    figure.savefig(file)


@mpl.rc_context(STYLE)
def dropout_gap(file: Path, without: Curve, with_dropout: Curve) -> None:
    """Training and test accuracy, without Dropout and with it side by side; the gap between them is shaded."""
    right_labels = 1 - training.WRONG_LABELS / training.SMALL_IMAGES
    subtitle = (
        f"A {training.SIZES_SHOWN} network trained by Adam on {training.SMALL_IMAGES} images, {training.WRONG_LABELS} "
        "of them labelled wrongly on purpose; the labels of the test images are right."
    )
    figure = titled(12, 6.2, "Dropout against learning by heart", subtitle)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    titles = ("Without Dropout", f"With Dropout {training.STRONG_RATIO:g}")
    for axes, title, curve in zip(panels, titles, (without, with_dropout), strict=True):
        train, test = curve.train_accuracy, curve.test_accuracy
        axes.axhline(right_labels, color=GREY, linewidth=1.2, linestyle=":")
        axes.fill_between(curve.steps, train, test, color=GREY, alpha=0.18, linewidth=0)
        axes.plot(curve.steps, train, color=COLOURS["Momentum"], label="training images, labels as given")
        axes.plot(curve.steps, test, color=COLOURS["Adam"], label="test images")
        gap = 100 * (train[-1] - test[-1])
        axes.set_title(f"{title}: test {test[-1]:.1%}, gap {gap:+.1f} points".replace("-", "−"))
        axes.set(xlabel="training step", ylim=(0, 1.03))
        axes.margins(x=0.01)
        axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    panels[0].set_ylabel("accuracy")
    panels[0].annotate(
        f"{right_labels:.0%} of the training labels are right",
        (0.98, right_labels),
        (0, -7),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#555555",
    )
    panels[0].legend(loc="lower right")
    figure.savefig(file)
