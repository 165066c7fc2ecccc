"""Runs a sweep: for each problem every candidate is prepared and checked, then all are timed."""

import dataclasses
import datetime
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import tqdm

from benchmarks import candidates, checks, memory, roofline
from benchmarks.candidates import Candidate, Groups
from benchmarks.cases import Bench
from benchmarks.memory import OutOfMemory
from benchmarks.peers import Checkouts, Missing, load_peer
from benchmarks.problems import Problem, make_problem
from benchmarks.results import Results, Row
from benchmarks.timing import Stopwatch, interleave, summarize

# Together the copies of the inputs are larger than the last-level cache of any GPU (H200: 50 MB,
# B200: 126 MB), so that every call reads them from memory.
_COLD_BYTES = 2**28


class _Case(NamedTuple):
    """What is timed together: `what` for `n` residues in one `mode`."""

    what: str
    n: int
    mode: str


class _Expected(NamedTuple):
    """What the result must be.

    Attributes:
      groups: the result.
      is_float64: whether it is exact, so that the size of the error says something.
    """

    groups: Groups
    is_float64: bool


class _Entry:
    """A candidate on its way through a case."""

    def __init__(self, candidate: Candidate, case: _Case, dtype: str):
        self.candidate = candidate
        self.stopwatch: Stopwatch | None = None
        self.row = Row(*case[:2], dtype, case.mode, candidate.name, candidate.label)

    def attempt(self, step: Callable[[], None]) -> None:
        """Takes a step unless the candidate is out; running out of memory puts it out."""
        if self.row.status != "ok":
            return
        try:
            outcome = memory.attempt(step)
        except NotImplementedError as error:
            self.fail("unsupported", str(error))
        else:
            if isinstance(outcome, OutOfMemory):
                self.fail("out of memory", outcome.note)

    def sample(self) -> None:
        """Takes one timed sample unless the candidate is out."""
        if self.stopwatch is not None:
            self.attempt(self.stopwatch.sample)

    def fail(self, status: str, note: str) -> None:
        self.set(status=status, note=note)
        self.stopwatch = None  # the others may need the memory

    def set(self, **fields: Any) -> None:
        self.row = dataclasses.replace(self.row, **fields)


