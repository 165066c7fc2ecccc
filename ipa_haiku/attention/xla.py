"""Exact attention in plain XLA, shaped for matrix products, with a hand-written gradient.

Same result as `reference`, in another order of operations:

- point distances are sums of squared differences, never expanded: exact at any coordinates;
- the softmax stays unnormalised until the outputs are small;
- the gradient keeps one [H, Nq, Nk] array from the forward pass (none with `query_block`);
- on CPUs, what reads or writes `inputs_2d` does so in blocks of rows that a cache holds (`rows`);
- coordinates are expected near the origin (`base.at_center`, or the module, moves them there), so
  that the gradient's matrix products do not cancel large numbers.

Below, x is an `IPAInputs` of one protein in float32 (or float64); letters in einsums: q queries,
k keys, h heads, c channels.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import (
    MASK_PENALTY,
    IPAInputs,
    IPAOutput,
    LogitScales,
    for_each_protein,
    narrow,
    subtract_segment_penalty,
    sum_of_squares,
    unfused,
    weighted_squares,
    widen,
)
from ipa_haiku.attention.rows import (
    BY_ROW,
    block_start,
    by_rows,
    is_large_result,
    is_one_block,
    laid_out,
    narrow_rows,
    num_block,
    own_array,
    take_axis,
    take_rows,
    update,
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
      inputs: the array arguments, checked; points near the origin.
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


class _Keys(NamedTuple):
    """Of all keys, what the logits and their gradient are made of, laid out for products.

    To be made outside of loops over rows.
    """

    scalar: jax.Array  # [H, C, Nk]
    point: jax.Array  # [H, P*3, Nk]
    value: jax.Array  # [Nk, H, Cv + Pv*3] scalar and point values side by side


class _Softmax(NamedTuple):
    """Attention weights (line 7) in two factors."""

    weights: jax.Array  # [H, Nq, Nk] exp(logits - max)
    scale: jax.Array  # [H, Nq] 1 / their sums


class _Attention(NamedTuple):
    """What the gradient knows of the forward pass: of all keys, and of the same rows."""

    keys: _Keys
    softmax: _Softmax
    out: IPAOutput


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, inputs: IPAInputs) -> IPAOutput:
    return narrow(_forward(static, inputs, in_gradient=False)[0], inputs)


def _attend_fwd(static: _Static, inputs: IPAInputs) -> tuple[IPAOutput, tuple]:
    out, softmax = _forward(static, inputs, in_gradient=True)
    # The wide outputs are kept: the gradient takes a difference with them.
    return narrow(out, inputs), (inputs, out, softmax)


def _forward(
    static: _Static, inputs: IPAInputs, in_gradient: bool
) -> tuple[IPAOutput, _Softmax | None]:
    """Outputs, not yet in the dtypes of the inputs, and attention weights without `query_block`."""
    keys = _keys(widen(inputs))
    in_blocks = static.query_block < inputs.num_query
    # With a copy of the weights for each, the products with inputs_2d and with values run at once.
    is_forked = is_one_block(inputs) and not in_blocks and not in_gradient
    own = functools.partial(own_array, on_cpu=is_forked)

    def softmax_and_pair(start: jax.Array | int, size: int) -> tuple[_Softmax, jax.Array]:
        x = take_rows(inputs, start, size)
        softmax = _softmax(static, x, keys)
        pair = _pair_sums(static, x, own(jnp.swapaxes(softmax.weights, 0, 1)))
        # In a gradient CPUs are faster with the scale here, else below, outside of the loop.
        return softmax, _scaled(pair, softmax) if in_gradient else pair

    def outputs(softmax: _Softmax, pair: jax.Array) -> IPAOutput:
        pair = pair if in_gradient else _scaled(pair, softmax)
        return _outputs(inputs, keys, softmax._replace(weights=own(softmax.weights)), pair)

    def outputs_of_rows(start: jax.Array | int, size: int) -> IPAOutput:
        return outputs(*softmax_and_pair(start, size))

    first: Any = 0  # where the axis of rows is
    second: Any = 1
    if in_blocks:
        axes: Any = IPAOutput(first, first, first)
        return by_rows(outputs_of_rows, inputs, static.query_block, axes), None
    # In a gradient, zeros would be written by the core that first writes those of the gradient of
    # inputs_2d, and the loop would wait for both.
    fill = keys.value[0, 0, 0] if in_gradient else 0
    axes = (_Softmax(second, second), first)
    softmax, pair = by_rows(
        softmax_and_pair, inputs, static.query_block, axes, at_once=2, fill=fill
    )
    return outputs(softmax, pair), softmax


def _attend_bwd(static: _Static, residuals: tuple, cotangent: IPAOutput) -> tuple[IPAInputs]:
    inputs, out, softmax = residuals
    if softmax is None:
        grads = _backward_in_blocks(static, inputs, out, cotangent)
    else:
        cotangent = jax.tree.map(lambda a: a.astype(inputs.logits_dtype), cotangent)
        attention = _Attention(_keys(widen(inputs)), softmax, out)
        grads = _backward(static, inputs, attention, cotangent)
    inputs = _without_segments(inputs)  # which have no gradient
    return (jax.tree.map(lambda g, a: g.astype(a.dtype), grads, inputs),)


_attend.defvjp(_attend_fwd, _attend_bwd)


def _keys(x: IPAInputs) -> _Keys:
    value = jnp.concatenate([x.v_scalar, _flat(x.v_point)], axis=-1)
    point = laid_out(_coordinates(x.k_point), x.point_weights[0])
    return _Keys(jnp.moveaxis(x.k_scalar, 0, -1), point, value)


def _softmax(static: _Static, x: IPAInputs, keys: _Keys) -> _Softmax:
    """Attention weights of the queries of x (line 7)."""
    scales = static.scales
    q_scalar = jnp.swapaxes(scales.scalar * x.q_scalar, 0, 1)  # [H, Nq, C]
    logits = jnp.matmul(q_scalar, keys.scalar, precision=static.precision)

    # All of inputs_2d as one tall matrix; transposing the small result is cheaper than any
    # contraction that puts heads first.
    z = x.inputs_2d.reshape(-1, x.inputs_2d.shape[-1])
    pair = jnp.matmul(z, scales.pair * x.pair_weights, precision=static.precision)
    pair = (pair + scales.pair * x.pair_bias).reshape(x.num_query, x.num_key, x.num_head)

    square_distance = sum_of_squares(_coordinates(x.q_point), keys.point)
    terms = jnp.moveaxis(pair, -1, 0) - 0.5 * x.point_weights[:, None, None] * square_distance
    mask_2d = x.q_mask[:, None] * x.k_mask
    terms = terms - MASK_PENALTY * (1.0 - mask_2d)
    terms = subtract_segment_penalty(terms, x)
    # XLA:CPU would fuse half of this sum with the reduction below, and write out the other half.
    logits = scales.total * (logits + unfused(terms))
    weights = jnp.exp(logits - jnp.max(logits, axis=-1, keepdims=True))
    return _Softmax(weights, 1.0 / jnp.sum(weights, axis=-1))


def _coordinates(points: jax.Array) -> jax.Array:
    """[N, H, P, 3] -> [H, P*3, N]."""
    return jnp.moveaxis(_flat(points), 0, -1)


def _pair_sums(static: _Static, x: IPAInputs, weights: jax.Array) -> jax.Array:
    """Sums of inputs_2d [Nq, H, C_z] with weights [Nq, H, Nk] (line 9)."""
    return jnp.einsum("qhk,qkc->qhc", weights, x.inputs_2d, precision=static.precision)


def _scaled(sums: jax.Array, softmax: _Softmax) -> jax.Array:
    """Sums over keys [Nq, H, c] with weights, as sums with attention weights."""
    return softmax.scale.T[..., None] * sums


def _outputs(inputs: IPAInputs, keys: _Keys, softmax: _Softmax, pair: jax.Array) -> IPAOutput:
    """The pair output with those of scalars and points (lines 8 and 10)."""
    # Twice as fast on a CPU as the einsum that gives [Nq, H, Cv + Pv*3] right away.
    value = jnp.matmul(softmax.weights, jnp.swapaxes(keys.value, 0, 1), precision=_HIGHEST)
    value = _scaled(jnp.swapaxes(value, 0, 1), softmax)
    scalar, point = jnp.split(value, [inputs.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(scalar, point.reshape(*point.shape[:2], -1, 3), pair)


def _backward(
    static: _Static, inputs: IPAInputs, attention: _Attention, cotangent: IPAOutput
) -> IPAInputs:
    """Gradient of every input; zero for the masks by definition."""
    x, softmax = widen(inputs), attention.softmax
    pair_scale = static.scales.pair
    dvalue = jnp.concatenate([cotangent.scalar, _flat(cotangent.point)], axis=-1)  # [Nq, H, c]
    dlogits, dpair = _backward_logits(static, inputs, attention, cotangent, dvalue)

    dvalue = softmax.scale.T[..., None] * dvalue
    dv = jnp.einsum("hqk,qhc->khc", softmax.weights, dvalue, precision=_HIGHEST)
    dv_scalar, dv_point = jnp.split(dv, [x.v_scalar.shape[-1]], axis=-1)
    dinputs_2d, sums = _dinputs_2d_and_sums(static, inputs, attention, cotangent.pair, dlogits)
    return IPAInputs(
        v_scalar=dv_scalar,
        v_point=dv_point.reshape(x.v_point.shape),
        inputs_2d=dinputs_2d,
        pair_weights=pair_scale * jnp.sum(dpair, axis=0).T,
        # Shifts all logits of a row alike, so the softmax does not see it.
        pair_bias=jnp.zeros_like(x.pair_bias),
        point_weights=-0.5 * jnp.sum(sums, axis=-1),
        q_mask=jnp.zeros_like(x.q_mask),
        k_mask=jnp.zeros_like(x.k_mask),
        **_backward_queries_and_keys(static, x, dlogits),
    )


def _backward_logits(
    static: _Static,
    inputs: IPAInputs,
    attention: _Attention,
    cotangent: IPAOutput,
    dvalue: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of the logits [H, Nq, Nk], and its sums over keys of inputs_2d [Nq, H, C_z].

    `dvalue` [Nq, H, Cv + Pv*3] is the cotangent of scalars and points.
    """
    # dlogits = total * attention * (dattention - sum_k attention * dattention), and that sum is
    # the dot product of the outputs with their cotangents.
    out = attention.out
    value = jnp.concatenate([out.scalar, _flat(out.point)], axis=-1)
    delta = jnp.sum(dvalue * value, axis=-1) + jnp.sum(cotangent.pair * out.pair, axis=-1)
    values = jnp.moveaxis(attention.keys.value, 0, -1)  # [H, Cv + Pv*3, Nk]

    def rows(start: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        x = take_rows(inputs, start, size)
        weights, scale = (take_axis(a, start, size, 1) for a in attention.softmax)
        dvalue_rows, dpair, delta_rows = (
            take_axis(a, start, size) for a in (dvalue, cotangent.pair, delta)
        )
        dattention = jnp.matmul(jnp.swapaxes(dvalue_rows, 0, 1), values, precision=_HIGHEST)
        dattention_pair = jnp.einsum("qkc,qhc->qkh", x.inputs_2d, dpair, precision=static.precision)
        dattention += jnp.moveaxis(dattention_pair, -1, 0) - delta_rows.T[..., None]
        dlogits = static.scales.total * scale[..., None] * weights * dattention
        sums = jnp.einsum(
            "qhk,qkc->qhc", jnp.swapaxes(dlogits, 0, 1), x.inputs_2d, precision=static.precision
        )
        return dlogits, sums

    if inputs.inputs_2d.dtype == inputs.logits_dtype:
        return rows(0, inputs.num_query)
    return by_rows(rows, inputs, inputs.num_query, (1, 0))  # never all of inputs_2d in float32


def _dinputs_2d_and_sums(
    static: _Static,
    inputs: IPAInputs,
    attention: _Attention,
    dpair: jax.Array,
    dlogits: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of inputs_2d [Nq, Nk, C_z], and sums over keys of dlogits * |Q - K|^2 [H, Nq]."""
    dinputs_2d = functools.partial(_dinputs_2d, static, inputs, attention, dpair, dlogits)
    squares = functools.partial(_sums_of_squares, inputs, attention, dlogits)
    num_query = inputs.num_query

    def together() -> tuple[jax.Array, jax.Array]:
        return by_rows(lambda *rows: (dinputs_2d(*rows), squares(*rows)), inputs, num_query, (0, 1))

    def apart() -> tuple[jax.Array, jax.Array]:
        return dinputs_2d(0, num_query), by_rows(squares, inputs, num_query, 1)

    cpu = apart if is_large_result(inputs) else together
    return jax.lax.platform_dependent(cpu=cpu, default=together)


def _dinputs_2d(
    static: _Static,
    inputs: IPAInputs,
    attention: _Attention,
    dpair: jax.Array,
    dlogits: jax.Array,
    start: jax.Array | int,
    size: int,
) -> jax.Array:
    """Gradient of some rows of inputs_2d [q, Nk, C_z]."""
    arrays = (*attention.softmax, dlogits)
    weights, scale, dlogits = (take_axis(a, start, size, 1) for a in arrays)
    # d(inputs_2d)_qk = sum_h attention_hqk dpair_qh + dlogits_hqk pair_weights_h, as one product.
    dpair = scale.T[..., None] * take_axis(dpair, start, size)
    pair_weights = static.scales.pair * widen(inputs).pair_weights.T
    left = jnp.swapaxes(jnp.concatenate([weights, dlogits]), 0, 1)  # [q, 2H, Nk]
    right = jnp.concatenate([dpair, jnp.broadcast_to(pair_weights, dpair.shape)], axis=1)
    dinputs_2d = jnp.einsum("qgk,qgc->qkc", left, right, precision=static.precision)
    return narrow_rows(dinputs_2d, inputs, start)


def _sums_of_squares(
    inputs: IPAInputs,
    attention: _Attention,
    dlogits: jax.Array,
    start: jax.Array | int,
    size: int,
) -> jax.Array:
    """Of some rows, the sums over keys of dlogits * |Q - K|^2 [H, q]."""
    q_point = take_axis(_coordinates(widen(inputs).q_point), start, size, 2)
    dlogits = take_axis(dlogits, start, size, 1)
    return jnp.sum(weighted_squares(dlogits, q_point, attention.keys.point), axis=-1)


def _backward_queries_and_keys(
    static: _Static, x: IPAInputs, dlogits: jax.Array
) -> dict[str, jax.Array]:
    """Gradients of scalar and point queries and keys.

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
    return {
        "q_scalar": static.scales.scalar * dq_scalar,
        "k_scalar": static.scales.scalar * dk_scalar,
        "q_point": (w * to_q).reshape(x.q_point.shape),
        "k_point": (w * to_k).reshape(x.k_point.shape),
    }


def _backward_in_blocks(
    static: _Static, inputs: IPAInputs, out: IPAOutput, cotangent: IPAOutput
) -> IPAInputs:
    """The gradient, `query_block` rows at a time, with attention weights computed anew."""
    block, num_query, dtype = static.query_block, inputs.num_query, inputs.logits_dtype
    count = num_block(block, num_query)
    keys = _keys(widen(inputs))

    def step(j: jax.Array, grads: IPAInputs) -> IPAInputs:
        i = count - 1 - j
        start = block_start(i, block, num_query)
        # The last block reaches back over rows of the one before it. They count for nothing in
        # it, and as it comes first, what it wrote there is written over.
        fresh = start + jnp.arange(block) >= i * block
        out_rows, cotangent_rows = (
            jax.tree.map(lambda a: take_axis(a, start, block).astype(dtype), tree)
            for tree in (out, cotangent)
        )
        cotangent_rows = jax.tree.map(
            lambda a: jnp.where(fresh.reshape(-1, *[1] * (a.ndim - 1)), a, 0.0), cotangent_rows
        )
        x = take_rows(inputs, start, block)
        attention = _Attention(keys, _softmax(static, x, keys), out_rows)
        rows = _backward(static, x, attention, cotangent_rows)
        return IPAInputs(
            **{
                name: update(total, getattr(rows, name), start, 0)
                if name in BY_ROW
                else total + getattr(rows, name)
                for name, total in grads._asdict().items()
                if total is not None
            }
        )

    zeros = {
        name: jnp.zeros(a.shape, a.dtype if name == "inputs_2d" else dtype)
        for name, a in _without_segments(inputs)._asdict().items()
        if a is not None
    }
    return jax.lax.fori_loop(0, count, step, IPAInputs(**zeros))


def _without_segments(inputs: IPAInputs) -> IPAInputs:
    return inputs._replace(q_segment_ids=None, k_segment_ids=None)


def _flat(points: jax.Array) -> jax.Array:
    """[..., P, 3] -> [..., P*3]."""
    return points.reshape(*points.shape[:-2], -1)
