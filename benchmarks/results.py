"""Results: rows, the JSON file of a run, and the comparison of two runs."""

import dataclasses
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jsonschema

# Raised when a field changes its meaning, is removed, or becomes required.
SCHEMA_VERSION = 1

_SCHEMA = Path(__file__).parent / "results.schema.json"

# Temporary memory is what the compiler says, no measurement: a real change is never this small.
MEMORY_MARGIN = 0.02


@dataclasses.dataclass(frozen=True)
class Row:
    """One implementation at one size in one mode."""

    what: str  # of `cases.WHATS`
    n: int  # residues
    dtype: str  # of activations and weights
    mode: str  # of `cases.MODES`
    implementation: str  # name on the command line
    label: str  # name in tables
    status: str = "ok"  # "wrong" if the result is (there is no time then), "out of memory", ...
    note: str = ""  # the reason of a status, or a reservation
    median_ms: float | None = None  # time of a run, of the samples
    q1_ms: float | None = None  # lower quartile
    q3_ms: float | None = None  # upper quartile
    samples: int = 0
    compile_s: float | None = None  # time to trace and compile, the median of up to three times
    temp_bytes: int | None = None  # XLA's memory for intermediate results
    speedup: float | None = None  # AF2's median over this row's, of the same run
    # The largest error relative to the largest element, against float64; of the worst group.
    error: float | None = None
    roofline: float | None = None  # fraction of the speed that the machine's rates would allow
    # Of all groups; None for one that is not finite.
    errors: dict[str, float | None] | None = None

    @property
    def key(self) -> tuple[str, int, str, str, str]:
        """What identifies the row in a run."""
        return (self.what, self.n, self.dtype, self.mode, self.implementation)


@dataclasses.dataclass
class Results:
    """One run; what the JSON file holds beside the version of its schema."""

    date: str  # ISO 8601, UTC
    machine: dict[str, Any]  # of `machine.describe`
    settings: dict[str, Any]  # of `cases.Bench`
    demonstration: dict[str, Any] | None = None  # of `demo.run`
    # What was left out: {"name": ..., "reason": ...}.
    missing: list[dict[str, str]] = dataclasses.field(default_factory=list)
    rows: list[Row] = dataclasses.field(default_factory=list)
    is_complete: bool = False  # whether the run reached its end
    # Whose gradient was measured; in files that do not say so, <cotangent, output>, and no value.
    loss: str = "linear"

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the JSON file in one step: there is never half of one.

        Raises:
          jsonschema.ValidationError: if the results do not fit the schema.
        """
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        jsonschema.validate(content, _schema())
        unfinished = f"{os.fspath(path)}.unfinished"
        with open(unfinished, "w") as file:
            json.dump(content, file, indent=1)
            file.write("\n")
        os.replace(unfinished, path)


def _schema() -> dict[str, Any]:
    return json.loads(_SCHEMA.read_text())


def read(path: str | os.PathLike[str]) -> Results:
    """Reads and validates a JSON file of `Results.write`.

    Raises:
      OSError: if it cannot be read.
      ValueError: if it is no such file, or of another version, naming what is wrong with it.
    """
    with open(path) as file:
        try:
            content = json.load(file)
        except json.JSONDecodeError as error:
            raise ValueError(f"{os.fspath(path)} is not JSON: {error}") from error
    version = content.get("schema_version") if isinstance(content, dict) else None
    if version != SCHEMA_VERSION:
        raise ValueError(
            f"{os.fspath(path)}: schema_version must be {SCHEMA_VERSION}, got {version!r}."
        )
    try:
        jsonschema.validate(content, _schema())
    except jsonschema.ValidationError as error:
        where = "/".join(map(str, error.absolute_path)) or "the top level"
        raise ValueError(f"{os.fspath(path)}: {where}: {error.message}") from error
    del content["schema_version"]
    rows = [Row(**row) for row in content.pop("rows")]
    return Results(**content, rows=rows)


def regressions(old: Iterable[Row], new: Iterable[Row], margin: float) -> list[str]:
    """What got worse from one run to another.

    A row got slower if its median grew by more than `margin` (a fraction) and its lower quartile
    lies above the old upper quartile; larger if its temporary memory grew by more than
    `MEMORY_MARGIN`; and it broke if only the old one has a time. Rows of one run only do not count.

    Returns:
      One line for each.
    """
    before, found = {row.key: row for row in old}, []
    for row in new:
        reference = before.get(row.key)
        if reference is None:
            continue
        name = f"{row.what} N={row.n} {row.dtype} {row.mode} {row.label}"
        if reference.status == "ok" and row.status != "ok":
            found.append(f"{name}: {row.status}, was ok")
        was, now = reference.median_ms, row.median_ms
        if was and now and now > (1 + margin) * was and row.q1_ms > reference.q3_ms:  # type: ignore[operator]
            found.append(f"{name}: {now:.3g} ms, was {was:.3g} ms ({now / was:.2f} times)")
        was, now = reference.temp_bytes, row.temp_bytes
        if was and now and now > (1 + MEMORY_MARGIN) * was:
            found.append(f"{name}: {now / 1e6:.1f} MB of temporary memory, was {was / 1e6:.1f} MB")
    return found
