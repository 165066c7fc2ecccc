"""The gradient of the fused GPU kernels.

One kernel goes over `inputs_2d`: a program takes the row of one query, turns logits into attention
weights, adds the pair part to their gradient, and writes the row of the gradient of `inputs_2d` and
its part of the pair weights' gradient, so that nothing is added up by atomics. The gradients of the
logits take the place of those of the attention weights; sums of them over keys and over queries
give all other gradients.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.base import IPAInputs, IPAOutput
from ipa_haiku.attention.pallas_triton import Static
from ipa_haiku.attention.pallas_triton_base import (
    Side,
    Softmax,
    block_starts,
    call,
    dot,
    flat,
    join_rows,
    key_side,
    load_pair,
    once_differentiable,
    query_side,
    row_index,
    row_mask,
    row_specs,
    split_rows,
    transposed_pair_weights,
    values,
)
from ipa_haiku.attention.pallas_triton_tiles import (
    logits_without_pair,
    products,
    sum_over_keys_and_squares,
    sum_over_queries,
)


class _Rows(NamedTuple):
    """What the gradient takes from query rows, here Nq of them."""

    query: Side
    dvalue: jax.Array  # [Nq, H, Cv + Pv*3] gradient of scalar and point outputs
    dpair: jax.Array  # [Nq, H, C_z] of pair outputs, dtype of inputs_2d
    delta: jax.Array  # [Nq, H] sum over keys of attention times its gradient
    softmax: Softmax


class _ByRow(NamedTuple):
    """Sums over keys."""

    key: jax.Array  # [Nq, H, C + P*3 + 1] of dlogits times keys
    square: jax.Array  # [Nq, H] of dlogits times squared distances


class _Sums(NamedTuple):
    """Sums over queries, which the gradients of all but queries and inputs_2d are made of."""

    value: jax.Array  # [Nk, H, Cv + Pv*3] of attention times gradients of outputs
    query: jax.Array  # [Nk, H, C + P*3 + 1] of dlogits times queries
    pair_weights: jax.Array  # [H, C_z] of dlogits times inputs_2d


def backward(static: Static, residuals: tuple, cotangent: IPAOutput) -> tuple[IPAInputs]:
    """The gradient of every input; zero for the masks and the pair bias."""
    return (once_differentiable(functools.partial(_backward, static))(residuals, cotangent),)


def _backward(static: Static, residuals: tuple, cotangent: IPAOutput) -> IPAInputs:
    inputs, out, softmax, logits = residuals
    rows = _rows(inputs, out, softmax, cotangent)
    by_row: _ByRow
    if static.query_block < inputs.num_query:
        by_row, sums, dinputs_2d = _rows_in_blocks(static, inputs, rows)
    else:
        start = jnp.zeros(1, jnp.int32)
        by_row, sums, dinputs_2d = _rows_gradient(static, inputs, start, rows, logits)

    dv_scalar, dv_point = jnp.split(sums.value, [inputs.v_scalar.shape[-1]], axis=-1)
    zeros = {name: jnp.zeros_like(getattr(inputs, name)) for name in ("q_mask", "k_mask")}
    inputs = inputs._replace(q_segment_ids=None, k_segment_ids=None)  # have no gradient
    grads = IPAInputs(
        v_scalar=dv_scalar,
        v_point=dv_point.reshape(inputs.v_point.shape),
        inputs_2d=dinputs_2d,
        pair_weights=static.scales.total * static.scales.pair * sums.pair_weights.T,
        # Shifts all logits of a row alike, so the softmax does not see it.
        pair_bias=jnp.zeros_like(inputs.pair_bias),
        **_queries_and_keys(static, inputs, by_row.key, sums.query),
        point_weights=-0.5 * static.scales.total * jnp.sum(by_row.square, axis=0),
        **zeros,
    )
    return jax.tree.map(lambda g, x: g.astype(x.dtype), grads, inputs)


def _rows(inputs: IPAInputs, out: IPAOutput, softmax: Softmax, cotangent: IPAOutput) -> _Rows:
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), cotangent)
    dvalue = jnp.concatenate([wide.scalar, flat(wide.point)], axis=-1)
    value = jnp.concatenate([out.scalar, flat(out.point)], axis=-1)
    delta = jnp.sum(dvalue * value, axis=-1) + jnp.sum(wide.pair * out.pair, axis=-1)
    return _Rows(query_side(inputs), dvalue, cotangent.pair, delta, softmax)


def _rows_in_blocks(
    static: Static, inputs: IPAInputs, rows: _Rows
) -> tuple[_ByRow, _Sums, jax.Array]:
    """`_rows_gradient`, `query_block` rows at a time, with the logits computed anew."""

    def step(carry: tuple[_Sums, jax.Array], block: tuple[jax.Array, _Rows]) -> tuple:
        sums, dinputs_2d = carry
        by_row, more, dinputs_2d = _rows_gradient(
            static, inputs, *block, logits=None, dinputs_2d=dinputs_2d
        )
        return (jax.tree.map(jnp.add, sums, more), dinputs_2d), by_row

    num_key, num_head = inputs.num_key, inputs.num_head
    depth = inputs.q_scalar.shape[-1] + flat(inputs.q_point).shape[-1] + 1
    sums = _Sums(
        value=jnp.zeros((num_key, num_head, rows.dvalue.shape[-1]), jnp.float32),
        query=jnp.zeros((num_key, num_head, depth), jnp.float32),
        pair_weights=jnp.zeros((num_head, inputs.inputs_2d.shape[-1]), jnp.float32),
    )
    blocks = (block_starts(static, inputs), split_rows(static, rows))
    empty = (sums, jnp.zeros_like(inputs.inputs_2d))
    by_row: _ByRow
    (sums, dinputs_2d), by_row = jax.lax.scan(step, empty, blocks)
    return join_rows(by_row, inputs.num_query), sums, dinputs_2d


def _rows_gradient(
    static: Static,
    inputs: IPAInputs,
    start: jax.Array,
    rows: _Rows,
    logits: jax.Array | None,
    dinputs_2d: jax.Array | None = None,
) -> tuple[_ByRow, _Sums, jax.Array]:
    """The gradient from the query rows at `start` [1] and after it.

    Args:
      static: scales and tunables.
      inputs: of which `inputs_2d` has all rows.
      start: [1] first row.
      rows: what belongs to them.
      logits: [Nq, H, Nk] of the forward pass; None to compute them anew.
      dinputs_2d: gradient of `inputs_2d` to write these rows of, in place; None for a new array.

    Returns:
      Sums over keys, sums over queries, and the gradient of `inputs_2d`.
    """
    config, key = static.config, key_side(inputs)
    has_pair = logits is not None
    if logits is None:
        point_weights = inputs.point_weights.astype(jnp.float32)
        logits = logits_without_pair(static, rows.query, key, point_weights)
    dlogits = products(config, rows.dvalue, values(inputs), rows.delta)
    logits, dlogits, dinputs_2d, dpair_weights = _pair_pass(
        static, inputs, start, rows, logits, dlogits, dinputs_2d, has_pair
    )
    sums = _Sums(
        value=sum_over_queries(config, logits, rows.dvalue, rows.softmax),
        query=sum_over_queries(config, dlogits, _with_ones(rows.query)),
        pair_weights=jnp.sum(dpair_weights, axis=0),
    )
    by_row = sum_over_keys_and_squares(
        config, dlogits, _with_ones(key), rows.query.point, key.point
    )
    return _ByRow(*by_row), sums, dinputs_2d


def _with_ones(side: Side) -> jax.Array:
    """Scalars, points and 1 side by side, [N, H, C + P*3 + 1]."""
    ones = jnp.ones_like(side.point[..., :1])
    return jnp.concatenate([side.scalar, side.point, ones], axis=-1)


def _pair_pass(
    static: Static,
    inputs: IPAInputs,
    start: jax.Array,
    rows: _Rows,
    logits: jax.Array,
    dlogits: jax.Array,
    dinputs_2d: jax.Array | None,
    has_pair: bool,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """One pass over `inputs_2d` that completes dlogits and writes the gradient of `inputs_2d`.

    Args:
      static: scales and tunables.
      inputs: of which `inputs_2d` has all rows.
      start: [1] first row.
      rows: what belongs to them.
      logits: [Nq, H, Nk], to which the pair term is added in place unless `has_pair`.
      dlogits: [Nq, H, Nk] gradient of attention weights minus delta, without the pair output's
        part; the gradient of the logits, but for the total scale, is written in its place.
      dinputs_2d: as in `_rows_gradient`.
      has_pair: whether `logits` is complete.

    Returns:
      logits, dlogits, gradient of `inputs_2d`, and the rows' parts [Nq, H, C_z] of the gradient of
      `pair_weights`, without its scale.
    """
    num_query, num_head, num_key = logits.shape
    config, z = static.config, inputs.inputs_2d
    num_channel = z.shape[-1]
    total_scale = static.scales.total
    pair_scale = total_scale * static.scales.pair
    pair_weights = transposed_pair_weights(inputs)
    heads, channels = pair_weights.shape
    block = config.backward_block
    specs = row_specs(inputs, heads, channels, block)

    def kernel(
        start: Any, logits: Any, dlogits: Any, z: Any, pair_weights: Any, dpair: Any,
        maximum: Any, scale: Any, *refs: Any,
    ) -> None:  # fmt: skip
        logits_out = None if has_pair else refs[-1]
        dlogits_out, dpair_weights_out, dz_out = refs[-3:] if has_pair else refs[-4:-1]
        row = row_index(start, z)
        is_row = start[0] + pl.program_id(0) < z.shape[0]
        is_head = jnp.arange(heads) < num_head
        is_channel = jnp.arange(channels) < num_channel
        is_head_channel = is_head[:, None] & is_channel[None, :]
        dpair = plgpu.load(dpair.at[:, :], mask=is_head_channel, other=0.0)
        maximum = plgpu.load(maximum.at[:], mask=is_head, other=0.0)
        scale = plgpu.load(scale.at[:], mask=is_head, other=0.0)

        def add_block(b: jax.Array, dpair_weights: jax.Array) -> jax.Array:
            columns = pl.ds(b * block, block)
            mask = row_mask(b, heads, block, (num_head, num_key))
            z_block = load_pair(z, row, b, block, (num_key, num_channel))
            scores = plgpu.load(logits.at[:, columns], mask=mask, other=-jnp.inf)
            if logits_out is not None:
                bias = dot(config, pair_weights[:, :], z_block, trans_b=True)
                scores = scores + pair_scale * bias
                plgpu.store(logits_out.at[:, columns], scores, mask=mask)
            attention = jnp.exp(scores - maximum[:, None]) * scale[:, None]
            dattention = plgpu.load(dlogits.at[:, columns], mask=mask, other=0.0)
            dattention = dattention + dot(config, dpair, z_block, trans_b=True)
            dscores = attention * dattention
            plgpu.store(dlogits_out.at[:, columns], dscores, mask=mask)
            dz = dot(config, attention, dpair, trans_a=True)
            dz = dz + dot(config, pair_scale * dscores, pair_weights[:, :], trans_a=True)
            inside = is_row & (b * block + jnp.arange(block) < num_key)
            plgpu.store(
                dz_out.at[row, columns, :],
                dz.astype(z_block.dtype),
                mask=inside[:, None] & is_channel[None, :],
            )
            return dpair_weights + dot(config, dscores, z_block)

        zeros = jnp.zeros((heads, channels), jnp.float32)
        dpair_weights = jax.lax.fori_loop(0, pl.cdiv(num_key, block), add_block, zeros)
        plgpu.store(dpair_weights_out.at[:, :], dpair_weights, mask=is_head_channel)

    row_shape = jax.ShapeDtypeStruct(logits.shape, jnp.float32)
    parts = jax.ShapeDtypeStruct((num_query, num_head, num_channel), jnp.float32)
    arguments = [start, logits, dlogits, z, pair_weights, rows.dpair, *rows.softmax]
    in_specs = [
        specs.start, specs.row, specs.row, specs.pair, specs.weights, specs.head_channels,
        specs.heads, specs.heads,
    ]  # fmt: skip
    outputs = {"dlogits": (row_shape, specs.row), "dpair_weights": (parts, specs.head_channels)}
    outputs["dz"] = (jax.ShapeDtypeStruct(z.shape, z.dtype), specs.pair)
    aliases = {2: 0}
    if dinputs_2d is not None:
        aliases[len(arguments)] = 2
        arguments.append(dinputs_2d)
        in_specs.append(specs.pair)
    if not has_pair:
        aliases[1] = 3
        outputs["logits"] = (row_shape, specs.row)
    result = dict(
        zip(
            outputs,
            call(
                config,
                kernel,
                grid=(num_query,),
                in_specs=in_specs,
                out_shape=[shape for shape, _ in outputs.values()],
                out_specs=[spec for _, spec in outputs.values()],
                input_output_aliases=aliases,
            )(*arguments),
        )
    )
    return result.get("logits", logits), result["dlogits"], result["dz"], result["dpair_weights"]


def _queries_and_keys(
    static: Static, inputs: IPAInputs, sum_k: jax.Array, sum_q: jax.Array
) -> dict[str, jax.Array]:
    """Gradients of scalar and point queries and keys.

    With g = dlogits, d(q_point) = -w sum_k g_qk (Q_q - K_k) = w (sum_k g K_k - Q_q sum_k g), and
    likewise for keys: the two sums give all four gradients. The point weights' could come from
    them, too, but as a difference of sums over coordinates, which are larger than distances.

    Args:
      static: scales.
      inputs: of the core.
      sum_k: [Nq, H, C + P*3 + 1] sum over keys of g times keys, but for the total scale.
      sum_q: [Nk, H, C + P*3 + 1] sum over queries of g times queries, likewise.
    """
    sum_k, sum_q = static.scales.total * sum_k, static.scales.total * sum_q
    q_point, k_point = query_side(inputs).point, key_side(inputs).point
    at = [inputs.q_scalar.shape[-1], sum_k.shape[-1] - 1]
    dq_scalar, sum_k_point, sum_k_one = jnp.split(sum_k, at, axis=-1)
    dk_scalar, sum_q_point, sum_q_one = jnp.split(sum_q, at, axis=-1)

    to_q, to_k = sum_k_point - q_point * sum_k_one, sum_q_point - k_point * sum_q_one
    w = inputs.point_weights.astype(jnp.float32)[:, None]
    return {
        "q_scalar": static.scales.scalar * dq_scalar,
        "k_scalar": static.scales.scalar * dk_scalar,
        "q_point": (w * to_q).reshape(inputs.q_point.shape),
        "k_point": (w * to_k).reshape(inputs.k_point.shape),
    }
