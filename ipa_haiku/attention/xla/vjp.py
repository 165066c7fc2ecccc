"""The gradient of `xla`, by hand, of every argument."""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from ipa_haiku.attention.logits import Side, side_gradients, sum_of_squares, summands
from ipa_haiku.attention.xla import cpu
from ipa_haiku.attention.xla.forward import (
    HIGHEST,
    Keys,
    Queries,
    Softmax,
    Static,
    Sums,
    Weights,
    coordinates,
    features,
    has_pair,
    pair_sums,
    softmax_of,
    sums_of,
    take_queries,
)
from ipa_haiku.attention.xla.rows import by_rows, sum_by_rows, take


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention_sums(static: Static, q: Queries, k: Keys, weights: Weights) -> Sums:
    """Attention-weighted sums over keys of values and pair features."""

    def compute(start: jax.Array | int, size: int) -> Sums:
        rows = take_queries(q, start, size)
        return sums_of(static, softmax_of(static, rows, k, weights), rows, k, weights)

    return _in_blocks(static, q, k, compute, _axes_of_sums(q, k))


def _forward(static: Static, q: Queries, k: Keys, weights: Weights) -> tuple[Sums, tuple]:
    if static.query_block < q.side.scalar.shape[0]:
        return attention_sums(static, q, k, weights), (q, k, weights, None)

    def compute(start: jax.Array | int, size: int) -> tuple[Softmax, Sums]:
        rows = take_queries(q, start, size)
        softmax = softmax_of(static, rows, k, weights)
        return softmax, sums_of(static, softmax, rows, k, weights)

    second: Any = 1  # the axis of rows
    axes = Softmax(second, second), _axes_of_sums(q, k)
    softmax, sums = _in_blocks(static, q, k, compute, axes)
    return sums, (q, k, weights, softmax)


def _axes_of_sums(q: Queries, k: Keys) -> Any:
    first: Any = 0
    return Sums(first, first if has_pair(q, k) else None)


def _in_blocks(static: Static, q: Queries, k: Keys, compute: Any, axes: Any) -> Any:
    """`by_rows`, at most `static.query_block` rows at a time."""
    num_query, block = q.side.scalar.shape[0], static.query_block
    in_blocks = functools.partial(by_rows, compute, num_query, axes=axes, like=k)
    if q.pair_rows is None or k.pair is not None:
        return in_blocks(block)
    # Rows of an array `inputs_2d`.
    row = jax.ShapeDtypeStruct(q.pair_rows.shape[1:], k.value.dtype)
    cpu_block = min(block, cpu.block_rows(num_query, row.size * row.dtype.itemsize))
    return cpu.either(lambda: in_blocks(cpu_block), lambda: in_blocks(block))


def _backward(static: Static, residuals: tuple, cotangent: Sums) -> tuple[Queries, Keys, Weights]:
    q, k, weights, softmax = residuals
    if softmax is not None:
        return _gradients(static, q, k, weights, softmax, cotangent)

    def compute(rows: Any, is_counted: jax.Array) -> tuple[Queries, Any]:
        q, cotangent = rows
        cotangent = jax.tree.map(lambda x: jnp.where(is_counted[:, None, None], x, 0.0), cotangent)
        softmax = softmax_of(static, q, k, weights)
        dq, dk, dweights = _gradients(static, q, k, weights, softmax, cotangent)
        return dq, (dk, dweights)

    dq, (dk, dweights) = sum_by_rows(compute, (q, cotangent), static.query_block, k)
    return dq, dk, dweights


attention_sums.defvjp(_forward, _backward)


def _gradients(
    static: Static, q: Queries, k: Keys, weights: Weights, softmax: Softmax, cotangent: Sums
) -> tuple[Queries, Keys, Weights]:
    """Gradients of some queries, and what they add to those of keys and weights.

    dlogits = total * attention * (dattention - delta), delta = sum_k attention * dattention. The
    same delta from the outputs, sum_c out_c dout_c, has a rounding of its own that grows with the
    coordinates of the values. Here what cancels is the same number: where a query attends to one
    key alone, the gradient is exactly zero.
    """
    dvalue = jnp.swapaxes(cotangent.value, 0, 1)  # [H, q, c]
    dattention = jnp.matmul(dvalue, jnp.swapaxes(k.value, 1, 2), precision=HIGHEST)
    if has_pair(q, k):
        dattention += _pair_dattention(static, q, k, weights, cotangent.pair)
    attention = softmax.weights / softmax.total[..., None]
    delta = jnp.sum(attention * dattention, axis=-1, keepdims=True)
    dlogits = static.scales.total * attention * (dattention - delta)

    dq_side, dk_side = _side_gradients(static, q, k, weights, dlogits)
    dq, dk, dpair_weights = _pair_gradients(
        static, q, k, weights, attention, dlogits, cotangent.pair
    )
    return (
        dq._replace(side=dq_side),
        dk._replace(
            side=dk_side,
            value=jnp.matmul(jnp.swapaxes(attention, 1, 2), dvalue, precision=HIGHEST),
        ),
        Weights(_point_weights_gradient(q, k, dlogits), dpair_weights),
    )


