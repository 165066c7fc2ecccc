"""Timing: warm, interleaved, blocked on, summarised by median and quartiles."""

import math
import random
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks.candidates import Prepared

# After a sample, so that the threads of its library fall asleep: OpenMP's wait busily for about a
# millisecond, and would take a core from the next one.
_PAUSE_SECONDS = 0.01

# A sample of many calls hides nothing that longer ones would show, and keeps sweeps short.
MAX_CALLS_PER_SAMPLE = 100


class Summary(NamedTuple):
    """Median and quartiles, in the unit of the samples."""

    median: float
    q1: float
    q3: float


def summarize(samples: Sequence[float]) -> Summary:
    """Median and quartiles of samples; between two of them, by linear interpolation.

    Raises:
      ValueError: if there are none.
    """
    if not samples:
        raise ValueError("samples: must not be empty.")
    q1, median, q3 = np.quantile(samples, (0.25, 0.5, 0.75))
    return Summary(float(median), float(q1), float(q3))


def calls_per_sample(seconds_per_call: float, min_sample_seconds: float) -> int:
    """How many calls make a sample of at least `min_sample_seconds`, up to a maximum."""
    if seconds_per_call * MAX_CALLS_PER_SAMPLE <= min_sample_seconds:
        return MAX_CALLS_PER_SAMPLE
    return max(1, math.ceil(min_sample_seconds / seconds_per_call))


class Stopwatch:
    """Takes samples of one computation, cycling through the copies of its inputs."""

    def __init__(
        self, prepared: Prepared, num_copies: int, min_sample_seconds: float, is_cpu: bool
    ):
        """Runs the computation twice: once to warm it up, once to see how long it takes.

        Args:
          prepared: the computation.
          num_copies: of its inputs.
          min_sample_seconds: shorter calls are repeated.
          is_cpu: whether to wait for each call of a sample. JAX may run calls side by side on a
            CPU; a GPU runs them one after the other, and waiting for each would time the queue.
        """
        self._prepared = prepared
        self._num_copies = num_copies
        self._is_cpu = is_cpu
        self._next_copy = 0
        self.samples: list[float] = []
        self._calls = 1
        self._run()
        self._calls = calls_per_sample(self._run(), min_sample_seconds)

    def sample(self) -> None:
        """Takes one sample, in seconds per call.

        Not of the first call: that finds cold caches, sleeping threads and memory that the one
        before has given back, where the layers of a model run one right after the other.
        """
        self._prepared.wait(self._start())
        self.samples.append(self._run())

    def _start(self) -> Any:
        result = self._prepared.start(self._next_copy)
        self._next_copy = (self._next_copy + 1) % self._num_copies
        return result

    def _run(self) -> float:
        start = time.perf_counter()
        for _ in range(self._calls):
            result = self._start()
            if self._is_cpu:
                self._prepared.wait(result)
        self._prepared.wait(result)
        return (time.perf_counter() - start) / self._calls


def interleave(
    tasks: Sequence[Callable[[], None]], rounds: int, on_round: Callable[[], None]
) -> None:
    """Calls every task once per round, each round in another random order.

    What the machine does meanwhile, getting warm or busy, so falls on all of them alike.
    """
    order = list(tasks)
    shuffle = random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for task in order:
            task()
            time.sleep(_PAUSE_SECONDS)
        on_round()
