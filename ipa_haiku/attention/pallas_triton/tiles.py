"""Tiles of queries and keys of one head: how arrays are laid out for them, and the logits.

Arrays [Nq, H, Nk] stay as they are. What else kernels over tiles take and give has heads first, and
is padded to whole tiles of tokens: [H, N, D], statistics [H, N], coordinates [H, P*3, N].
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.logits import Side, mask_penalty
from ipa_haiku.attention.pallas_triton.common import (
    Static,
    call,
    float32,
    is_inside,
    pad,
    padded_size,
    round_up,
    tile_mask,
)
from ipa_haiku.attention.types import LogitScales

# --- logits --------------------------------------------------------------------------------------


def logits_without_pair(
    static: Static, query: Side, key: Side, point_weights: jax.Array
) -> jax.Array:
    """Logits [Nq, H, Nk] but for the pair term (Suppl. Alg. 22, line 7).

    Sums of products and of squared differences of float32, nothing expanded.
    """
    tile = static.config.tile
    (num_query, num_head, _), num_key = query.scalar.shape, key.scalar.shape[0]
    query, key = (jax.tree.map(lambda x: tokens_last(x, tile), side) for side in (query, key))
    return call(
        static.config,
        functools.partial(_logits_kernel, scales=static.scales, shape=(num_query, num_key)),
        (query, key, point_weights),
        name="ipa_logits",
        grid=(pl.cdiv(num_query, tile), pl.cdiv(num_key, tile), num_head),
        in_specs=(
            _side_specs(query, tile, grid_axis=0),
            _side_specs(key, tile, grid_axis=1),
            pl.BlockSpec((1,), lambda i, j, h: (h,)),
        ),
        out_specs=pl.BlockSpec((tile, None, tile), lambda i, j, h: (i, h, j)),
        out_shape=float32(num_query, num_head, num_key),
    )


def _side_specs(side: Side, tile: int, grid_axis: int) -> Side:
    """Blocks of one tile of tokens of the arrays [H, channels, N] and [N] of one side."""

    def matrix(x: jax.Array) -> Any:
        return pl.BlockSpec((None, x.shape[1], tile), lambda *ids: (ids[2], 0, ids[grid_axis]))

    vector: Any = pl.BlockSpec((tile,), lambda *ids: (ids[grid_axis],))
    segment = None if side.segment is None else vector
    return Side(matrix(side.scalar), matrix(side.point), vector, segment)


def _logits_kernel(
    query: Any, key: Any, point_weights: Any, out: Any,
    *, scales: LogitScales, shape: tuple[int, int],
) -> None:  # fmt: skip
    tile = out.shape[0]

    def add_product(c: jax.Array, total: jax.Array) -> jax.Array:
        return total + query.scalar[c, :][:, None] * key.scalar[c, :][None, :]

    zeros = jnp.zeros((tile, tile), jnp.float32)
    product = jax.lax.fori_loop(0, query.scalar.shape[0], add_product, zeros)
    squares = square_distance(query.point, key.point, slice(None))
    logits = scales.scalar * product - 0.5 * point_weights[0] * squares
    logits = scales.total * (logits - mask_penalty(query.mask[...], key.mask[...]))
    if query.segment is not None:
        differ = query.segment[...][:, None] != key.segment[...][None, :]
        # The pair term, which is added later, is too small to change this.
        logits = jnp.where(differ, float(jnp.finfo(jnp.float32).min), logits)
    mask = tile_mask(tile, tile, shape, pl.program_id(0), pl.program_id(1))
    plgpu.store(out.at[:, :], logits, mask=mask)


def square_distance(query: Any, key: Any, block: Any) -> jax.Array:
    """Squared differences of coordinates, summed over them [tile, tile].

    Args:
      query: reference to [P*3, tile].
      key: reference to [P*3, Nk].
      block: slice of its keys.
    """
    # Not a loop, which would keep Triton from loading ahead in the loop around it.
    zeros = jnp.zeros((), jnp.float32)
    differences = (query[c, :][:, None] - key[c, block][None, :] for c in range(query.shape[0]))
    return sum((jnp.square(x) for x in differences), start=zeros)


# --- layouts, and blocks of a program (i, h): tile i of head h -----------------------------------


def heads_first(x: jax.Array, tile: int) -> jax.Array:
    """[N, H, D] -> [H, N padded, D padded so that every row starts at a multiple of 32 bytes]."""
    x = jnp.swapaxes(x, 0, 1)
    num_head, num_token, depth = x.shape
    return pad(x, (num_head, round_up(num_token, tile), _padded_depth(depth)))


def tokens_first(x: jax.Array, num_token: int, depth: int) -> jax.Array:
    """The inverse of `heads_first`."""
    return jnp.swapaxes(x, 0, 1)[:num_token, :, :depth]


def tokens_last(x: jax.Array, tile: int) -> jax.Array:
    """[N, ...] -> [..., N padded]."""
    x = jnp.moveaxis(x, 0, -1)
    return pad(x, (*x.shape[:-1], round_up(x.shape[-1], tile)))


def like(values: jax.Array, num_token: int, tile: int) -> jax.ShapeDtypeStruct:
    """Shape of sums of `values` in the layout of `heads_first`, for other tokens."""
    return float32(values.shape[0], round_up(num_token, tile), values.shape[2])


def _padded_depth(depth: int) -> int:
    return round_up(depth, 8)


def own_tile(tree: Any, tile: int) -> Any:
    """The tile's tokens of arrays [H, N] or [H, N, D]; D padded to a power of two."""

    def spec(x: Any) -> pl.BlockSpec:
        depth = [padded_size(d) for d in x.shape[2:]]
        return pl.BlockSpec((None, tile, *depth), lambda i, h: (h, i, *[0] * len(depth)))

    return jax.tree.map(spec, tree)


def all_tokens(tree: Any) -> Any:
    """All tokens of arrays [H, N] or [H, N, D]; D padded to a power of two."""

    def spec(x: Any) -> pl.BlockSpec:
        depth = [padded_size(d) for d in x.shape[2:]]
        return pl.BlockSpec((None, x.shape[1], *depth), lambda i, h: (h, *[0] * (x.ndim - 1)))

    return jax.tree.map(spec, tree)


def own_rows(weights: Any, tile: int) -> pl.BlockSpec:
    """The tile's rows of [Nq, H, Nk]."""
    num_key = round_up(weights.shape[2], tile)
    return pl.BlockSpec((tile, None, num_key), lambda i, h: (i, h, 0))


def load_channels(x: Any, tokens: Any, depth: int) -> jax.Array:
    """Tokens of an array of `heads_first` [tokens, D padded to what a block holds]."""
    # With the zeros that it is padded with: Triton then moves 16 bytes at a time, not 4.
    mask = is_inside(0, x.shape[-1], _padded_depth(depth))[None, :]
    return plgpu.load(x.at[tokens, :], mask=mask, other=0.0)


def store_channels(out: Any, x: jax.Array, depth: int) -> None:
    """Stores what `load_channels` loads."""
    mask = is_inside(0, out.shape[-1], _padded_depth(depth))[None, :]
    plgpu.store(out.at[:, :], x, mask=mask)
