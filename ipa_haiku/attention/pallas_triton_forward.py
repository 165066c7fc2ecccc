"""The forward pass of the fused GPU kernels: all that needs `inputs_2d` in one reading of it."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention import pallas_triton_vjp
from ipa_haiku.attention.base import IPAInputs, IPAOutput, LogitScales, narrow
from ipa_haiku.attention.pallas_triton import Static
from ipa_haiku.attention.pallas_triton_base import (
    Side,
    Softmax,
    block_starts,
    call,
    combine,
    dot,
    join_rows,
    key_side,
    load_pair,
    once_differentiable,
    query_side,
    round_up,
    row_mask,
    split_rows,
    transposed_pair_weights,
    values,
    whole,
)
from ipa_haiku.attention.pallas_triton_tiles import sum_over_keys


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_one(static: Static, inputs: IPAInputs) -> IPAOutput:
    """Attention of one protein, differentiable once."""
    return _attend_fwd(static, inputs)[0]


def _attend_fwd(static: Static, inputs: IPAInputs) -> tuple[IPAOutput, tuple]:
    out, residuals = once_differentiable(functools.partial(_outputs_and_residuals, static))(inputs)
    return narrow(out, inputs), (inputs, out, *residuals)


attend_one.defvjp(_attend_fwd, pallas_triton_vjp.backward)


def _outputs_and_residuals(
    static: Static, inputs: IPAInputs
) -> tuple[IPAOutput, tuple[Softmax, jax.Array | None]]:
    """Outputs in float32 (the gradient takes a difference with them), statistics, and logits.

    The logits [Nq, H, Nk] are not kept when rows are processed in blocks.
    """
    if static.query_block < inputs.num_query:
        rows = (block_starts(static, inputs), split_rows(static, query_side(inputs)))
        out, softmax = jax.lax.map(lambda rows: _forward(static, inputs, *rows)[:2], rows)
        out, softmax = join_rows((out, softmax), inputs.num_query)
        return out, (softmax, None)
    start = jnp.zeros(1, jnp.int32)
    out, softmax, logits = _forward(static, inputs, start, query_side(inputs))
    return out, (softmax, logits)


def _forward(
    static: Static, inputs: IPAInputs, start: jax.Array, query: Side
) -> tuple[IPAOutput, Softmax, jax.Array]:
    """Outputs, softmax statistics and logits [Nq, H, Nk] of the rows from `start` [1] on."""
    logits, pair, softmax = _pair_pass(static, inputs, start, query)
    value = sum_over_keys(static.config, logits, values(inputs), softmax)
    scalar, point = jnp.split(value, [inputs.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(scalar, point.reshape(*point.shape[:2], -1, 3), pair), softmax, logits


class _Running(NamedTuple):
    """State of the softmax of one query row, over the keys seen so far."""

    total: jax.Array  # [H, C_z] of exp(logits - maximum) times inputs_2d
    maximum: jax.Array  # [H]
    weight: jax.Array  # [H] of exp(logits - maximum)


def _pair_pass(
    static: Static, inputs: IPAInputs, start: jax.Array, query: Side
) -> tuple[jax.Array, jax.Array, Softmax]:
    """The pass over `inputs_2d`: logits [Nq, H, Nk], pair outputs and softmax statistics.

    The pair bias shifts all logits of a row alike: the softmax does not see it, and it is left out.
    """
    config, scales, z = static.config, static.scales, inputs.inputs_2d
    num_query, num_head, _ = query.scalar.shape
    num_key, z_channels = z.shape[1:]
    logits_shape = (num_query, num_head, num_key)
    pair_weights = transposed_pair_weights(inputs)
    heads, channels = pair_weights.shape  # padded
    block = config.forward_block
    key = key_side(inputs)
    key = key._replace(scalar=jnp.moveaxis(key.scalar, 0, -1), point=jnp.moveaxis(key.point, 0, -1))

    def kernel(
        start: Any, z: Any, pair_weights: Any, query: Any, key: Any, point_weights: Any,
        logits_out: Any, pair_out: Any, maximum_out: Any, scale_out: Any,
    ) -> None:  # fmt: skip
        is_head = jnp.arange(heads) < num_head
        is_channel = jnp.arange(channels) < z_channels
        # The last program's rows past the end are its last one again.
        first = config.rows * pl.program_id(0)
        rows = [jnp.minimum(first + i, num_query - 1) for i in range(config.rows)]
        point_weights = plgpu.load(point_weights.at[:], mask=is_head, other=0.0)

        def add_block(b: jax.Array, states: tuple[_Running, ...]) -> tuple[_Running, ...]:
            columns = pl.ds(b * block, block)
            mask = row_mask(b, heads, block, (num_head, num_key))
            inside = b * block + jnp.arange(block) < num_key
            blocks = _logits_of_rows(
                scales, query, key, rows, columns, is_head, inside, point_weights
            )
            after = []
            for row, scores, state in zip(rows, blocks, states):
                z_row = jnp.minimum(start[0] + row, z.shape[0] - 1)
                z_block = load_pair(z, z_row, b, block, (num_key, z_channels))
                bias = dot(config, pair_weights[:, :], z_block, trans_b=True)
                scores = scores + scales.total * scales.pair * bias
                plgpu.store(logits_out.at[row, :, columns], scores, mask=mask)
                scores = jnp.where(inside[None, :], scores, -jnp.inf)
                # The first block has a key, so that the maximum is finite from then on.
                maximum = jnp.maximum(state.maximum, jnp.max(scores, axis=1))
                shrink = jnp.exp(state.maximum - maximum)
                part = jnp.exp(scores - maximum[:, None])
                total = state.total * shrink[:, None] + dot(config, part, z_block)
                weight = state.weight * shrink + jnp.sum(part, axis=1)
                after.append(_Running(total, maximum, weight))
            return tuple(after)

        empty = _Running(
            jnp.zeros((heads, channels), jnp.float32),
            jnp.full(heads, -jnp.inf, jnp.float32),
            jnp.zeros(heads, jnp.float32),
        )
        states = jax.lax.fori_loop(0, pl.cdiv(num_key, block), add_block, (empty,) * config.rows)
        for row, state in zip(rows, states):
            scale = 1.0 / state.weight
            pair = state.total * scale[:, None]
            plgpu.store(pair_out.at[row, :, :], pair, mask=is_head[:, None] & is_channel[None, :])
            plgpu.store(maximum_out.at[row, :], state.maximum, mask=is_head)
            plgpu.store(scale_out.at[row, :], scale, mask=is_head)

    keys = round_up(num_key, block)
    shapes = [logits_shape, (num_query, num_head, z_channels), *[(num_query, num_head)] * 2]
    logits, pair, maximum, scale = call(
        config,
        kernel,
        num_warps=config.forward_warps,
        grid=(pl.cdiv(num_query, config.rows),),
        in_specs=[
            whole(1),
            whole(z.shape[0], keys, channels),
            whole(heads, channels),
            _side_specs(query, lambda x: (num_query, *(heads, x.shape[-1])[: x.ndim - 1])),
            _side_specs(key, lambda x: (*(heads, *x.shape[1:-1])[: x.ndim - 1], keys)),
            whole(heads),
        ],
        out_specs=[
            whole(num_query, heads, keys),
            whole(num_query, heads, channels),
            whole(num_query, heads),
            whole(num_query, heads),
        ],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    )(start, z, pair_weights, query, key, inputs.point_weights.astype(jnp.float32))
    return logits, pair, Softmax(maximum, scale)


def _side_specs(side: Side, sizes: Callable[[jax.Array], tuple[int, ...]]) -> Side:
    return jax.tree.map(lambda x: whole(*sizes(x)), side)


def _logits_of_rows(
    scales: LogitScales,
    query: Any,
    key: Any,
    rows: list[jax.Array],
    columns: Any,
    is_head: jax.Array,
    is_key: jax.Array,
    point_weights: jax.Array,
) -> list[jax.Array]:
    """Logits [H, block] but for the pair term, of each of `rows`; every key is read once for all.

    Args:
      scales: static factors of the terms.
      query: references to the `Side` of queries, arrays [Nq, H, C] and so on.
      key: the same of keys, but [H, C, Nk].
      rows: indices of queries.
      columns: slice of keys.
      is_head: [H] where heads are heads, no padding.
      is_key: [block] the same of keys.
      point_weights: [H].
    """
    mask = is_head[:, None] & is_key[None, :]

    def sums(queries: Any, keys: Any, term: Callable[..., jax.Array]) -> list[jax.Array]:
        totals = [jnp.zeros(mask.shape, jnp.float32) for _ in rows]
        # Not a loop, which would keep Triton from loading ahead in the loop around it.
        for c in map(jnp.int32, range(keys.shape[1])):  # masked loads take no plain integers
            k = plgpu.load(keys.at[:, c, columns], mask=mask, other=0.0)
            for i, row in enumerate(rows):
                q = plgpu.load(queries.at[row, :, c], mask=is_head, other=0.0)
                totals[i] = totals[i] + term(q[:, None], k)
        return totals

    products = sums(query.scalar, key.scalar, lambda q, k: q * k)
    squares = sums(query.point, key.point, lambda q, k: jnp.square(q - k))
    k_mask = plgpu.load(key.mask.at[columns], mask=is_key, other=0.0)
    logits = []
    for row, product, square in zip(rows, products, squares):
        differ = None
        if key.segment is not None:
            differ = query.segment[row] != plgpu.load(key.segment.at[columns], mask=is_key, other=0)
            differ = differ[None, :]
        both = query.mask[row] * k_mask[None, :]
        logits.append(combine(scales, product, square, point_weights[:, None], both, differ))
    return logits
