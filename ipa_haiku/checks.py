"""Assertions at trace time that name the argument."""

import operator
from typing import Any

import chex
import jax


def assert_floating(name: str, x: jax.Array) -> None:
    """Asserts that `x` is an array of floating-point numbers.

    Raises:
      TypeError: if it is not an array.
      AssertionError: if its dtype is not a floating-point one.
    """
    assert_array(name, x)
    chex.assert_type(x, float, custom_message=f"{name} must be floating-point, got {x.dtype}")


def assert_integer(name: str, x: jax.Array) -> None:
    """Asserts that `x` is an array of integers.

    Raises:
      TypeError: if it is not an array.
      AssertionError: if its dtype is not an integer one.
    """
    assert_array(name, x)
    chex.assert_type(x, int, custom_message=f"{name} must be integers, got {x.dtype}")


def assert_array(name: str, x: Any) -> None:
    """Raises a TypeError if `x` has no shape or no dtype."""
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")


def assert_shape(name: str, x: jax.Array, axes: str, expected: tuple) -> None:
    """Asserts `x.shape == expected` (None matches any size); `axes` names them in the error.

    Raises:
      AssertionError: naming the argument, the axes, the expected and the given shape.
    """
    chex.assert_shape(
        x,
        expected,
        custom_message=f"{name} must have shape [{axes}], here {expected}, got {tuple(x.shape)}",
    )


def positive_integer(name: str, value: Any, least: int = 1) -> int:
    """`value`, an integer of Python, NumPy or JAX, as one of Python.

    Raises:
      ValueError: naming it, if it is anything else or less than `least`.
    """
    kind = "a positive integer" if least == 1 else f"an integer, at least {least}"
    try:
        size = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        size = 0
    if size < least:
        raise ValueError(f"{name} must be {kind}, got {value!r}.")
    return size
