"""Exact attention in plain XLA, shaped for matrix products, with a hand-written gradient.

Same result as `reference`, in another order of operations:

- point distances are sums of squared differences, never expanded: exact at any coordinates;
- the softmax stays unnormalised until the outputs are small;
- the gradient keeps one [H, Nq, Nk] array from the forward pass (none with `query_block`) and
  touches `inputs_2d` three times;
- coordinates are recentred, so that the gradient's matrix products do not cancel large numbers.

Below, x is an `IPAInputs` of one protein in float32 (or float64); letters in einsums: q queries,
k keys, h heads, c channels.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import (
    MASK_PENALTY,
    IPAInputs,
    IPAOutput,
    LogitScales,
    for_each_protein,
    in_one_loop,
    subtract_segment_penalty,
    sum_of_squares,
    weighted_squares,
    widen,
)

# Products that involve points: never bfloat16 or TF32.
_HIGHEST = jax.lax.Precision.HIGHEST


class _Static(NamedTuple):
    scales: LogitScales
    precision: jax.lax.PrecisionLike
    query_block: int  # Nq for all rows at once


def attend(
    inputs: IPAInputs,
    scales: LogitScales,
    *,
    precision: jax.lax.PrecisionLike = None,
    query_block: int | None = None,
) -> IPAOutput:
    """Invariant point attention by matrix products, with a hand-written gradient.

    Args:
      inputs: the array arguments, checked.
      scales: static factors of the logit terms.
      precision: of the matrix products over scalar and pair channels.
      query_block: how many query rows to process at a time, forward and backward; None for all.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode differentiation, which only `reference` supports.
    """
    query_block = min(query_block or inputs.num_query, inputs.num_query)
    attend_one = functools.partial(_attend, _Static(scales, precision, query_block))
    return for_each_protein(attend_one, inputs, "xla")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, inputs: IPAInputs) -> IPAOutput:
    return _attend_fwd(static, inputs)[0]


def _attend_fwd(static: _Static, inputs: IPAInputs) -> tuple[IPAOutput, tuple]:
    weights = None
    if static.query_block < inputs.num_query:
        out = _forward_in_blocks(static, inputs)
    else:
        x = widen(inputs)
        weights = _softmax(static, x)
        out = _outputs(static, x, *weights)
    # The wide outputs are kept: the gradient takes a difference with them.
    return _narrow(out, inputs), (inputs, out, weights)


def _attend_bwd(static: _Static, residuals: tuple, cotangent: IPAOutput) -> tuple[IPAInputs]:
    inputs, out, weights = residuals
    if weights is None:
        grads = _backward_in_blocks(static, inputs, out, cotangent)
    else:
        cotangent = jax.tree.map(lambda a: a.astype(inputs.logits_dtype), cotangent)
        grads = _backward(static, widen(inputs), out, weights, cotangent)
    inputs = _without_segments(inputs)  # which have no gradient
    return (jax.tree.map(lambda g, a: g.astype(a.dtype), grads, inputs),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _softmax(static: _Static, x: IPAInputs) -> tuple[jax.Array, jax.Array]:
    """Attention weights as exp(logits - max) [H, Nq, Nk] and 1 / their sums [H, Nq] (line 7)."""
    scales = static.scales
    q_scalar = jnp.swapaxes(scales.scalar * x.q_scalar, 0, 1)  # [H, Nq, C]
    k_scalar = jnp.moveaxis(x.k_scalar, 0, -1)  # [H, C, Nk]
    logits = jnp.matmul(q_scalar, k_scalar, precision=static.precision)

    # All of inputs_2d as one tall matrix; transposing the small result is cheaper than any
    # contraction that puts heads first.
    z = x.inputs_2d.reshape(-1, x.inputs_2d.shape[-1])
    pair = jnp.matmul(z, scales.pair * x.pair_weights, precision=static.precision)
    pair = (pair + scales.pair * x.pair_bias).reshape(x.num_query, x.num_key, x.num_head)

    terms = jnp.moveaxis(pair, -1, 0) - 0.5 * x.point_weights[:, None, None] * _square_distance(x)
    mask_2d = x.q_mask[:, None] * x.k_mask
    terms = terms - MASK_PENALTY * (1.0 - mask_2d)
    terms = subtract_segment_penalty(terms, x)
    logits = scales.total * (logits + in_one_loop(terms))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return weights, 1.0 / jnp.sum(weights, axis=-1)


def _square_distance(x: IPAInputs) -> jax.Array:
    """Squared distances of query and key points, summed over points [H, Nq, Nk]."""
    return sum_of_squares(_coordinates(x.q_point), _coordinates(x.k_point))


def _coordinates(points: jax.Array) -> jax.Array:
    """[N, H, P, 3] -> [H, P*3, N]."""
    return jnp.moveaxis(_flat(points), 0, -1)


def _outputs(static: _Static, x: IPAInputs, weights: jax.Array, scale: jax.Array) -> IPAOutput:
    """Scalar, point and pair outputs from weights [H, Nq, Nk] times scale [H, Nq] (lines 8-10)."""
    scale = scale.T[..., None]  # [Nq, H, 1]
    value = scale * jnp.einsum("hqk,khc->qhc", weights, _values(x), precision=_HIGHEST)
    pair = jnp.einsum(
        "qhk,qkc->qhc", jnp.swapaxes(weights, 0, 1), x.inputs_2d, precision=static.precision
    )
    scalar, point = jnp.split(value, [x.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(scalar, point.reshape(*point.shape[:2], -1, 3), scale * pair)


def _backward(
    static: _Static,
    x: IPAInputs,
    out: IPAOutput,
    softmax: tuple[jax.Array, jax.Array],
    cotangent: IPAOutput,
) -> IPAInputs:
    """Gradient of every input; zero for the masks by definition."""
    weights, scale = softmax
    scales, precision = static.scales, static.precision
    # dlogits = total * attention * (dattention - sum_k attention * dattention), and that sum is
    # the dot product of the outputs with their cotangents.
    dvalue = jnp.concatenate([cotangent.scalar, _flat(cotangent.point)], axis=-1)  # [Nq, H, c]
    value = jnp.concatenate([out.scalar, _flat(out.point)], axis=-1)
    delta = jnp.sum(dvalue * value, axis=-1) + jnp.sum(cotangent.pair * out.pair, axis=-1)
    dattention = jnp.einsum("qhc,khc->hqk", dvalue, _values(x), precision=_HIGHEST)
    dattention_pair = jnp.einsum("qkc,qhc->qkh", x.inputs_2d, cotangent.pair, precision=precision)
    attention = scale[..., None] * weights
    dlogits = attention * (dattention + jnp.moveaxis(dattention_pair, -1, 0) - delta.T[..., None])
    dlogits = scales.total * dlogits

    dv = jnp.einsum("hqk,qhc->khc", attention, dvalue, precision=_HIGHEST)
    dv_scalar, dv_point = jnp.split(dv, [x.v_scalar.shape[-1]], axis=-1)
    grads_qk = _backward_queries_and_keys(static, x, dlogits)

    pair_weights = scales.pair * x.pair_weights.T  # [H, C_z]
    dpair = jnp.einsum(
        "qhk,qkc->qhc", jnp.swapaxes(dlogits, 0, 1), x.inputs_2d, precision=precision
    )
    # d(inputs_2d)_qk = sum_h attention_hqk dpair_qh + dlogits_hqk pair_weights_h, as one product.
    left = jnp.concatenate([attention, dlogits], axis=0)  # [2H, Nq, Nk]
    right = jnp.concatenate(
        [cotangent.pair, jnp.broadcast_to(pair_weights, cotangent.pair.shape)], axis=1
    )  # [Nq, 2H, C_z]
    dinputs_2d = jnp.einsum("qgk,qgc->qkc", jnp.swapaxes(left, 0, 1), right, precision=precision)
    return IPAInputs(
        v_scalar=dv_scalar,
        v_point=dv_point.reshape(x.v_point.shape),
        inputs_2d=dinputs_2d,
        pair_weights=scales.pair * jnp.sum(dpair, axis=0).T,
        # Shifts all logits of a row alike, so the softmax does not see it.
        pair_bias=jnp.zeros_like(x.pair_bias),
        q_mask=jnp.zeros_like(x.q_mask),
        k_mask=jnp.zeros_like(x.k_mask),
        **grads_qk,
    )


def _backward_queries_and_keys(
    static: _Static, x: IPAInputs, dlogits: jax.Array
) -> dict[str, jax.Array]:
    """Gradients of scalar and point queries and keys, and of the point weights.

    With g = dlogits, d(q_point) = -w sum_k g_qk (Q_q - K_k) = w (sum_k g K_k - Q_q sum_k g), and
    likewise for keys: two products give all four gradients. The point weights' could come from
    them, too, but as a difference of sums over coordinates, which are larger than distances.
    """
    q_point, k_point = _flat(x.q_point), _flat(x.k_point)
    keys = jnp.concatenate([x.k_scalar, k_point, jnp.ones_like(k_point[..., :1])], axis=-1)
    queries = jnp.concatenate([x.q_scalar, q_point, jnp.ones_like(q_point[..., :1])], axis=-1)
    sums_q = jnp.einsum("hqk,khc->qhc", dlogits, keys, precision=_HIGHEST)
    sums_k = jnp.einsum("hqk,qhc->khc", dlogits, queries, precision=_HIGHEST)
    at = [x.q_scalar.shape[-1], sums_q.shape[-1] - 1]
    dq_scalar, sum_k_point, sum_q_one = jnp.split(sums_q, at, axis=-1)
    dk_scalar, sum_q_point, sum_k_one = jnp.split(sums_k, at, axis=-1)

    w = x.point_weights[:, None]
    to_q, to_k = sum_k_point - q_point * sum_q_one, sum_q_point - k_point * sum_k_one
    # One head at a time, so that no [H, Nq, Nk] array more is needed.
    sums_of_squares = jax.lax.map(
        lambda head: jnp.sum(weighted_squares(*head), axis=-1),
        (dlogits, _coordinates(x.q_point), _coordinates(x.k_point)),
    )  # [H, Nq]
    return {
        "q_scalar": static.scales.scalar * dq_scalar,
        "k_scalar": static.scales.scalar * dk_scalar,
        "q_point": (w * to_q).reshape(x.q_point.shape),
        "k_point": (w * to_k).reshape(x.k_point.shape),
        "point_weights": -0.5 * jnp.sum(sums_of_squares, axis=-1),
    }


_BY_ROW = ("q_scalar", "q_point", "inputs_2d", "q_mask", "q_segment_ids")


def _forward_in_blocks(static: _Static, inputs: IPAInputs) -> IPAOutput:
    """The outputs, `query_block` rows at a time."""

    def block(i: jax.Array | int) -> tuple[jax.Array, IPAOutput]:
        start, rows = _rows(static, inputs, i)
        x = widen(rows)
        return start, _outputs(static, x, *_softmax(static, x))

    def step(i: jax.Array, out: IPAOutput) -> IPAOutput:
        start, rows = block(i)
        return jax.tree.map(lambda a, b: _update(a, b, start), out, rows)

    shapes = jax.eval_shape(block, 0)[1]
    empty = jax.tree.map(lambda a: jnp.zeros((inputs.num_query, *a.shape[1:]), a.dtype), shapes)
    return jax.lax.fori_loop(0, _num_block(static, inputs), step, empty)


def _backward_in_blocks(
    static: _Static, inputs: IPAInputs, out: IPAOutput, cotangent: IPAOutput
) -> IPAInputs:
    """The gradient, `query_block` rows at a time, with attention weights computed anew."""
    num_block = _num_block(static, inputs)
    dtype = inputs.logits_dtype

    def step(j: jax.Array, grads: IPAInputs) -> IPAInputs:
        i = num_block - 1 - j
        start, rows = _rows(static, inputs, i)
        # The last block reaches back over rows of the one before it. They count for nothing in
        # it, and as it comes first, what it wrote there is written over.
        fresh = start + jnp.arange(static.query_block) >= i * static.query_block
        out_rows, cotangent_rows = (
            jax.tree.map(lambda a: _slice(a, start, static.query_block).astype(dtype), tree)
            for tree in (out, cotangent)
        )
        cotangent_rows = jax.tree.map(
            lambda a: jnp.where(fresh.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0), cotangent_rows
        )
        x = widen(rows)
        block = _backward(static, x, out_rows, _softmax(static, x), cotangent_rows)
        return IPAInputs(
            **{
                name: _update(total, getattr(block, name), start)
                if name in _BY_ROW
                else total + getattr(block, name)
                for name, total in grads._asdict().items()
                if total is not None
            }
        )

    zeros = {
        name: jnp.zeros(a.shape, a.dtype if name == "inputs_2d" else dtype)
        for name, a in _without_segments(inputs)._asdict().items()
        if a is not None
    }
    return jax.lax.fori_loop(0, num_block, step, IPAInputs(**zeros))


def _without_segments(inputs: IPAInputs) -> IPAInputs:
    return inputs._replace(q_segment_ids=None, k_segment_ids=None)


def _num_block(static: _Static, inputs: IPAInputs) -> int:
    return -(-inputs.num_query // static.query_block)


def _rows(static: _Static, inputs: IPAInputs, i: jax.Array | int) -> tuple[jax.Array, IPAInputs]:
    """First row and inputs of block i; the last block is moved back to be as long as the rest."""
    start = jnp.minimum(i * static.query_block, inputs.num_query - static.query_block)
    rows = {
        name: jax.tree.map(lambda a: _slice(a, start, static.query_block), getattr(inputs, name))
        for name in _BY_ROW
    }
    return start, inputs._replace(**rows)


def _slice(a: jax.Array, start: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(a, start, size)


def _update(a: jax.Array, block: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(a, block.astype(a.dtype), start, axis=0)


def _flat(points: jax.Array) -> jax.Array:
    """[..., P, 3] -> [..., P*3]."""
    return points.reshape(*points.shape[:-2], -1)


def _values(x: IPAInputs) -> jax.Array:
    """Scalar and point values side by side, [Nk, H, Cv + Pv*3]."""
    return jnp.concatenate([x.v_scalar, _flat(x.v_point)], axis=-1)


def _narrow(out: IPAOutput, inputs: IPAInputs) -> IPAOutput:
    """Outputs in the dtypes that `IPAOutput` promises."""
    return out._replace(
        scalar=out.scalar.astype(inputs.v_scalar.dtype),
        pair=out.pair.astype(inputs.inputs_2d.dtype),
    )
