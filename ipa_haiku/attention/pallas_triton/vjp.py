"""The gradient of the fused GPU kernels, by hand, of every argument.

A row's gradient of the logits takes the place of that of its attention weights; sums of it over
keys and over queries give all other gradients.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.batching import as_varying
from ipa_haiku.attention.logits import Side, side_gradients, summands
from ipa_haiku.attention.pallas_triton.common import (
    Arrays,
    Static,
    block_starts,
    join_rows,
    once_differentiable,
    split_rows,
)
from ipa_haiku.attention.pallas_triton.forward import attend_rows, value_sums
from ipa_haiku.attention.pallas_triton.pair_rows import Attention, pair_gradients
from ipa_haiku.attention.pallas_triton.sums import (
    attention_gradient,
    sum_over_keys_and_squares,
    sum_over_queries,
)


class Sums(NamedTuple):
    """Attention-weighted sums over keys (Suppl. Alg. 22, lines 8 to 10)."""

    value: jax.Array  # [Nq, H, Cv + Pv*3]
    pair: jax.Array  # [Nq, H, C_z]


class _Rows(NamedTuple):
    """What the gradient takes from query rows, here Nq of them."""

    query: Side
    dvalue: jax.Array  # [Nq, H, Cv + Pv*3] gradient of sums of values
    dpair: jax.Array  # [Nq, H, C_z] of pair outputs, dtype of inputs_2d


class _Totals(NamedTuple):
    """Sums over queries."""

    value: jax.Array  # [Nk, H, Cv + Pv*3] of attention times `dvalue`
    query: jax.Array  # [Nk, H, C+P*3+2] of dlogits times `summands` of queries
    point_weights: jax.Array  # [H]
    pair_weights: jax.Array  # [H, C_z]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_sums(static: Static, x: Arrays) -> Sums:
    """Sums of one protein, differentiable once."""
    return _forward(static, x)[0]


def _forward(static: Static, x: Arrays) -> tuple[Sums, tuple[Arrays, Attention | None]]:
    sums, attention = once_differentiable(functools.partial(_sums_and_attention, static))(x)
    return sums, (x, attention)


def _sums_and_attention(static: Static, x: Arrays) -> tuple[Sums, Attention | None]:
    """The sums, and what the gradient needs of them; nothing when rows are taken in blocks."""

    def attend(start: jax.Array, query: Side) -> tuple[Sums, Attention]:
        attention = attend_rows(static, x, start, query)
        return Sums(value_sums(static, x, attention), attention.pair), attention

    if static.query_block >= x.num_query:
        return attend(jnp.zeros(1, jnp.int32), x.query)
    rows = (block_starts(static, x.num_query), split_rows(static, x.query))
    sums = jax.lax.map(lambda rows: attend(*rows)[0], rows)
    return join_rows(sums, x.num_query), None


def _backward(
    static: Static, residuals: tuple[Arrays, Attention | None], cotangent: Sums
) -> tuple[Arrays]:
    return (once_differentiable(functools.partial(_gradients, static))(*residuals, cotangent),)


attention_sums.defvjp(_forward, _backward)


def _gradients(static: Static, x: Arrays, attention: Attention | None, cotangent: Sums) -> Arrays:
    # Nothing is lost: it was narrower before.
    rows = _Rows(x.query, cotangent.value, cotangent.pair.astype(x.inputs_2d.dtype))
    if attention is None:
        dquery, totals, dinputs_2d = _rows_in_blocks(static, x, rows)
    else:
        start = jnp.zeros(1, jnp.int32)
        dquery, totals, dinputs_2d = _row_gradients(static, x, start, rows, attention)
    return Arrays(
        query=dquery,
        key=side_gradients(static.scales, x.key, totals.query, x.point_weights),
        value=totals.value,
        point_weights=totals.point_weights,
        inputs_2d=dinputs_2d,
        pair_weights=totals.pair_weights.T.astype(x.pair_weights.dtype),
    )


def _rows_in_blocks(static: Static, x: Arrays, rows: _Rows) -> tuple[Side, _Totals, jax.Array]:
    """`_row_gradients`, `query_block` rows at a time, with their attention computed anew."""

    def step(
        carry: tuple[_Totals, jax.Array], block: tuple[jax.Array, _Rows]
    ) -> tuple[tuple[_Totals, jax.Array], Side]:
        (totals, dinputs_2d), (start, rows) = carry, block
        attention = attend_rows(static, x, start, rows.query)
        dquery, more, dinputs_2d = _row_gradients(static, x, start, rows, attention, dinputs_2d)
        return (jax.tree.map(jnp.add, totals, more), dinputs_2d), dquery

    num_channel, num_head = x.pair_weights.shape
    totals = _Totals(
        value=jnp.zeros_like(x.value),
        query=jnp.zeros_like(summands(x.key)),  # as many as of queries
        point_weights=jnp.zeros_like(x.point_weights),
        pair_weights=jnp.zeros((num_head, num_channel), jnp.float32),
    )
    empty = as_varying((totals, jnp.zeros_like(x.inputs_2d)), x)
    blocks = (block_starts(static, x.num_query), split_rows(static, rows))
    (totals, dinputs_2d), dquery = jax.lax.scan(step, empty, blocks)
    return join_rows(dquery, x.num_query), totals, dinputs_2d


def _row_gradients(
    static: Static,
    x: Arrays,
    start: jax.Array,
    rows: _Rows,
    attention: Attention,
    dinputs_2d: jax.Array | None = None,
) -> tuple[Side, _Totals, jax.Array]:
    """The gradient from the query rows at `start` [1] and after it.

    Args:
      static: scales and tunables.
      x: of which `inputs_2d` has all rows.
      start: [1] first row.
      rows: what belongs to them.
      attention: theirs.
      dinputs_2d: gradient of `inputs_2d` to write these rows of, in place; None for a new array.

    Returns:
      The gradient of the queries, sums over queries, and the gradient of `inputs_2d`.
    """
    config = static.config
    dattention, delta = attention_gradient(
        config, rows.dvalue, x.value, attention.logits, attention.softmax
    )
    dlogits, dinputs_2d, dpair_weights = pair_gradients(
        static, x, start, attention, dattention, delta, rows.dpair, dinputs_2d
    )
    sums, squares = sum_over_keys_and_squares(
        config, dlogits, summands(x.key), rows.query.point, x.key.point
    )
    totals = _Totals(
        value=sum_over_queries(config, attention.logits, rows.dvalue, attention.softmax),
        query=sum_over_queries(config, dlogits, summands(rows.query)),
        point_weights=-0.5 * jnp.sum(squares, axis=0),
        pair_weights=jnp.sum(dpair_weights, axis=0),
    )
    dquery = side_gradients(static.scales, rows.query, sums, x.point_weights)
    return dquery, totals, dinputs_2d
