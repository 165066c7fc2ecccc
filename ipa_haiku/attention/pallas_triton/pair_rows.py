"""The two kernels that read `inputs_2d`: a program takes one query row, a block of keys at a time.

The forward one completes the logits of all heads, keeps a running softmax and sums the pair output.
The backward one turns logits into attention weights, completes the gradient of the logits, and
writes the row of the gradient of `inputs_2d` and its part of the pair weights' gradient, so that
nothing is added up by atomics.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.pallas_triton.common import (
    Arrays,
    Softmax,
    Static,
    attention_of,
    call,
    dot,
    float32,
    is_inside,
    pad,
    padded_size,
    round_up,
    tile_mask,
)
from ipa_haiku.attention.pallas_triton.config import KernelConfig
from ipa_haiku.attention.types import LogitScales


class Attention(NamedTuple):
    """What the forward kernel makes of some query rows."""

    logits: jax.Array  # [Nq, H, Nk]
    softmax: Softmax
    pair: jax.Array  # [Nq, H, C_z] pair output


class _Sizes(NamedTuple):
    """What the kernels know when compiled; blocks that they get are padded."""

    num_head: int
    num_key: int
    num_channel: int
    block: int  # of keys

    @property
    def num_block(self) -> int:
        return pl.cdiv(self.num_key, self.block)

    def row_mask(self, heads: int, b: jax.Array) -> jax.Array:
        """Where block b of a row [heads, block] is inside of [H, Nk]."""
        return tile_mask(heads, self.block, (self.num_head, self.num_key), 0, b)


class _Specs(NamedTuple):
    """Blocks of a program; sizes are padded, stores masked."""

    start: pl.BlockSpec  # of [1], the first row of `inputs_2d` that counts
    row: pl.BlockSpec  # of [Nq, H, Nk]
    pair: pl.BlockSpec  # of [Nq, Nk, C_z], all of it: its rows are counted from `start`
    weights: pl.BlockSpec  # of [H padded, C_z padded]
    head_channels: pl.BlockSpec  # of [Nq, H, C_z]
    heads: pl.BlockSpec  # of [Nq, H]
    softmax: Any  # of both statistics


def _layout(x: Arrays, block: int) -> tuple[_Sizes, _Specs, jax.Array]:
    """Sizes, blocks, and pair weights as the kernels take them [H padded, C_z padded].

    They are bfloat16 if both they and `inputs_2d` are, else float32.
    """
    is_bfloat16 = x.inputs_2d.dtype == x.pair_weights.dtype == jnp.bfloat16
    weights = x.pair_weights.astype(jnp.bfloat16 if is_bfloat16 else jnp.float32).T
    sizes = _Sizes(weights.shape[0], x.inputs_2d.shape[1], weights.shape[1], block)
    heads, channels = (padded_size(size) for size in weights.shape)
    num_key = round_up(sizes.num_key, block)

    def whole(*shape: int) -> pl.BlockSpec:
        return pl.BlockSpec(shape, lambda _: (0,) * len(shape))

    of_heads: Any = pl.BlockSpec((None, heads), lambda i: (i, 0))
    of_softmax: Any = Softmax(of_heads, of_heads)
    specs = _Specs(
        start=whole(1),
        row=pl.BlockSpec((None, heads, num_key), lambda i: (i, 0, 0)),
        pair=whole(len(x.inputs_2d), num_key, channels),
        weights=whole(heads, channels),
        head_channels=pl.BlockSpec((None, heads, channels), lambda i: (i, 0, 0)),
        heads=of_heads,
        softmax=of_softmax,
    )
    return sizes, specs, pad(weights, (heads, channels))


def _load_pair(z: Any, row: jax.Array, b: jax.Array, sizes: _Sizes) -> jax.Array:
    """Block b of a row of `inputs_2d` [block, C_z padded], zero outside of it."""
    mask = tile_mask(sizes.block, z.shape[-1], (sizes.num_key, sizes.num_channel), b, 0)
    return plgpu.load(z.at[row, pl.ds(b * sizes.block, sizes.block), :], mask=mask, other=0.0)


def _row_index(start: Any, z: Any) -> jax.Array:
    """Row of `inputs_2d` of this program; rows filled in at the end work on the last one."""
    row = jnp.minimum(start[0] + pl.program_id(0), z.shape[0] - 1)
    return row.astype(int)  # as the other indices are, which the interpreter wants


# --- forward -------------------------------------------------------------------------------------


def add_pair_term(static: Static, x: Arrays, start: jax.Array, logits: jax.Array) -> Attention:
    """Completes logits of the rows from `start` [1] on, in place.

    The pair bias shifts all logits of a row alike: the softmax does not see it, and it is left out.

    Args:
      static: scales and tunables.
      x: of which `inputs_2d` has all rows.
      start: [1] first row.
      logits: [Nq, H, Nk] without the pair term.
    """
    sizes, specs, pair_weights = _layout(x, static.config.forward_block)
    num_query = len(logits)
    statistics: Any = float32(num_query, sizes.num_head)
    logits, pair, softmax = call(
        static.config,
        functools.partial(_forward_kernel, config=static.config, scales=static.scales, sizes=sizes),
        (start, logits, x.inputs_2d, pair_weights),
        name="ipa_pair_forward",
        grid=(num_query,),
        in_specs=(specs.start, specs.row, specs.pair, specs.weights),
        out_specs=(specs.row, specs.head_channels, specs.softmax),
        out_shape=(
            float32(*logits.shape),
            float32(num_query, sizes.num_head, sizes.num_channel),
            Softmax(statistics, statistics),
        ),
        input_output_aliases={1: 0},
    )
    return Attention(logits, softmax, pair)


def _forward_kernel(
    start: Any, logits: Any, z: Any, pair_weights: Any,
    logits_out: Any, pair_out: Any, softmax_out: Any,
    *, config: KernelConfig, scales: LogitScales, sizes: _Sizes,
) -> None:  # fmt: skip
    heads, channels = pair_weights.shape
    row = _row_index(start, z)

    def add_block(b: jax.Array, state: tuple) -> tuple:
        total, maximum, weight = state
        columns, mask = pl.ds(b * sizes.block, sizes.block), sizes.row_mask(heads, b)
        z_block = _load_pair(z, row, b, sizes)
        bias = dot(config, pair_weights[:, :], z_block, trans_b=True)
        scores = plgpu.load(logits.at[:, columns], mask=mask, other=0.0)
        scores = scores + scales.total * scales.pair * bias
        plgpu.store(logits_out.at[:, columns], scores, mask=mask)
        inside = is_inside(b, sizes.block, sizes.num_key)
        scores = jnp.where(inside[None, :], scores, -jnp.inf)
        higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
        shrink = jnp.exp(maximum - higher)
        part = jnp.exp(scores - higher[:, None])
        total = total * shrink[:, None] + dot(config, part, z_block)
        return total, higher, weight * shrink + jnp.sum(part, axis=1)

    state = (
        jnp.zeros((heads, channels), jnp.float32),
        # Finite: all keys of the first block may be as far away as squares overflow.
        jnp.full(heads, float(jnp.finfo(jnp.float32).min), jnp.float32),
        jnp.zeros(heads, jnp.float32),
    )
    total, maximum, weight = jax.lax.fori_loop(0, sizes.num_block, add_block, state)
    scale = 1.0 / weight
    is_head = is_inside(0, heads, sizes.num_head)
    is_channel = is_inside(0, channels, sizes.num_channel)
    of_channels = is_head[:, None] & is_channel[None, :]
    plgpu.store(pair_out.at[:, :], total * scale[:, None], mask=of_channels)
    plgpu.store(softmax_out.maximum.at[:], maximum, mask=is_head)
    plgpu.store(softmax_out.scale.at[:], scale, mask=is_head)


# --- backward ------------------------------------------------------------------------------------


class PairGradients(NamedTuple):
    """What the backward kernel makes of some query rows."""

    dlogits: jax.Array  # [Nq, H, Nk]
    inputs_2d: jax.Array  # [Nq, Nk, C_z]
    pair_weights: jax.Array  # [Nq, H, C_z] parts, to be summed over rows


def pair_gradients(
    static: Static,
    x: Arrays,
    start: jax.Array,
    attention: Attention,
    dattention: jax.Array,
    delta: jax.Array,
    dpair: jax.Array,
    dinputs_2d: jax.Array | None,
) -> PairGradients:
    """Completes the gradient of logits, of the rows from `start` [1] on.

    dlogits = total * attention * ((dattention - delta) + (dpair z - delta_pair)): where a query
    attends to one key alone, each of the two differences is one of equal numbers. delta_pair comes
    from outputs, as `inputs_2d` is read once; it has a rounding of its own, which is removed in the
    end: sums over keys are zero, and what they are not is taken away from each in proportion to
    its attention.

    Args:
      static: scales and tunables.
      x: of which `inputs_2d` has all rows.
      start: [1] first row.
      attention: of these rows.
      dattention: [Nq, H, Nk] gradient of attention weights but for the pair output's part; dlogits
        are written in its place.
      delta: [Nq, H] sum over keys of attention times `dattention`.
      dpair: [Nq, H, C_z] gradient of pair outputs, dtype of `inputs_2d`.
      dinputs_2d: gradient of `inputs_2d` to write these rows of, in place; None for a new array.
    """
    sizes, specs, pair_weights = _layout(x, static.config.backward_block)
    num_query, z = len(dattention), x.inputs_2d
    # The first arguments give their place to the first results.
    results = call(
        static.config,
        functools.partial(
            _backward_kernel, config=static.config, scales=static.scales, sizes=sizes
        ),
        (dattention, dinputs_2d, start, *attention, delta, dpair, z, pair_weights),
        name="ipa_pair_backward",
        grid=(num_query,),
        in_specs=(
            specs.row, None if dinputs_2d is None else specs.pair, specs.start,
            specs.row, specs.softmax, specs.head_channels,
            specs.heads, specs.head_channels, specs.pair, specs.weights,
        ),
        out_specs=(specs.row, specs.pair, specs.head_channels),
        out_shape=(
            float32(*dattention.shape),
            jax.ShapeDtypeStruct(z.shape, z.dtype),
            float32(num_query, sizes.num_head, sizes.num_channel),
        ),
        input_output_aliases={0: 0} if dinputs_2d is None else {0: 0, 1: 1},
    )  # fmt: skip
    return PairGradients(*results)


def _backward_kernel(
    dattention: Any, dinputs_2d: Any, start: Any, logits: Any, softmax: Any, pair: Any,
    delta: Any, dpair: Any, z: Any, pair_weights: Any,
    dlogits_out: Any, dz_out: Any, dpair_weights_out: Any,
    *, config: KernelConfig, scales: LogitScales, sizes: _Sizes,
) -> None:  # fmt: skip
    del dinputs_2d  # is where `dz_out` is
    heads, channels = pair_weights.shape
    row = _row_index(start, z)
    is_row = start[0] + pl.program_id(0) < z.shape[0]
    is_head = is_inside(0, heads, sizes.num_head)
    is_channel = is_inside(0, channels, sizes.num_channel)
    of_channels = is_head[:, None] & is_channel[None, :]

    def per_head(ref: Any) -> jax.Array:
        return plgpu.load(ref.at[:], mask=is_head, other=0.0)

    def per_head_channel(ref: Any) -> jax.Array:
        return plgpu.load(ref.at[:, :], mask=of_channels, other=0.0)

    def attention(columns: Any, mask: jax.Array) -> jax.Array:
        return attention_of(
            plgpu.load(logits.at[:, columns], mask=mask, other=-jnp.inf), statistics
        )

    statistics = Softmax(*(per_head(ref) for ref in softmax))
    delta, dpair = per_head(delta), per_head_channel(dpair)
    # The same products as those that it is subtracted from.
    by_head = dot(config, dpair, per_head_channel(pair), trans_b=True)
    head = jnp.arange(heads, dtype=jnp.int32)
    delta_pair = jnp.sum(jnp.where(head[:, None] == head[None, :], by_head, 0.0), axis=1)

    def add_block(b: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple:
        columns, mask = pl.ds(b * sizes.block, sizes.block), sizes.row_mask(heads, b)
        z_block, weights = _load_pair(z, row, b, sizes), attention(columns, mask)
        from_values = plgpu.load(dattention.at[:, columns], mask=mask, other=0.0) - delta[:, None]
        from_pair = dot(config, dpair, z_block, trans_b=True) - delta_pair[:, None]
        dlogits = scales.total * weights * (from_values + from_pair)
        plgpu.store(dlogits_out.at[:, columns], dlogits, mask=mask)
        dz = dot(config, weights, dpair, trans_a=True)
        dz = dz + dot(config, scales.pair * dlogits, pair_weights[:, :], trans_a=True)
        inside = is_row & is_inside(b, sizes.block, sizes.num_key)
        plgpu.store(
            dz_out.at[row, columns, :],
            dz.astype(z_block.dtype),
            mask=inside[:, None] & is_channel[None, :],
        )
        return state[0] + dot(config, dlogits, z_block), state[1] + dlogits

    def remove_mean(b: jax.Array, _: None) -> None:
        columns, mask = pl.ds(b * sizes.block, sizes.block), sizes.row_mask(heads, b)
        dlogits = plgpu.load(dlogits_out.at[:, columns], mask=mask, other=0.0)
        dlogits = dlogits - attention(columns, mask) * mean[:, None]
        plgpu.store(dlogits_out.at[:, columns], dlogits, mask=mask)

    zeros = jnp.zeros((heads, channels), jnp.float32), jnp.zeros((heads, sizes.block), jnp.float32)
    dpair_weights, sums = jax.lax.fori_loop(0, sizes.num_block, add_block, zeros)
    mean = jnp.sum(sums, axis=1)
    if not config.interpret:
        plgpu.debug_barrier()  # threads may load what others have stored
    jax.lax.fori_loop(0, sizes.num_block, remove_mean, None)
    dpair_weights = dpair_weights - mean[:, None] * per_head_channel(pair)
    plgpu.store(dpair_weights_out.at[:, :], scales.pair * dpair_weights, mask=of_channels)
