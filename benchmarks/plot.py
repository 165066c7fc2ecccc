"""The figure: time and memory against the number of residues, with the least time possible."""

import os
from collections.abc import Sequence

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from benchmarks.report import MODE_TITLES
from benchmarks.results import Results, Row

_MARKERS = "osD^vP*X<>"


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes the figure; the format is that of the file's name, see `check_format`."""
    figure(results).savefig(path, dpi=150)


def figure(results: Results) -> Figure:
    """A row of panels for each part: time of each mode, and memory of the last mode.

    Bands are quartiles. Only implementations that were timed appear; the memory of one that did
    not fit is what XLA says.

    Raises:
      ValueError: if there is nothing to draw.
    """
    timed = [row for row in results.rows if row.median_ms is not None]
    if not timed:
        raise ValueError("there is no row with a time to draw.")
    whats = list(dict.fromkeys(row.what for row in timed))
    modes = list(dict.fromkeys(row.mode for row in timed))
    labels = list(dict.fromkeys(row.label for row in timed))

    num_columns = len(modes) + 1
    figure = Figure(figsize=(4.2 * num_columns, 3.6 * len(whats) + 0.8), layout="constrained")
    grid = figure.subplots(len(whats), num_columns, squeeze=False)
    for what, axes in zip(whats, grid):
        part = what.replace("_", " ")
        for mode, ax in zip(modes, axes):
            _draw_times(ax, [row for row in timed if (row.what, row.mode) == (what, mode)], labels)
            ax.set_title(f"{part}: {MODE_TITLES[mode]}")
        # Also of what was compiled and then did not fit.
        rows = [row for row in results.rows if (row.what, row.mode) == (what, modes[-1])]
        _draw(axes[-1], [row for row in rows if row.temp_bytes], labels, "temp_bytes", 1e-6)
        axes[-1].set_ylabel("temporary memory (MB)")
        axes[-1].set_title(f"{part}: memory, {MODE_TITLES[modes[-1]]}")
    handles: dict[str, Artist] = {}
    for ax in grid.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    shown, ncols = (list(handles.values()), list(handles)), min(len(handles), 4)
    figure.legend(*shown, loc="outside lower center", ncols=ncols)
    machine = results.machine
    figure.suptitle(
        f"{machine['device']}, {machine['cores']} CPU cores, {results.settings['dtype']}, "
        f"jax {machine['versions']['jax']}, {results.date[:10]}"
    )
    return figure


def check_format(path: str | os.PathLike[str]) -> None:
    """Checks that a figure can be written under that name.

    Raises:
      ValueError: if there is no such format, naming those there are.
    """
    suffix = os.path.splitext(path)[1].removeprefix(".")
    known = Figure().canvas.get_supported_filetypes()
    if suffix not in known:
        raise ValueError(f"{os.fspath(path)}: unknown format, known are {', '.join(known)}.")


def _draw_times(ax: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    least = {row.n: row.roofline * row.median_ms for row in rows if row.roofline and row.median_ms}
    n = sorted(least)
    _draw(ax, rows, labels, "median_ms", 1.0)
    ax.plot(n, [least[x] for x in n], color="black", linestyle="--", label="least possible time")
    ax.set_ylabel("time (ms)")


def _draw(ax: Axes, rows: Sequence[Row], labels: Sequence[str], column: str, unit: float) -> None:
    """A line for each label, with a band of quartiles if it is one of times."""
    for i, label in enumerate(labels):
        line = sorted((row for row in rows if row.label == label), key=lambda row: row.n)

        def values(name: str, line: Sequence[Row] = line) -> np.ndarray:
            return np.array([getattr(row, name) for row in line], np.float64)

        n, marker = values("n"), _MARKERS[i % len(_MARKERS)]
        ax.plot(n, values(column) * unit, marker=marker, color=f"C{i}", label=label)
        if column == "median_ms":
            quartiles = values("q1_ms"), values("q3_ms")
            ax.fill_between(n, *quartiles, color=f"C{i}", alpha=0.2, linewidth=0)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted({row.n for row in rows}))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("residues N")
    ax.grid(which="major", alpha=0.3)
