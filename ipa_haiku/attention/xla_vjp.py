"""The gradient of `xla`, by hand, of every argument."""

import functools

import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import IPAInputs, IPAOutput, weighted_squares, widen
from ipa_haiku.attention.rows import (
    BY_ROW,
    block_start,
    by_rows,
    is_large_result,
    narrow_rows,
    num_block,
    take_axis,
    take_rows,
    update,
)
from ipa_haiku.attention.xla_forward import (
    HIGHEST,
    Attention,
    Static,
    coordinates,
    flat,
    keys_of,
    softmax_of,
)


def backward(
    static: Static, inputs: IPAInputs, attention: Attention, cotangent: IPAOutput
) -> IPAInputs:
    """Gradient of every input; zero for the masks by definition."""
    x, softmax = widen(inputs), attention.softmax
    pair_scale = static.scales.pair
    dvalue = jnp.concatenate([cotangent.scalar, flat(cotangent.point)], axis=-1)  # [Nq, H, c]
    dlogits, dpair = _backward_logits(static, inputs, attention, cotangent, dvalue)

    dvalue = softmax.scale.T[..., None] * dvalue
    dv = jnp.einsum("hqk,qhc->khc", softmax.weights, dvalue, precision=HIGHEST)
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
    static: Static,
    inputs: IPAInputs,
    attention: Attention,
    cotangent: IPAOutput,
    dvalue: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Gradient of the logits [H, Nq, Nk], and its sums over keys of inputs_2d [Nq, H, C_z].

    `dvalue` [Nq, H, Cv + Pv*3] is the cotangent of scalars and points.
    """
    # dlogits = total * attention * (dattention - sum_k attention * dattention), and that sum is
    # the dot product of the outputs with their cotangents.
    out = attention.out
    value = jnp.concatenate([out.scalar, flat(out.point)], axis=-1)
    delta = jnp.sum(dvalue * value, axis=-1) + jnp.sum(cotangent.pair * out.pair, axis=-1)
    values = jnp.moveaxis(attention.keys.value, 0, -1)  # [H, Cv + Pv*3, Nk]

    def rows(start: jax.Array | int, size: int) -> tuple[jax.Array, jax.Array]:
        x = take_rows(inputs, start, size)
        weights, scale = (take_axis(a, start, size, 1) for a in attention.softmax)
        dvalue_rows, dpair, delta_rows = (
            take_axis(a, start, size) for a in (dvalue, cotangent.pair, delta)
        )
        dattention = jnp.matmul(jnp.swapaxes(dvalue_rows, 0, 1), values, precision=HIGHEST)
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
    static: Static,
    inputs: IPAInputs,
    attention: Attention,
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
    static: Static,
    inputs: IPAInputs,
    attention: Attention,
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
    attention: Attention,
    dlogits: jax.Array,
    start: jax.Array | int,
    size: int,
) -> jax.Array:
    """Of some rows, the sums over keys of dlogits * |Q - K|^2 [H, q]."""
    q_point = take_axis(coordinates(widen(inputs).q_point), start, size, 2)
    dlogits = take_axis(dlogits, start, size, 1)
    return jnp.sum(weighted_squares(dlogits, q_point, attention.keys.point), axis=-1)


def _backward_queries_and_keys(
    static: Static, x: IPAInputs, dlogits: jax.Array
) -> dict[str, jax.Array]:
    """Gradients of scalar and point queries and keys.

    With g = dlogits, d(q_point) = -w sum_k g_qk (Q_q - K_k) = w (sum_k g K_k - Q_q sum_k g), and
    likewise for keys: two products give all four gradients. The point weights' could come from
    them, too, but as a difference of sums over coordinates, which are larger than distances.
    """
    q_point, k_point = flat(x.q_point), flat(x.k_point)
    keys = jnp.concatenate([x.k_scalar, k_point, jnp.ones_like(k_point[..., :1])], axis=-1)
    queries = jnp.concatenate([x.q_scalar, q_point, jnp.ones_like(q_point[..., :1])], axis=-1)
    sums_q = jnp.einsum("hqk,khc->qhc", dlogits, keys, precision=HIGHEST)
    sums_k = jnp.einsum("hqk,qhc->khc", dlogits, queries, precision=HIGHEST)
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


def backward_in_blocks(
    static: Static, inputs: IPAInputs, out: IPAOutput, cotangent: IPAOutput
) -> IPAInputs:
    """The gradient, `query_block` rows at a time, with attention weights computed anew."""
    block, num_query, dtype = static.query_block, inputs.num_query, inputs.logits_dtype
    count = num_block(block, num_query)
    keys = keys_of(widen(inputs))

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
        attention = Attention(keys, softmax_of(static, x, keys), out_rows)
        rows = backward(static, x, attention, cotangent_rows)
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
        for name, a in without_segments(inputs)._asdict().items()
        if a is not None
    }
    return jax.lax.fori_loop(0, count, step, IPAInputs(**zeros))


def without_segments(inputs: IPAInputs) -> IPAInputs:
    """The arguments that have a gradient."""
    return inputs._replace(q_segment_ids=None, k_segment_ids=None)
