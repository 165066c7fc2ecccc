"""What XLA's compiler for CPUs wants otherwise; every workaround is here.

Each one says symptom, cause, effect and version. `tests/test_cpu.py` fails where one no longer
works. The gains were measured on two cores of an AMD EPYC with level-2 caches of 0.5 MB, JAX
0.10.2, float32, AF2's sizes: see `benchmarks/CPU_NOTES.md`. Nothing depends on the machine that
traces a program, and programs for other platforms contain none of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Rows of `inputs_2d` that a block of the forward pass holds: its products then read memory once.
_BLOCK_BYTES = 4 * 2**20

# Products over fewer rows are slower by a quarter.
_LEAST_ROWS = 16

# Parts of a sum over keys: so many at least, and more of so many keys.
_LEAST_PARTS = 4
_PART = 128


def block_rows(num_row: int, bytes_per_row: int) -> int:
    """Rows at a time in a forward pass on CPUs: about equally many in each block."""
    most = max(_BLOCK_BYTES // bytes_per_row, _LEAST_ROWS)
    return -(-num_row // -(-num_row // most))


def either(on_cpu: Callable[[], Any], elsewhere: Callable[[], Any]) -> Any:
    """The result of one of two functions of the same result, by the platform compiled for."""
    return jax.lax.platform_dependent(cpu=on_cpu, default=elsewhere)


def one_array(compute: Callable[[], jax.Array], is_true: jax.Array) -> jax.Array:
    """`compute()`, on CPUs as an array that exists once; `is_true` holds, unknown to the compiler.

    Symptom: a block of rows of `inputs_2d` is copied once for each product that takes it. Cause:
    XLA:CPU fuses the slice with the layout change of each. A conditional returns one array. Effect:
    forward pass of the core 113 to 81 ms at N = 512, 24 to 15 ms at 256.
    """
    return either(lambda: jax.lax.cond(is_true, compute, compute), compute)


def unfused(x: jax.Array) -> jax.Array:
    """`x`, which XLA:CPU fuses with no product or reduction that takes it.

    Symptom: of a sum that goes into products' and softmax's fusion, half is taken in and the other
    half written out. Cause: XLA:CPU's choice of fusions. It fuses no rounding, and this one, to the
    precision that `x` has, changes nothing. Effect: the attention core 93 to 49 ms at N = 512.
    """
    info = jnp.finfo(x.dtype)
    return either(lambda: jax.lax.reduce_precision(x, info.nexp, info.nmant), lambda: x)


def sum_over_keys(
    weights: jax.Array, x: jax.Array, precision: jax.lax.PrecisionLike, may_copy: bool
) -> jax.Array:
    """weights [b, m, Nk] times x [b, Nk, n], as `jnp.matmul`.

    Symptom: the product runs on one core, and at N = 257 points have 2.5 times the error of
    `reference`. Cause: XLA:CPU spreads a batch of products over cores only where a sum follows, and
    adds up the keys one by one. So this sums parts of the keys. Effect on the product of attention
    weights and `inputs_2d`: 45 to 25 ms at N = 512; on that error: 1.1 times. Keys that no part
    takes are added by themselves; without `may_copy`, as slices of `x` are copies, parts take all
    keys, though there may be but one.
    """
    num_key = weights.shape[-1]
    num_part = max(_LEAST_PARTS, num_key // _PART)
    if not may_copy:
        num_part = next(n for n in range(num_part, 0, -1) if num_key % n == 0)

    def whole() -> jax.Array:
        return jnp.matmul(weights, x, precision=precision)

    def in_parts() -> jax.Array:
        split = num_key // num_part * num_part
        parts = weights[..., :split].reshape(*weights.shape[:2], num_part, -1)
        x_parts = x[:, :split].reshape(len(x), num_part, -1, x.shape[-1])
        sums = jnp.matmul(jnp.swapaxes(parts, 1, 2), x_parts, precision=precision)
        total = jnp.sum(sums, axis=1)
        if split == num_key:
            return total
        return total + jnp.matmul(weights[..., split:], x[:, split:], precision=precision)

    return whole() if num_part == 1 or num_part > num_key else either(in_parts, whole)