def _side_gradients(
    static: Static, q: Queries, k: Keys, weights: Weights, dlogits: jax.Array
) -> tuple[Side, Side]:
    """Gradients of what queries and keys put into the logits beside the pair term."""
    sums_q = jnp.einsum("hqk,khc->qhc", dlogits, summands(k.side), precision=HIGHEST)
    sums_k = jnp.einsum("hqk,qhc->khc", dlogits, summands(q.side), precision=HIGHEST)
    return (
        side_gradients(static.scales, q.side, sums_q, weights.point),
        side_gradients(static.scales, k.side, sums_k, weights.point),
    )


def _point_weights_gradient(q: Queries, k: Keys, dlogits: jax.Array) -> jax.Array:
    """[H]; nothing from a key that has no weight, however far away it is."""
    squares = sum_of_squares(*coordinates(q, k))
    # Not the product: its derivative with respect to weights is that of zero ones, too.
    is_nothing = (dlogits == 0) & ~(squares < jnp.inf)
    rows = jnp.sum(dlogits * jnp.where(is_nothing, 0.0, squares), axis=2)
    # In two steps, which XLA:CPU would make one: a sum of Nq * Nk terms rounds three times as much.
    return -0.5 * jnp.sum(cpu.unfused(rows), axis=1)


def _pair_dattention(
    static: Static, q: Queries, k: Keys, weights: Weights, dpair: jax.Array
) -> jax.Array:
    """Gradient of attention weights [H, q, k] from that of the sums of pair features [q, H, f]."""
    z, is_by_query = features(q, k, weights)
    if not is_by_query:
        return jnp.einsum("qhf,kf->hqk", dpair, z, precision=static.precision)
    dattention = jnp.einsum("qkf,qhf->qkh", z, dpair, precision=static.precision)
    return jnp.moveaxis(dattention, -1, 0)


def _pair_gradients(
    static: Static,
    q: Queries,
    k: Keys,
    weights: Weights,
    attention: jax.Array,
    dlogits: jax.Array,
    dpair: jax.Array,
) -> tuple[Queries, Keys, Any]:
    """Gradients of pair features and weights, the other fields None."""
    none: Any = None
    dq, dk = Queries(none, none, none), Keys(none, none, none)
    if not has_pair(q, k):
        return dq, dk, None
    sums = pair_sums(static, dlogits, q, k, weights)  # [q, H, f]
    if q.pair_weights is not None:  # the features of a key are the same for all queries
        dfeatures = jnp.einsum("hqk,qhf->kf", dlogits, q.pair_weights, precision=static.precision)
        dfeatures += jnp.einsum("hqk,qhf->kf", attention, dpair, precision=static.precision)
        return dq._replace(pair_weights=sums), dk._replace(pair=dfeatures), None
    if k.pair is None:
        dq = dq._replace(pair_rows=_dinputs_2d(static, q, k, weights, attention, dlogits, dpair))
    return dq, dk, jnp.sum(sums, axis=0)


def _dinputs_2d(
    static: Static,
    q: Queries,
    k: Keys,
    weights: Weights,
    attention: jax.Array,
    dlogits: jax.Array,
    dpair: jax.Array,
) -> jax.Array:
    """Gradient of an array `inputs_2d` [q, Nk, C_z]: one product over 2 H channels.

    sum_h attention_hqk dpair_qhf + dlogits_hqk weights_hf
    """
    right = jnp.concatenate([dpair, jnp.broadcast_to(weights.pair, dpair.shape)], axis=1)

    def compute(start: jax.Array | int, size: int) -> jax.Array:
        rows = [take(x, start, size, axis=1) for x in (attention, dlogits)]
        left = jnp.swapaxes(jnp.concatenate(rows), 0, 1)  # [q, 2H, Nk]
        right_rows = take(right, start, size)
        dinputs_2d = jnp.einsum("qgk,qgf->qkf", left, right_rows, precision=static.precision)
        return dinputs_2d.astype(q.pair_rows.dtype)

    return _in_blocks(static, q, k, compute, 0)
