"""Whether a result is right: compared with float64, or with the reference in float32.

A group of arrays may be off by a fixed limit, or by a few times what AF2's own float32 is off by in
the same run: some problems, such as the gradient of eight layers, are so ill-conditioned that
nothing in float32 comes near the exact result.
"""

import math
from typing import Any

import jax
import numpy as np

from benchmarks import memory
from benchmarks.candidates import Groups, JaxCandidate
from benchmarks.problems import Problem
from ipa_haiku.jax_versions import enable_x64

# Errors beyond which a result is called wrong. A dropped factor or a swapped axis is off by 0.1 or
# more, whatever the arithmetic; below that, the limits are loose on purpose: they are to catch
# wrong formulas, and how exact a right one is stands in the table.
#
# float32 rounds to 6e-8, and AF2's own sums over residues and channels reach some 1e-6.
_LIMIT_FLOAT32 = 1e-4
# GPUs and TPUs multiply float32 matrices in TF32 (5e-4) or bfloat16 (4e-3) unless told otherwise.
_LIMIT_FAST_FLOAT32 = 5e-2
# bfloat16 rounds to 4e-3, inputs excluded: float64 gets the rounded ones, too.
_LIMIT_BFLOAT16 = 1e-1

# How many times AF2's own error others may have: the largest errors of two computations of one
# accuracy differ by a factor of 3. An error that could be a wrong formula's nothing excuses.
TIMES_OWN_ERROR = 4.0
_WRONG_FORMULA = 0.1


def error_limit(dtype: str, platform: str) -> float:
    """Largest error, relative to the largest element, of a result that counts as right."""
    if dtype == "bfloat16":
        return _LIMIT_BFLOAT16
    return _LIMIT_FLOAT32 if platform == "cpu" else _LIMIT_FAST_FLOAT32


def wrong_groups(
    errors: dict[str, float], own_errors: dict[str, float], limit: float
) -> dict[str, float]:
    """The groups that are wrong, and the error that each of them was allowed.

    Args:
      errors: of all groups.
      own_errors: AF2's of the same groups, where they are known.
      limit: of `error_limit`.
    """
    allowed = {}
    for name in errors:
        own = own_errors.get(name, 0.0)
        excused = min(TIMES_OWN_ERROR * own, _WRONG_FORMULA) if own <= _WRONG_FORMULA else 0.0
        allowed[name] = max(limit, excused)
    return {name: allowed[name] for name, error in errors.items() if not error <= allowed[name]}


def float64_result(reference: JaxCandidate, problem: Problem, mode: str) -> Groups:
    """What the reference implementation computes in float64; raises what `float32_result` does."""
    device = jax.devices()[0]
    if device.platform == "tpu":  # which has no float64
        device = jax.devices("cpu")[0]
    with enable_x64(True), jax.default_device(device):
        return float32_result(reference, jax.device_put(to_float64(problem), device), mode)


def float32_result(reference: JaxCandidate, problem: Problem, mode: str) -> Groups:
    """What the reference implementation computes in the type of the problem.

    Raises:
      MemoryError: if it does not fit.
    """
    arguments = reference.arguments(problem)
    compiled = reference.compile(arguments, mode)
    if needed := compiled.memory_analysis():
        size = needed.temp_size_in_bytes + needed.output_size_in_bytes
        memory.check_fits(size, "the reference")
    return jax.tree.map(np.asarray, compiled(arguments))


def to_float64(problem: Problem) -> Problem:
    """`problem` on the host, its floating-point numbers in float64."""

    def widen(x: Any) -> np.ndarray:
        x = np.asarray(x)
        return x.astype(np.float64) if jax.dtypes.issubdtype(x.dtype, np.floating) else x

    return jax.tree.map(widen, problem)


def group_errors(actual: Groups, expected: Groups) -> dict[str, float]:
    """The largest error of each group, relative to the largest element of the group.

    A NaN or an infinity makes it infinite.

    Raises:
      ValueError: if the groups, or the shapes in them, differ.
    """
    if actual.keys() != expected.keys():
        raise ValueError(f"groups {sorted(actual)} where {sorted(expected)} were expected.")
    return {name: _group_error(name, actual[name], expected[name]) for name in expected}


def _group_error(name: str, actual: Any, expected: Any) -> float:
    shapes, expected_shapes = (jax.tree.map(np.shape, x) for x in (actual, expected))
    if shapes != expected_shapes:
        raise ValueError(f"{name} has shapes {shapes} where {expected_shapes} were expected.")
    scale, difference = 0.0, 0.0
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        exact = np.asarray(y, np.float64)
        scale = max(scale, float(np.max(np.abs(exact))))
        difference = max(difference, _largest_difference(np.asarray(x, np.float64), exact))
    if scale == 0.0:
        return 0.0 if difference == 0.0 else math.inf
    return difference / scale


def _largest_difference(actual: np.ndarray, exact: np.ndarray) -> float:
    difference = float(np.max(np.abs(actual - exact)))
    return difference if math.isfinite(difference) else math.inf  # a NaN would get lost in max()
