"""Runs a sweep: for each problem every candidate is prepared and checked, then all are timed."""

import dataclasses
import datetime
import itertools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tqdm

from benchmarks import candidates, checks, memory, problems, roofline
from benchmarks.candidates import Candidate, Groups, Prepared
from benchmarks.cases import Bench
from benchmarks.memory import OutOfMemory
from benchmarks.peers import Checkouts, Missing, load
from benchmarks.problems import Problem, make_problem
from benchmarks.results import Results, Row
from benchmarks.timing import Stopwatch, interleave, summarize

# Together the copies of the inputs are larger than the last-level cache of any GPU (H200: 50 MB,
# B200: 126 MB), so that every call reads them from memory.
_COLD_BYTES = 2**28


class _Entry:
    """A candidate on its way through a case: compiled, checked, judged, timed, or out."""

    def __init__(self, candidate: Candidate, case: Row):
        self.candidate = candidate
        self.prepared: Prepared | None = None
        self.errors: dict[str, float] = {}  # by group, if it was checked
        self.stopwatch: Stopwatch | None = None
        self.row = dataclasses.replace(case, implementation=candidate.name, label=candidate.label)

    def attempt(self, step: Callable[..., None], *args: Any) -> None:
        """Takes a step unless the candidate is out; running out of memory puts it out."""
        if self.row.status != "ok":
            return
        try:
            outcome = memory.attempt(step, *args)
        except NotImplementedError as error:
            self.fail("unsupported", str(error))
        else:
            if isinstance(outcome, OutOfMemory):
                self.fail("out of memory", outcome.note)

    def fail(self, status: str, note: str) -> None:
        self.set(status=status, note=note)
        self.prepared = self.stopwatch = None  # the others may need the memory

    def set(self, **fields: Any) -> None:
        self.row = dataclasses.replace(self.row, **fields)

    def prepare(
        self, copies: list[Problem], expected: Groups | OutOfMemory, is_float64: bool
    ) -> None:
        """Compiles, and finds the errors, which say something if what is expected is exact."""
        self.prepared = prepared = self.candidate.prepare(copies, self.row.mode)
        self.set(compile_s=prepared.compile_seconds, temp_bytes=prepared.temp_bytes)
        memory.check_fits(prepared.required_bytes, "it")
        if not self.candidate.is_exact:
            self.set(note="computes another function: not checked")
        elif isinstance(expected, OutOfMemory):
            self.set(note=f"not checked: {expected.note}")
        else:
            groups = prepared.groups(prepared.start(0))
            self.errors = checks.group_errors(groups, self.candidate.in_layout(expected))
            if is_float64:
                self.set(
                    errors={name: _finite(x) for name, x in self.errors.items()},
                    error=_finite(max(self.errors.values())),
                )

    def judge(self, own_errors: dict[str, float], limit: float) -> None:
        """Puts the candidate out if it is wrong; notes where only AF2's own error excuses it."""
        if wrong := checks.wrong_groups(self.errors, own_errors, limit):
            self.fail("wrong", _off(self.errors, wrong, "allowed"))
        elif beyond := checks.wrong_groups(self.errors, {}, limit):
            own = {name: own_errors[name] for name in beyond}
            self.set(note=f"ill-conditioned: {_off(self.errors, own, 'AlphaFold 2 by')}")

    def warm_up(self, num_copies: int, min_sample_seconds: float, is_cpu: bool) -> None:
        assert self.prepared is not None
        self.stopwatch = Stopwatch(self.prepared, num_copies, min_sample_seconds, is_cpu)

    def sample(self) -> None:
        """Takes one timed sample unless the candidate is out."""
        if self.stopwatch is not None:
            self.attempt(self.stopwatch.sample)

    def finish(self, least_seconds: float) -> None:
        """Enters the times if the candidate came through."""
        if self.stopwatch is None:
            return
        samples = self.stopwatch.samples
        summary = summarize(samples)
        times = {f"{name}_ms": 1e3 * x for name, x in summary._asdict().items()}
        self.set(**times, samples=len(samples), roofline=least_seconds / summary.median)


def _finite(error: float) -> float | None:
    """There is no infinity in JSON."""
    return error if math.isfinite(error) else None


