"""Statistics of samples, the roofline, and how errors of results are measured."""

import dataclasses

import numpy as np
import pytest

from benchmarks import checks, roofline, timing
from benchmarks.candidates import Prepared
from benchmarks.cases import Model
from benchmarks.timing import Stopwatch, calls_per_sample, interleave, summarize

# Statistics and timing.


def test_summary_is_median_and_quartiles():
    assert summarize([3.0, 1.0, 2.0, 5.0, 4.0]) == (3.0, 2.0, 4.0)
    assert summarize([1.0, 2.0]) == (1.5, 1.25, 1.75)
    assert summarize([7.0]) == (7.0, 7.0, 7.0)
    with pytest.raises(ValueError, match="samples"):
        summarize([])


@pytest.mark.parametrize(
    ("seconds", "at_least", "calls"),
    [(1.0, 0.001, 1), (0.001, 0.01, 10), (0.003, 0.01, 4), (1e-6, 1.0, 100), (0.1, 0.0, 1)],
)
def test_calls_per_sample(seconds, at_least, calls):
    assert calls_per_sample(seconds, at_least) == calls


def _counting(starts, waits):
    return Prepared(
        start=lambda i: starts.append(i) or len(starts),
        wait=waits.append,
        groups=dict,
        compile_seconds=None,
        temp_bytes=None,
        required_bytes=0,
    )


@pytest.mark.parametrize("is_cpu", [False, True])
def test_stopwatch_cycles_through_copies_and_waits(is_cpu):
    starts, waits = [], []
    watch = Stopwatch(_counting(starts, waits), 3, 0.0, is_cpu)
    warm_up = len(starts)
    assert warm_up == 2
    for _ in range(4):
        watch.sample()
    # Each sample is of one call after another that is not timed.
    assert starts == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert len(watch.samples) == 4
    assert waits[-1] == len(starts)  # the last result


@pytest.mark.parametrize(("is_cpu", "waits_per_sample"), [(False, 2), (True, 102)])
def test_calls_of_a_sample_are_waited_for_one_by_one_on_a_cpu(is_cpu, waits_per_sample):
    starts, waits = [], []
    watch = Stopwatch(_counting(starts, waits), 1, min_sample_seconds=1e3, is_cpu=is_cpu)
    before = len(starts), len(waits)
    watch.sample()
    assert (len(starts) - before[0], len(waits) - before[1]) == (101, waits_per_sample)


def test_interleave_runs_every_task_once_a_round_in_changing_order(monkeypatch):
    monkeypatch.setattr(timing, "_PAUSE_SECONDS", 0.0)
    done, rounds = [], []
    tasks = [lambda i=i: done.append(i) for i in range(4)]
    interleave(tasks, 6, on_round=lambda: rounds.append(len(done)))
    orders = [tuple(done[i : i + 4]) for i in range(0, 24, 4)]
    assert rounds == [4, 8, 12, 16, 20, 24]
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) > 1


def test_roofline_takes_the_larger_of_bytes_and_operations():
    model = Model.from_name("af2_monomer")
    fast = {"bandwidth_gb_s": 1e9, "matmul_gflop_s": 1e9}
    slow_memory, slow_units = fast | {"bandwidth_gb_s": 1.0}, fast | {"matmul_gflop_s": 1.0}
    case = (model, 512, "float32")
    z = 512 * 512 * 128 * 4
    assert roofline.least_seconds(slow_memory, "module", *case, "forward") == z / 1e9
    assert roofline.least_seconds(slow_memory, "module", *case, "grad") == 3 * z / 1e9
    assert roofline.least_seconds(slow_memory, "structure_module", *case, "grad") == 24 * z / 1e9
    factors = dataclasses.replace(model, pair_rank=2)
    least = roofline.least_seconds(slow_memory, "module", factors, 512, "float32", "forward")
    assert least == 2 * 512 * 2 * 128 * 4 / 1e9
    # 2 * N^2 * H * (16 + 12 + 128 + 16 + 24 + 128) and 2 * N * (384 * 1152 + 2112 * 384).
    operations = 2 * 512 * 512 * 12 * 324
    assert roofline.least_seconds(slow_units, "core", *case, "forward") == operations / 1e9
    operations += 2 * 512 * (384 * 1152 + 2112 * 384)
    assert roofline.least_seconds(slow_units, "module", *case, "forward") == operations / 1e9


# Checks.


def test_errors_are_relative_to_the_group():
    expected = {"a": {"x": np.array([10.0, 1.0]), "y": np.array([0.0])}, "b": np.array([1.0])}
    actual = {"a": {"x": np.array([10.0, 1.5]), "y": np.array([0.2])}, "b": np.array([1.01])}
    assert checks.group_errors(actual, expected) == pytest.approx({"a": 0.05, "b": 0.01})


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_not_a_number_is_an_infinite_error(bad):
    expected = {"a": {"x": np.ones(3), "y": np.ones(2)}}
    actual = {"a": {"x": np.array([1.0, bad, 1.0]), "y": np.ones(2)}}
    assert checks.group_errors(actual, expected) == {"a": np.inf}


def test_zero_must_be_zero():
    zero = {"a": np.zeros(2)}
    assert checks.group_errors(zero, zero) == {"a": 0.0}
    assert checks.group_errors({"a": np.array([0.0, 1e-9])}, zero) == {"a": np.inf}


def test_other_shapes_and_groups_are_refused():
    with pytest.raises(ValueError, match="a has shapes"):
        checks.group_errors({"a": np.ones(2)}, {"a": np.ones(3)})
    with pytest.raises(ValueError, match="groups"):
        checks.group_errors({"a": np.ones(2)}, {"b": np.ones(2)})


def test_a_group_may_be_off_by_the_limit_or_by_a_few_times_alphafolds_error():
    errors = {"a": 3e-4, "b": 3e-4, "c": 1e-5, "d": np.inf}
    assert checks.wrong_groups(errors, {}, 1e-3) == {"d": 1e-3}
    own = {"a": 1e-4, "b": 5e-5, "c": 0.0, "d": np.inf}
    assert checks.wrong_groups(errors, own, 1e-4) == pytest.approx({"b": 2e-4, "d": 1e-4})
    # What could be a wrong formula is wrong, in AF2 as well.
    own = {"a": 0.05, "b": 0.2}
    assert checks.wrong_groups({"a": 0.09, "b": 0.09}, own, 1e-4) == {"b": 1e-4}
    assert checks.wrong_groups({"a": 0.11, "b": 0.2}, own, 1e-4) == {"a": 0.1, "b": 1e-4}