class Runner:
    """One run of a sweep; what it found is in `results`, also while it runs."""

    def __init__(self, bench: Bench, machine: dict[str, Any], checkouts: Checkouts):
        """Loads the candidates.

        Args:
          bench: the sweep.
          machine: of `machine.describe`.
          checkouts: of peers that are no packages, checked.
        """
        self._bench = bench
        self._model = bench.sized_model()
        self._is_cpu = machine["platform"] == "cpu"
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.results = Results(date=now, machine=machine, settings=dataclasses.asdict(bench))
        self._field = {what: self._load(what, checkouts) for what in bench.what}

    def _load(self, what: str, checkouts: Checkouts) -> list[Candidate]:
        """This project's implementations and the peers; missing ones are noted."""
        field: list[Candidate] = [
            *candidates.all_ours(what, self._model, self._bench.implementations)
        ]
        for name in self._bench.peers:
            peer = load_peer(name, what, self._model, checkouts)
            if isinstance(peer, Missing):
                if peer._asdict() not in self.results.missing:
                    self.results.missing.append(peer._asdict())
            elif peer is not None:
                field.append(peer)
        return field

    def run(self, on_case: Callable[[], None]) -> None:
        """Measures everything; calls `on_case` whenever there are new rows."""
        bench = self._bench
        steps = sum(len(field) + bench.repeats for field in self._field.values())
        steps *= len(bench.sizes) * len(bench.modes)
        with tqdm.tqdm(total=steps, disable=None, leave=False) as bar:
            for what in bench.what:
                for n in bench.sizes:
                    copies = memory.attempt(functools.partial(self._make_copies, what, n))
                    for mode in bench.modes:
                        bar.set_description(f"{what} N={n} {mode}")
                        self.results.rows += self._measure(_Case(what, n, mode), copies, bar.update)
                        on_case()

    def _make_copies(self, what: str, n: int) -> list[Problem]:
        size = roofline.pair_bytes(self._model, n, self._bench.dtype)
        num_copies = 1 if self._is_cpu else math.ceil(_COLD_BYTES / size)
        # Drawing random numbers holds their bits and the numbers at the same time.
        memory.check_fits(size * (num_copies + 1), "inputs_2d")
        key = jax.random.key(self._bench.seed)
        problem = make_problem(what, self._model, n, self._bench.dtype, key)
        more = [jax.tree.map(jnp.copy, problem) for _ in range(num_copies - 1)]
        return jax.block_until_ready([problem, *more])

    def _measure(
        self, case: _Case, copies: list[Problem] | OutOfMemory, advance: Callable[[int], Any]
    ) -> list[Row]:
        """The rows of one case; tells `advance` the steps done."""
        entries = [_Entry(c, case, self._bench.dtype) for c in self._field[case.what]]
        if isinstance(copies, OutOfMemory):
            for entry in entries:
                entry.fail("out of memory", copies.note)
            advance(len(entries) + self._bench.repeats)
            return [entry.row for entry in entries]

        expected = memory.attempt(functools.partial(self._expected, case, copies[0]))
        for entry in entries:
            entry.attempt(functools.partial(self._prepare, entry, case.mode, copies, expected))
            advance(1)
        del expected  # its memory
        interleave(
            [entry.sample for entry in entries], self._bench.repeats, on_round=lambda: advance(1)
        )
        for entry in entries:
            self._finish(entry, case)
        return _with_speedups([entry.row for entry in entries], self._baseline(case.what))

    def _expected(self, case: _Case, problem: Problem) -> _Expected:
        """What the result must be, exact if the problem is small enough."""
        reference = candidates.reference(case.what, self._model)
        is_float64 = case.n <= self._bench.float64_max_size
        compute = checks.float64_result if is_float64 else checks.float32_result
        return _Expected(compute(reference, problem, case.mode), is_float64)

    def _prepare(
        self,
        entry: _Entry,
        mode: str,
        copies: list[Problem],
        expected: _Expected | OutOfMemory,
    ) -> None:
        """Compiles, checks and warms up."""
        prepared = entry.candidate.prepare(copies, mode)
        entry.set(compile_s=prepared.compile_seconds, temp_bytes=prepared.temp_bytes)
        memory.check_fits(prepared.required_bytes, "it")
        if not entry.candidate.is_exact:
            entry.set(note="computes another function: not checked")
        elif isinstance(expected, OutOfMemory):
            entry.set(note=f"not checked: {expected.note}")
        else:
            self._check(entry, prepared.groups(prepared.start(0)), expected)
        if entry.row.status == "ok":
            seconds = 1e-3 * self._bench.min_sample_ms
            entry.stopwatch = Stopwatch(prepared, len(copies), seconds, self._is_cpu)

    def _check(self, entry: _Entry, groups: Groups, expected: _Expected) -> None:
        reference = dict(expected.groups)
        if "parameters" in reference:
            reference["parameters"] = entry.candidate.layout(reference["parameters"])
        error = checks.largest_error(groups, reference)
        limit = checks.error_limit(self._bench.dtype, self.results.machine["platform"])
        if math.isfinite(error) and expected.is_float64:
            entry.set(error=error)
        if error > limit:
            entry.fail("wrong", f"off by {error:.1e} of the largest element, allowed {limit:.0e}")

    def _finish(self, entry: _Entry, case: _Case) -> None:
        """Enters the times of a candidate that came through."""
        if entry.stopwatch is None or entry.row.status != "ok":
            return
        samples = entry.stopwatch.samples
        summary = summarize(samples)
        least = roofline.least_seconds(
            self.results.machine, case.what, self._model, case.n, self._bench.dtype, case.mode
        )
        entry.set(
            median_ms=1e3 * summary.median,
            q1_ms=1e3 * summary.q1,
            q3_ms=1e3 * summary.q3,
            samples=len(samples),
            roofline=least / summary.median,
        )

    def _baseline(self, what: str) -> str:
        """Name of the candidate that the others are compared with: AF2's, where it has one.

        AF2 has no function for the core alone; the reference runs AF2's operations in its order.
        """
        if what == "core":
            return "reference"
        return "alphafold" if self._model.variant == "monomer" else "alphafold_multimer"


def _with_speedups(rows: list[Row], baseline: str) -> list[Row]:
    medians = {row.implementation: row.median_ms for row in rows}
    base = medians.get(baseline)
    if base is None:
        return rows
    return [
        dataclasses.replace(row, speedup=None if row.median_ms is None else base / row.median_ms)
        for row in rows
    ]