def _off(errors: dict[str, float], others: dict[str, float], word: str) -> str:
    return "; ".join(
        f"{name} off by {errors[name]:.1e} of the largest element, {word} {other:.1e}"
        for name, other in others.items()
    )


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
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        settings = dataclasses.asdict(bench)
        self.results = Results(date=now, machine=machine, settings=settings, loss=problems.LOSS)
        self._field = {what: self._load(what, checkouts) for what in bench.what}

    def _load(self, what: str, checkouts: Checkouts) -> list[Candidate]:
        """All that can be measured in `what`; what is missing is noted."""
        field: list[Candidate] = []
        for found in load(what, self._bench, checkouts):
            if not isinstance(found, Missing):
                field.append(found)
            elif found._asdict() not in self.results.missing:
                self.results.missing.append(found._asdict())
        return field

    def run(self, on_case: Callable[[], None]) -> None:
        """Measures everything; calls `on_case` whenever there are new rows."""
        bench = self._bench
        field = {what: candidates for what, candidates in self._field.items() if candidates}
        steps = sum(len(candidates) + bench.repeats for candidates in field.values())
        steps *= len(bench.sizes) * len(bench.modes)
        with tqdm.tqdm(total=steps, disable=None, leave=False) as bar:
            for what, n in itertools.product(field, bench.sizes):
                copies = memory.attempt(self._make_copies, what, n)
                for mode in bench.modes:
                    bar.set_description(f"{what} N={n} {mode}")
                    case = Row(what, n, bench.dtype, mode, "", "")
                    self.results.rows += self._measure(case, copies, bar.update)
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
        self, case: Row, copies: list[Problem] | OutOfMemory, advance: Callable[[int], Any]
    ) -> list[Row]:
        """The rows of one case, a row with no more in it; tells `advance` the steps done."""
        bench = self._bench
        entries = [_Entry(candidate, case) for candidate in self._field[case.what]]
        if isinstance(copies, OutOfMemory):
            for entry in entries:
                entry.fail("out of memory", copies.note)
            advance(len(entries) + bench.repeats)
            return [entry.row for entry in entries]

        is_float64 = case.n <= bench.float64_max_size
        compute = checks.float64_result if is_float64 else checks.float32_result
        reference = candidates.reference(case.what, self._model)
        expected = memory.attempt(compute, reference, copies[0], case.mode)
        for entry in entries:
            entry.attempt(entry.prepare, copies, expected, is_float64)
            advance(1)
        if not isinstance(expected, OutOfMemory):
            self._judge(case, entries, copies[0], expected)
        del expected  # its memory
        for entry in entries:
            entry.attempt(entry.warm_up, len(copies), 1e-3 * bench.min_sample_ms, self._is_cpu)
        interleave([entry.sample for entry in entries], bench.repeats, lambda: advance(1))
        least = roofline.least_seconds(
            self.results.machine, case.what, self._model, case.n, bench.dtype, case.mode
        )
        for entry in entries:
            entry.finish(least)
        return _with_speedups([entry.row for entry in entries], self._baseline(case.what))

    def _judge(self, case: Row, entries: list[_Entry], problem: Problem, expected: Groups) -> None:
        """Puts out what is wrong, by AF2's own errors where the limit alone would not do."""
        limit = checks.error_limit(self._bench.dtype, self.results.machine["platform"])
        own_errors: dict[str, float] = {}
        if any(checks.wrong_groups(entry.errors, {}, limit) for entry in entries):
            own_errors = self._own_errors(case, entries, problem, expected)
        for entry in entries:
            entry.judge(own_errors, limit)

    def _own_errors(
        self, case: Row, entries: list[_Entry], problem: Problem, expected: Groups
    ) -> dict[str, float]:
        """AF2's errors in this case, or the reference's, which runs AF2's operations."""
        found = {entry.row.implementation: entry.errors for entry in entries if entry.errors}
        for name in (self._baseline(case.what), "reference"):
            if name in found:
                return found[name]
        reference = candidates.reference(case.what, self._model)
        result = memory.attempt(checks.float32_result, reference, problem, case.mode)
        return {} if isinstance(result, OutOfMemory) else checks.group_errors(result, expected)

    def _baseline(self, what: str) -> str:
        """Name of the candidate that the others are compared with: AF2's, where it has one.

        AF2 has no function for the core alone; the reference runs AF2's operations in its order.
        """
        return "reference" if what == "core" else self._model.alphafold


def _with_speedups(rows: list[Row], baseline: str) -> list[Row]:
    base = {row.implementation: row.median_ms for row in rows}.get(baseline)
    if base is None:
        return rows
    return [
        dataclasses.replace(row, speedup=None if row.median_ms is None else base / row.median_ms)
        for row in rows
    ]
