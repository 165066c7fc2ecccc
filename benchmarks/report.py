"""Results as text for the terminal and as Markdown for the README."""

import functools
import itertools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cost import CostRow
from benchmarks.results import Results, Row

README_BEGIN = "<!-- benchmark:begin -->"
README_END = "<!-- benchmark:end -->"

_MISSING = "-"

_TITLES = {
    "core": "attention core",
    "module": "Haiku module",
    "structure_module": "AlphaFold 2's structure module with the module in it",
}
MODE_TITLES = {"forward": "forward", "grad": "gradient"}


def machine(results: Results) -> str:
    """The machine and what runs on it, in two lines, or three."""
    m = results.machine
    versions = ", ".join(f"{name} {version}" for name, version in m["versions"].items())
    environment = _environment(m)
    return (
        f"{_machine_name(m)}; memory {m['bandwidth_gb_s']:.0f} GB/s, "
        f"{results.settings['dtype']} matrix products {m['matmul_gflop_s']:.0f} GFLOP/s (measured)"
        f"\n{versions}" + (f"\n{environment}" if environment else "")
    )


def _environment(m: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in m.get("environment", {}).items())


def _machine_name(m: dict[str, Any]) -> str:
    size = "" if m["memory_gb"] is None else f", {m['memory_gb']:.0f} GB"
    return f"{m['device']}, {m['cores']} CPU cores{size}"


def demonstration(demo: dict[str, Any]) -> str:
    """The demonstration on a real protein."""
    columns: dict[str, Callable[[dict[str, float]], str]] = {
        "translation": lambda moved: f"{moved['distance']:,.0f} Å"
    }
    titles = {
        "attention": "attention weights",
        "output": "output",
        "rounding": "float64 output",
        "alphafold": "AlphaFold 2's output",
    }
    for name, title in titles.items():
        if all(name in moved for moved in demo["moved"]):
            columns[title] = f"{{0[{name}]:.1e}}".format
    lines = [
        f"{demo['protein']}, {demo['residues']} residues, moved as a whole by a random rotation "
        "and a translation.",
        "Change of each result over its largest element; that of the float64 output is what "
        "float32 coordinates alone cost:",
        *_table(columns, demo["moved"]),
    ]
    lines += [
        f"AlphaFold 2 against implementation={x['implementation']}: off by {x['error']:.1e} of the "
        f"largest element, {x['identical']:.0%} of the numbers identical in every bit."
        for x in demo["agreement"]
    ]
    return "\n".join(lines)


def tables(results: Results) -> str:
    """All rows, in a table for each size, and what was left out."""
    groups = itertools.groupby(results.rows, key=lambda row: (row.what, row.n, row.dtype))
    blocks = [
        "\n".join([f"{_TITLES[what]}, N = {n}, {dtype}", *_rows_table(list(rows), what)])
        for (what, n, dtype), rows in groups
    ]
    if note := _loss_note(results):
        blocks.append(note)
    if results.missing:
        blocks.append(
            "\n".join(["Left out:", *(f"  {x['name']}: {x['reason']}" for x in results.missing)])
        )
    if not results.is_complete:
        blocks.append("The run was interrupted: what is above is complete, the rest is missing.")
    return "\n\n".join(blocks)


def _loss_note(results: Results) -> str:
    """What the gradient is; nothing where there is none, or for files that do not say."""
    has_gradient = any(row.mode == "grad" for row in results.rows)
    if not has_gradient or results.loss == "linear":
        return ""
    return f"{MODE_TITLES['grad']}: value and gradient of a {results.loss} to a target."


def _base(what: str) -> str:
    return "reference" if what == "core" else "AlphaFold 2"


def _rows_table(rows: Sequence[Row], what: str) -> list[str]:
    columns: dict[str, Callable[[Row], str]] = {
        "implementation": lambda row: row.label,
        "": lambda row: MODE_TITLES[row.mode],
        "median ms": _time,
        "quartiles": lambda row: (
            f"{_number(row.q1_ms)} to {_number(row.q3_ms)}" if row.median_ms else _MISSING
        ),
        "compile s": lambda row: _number(row.compile_s, "{:.1f}"),
        f"speed ({_base(what)} = 1)": lambda row: _number(row.speedup, "{:.2f}"),
        "temp MB": lambda row: _megabytes(row.temp_bytes),
        "error": lambda row: _number(row.error, "{:.1e}"),
        "roofline": lambda row: _number(row.roofline, "{:.0%}"),
    }
    notes = dict.fromkeys(f"  {row.label}: {row.note}" for row in rows if row.note)
    return [*_table(columns, rows), *notes, *_errors_table(rows)]


