"""The forward pass of `xla`: attention weights in two factors, and the outputs.

In this file and in `xla_vjp`, x is an `IPAInputs` of one protein in float32 (or float64); letters
in einsums: q queries, k keys, h heads, c channels.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import (
    MASK_PENALTY,
    IPAInputs,
    IPAOutput,
    LogitScales,
    subtract_segment_penalty,
    sum_of_squares,
    unfused,
    widen,
)
from ipa_haiku.attention.rows import by_rows, is_one_block, laid_out, own_array, take_rows

# Products that involve points: never bfloat16 or TF32.
HIGHEST = jax.lax.Precision.HIGHEST

# Where attention weights take more, CPUs do not make them all at once: the memory of an array of
# this size is given back after each call, and page by page found again.
_MANY_WEIGHTS_BYTES = 32 * 2**20


class Static(NamedTuple):
    """What is known when tracing."""

    scales: LogitScales
    precision: jax.lax.PrecisionLike
    query_block: int  # Nq for all rows at once


class Keys(NamedTuple):
    """Of all keys, what the logits and their gradient are made of, laid out for products.

    To be made outside of loops over rows.
    """

    scalar: jax.Array  # [H, C, Nk]
    point: jax.Array  # [H, P*3, Nk]
    value: jax.Array  # [Nk, H, Cv + Pv*3] scalar and point values side by side


class Softmax(NamedTuple):
    """Attention weights (line 7) in two factors."""

    weights: jax.Array  # [H, Nq, Nk] exp(logits - max)
    scale: jax.Array  # [H, Nq] 1 / their sums


class Attention(NamedTuple):
    """What the gradient knows of the forward pass: of all keys, and of the same rows."""

    keys: Keys
    softmax: Softmax
    out: IPAOutput


def forward(
    static: Static, inputs: IPAInputs, in_gradient: bool
) -> tuple[IPAOutput, Softmax | None]:
    """Outputs, not yet in the dtypes of the inputs, and for a gradient the attention weights.

    The latter not with `query_block`; without a gradient, where there are not too many of them.
    """
    keys = keys_of(widen(inputs))
    in_blocks = static.query_block < inputs.num_query
    # With a copy of the weights for each, the products with inputs_2d and with values run at once.
    is_forked = is_one_block(inputs) and not in_blocks and not in_gradient
    own = functools.partial(own_array, on_cpu=is_forked)

    def softmax_and_pair(start: jax.Array | int, size: int) -> tuple[Softmax, jax.Array]:
        x = take_rows(inputs, start, size)
        softmax = softmax_of(static, x, keys)
        num_part = 1 if in_gradient else _num_part(inputs.num_key)
        pair = _pair_sums(static, x, softmax.weights, num_part, own)
        # In a gradient CPUs are faster with the scale here, else below, outside of the loop.
        return softmax, _scaled(pair, softmax) if in_gradient else pair

    def outputs(softmax: Softmax, pair: jax.Array) -> IPAOutput:
        pair = pair if in_gradient else _scaled(pair, softmax)
        return _outputs(inputs, keys, softmax._replace(weights=own(softmax.weights)), pair)

    def outputs_of_rows(start: jax.Array | int, size: int) -> IPAOutput:
        return outputs(*softmax_and_pair(start, size))

    first: Any = 0  # where the axis of rows is
    second: Any = 1
    num_weight = inputs.num_head * inputs.num_query * inputs.num_key
    is_many = num_weight * inputs.logits_dtype.itemsize > _MANY_WEIGHTS_BYTES
    if in_blocks or (is_many and not in_gradient):
        axes: Any = IPAOutput(first, first, first)
        at_once = 1 if in_blocks else 2
        return by_rows(outputs_of_rows, inputs, static.query_block, axes, at_once=at_once), None
    # In a gradient, zeros would be written by the core that first writes those of the gradient of
    # inputs_2d, and the loop would wait for both.
    fill = keys.value[0, 0, 0] if in_gradient else 0
    axes = (Softmax(second, second), first)
    softmax, pair = by_rows(
        softmax_and_pair, inputs, static.query_block, axes, at_once=2, fill=fill
    )
    return outputs(softmax, pair), softmax


def keys_of(x: IPAInputs) -> Keys:
    """The keys of x."""
    value = jnp.concatenate([x.v_scalar, flat(x.v_point)], axis=-1)
    point = laid_out(coordinates(x.k_point), x.point_weights[0])
    return Keys(jnp.moveaxis(x.k_scalar, 0, -1), point, value)


def softmax_of(static: Static, x: IPAInputs, keys: Keys) -> Softmax:
    """Attention weights of the queries of x (line 7)."""
    scales = static.scales
    q_scalar = jnp.swapaxes(scales.scalar * x.q_scalar, 0, 1)  # [H, Nq, C]
    logits = jnp.matmul(q_scalar, keys.scalar, precision=static.precision)

    # All of inputs_2d as one tall matrix; transposing the small result is cheaper than any
    # contraction that puts heads first.
    z = x.inputs_2d.reshape(-1, x.inputs_2d.shape[-1])
    pair = jnp.matmul(z, scales.pair * x.pair_weights, precision=static.precision)
    pair = (pair + scales.pair * x.pair_bias).reshape(x.num_query, x.num_key, x.num_head)

    square_distance = sum_of_squares(coordinates(x.q_point), keys.point)
    terms = jnp.moveaxis(pair, -1, 0) - 0.5 * x.point_weights[:, None, None] * square_distance
    mask_2d = x.q_mask[:, None] * x.k_mask
    terms = terms - MASK_PENALTY * (1.0 - mask_2d)
    terms = subtract_segment_penalty(terms, x)
    # XLA:CPU would fuse half of this sum with the reduction below, and write out the other half.
    logits = scales.total * (logits + unfused(terms))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return Softmax(weights, 1.0 / jnp.sum(weights, axis=-1))


def coordinates(points: jax.Array) -> jax.Array:
    """[N, H, P, 3] -> [H, P*3, N]."""
    return jnp.moveaxis(flat(points), 0, -1)


def _num_part(num_key: int) -> int:
    """In how many parts CPUs take the keys of a sum: then XLA:CPU spreads it over cores."""
    return next(n for n in (4, 3, 2, 1) if num_key % n == 0)


def _pair_sums(
    static: Static,
    x: IPAInputs,
    weights: jax.Array,
    num_part: int,
    own: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Sums of inputs_2d [Nq, H, C_z] with weights [H, Nq, Nk] (line 9).

    Args:
      static: what is known when tracing.
      x: the arguments.
      weights: of the sums.
      num_part: of the keys on CPUs, a divisor of their number.
      own: makes the copy of weights that the product takes.
    """
    product = functools.partial(jnp.einsum, precision=static.precision)

    def whole(weights: jax.Array, z: jax.Array) -> jax.Array:
        return product("qhk,qkc->qhc", own(jnp.swapaxes(weights, 0, 1)), z)

    def in_parts(weights: jax.Array, z: jax.Array) -> jax.Array:
        weights = weights.reshape(*weights.shape[:2], num_part, -1)
        z = z.reshape(len(z), num_part, -1, z.shape[-1])
        sums = product("qghk,qgkc->qghc", own(jnp.transpose(weights, (1, 2, 0, 3))), z)
        return jnp.sum(sums, axis=1)

    cpu = in_parts if num_part > 1 else whole
    return jax.lax.platform_dependent(weights, x.inputs_2d, cpu=cpu, default=whole)


def _scaled(sums: jax.Array, softmax: Softmax) -> jax.Array:
    """Sums over keys [Nq, H, c] with weights, as sums with attention weights."""
    return softmax.scale.T[..., None] * sums


def _outputs(inputs: IPAInputs, keys: Keys, softmax: Softmax, pair: jax.Array) -> IPAOutput:
    """The pair output with those of scalars and points (lines 8 and 10)."""
    # Twice as fast on a CPU as the einsum that gives [Nq, H, Cv + Pv*3] right away.
    value = jnp.matmul(softmax.weights, jnp.swapaxes(keys.value, 0, 1), precision=HIGHEST)
    value = _scaled(jnp.swapaxes(value, 0, 1), softmax)
    scalar, point = jnp.split(value, [inputs.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(scalar, point.reshape(*point.shape[:2], -1, 3), pair)


def flat(points: jax.Array) -> jax.Array:
    """[..., P, 3] -> [..., P*3]."""
    return points.reshape(*points.shape[:-2], -1)
