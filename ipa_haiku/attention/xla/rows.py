"""Query rows a block at a time, so that temporaries are those of one block."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from ipa_haiku.attention.batching import as_varying


def by_rows(
    compute: Callable[[Any, int], Any], num_row: int, block: int, axes: Any, like: Any
) -> Any:
    """What `compute` makes of all rows, `block` of them at a time.

    Args:
      compute: from the first row and the number of rows to arrays that have these rows.
      num_row: how many rows there are.
      block: how many to take at a time.
      axes: of the rows in each array that `compute` returns.
      like: arrays that vary over every axis of a mesh that any result varies over.

    Returns:
      The arrays with all rows.
    """
    if block >= num_row:
        return compute(0, num_row)

    def step(i: jax.Array, results: Any) -> Any:
        start = _start(i, block, num_row)
        return jax.tree.map(
            lambda all_rows, rows, axis: put(all_rows, rows, start, axis),
            results, compute(start, block), axes,
        )  # fmt: skip

    empty = jax.tree.map(
        lambda x, axis: _zeros(x, num_row, axis), jax.eval_shape(lambda: compute(0, block)), axes
    )
    return jax.lax.fori_loop(0, -(-num_row // block), step, as_varying(empty, like))


def sum_by_rows(
    compute: Callable[[Any, jax.Array], tuple[Any, Any]], rows: Any, block: int, like: Any
) -> Any:
    """By-row results and sums over rows, of a function that is linear in what it is told to count.

    Args:
      compute: from arrays with some rows, and 1 or 0 [block] whether a row is counted, to arrays
        with these rows, which are only kept where it is, and arrays to sum over blocks.
      rows: arrays [num_row, ...] to take the rows from.
      block: how many to take at a time, fewer than there are.
      like: arrays that vary over every axis of a mesh that any result varies over.

    Returns:
      The results with all rows, and the sums.
    """
    num_row = jax.tree.leaves(rows)[0].shape[0]
    count = -(-num_row // block)

    def compute_block(i: jax.Array) -> tuple[jax.Array, Any]:
        # The last block reaches back over rows of the one before it. It comes first, so that what
        # it wrote there is written over.
        start = _start(i, block, num_row)
        is_counted = start + jnp.arange(block, dtype=start.dtype) >= i * block
        return start, compute(jax.tree.map(lambda x: take(x, start, block), rows), is_counted)

    def step(j: jax.Array, totals: tuple[Any, Any]) -> tuple[Any, Any]:
        start, (block_rows, sums) = compute_block(count - 1 - j)
        return (
            jax.tree.map(lambda x, part: put(x, part, start), totals[0], block_rows),
            jax.tree.map(jnp.add, totals[1], sums),
        )

    shapes = jax.eval_shape(lambda: compute_block(jnp.zeros((), jnp.int32))[1])
    empty = (
        jax.tree.map(lambda x: _zeros(x, num_row, 0), shapes[0]),
        jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes[1]),
    )
    return jax.lax.fori_loop(0, count, step, as_varying(empty, like))


def take(x: jax.Array, start: jax.Array | int, size: int, axis: int = 0) -> jax.Array:
    """`size` elements along an axis."""
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


def put(x: jax.Array, rows: jax.Array, start: jax.Array, axis: int = 0) -> jax.Array:
    """`x` with some rows replaced."""
    return jax.lax.dynamic_update_slice_in_dim(x, rows, start, axis)


def _start(i: jax.Array | int, block: int, num_row: int) -> jax.Array:
    """First row of block i; the last block is moved back to be as long as the rest."""
    return jnp.minimum(i * block, num_row - block)


def _zeros(x: jax.ShapeDtypeStruct, num_row: int, axis: int) -> jax.Array:
    """An array like `x` with room for all rows."""
    return jnp.zeros((*x.shape[:axis], num_row, *x.shape[axis + 1 :]), x.dtype)