def _errors_table(rows: Sequence[Row]) -> list[str]:
    """The errors of each group, where there are several."""
    several = [row for row in rows if row.errors and len(row.errors) > 1]
    columns: dict[str, Callable[[Row], str]] = {
        "errors": lambda row: row.label,
        "": lambda row: MODE_TITLES[row.mode],
    }
    if not several:
        return []
    for name in several[0].errors or ():
        columns[name] = functools.partial(_group_error, name)
    return _table(columns, several)


def _group_error(name: str, row: Row) -> str:
    return _number((row.errors or {})[name], "{:.1e}")


def cost(target: str, rows: Sequence[CostRow]) -> str:
    """What programs compiled for a target would need."""
    columns: dict[str, Callable[[CostRow], str]] = {
        "N": lambda row: str(row.n),
        "implementation": lambda row: row.label,
        "": lambda row: MODE_TITLES[row.mode],
        "temp MB": lambda row: _megabytes(row.temp_bytes),
        "traffic / inputs_2d": lambda row: row.note or _number(row.traffic, "{:.1f}"),
    }
    return "\n".join([f"Compiled for {target}", *_table(columns, rows)])


def markdown(results: Results, source: str | None) -> str:
    """The README's table: for each part, a row for each size and implementation.

    Args:
      results: of a run.
      source: file they are from, to be named.
    """
    blocks = []
    for what, rows in itertools.groupby(results.rows, key=lambda row: row.what):
        blocks.append(_markdown_table(list(rows), what))
    m, rank = results.machine, results.settings.get("pair_rank")
    environment = f", with `{_environment(m)}`" if _environment(m) else ""
    footer = [
        f"Medians on {_machine_name(m)}; jax {m['versions']['jax']}, {results.settings['dtype']}, "
        f"{results.date[:10]}{environment}. Errors are largest errors against float64 over the "
        "largest element; of a gradient, the worst of parameters, inputs and frames.",
        _loss_note(results).capitalize(),
        f"`inputs_2d` is given as factors of rank {rank}." if rank else "",
        f"Generated from `{source}`." if source else "",
    ]
    return "\n\n".join([*blocks, " ".join(filter(None, footer))])


def _markdown_table(rows: Sequence[Row], what: str) -> str:
    modes = list(dict.fromkeys(row.mode for row in rows))
    columns: dict[str, Callable[[Row], str]] = {
        "time (ms)": _time,
        f"speed ({_base(what)} = 1)": lambda row: _number(row.speedup, "{:.1f}"),
        "temporary memory (MB)": lambda row: _megabytes(row.temp_bytes),
        "error": lambda row: _number(row.error, "{:.0e}"),
    }
    title = f"{_TITLES[what]}: {' / '.join(MODE_TITLES[mode] for mode in modes)}"
    lines = [["N", title, *columns], ["---:", "---", *["---:"] * len(columns)]]
    order = list(dict.fromkeys(row.label for row in rows))
    rows = sorted(rows, key=lambda row: (row.n, order.index(row.label), modes.index(row.mode)))
    for (n, label), of_row in itertools.groupby(rows, key=lambda row: (row.n, row.label)):
        in_modes = list(of_row)
        cells = (" / ".join(cell(row) for row in in_modes) for cell in columns.values())
        lines.append([str(n), label, *cells])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def update_readme(path: str | os.PathLike[str], content: str) -> None:
    """Replaces what stands between the markers of a file.

    Raises:
      OSError: if the file cannot be read or written.
      ValueError: if it does not have each marker once, in order.
    """
    before, after = around_markers(path)
    Path(path).write_text(f"{before}{README_BEGIN}\n{content}\n{README_END}{after}")


def around_markers(path: str | os.PathLike[str]) -> tuple[str, str]:
    """What stands before and after the markers of a file; raises what `update_readme` does."""
    text = Path(path).read_text()
    before, begin, rest = text.partition(README_BEGIN)
    _, end, after = rest.partition(README_END)
    if not (begin and end) or README_BEGIN in rest or README_END in before + after:
        raise ValueError(
            f"{os.fspath(path)} must have {README_BEGIN} and {README_END} once, in this order."
        )
    return before, after


def _table(columns: dict[str, Callable[[Any], str]], rows: Sequence[Any]) -> list[str]:
    """Aligned lines: the first column and those of words to the left, numbers to the right."""
    lines = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines)]
    is_text = [i == 0 or name in ("", "implementation") for i, name in enumerate(columns)]
    forms = [f"{{:{'<' if left else '>'}{width}}}" for left, width in zip(is_text, widths)]
    return [f"  {'  '.join(forms).format(*line)}".rstrip() for line in lines]


def _time(row: Row) -> str:
    return _number(row.median_ms) if row.median_ms else row.status


def _number(x: float | None, form: str | None = None) -> str:
    """Three significant digits, unless `form` says otherwise."""
    if x is None:
        return _MISSING
    if form is not None:
        return form.format(x)
    return f"{x:.0f}" if x >= 100 else f"{x:#.3g}"


def _megabytes(x: int | None) -> str:
    return _number(None if x is None else x / 1e6)
