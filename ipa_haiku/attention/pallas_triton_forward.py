"""The forward pass of the fused GPU kernels: all that needs `inputs_2d` in one reading of it."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention import pallas_triton_vjp
from ipa_haiku.attention.base import IPAInputs, IPAOutput, narrow
from ipa_haiku.attention.pallas_triton import Static
from ipa_haiku.attention.pallas_triton_base import (
    Side,
    Softmax,
    block_starts,
    call,
    dot,
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
from ipa_haiku.attention.pallas_triton_tiles import logits_without_pair, sum_over_keys


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
    logits = logits_without_pair(
        static, query, key_side(inputs), inputs.point_weights.astype(jnp.float32)
    )
    logits, pair, softmax = _pair_pass(static, inputs, start, logits)
    value = sum_over_keys(static.config, logits, values(inputs), softmax)
    scalar, point = jnp.split(value, [inputs.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(scalar, point.reshape(*point.shape[:2], -1, 3), pair), softmax, logits


def _pair_pass(
    static: Static, inputs: IPAInputs, start: jax.Array, logits: jax.Array
) -> tuple[jax.Array, jax.Array, Softmax]:
    """Adds the pair term to logits [Nq, H, Nk], in place; pair outputs and softmax statistics.

    The pair bias shifts all logits of a row alike: the softmax does not see it, and it is left out.
    """
    num_query, num_head, num_key = logits.shape
    config, z = static.config, inputs.inputs_2d
    pair_weights = transposed_pair_weights(inputs)  # [H padded, C_z padded]
    heads, channels = pair_weights.shape
    block = config.forward_block
    specs = row_specs(inputs, heads, channels, block)

    def kernel(
        start: Any, logits: Any, z: Any, pair_weights: Any,
        logits_out: Any, pair_out: Any, maximum_out: Any, scale_out: Any,
    ) -> None:  # fmt: skip
        row = row_index(start, z)

        def add_block(b: jax.Array, state: tuple) -> tuple:
            total, maximum, weight = state
            columns = pl.ds(b * block, block)
            mask = row_mask(b, heads, block, (num_head, num_key))
            z_block = load_pair(z, row, b, block, (num_key, z_channels))
            bias = dot(config, pair_weights[:, :], z_block, trans_b=True)
            scores = plgpu.load(logits.at[:, columns], mask=mask, other=0.0)
            scores = scores + static.scales.total * static.scales.pair * bias
            plgpu.store(logits_out.at[:, columns], scores, mask=mask)
            inside = (b * block + jnp.arange(block) < num_key)[None, :]
            scores = jnp.where(inside, scores, -jnp.inf)
            # The first block has a key, so that the maximum is finite from then on.
            higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
            shrink = jnp.exp(maximum - higher)
            part = jnp.exp(scores - higher[:, None])
            total = total * shrink[:, None] + dot(config, part, z_block)
            return total, higher, weight * shrink + jnp.sum(part, axis=1)

        state = (
            jnp.zeros((heads, channels), jnp.float32),
            jnp.full(heads, -jnp.inf, jnp.float32),
            jnp.zeros(heads, jnp.float32),
        )
        num_block = pl.cdiv(num_key, block)
        total, maximum, weight = jax.lax.fori_loop(0, num_block, add_block, state)
        scale = 1.0 / weight
        is_head = jnp.arange(heads) < num_head
        is_channel = jnp.arange(channels) < z_channels
        plgpu.store(
            pair_out.at[:, :], total * scale[:, None], mask=is_head[:, None] & is_channel[None, :]
        )
        plgpu.store(maximum_out.at[:], maximum, mask=is_head)
        plgpu.store(scale_out.at[:], scale, mask=is_head)

    z_channels = z.shape[-1]
    statistics = jax.ShapeDtypeStruct((num_query, num_head), jnp.float32)
    logits, pair, maximum, scale = call(
        config,
        kernel,
        grid=(num_query,),
        in_specs=[specs.start, specs.row, specs.pair, specs.weights],
        out_specs=[specs.row, specs.head_channels, specs.heads, specs.heads],
        out_shape=[
            jax.ShapeDtypeStruct(logits.shape, jnp.float32),
            jax.ShapeDtypeStruct((num_query, num_head, z_channels), jnp.float32),
            statistics,
            statistics,
        ],
        input_output_aliases={1: 0},
    )(start, logits, z, pair_weights)
    return logits, pair, Softmax(maximum, scale)
