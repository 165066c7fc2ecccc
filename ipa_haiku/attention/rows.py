"""Query rows a block at a time: to bound memory and, on CPUs, to keep `inputs_2d` in a cache."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import IPAInputs, unfused, widen

# The arguments that have a row for each query.
BY_ROW = ("q_scalar", "q_point", "inputs_2d", "q_mask", "q_segment_ids")

# XLA:CPU reads memory once for all products of a block of this size: it stays in a cache.
_CACHED_BYTES = 4 * 2**20

# Products over fewer rows are slower by a quarter.
_LEAST_ROWS = 16

# Between sizes at which one product was slower (75 MB) and faster (134 MB).
_LARGE_RESULT_BYTES = 96 * 2**20

# As Intel's servers have since 2023; AMD's have 0.5 or 1 MB.
_LARGE_LEVEL_2_BYTES = 2 * 2**20

# With such caches, and the level-3 caches that come with them, no blocks up to this size.
_UNCUT_BYTES = 20 * 2**20

_LEVEL_2_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index2")


def by_rows(
    compute: Callable[[Any, int], Any],
    inputs: IPAInputs,
    query_block: int,
    axes: Any,
    *,
    at_once: int = 1,
    fill: jax.Array | int = 0,
) -> Any:
    """What `compute` makes of all queries, at most `query_block` of them at a time.

    Args:
      compute: from the first row and the number of rows to arrays that have these rows.
      inputs: the arguments of one protein.
      query_block: how many rows at a time; CPUs take fewer.
      axes: of the rows in each array that `compute` returns.
      at_once: how many blocks a step of the loop takes on CPUs. They depend on nothing of each
        other, so cores may share them.
      fill: a number that the loop on CPUs finds where it puts its results. It is in none of them,
        but until it is known, no core writes it.

    Returns:
      The arrays with all rows.
    """
    num_query = inputs.num_query

    def in_blocks(block: int, at_once: int) -> Any:
        if block >= num_query:
            return compute(0, num_query)

        def step(i: jax.Array, results: Any) -> Any:
            starts = [block_start(i * at_once + j, block, num_query) for j in range(at_once)]
            all_rows = [jax.tree.map(_as_bits, compute(start, block)) for start in starts]
            for start, rows in zip(starts, all_rows):
                results = update(results, rows, start, axes)
            return results

        shapes = jax.eval_shape(lambda: compute(0, block))
        results = jax.tree.map(
            lambda a, axis: _as_bits(jnp.full(_with_rows(a.shape, num_query, axis), fill, a.dtype)),
            shapes, axes,
        )  # fmt: skip
        results = jax.lax.fori_loop(0, num_block(block * at_once, num_query), step, results)
        return jax.tree.map(lambda a, b: _from_bits(a, b.dtype), results, shapes)

    return jax.lax.platform_dependent(
        cpu=lambda: in_blocks(min(query_block, _cached_rows(inputs, at_once)), at_once),
        default=lambda: in_blocks(query_block, 1),
    )


def _cached_rows(inputs: IPAInputs, at_once: int) -> int:
    """Rows of a block that a cache holds, or a few: about equally many in each, or all."""
    if is_one_block(inputs):
        return inputs.num_query
    most = max(_CACHED_BYTES // _bytes_per_row(inputs), _LEAST_ROWS)
    num_step = num_block(most * at_once, inputs.num_query)
    # A loop of one step, which XLA takes apart, was a quarter slower at N = 128 than one of two.
    return num_block(max(num_step, 2) * at_once, inputs.num_query)


def is_one_block(inputs: IPAInputs) -> bool:
    """Whether CPUs take all rows of one protein together."""
    uncut = _UNCUT_BYTES if _has_large_caches() else _CACHED_BYTES
    return inputs.num_query * _bytes_per_row(inputs) <= uncut


def is_large_result(inputs: IPAInputs) -> bool:
    """Whether CPUs make the gradient of `inputs_2d` as one product, rather than in blocks.

    An array for blocks is filled with zeros before, and each is copied into it. From some size on
    that costs more than it saves, but only on cores with large caches.
    """
    # A narrower one would first be an array of float32.
    is_as_wide = inputs.inputs_2d.dtype == inputs.logits_dtype
    is_large = inputs.num_query * _bytes_per_row(inputs) >= _LARGE_RESULT_BYTES
    return is_as_wide and is_large and _has_large_caches()


def _bytes_per_row(inputs: IPAInputs) -> int:
    """Of `inputs_2d` in float32, or float64."""
    return inputs.logits_dtype.itemsize * inputs.num_key * inputs.inputs_2d.shape[-1]


def _has_large_caches() -> bool:
    """Whether this machine's first core has; no where the operating system is not Linux.

    Programs for CPUs depend on it, in the order of their sums; those for other devices do not.
    """
    try:
        level = (_LEVEL_2_CACHE / "level").read_text().strip()
        size = re.fullmatch(r"(\d+)K", (_LEVEL_2_CACHE / "size").read_text().strip())
    except OSError:
        return False
    return level == "2" and size is not None and 1024 * int(size[1]) >= _LARGE_LEVEL_2_BYTES


def num_block(block: int, num_query: int) -> int:
    """How many blocks there are."""
    return -(-num_query // block)


def block_start(i: jax.Array | int, block: int, num_query: int) -> jax.Array:
    """First row of block i; the last block is moved back to be as long as the rest."""
    return jnp.minimum(i * block, num_query - block)


def take_rows(inputs: IPAInputs, start: jax.Array | int, size: int) -> IPAInputs:
    """The arguments with `size` of their rows, in float32 (or float64)."""
    if size == inputs.num_query:
        return widen(inputs)

    def take(inputs_2d: jax.Array, start: jax.Array | int) -> jax.Array:
        return take_axis(inputs_2d, start, size).astype(inputs.logits_dtype)

    rows = {
        name: jax.tree.map(lambda a: take_axis(a, start, size), getattr(inputs, name))
        for name in BY_ROW
        if name != "inputs_2d"
    }
    # XLA:CPU would copy the rows once for each product that takes them.
    rows["inputs_2d"] = _as_one_array(take, inputs, start, inputs.inputs_2d, start)
    return widen(inputs._replace(**rows))


def narrow_rows(rows: jax.Array, inputs: IPAInputs, start: jax.Array | int) -> jax.Array:
    """Rows from `start` in the dtype of `inputs_2d`."""
    dtype = inputs.inputs_2d.dtype
    if rows.dtype == dtype:
        return rows
    # XLA:CPU would round them in the loop that writes them to the result, on one core.
    return _as_one_array(lambda rows: rows.astype(dtype), inputs, start, rows)


def _as_one_array(
    compute: Callable[..., jax.Array], inputs: IPAInputs, start: jax.Array | int, *args: Any
) -> jax.Array:
    """`compute(*args)`, which on CPUs is not fused with what takes it.

    What a conditional returns is one array; and that the first row is one of the rows always holds,
    which is not for the compiler to see.
    """

    def conditional(*args: Any) -> jax.Array:
        return jax.lax.cond(start < inputs.num_query, compute, compute, *args)

    return jax.lax.platform_dependent(*args, cpu=conditional, default=compute)


def own_array(x: jax.Array, on_cpu: bool) -> jax.Array:
    """`x`; on CPUs, if asked for, a copy for one product alone.

    XLA:CPU puts the result of one product where an argument of another was, which then have to run
    one after the other. And it goes on with other things when it has spread a copy over cores, but
    not when it has spread a product.
    """
    copy = unfused if on_cpu else _identity
    return jax.lax.platform_dependent(x, cpu=copy, default=_identity)


def _identity(x: jax.Array, *_: Any) -> jax.Array:
    return x


@jax.custom_jvp
def laid_out(x: jax.Array, number: jax.Array) -> jax.Array:
    """`x`; on CPUs in memory in the order of its axes.

    XLA:CPU would make a transposition a matter of layout, and a loop over the result load numbers
    one by one. What a loop carries is laid out in order. This one rounds `x` to the precision that
    it has, once or never, as `number` says, which the compiler does not know.
    """

    def carried(x: jax.Array, number: jax.Array) -> jax.Array:
        count = (number < jnp.inf).astype(jnp.int32)
        return jax.lax.fori_loop(0, count, lambda _, x: unfused(x), x)

    return jax.lax.platform_dependent(x, number, cpu=carried, default=_identity)


laid_out.defjvps(lambda dx, _, *__: dx, None)


def take_axis(a: jax.Array, start: jax.Array | int, size: int, axis: int = 0) -> jax.Array:
    """`size` elements along an axis."""
    return jax.lax.dynamic_slice_in_dim(a, start, size, axis)


def update(results: Any, rows: Any, start: jax.Array, axes: Any) -> Any:
    """`results` with some rows, along `axes`, replaced."""

    def update_array(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
        return jax.lax.dynamic_update_slice_in_dim(a, b.astype(a.dtype), start, axis)

    return jax.tree.map(update_array, results, rows, axes)


def _as_bits(a: jax.Array) -> jax.Array:
    """bfloat16 and float16 as integers: XLA:CPU would round them anew as it puts them in place."""
    return _bits(a) if a.dtype.itemsize == 2 else a


def _from_bits(a: jax.Array, dtype: Any) -> jax.Array:
    """The inverse of `_as_bits`. To JAX, the derivative of any `bitcast_convert_type` is zero."""
    return a if a.dtype == dtype else jax.lax.bitcast_convert_type(a, dtype)


@jax.custom_jvp
def _bits(a: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(a, jnp.uint16)


@_bits.defjvp
def _refuse_derivative(*_: Any) -> Any:
    raise TypeError(
        "implementation='xla' has no second derivatives where inputs_2d is bfloat16 or float16; "
        "use implementation='reference' for those."
    )


def _with_rows(shape: tuple[int, ...], num_query: int, axis: int) -> tuple[int, ...]:
    return (*shape[:axis], num_query, *shape[axis + 1 :])
