"""The figure: time and memory against the number of residues, with the least time possible."""

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from benchmarks.report import MODE_TITLES
from benchmarks.results import Results, Row

_MARKERS = "osD^vP*X<>"


def draw(results: Results, path: str | os.PathLike[str]) -> None:
    """Writes the figure; the format is that of the file's name, see `check_format`.

    Raises:
      ValueError: if there is nothing to draw.
    """
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
        for mode, ax in zip(modes, axes):
            rows = [row for row in timed if (row.what, row.mode) == (what, mode)]
            _draw_times(ax, rows, labels)
            ax.set_title(f"{what.replace('_', ' ')}: {MODE_TITLES[mode]}")
        # Also of what was compiled and then did not fit.
        rows = [row for row in results.rows if (row.what, row.mode) == (what, modes[-1])]
        _draw_memory(axes[-1], rows, labels)
        axes[-1].set_title(f"{what.replace('_', ' ')}: memory, {MODE_TITLES[modes[-1]]}")
    handles: dict[str, Artist] = {}
    for ax in grid.flat:
        handles |= dict(zip(*reversed(ax.get_legend_handles_labels())))
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="outside lower center",
        ncols=min(len(handles), 4),
    )
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
    for i, label in enumerate(labels):
        line = _of_label(rows, label)
        n, style = _column(line, "n"), _style(i)
        ax.plot(n, _column(line, "median_ms"), **style, label=label)
        quartiles = _column(line, "q1_ms"), _column(line, "q3_ms")
        ax.fill_between(n, *quartiles, color=style["color"], alpha=0.2, linewidth=0)
    least = {row.n: row.roofline * row.median_ms for row in rows if row.roofline and row.median_ms}
    ax.plot(
        sorted(least),
        [least[n] for n in sorted(least)],
        color="black",
        linestyle="--",
        label="least possible time",
    )
    ax.set_ylabel("time (ms)")
    _set_scales(ax, [row.n for row in rows])


def _draw_memory(ax: Axes, rows: Sequence[Row], labels: Sequence[str]) -> None:
    for i, label in enumerate(labels):
        line = [row for row in _of_label(rows, label) if row.temp_bytes]
        ax.plot(_column(line, "n"), _column(line, "temp_bytes") / 1e6, **_style(i), label=label)
    ax.set_ylabel("temporary memory (MB)")
    _set_scales(ax, [row.n for row in rows if row.temp_bytes])


def _of_label(rows: Sequence[Row], label: str) -> list[Row]:
    return sorted((row for row in rows if row.label == label), key=lambda row: row.n)


def _column(rows: Sequence[Row], name: str) -> np.ndarray:
    return np.array([getattr(row, name) for row in rows], np.float64)


def _style(i: int) -> dict[str, Any]:
    return {"marker": _MARKERS[i % len(_MARKERS)], "color": f"C{i}"}


def _set_scales(ax: Axes, sizes: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.set_xticks(sorted(set(sizes)))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_locator(NullLocator())
    ax.set_xlabel("residues N")
    ax.grid(which="major", alpha=0.3)
