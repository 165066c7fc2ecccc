"""The forward pass of `xla`: attention weights in two factors, and the sums over keys.

In this folder arrays are those of one protein, in float32 (or float64) but for rows of an array
`inputs_2d`. Letters in einsums: q queries, k keys, h heads, c channels, f pair features.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.logits import (
    Side,
    flat,
    mask_penalty,
    only_own_segment,
    sum_of_squares,
)
from ipa_haiku.attention.pair import rows_of_table
from ipa_haiku.attention.types import IPAInputs, LogitScales
from ipa_haiku.attention.xla import cpu
from ipa_haiku.attention.xla.rows import take

# Products that involve points: never bfloat16 or TF32.
HIGHEST = jax.lax.Precision.HIGHEST


class Static(NamedTuple):
    """What is known when tracing."""

    scales: LogitScales
    precision: jax.lax.PrecisionLike
    query_block: int  # Nq for all rows at once


class Queries(NamedTuple):
    """All that has a row for each query: these, or some of them."""

    side: Side
    pair_weights: Any  # `PairTerm.query_weights`
    pair_rows: Any  # `PairTerm.rows`


class Keys(NamedTuple):
    """All that has a row for each key."""

    side: Side
    value: jax.Array  # [H, Nk, Cv + Pv*3] scalar and point values side by side
    pair: Any  # `PairTerm.keys`


class Weights(NamedTuple):
    """What all residues share."""

    point: jax.Array  # [H]
    pair: Any  # `PairTerm.weights`


class Sums(NamedTuple):
    """Attention-weighted sums over keys (lines 8 to 10)."""

    value: jax.Array  # [Nq, H, Cv + Pv*3]
    pair: Any  # [Nq, H, f], if any


class Softmax(NamedTuple):
    """Attention weights (line 7) in two factors."""

    weights: jax.Array  # [H, Nq, Nk] exp(logits - max)
    total: jax.Array  # [H, Nq] their sums, which divide


def values_of(x: IPAInputs) -> jax.Array:
    """Scalar and point values side by side, [H, Nk, Cv + Pv*3]."""
    return jnp.swapaxes(jnp.concatenate([x.v_scalar, flat(x.v_point)], axis=-1), 0, 1)


def softmax_of(static: Static, q: Queries, k: Keys, weights: Weights) -> Softmax:
    """Attention weights of the queries (line 7)."""
    scales = static.scales
    q_scalar = jnp.swapaxes(scales.scalar * q.side.scalar, 0, 1)  # [H, Nq, C]
    k_scalar = jnp.moveaxis(k.side.scalar, 0, -1)  # [H, C, Nk]
    logits = jnp.matmul(q_scalar, k_scalar, precision=static.precision)
    square_distance = sum_of_squares(*coordinates(q, k))
    terms = -0.5 * weights.point[:, None, None] * square_distance
    if has_pair(q, k):
        terms = terms + pair_logits(static, q, k, weights)
    # The penalty last: beside it, sums keep two digits.
    logits = logits + cpu.unfused(terms) - mask_penalty(q.side.mask, k.side.mask)[None]
    logits = scales.total * logits
    logits = only_own_segment(logits, q.side.segment, k.side.segment)
    exponentials = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return Softmax(exponentials, jnp.sum(exponentials, axis=-1))


def has_pair(q: Queries, k: Keys) -> bool:
    """Whether there is a pair term."""
    return q.pair_rows is not None or k.pair is not None


def features(q: Queries, k: Keys, weights: Weights) -> tuple[jax.Array, bool]:
    """Pair features, and whether each query has its own: [q, k, f], else [k, f]."""
    if q.pair_rows is None:
        return k.pair, False
    if k.pair is None:
        return q.pair_rows.astype(weights.pair.dtype), True
    num_row = weights.pair.shape[-1]
    rows = rows_of_table(q.pair_rows, k.pair, num_row)
    return jax.nn.one_hot(rows, num_row, dtype=weights.pair.dtype), True


def pair_logits(static: Static, q: Queries, k: Keys, weights: Weights) -> jax.Array:
    """The pair term of the logits [H, q, k]."""
    z, is_by_query = features(q, k, weights)
    if not is_by_query:
        return jnp.einsum("qhf,kf->hqk", q.pair_weights, z, precision=static.precision)
    # All features as one tall matrix; transposing the small result is cheaper than any contraction
    # that puts heads first.
    tall = jnp.matmul(z.reshape(-1, z.shape[-1]), weights.pair.T, precision=static.precision)
    return jnp.moveaxis(tall.reshape(*z.shape[:2], -1), -1, 0)


def pair_sums(
    static: Static, weights_hqk: jax.Array, q: Queries, k: Keys, weights: Weights
) -> jax.Array:
    """Sums over keys of pair features [q, H, f] with weights [H, q, k]."""
    z, is_by_query = features(q, k, weights)
    if not is_by_query:
        return jnp.einsum("hqk,kf->qhf", weights_hqk, z, precision=static.precision)
    return cpu.sum_over_keys(jnp.swapaxes(weights_hqk, 0, 1), z, static.precision, may_copy=False)


def sums_of(static: Static, softmax: Softmax, q: Queries, k: Keys, weights: Weights) -> Sums:
    """Attention-weighted sums over keys (lines 8 to 10)."""
    # Twice as fast on a CPU as the einsum that gives [q, H, c] right away.
    value = cpu.sum_over_keys(softmax.weights, k.value, HIGHEST, may_copy=True)
    sums = Sums(jnp.swapaxes(value, 0, 1), None)
    if has_pair(q, k):
        sums = sums._replace(pair=pair_sums(static, softmax.weights, q, k, weights))
    return jax.tree.map(lambda x: x / softmax.total.T[..., None], sums)


def take_queries(q: Queries, start: jax.Array | int, size: int) -> Queries:
    """`size` of the queries."""
    num_query = q.side.scalar.shape[0]
    if size == num_query:
        return q
    rows = jax.tree.map(lambda x: take(x, start, size), q._replace(pair_rows=None))
    if q.pair_rows is None:
        return rows
    pair_rows = cpu.one_array(
        lambda: take(q.pair_rows, start, size), jnp.asarray(start < num_query)
    )
    return rows._replace(pair_rows=pair_rows)


def coordinates(q: Queries, k: Keys) -> tuple[jax.Array, jax.Array]:
    """Of points, [H, P*3, q] and [H, P*3, k]."""
    return jnp.moveaxis(q.side.point, 0, -1), jnp.moveaxis(k.side.point, 0, -1)
