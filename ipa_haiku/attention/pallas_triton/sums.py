"""Sums over keys and over queries, by kernels over tiles of one head; none touches `inputs_2d`."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.pallas_triton.common import (
    Softmax,
    attention_of,
    call,
    dot,
    dot_with_all_bits,
    float32,
    tile_mask,
)
from ipa_haiku.attention.pallas_triton.config import KernelConfig
from ipa_haiku.attention.pallas_triton.tiles import (
    all_tokens,
    heads_first,
    like,
    load_channels,
    own_rows,
    own_tile,
    square_distance,
    store_channels,
    tokens_first,
    tokens_last,
)


class _Sizes(NamedTuple):
    """What the kernels know when compiled; blocks that they get are padded."""

    num_query: int
    num_key: int
    depth: int  # of values
    tile: int

    def num_tile(self, num_token: int) -> int:
        """How many tiles hold all queries, or all keys."""
        return pl.cdiv(num_token, self.tile)

    def mask(self, i: Any, j: Any) -> jax.Array:
        """Which queries of tile i and keys of tile j there are."""
        return tile_mask(self.tile, self.tile, (self.num_query, self.num_key), i, j)


def _sizes(config: KernelConfig, weights: jax.Array, values: jax.Array) -> _Sizes:
    """Of weights [Nq, H, Nk] and values [N, H, D]."""
    return _Sizes(weights.shape[0], weights.shape[2], values.shape[-1], config.tile)


def _by_head(softmax: Softmax, tile: int) -> Softmax:
    """[Nq, H] -> [H, Nq padded]."""
    return jax.tree.map(lambda x: tokens_last(x, tile), softmax)


def sum_over_keys(
    config: KernelConfig, logits: jax.Array, values: jax.Array, softmax: Softmax
) -> jax.Array:
    """attention_qhk values_khd summed over k, as [Nq, H, D].

    Args:
      config: tunables.
      logits: [Nq, H, Nk].
      values: [Nk, H, D] float32.
      softmax: of the rows.
    """
    tile, sizes = config.tile, _sizes(config, logits, values)
    values, softmax = heads_first(values, tile), _by_head(softmax, tile)
    result = like(values, sizes.num_query, tile)
    sums = call(
        config,
        functools.partial(_sum_over_keys_kernel, config=config, sizes=sizes),
        (logits, values, softmax),
        name="ipa_sum_over_keys",
        grid=(sizes.num_tile(sizes.num_query), logits.shape[1]),
        in_specs=(own_rows(logits, tile), all_tokens(values), own_tile(softmax, tile)),
        out_specs=own_tile(result, tile),
        out_shape=result,
    )
    return tokens_first(sums, sizes.num_query, sizes.depth)


def _sum_over_keys_kernel(
    logits: Any, values: Any, softmax: Any, sums_out: Any, *, config: KernelConfig, sizes: _Sizes
) -> None:
    i = pl.program_id(0)

    def add_block(b: jax.Array, total: jax.Array) -> jax.Array:
        block = pl.ds(b * sizes.tile, sizes.tile)
        part = plgpu.load(logits.at[:, block], mask=sizes.mask(i, b), other=-jnp.inf)
        part = attention_of(part, Softmax(*(x[...] for x in softmax)))
        value = load_channels(values, block, sizes.depth)
        return total + dot_with_all_bits(config, part, value)

    zeros = jnp.zeros(sums_out.shape, jnp.float32)
    total = jax.lax.fori_loop(0, sizes.num_tile(sizes.num_key), add_block, zeros)
    store_channels(sums_out, total, sizes.depth)


def attention_gradient(
    config: KernelConfig, dvalue: jax.Array, values: jax.Array, logits: jax.Array, softmax: Softmax
) -> tuple[jax.Array, jax.Array]:
    """The gradient of attention weights that values make, and its mean by attention.

    The mean is what the softmax's gradient takes away. From outputs it would come with roundings of
    its own, which grow with coordinates; here what cancels is the same numbers.

    Args:
      config: tunables.
      dvalue: [Nq, H, D] float32, gradient of the sums over keys.
      values: [Nk, H, D] float32.
      logits: [Nq, H, Nk].
      softmax: of the rows.

    Returns:
      dattention_qhk = sum_d dvalue_qhd values_khd [Nq, H, Nk], and delta_qh = sum_k attention_qhk
      dattention_qhk [Nq, H].
    """
    tile, sizes, num_head = config.tile, _sizes(config, logits, values), logits.shape[1]
    dvalue, values = heads_first(dvalue, tile), heads_first(values, tile)
    softmax = _by_head(softmax, tile)
    delta_shape = float32(*dvalue.shape[:2])
    dattention, delta = call(
        config,
        functools.partial(_attention_gradient_kernel, config=config, sizes=sizes),
        (dvalue, values, logits, softmax),
        name="ipa_attention_gradient",
        grid=(sizes.num_tile(sizes.num_query), num_head),
        in_specs=(
            own_tile(dvalue, tile),
            all_tokens(values),
            own_rows(logits, tile),
            own_tile(softmax, tile),
        ),
        out_specs=(own_rows(logits, tile), own_tile(delta_shape, tile)),
        out_shape=(float32(*logits.shape), delta_shape),
    )
    return dattention, delta[:, : sizes.num_query].T


def _attention_gradient_kernel(
    dvalue: Any, values: Any, logits: Any, softmax: Any, dattention_out: Any, delta_out: Any,
    *, config: KernelConfig, sizes: _Sizes,
) -> None:  # fmt: skip
    i, statistics = pl.program_id(0), Softmax(*(x[...] for x in softmax))
    own = load_channels(dvalue, slice(None), sizes.depth)

    def add_block(b: jax.Array, delta: jax.Array) -> jax.Array:
        block, mask = pl.ds(b * sizes.tile, sizes.tile), sizes.mask(i, b)
        dattention = dot(config, own, load_channels(values, block, sizes.depth), trans_b=True)
        plgpu.store(dattention_out.at[:, block], dattention, mask=mask)
        part = plgpu.load(logits.at[:, block], mask=mask, other=-jnp.inf)
        return delta + jnp.sum(attention_of(part, statistics) * dattention, axis=1)

    zeros = jnp.zeros(sizes.tile, jnp.float32)
    delta_out[...] = jax.lax.fori_loop(0, sizes.num_tile(sizes.num_key), add_block, zeros)


def sum_over_keys_and_squares(
    config: KernelConfig, weights: jax.Array, values: jax.Array, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Two sums over keys in one reading of their weights.

    Args:
      config: tunables.
      weights: [Nq, H, Nk].
      values: [Nk, H, D] float32.
      query: [Nq, H, P*3] float32 coordinates.
      key: [Nk, H, P*3].

    Returns:
      weights_qhk values_khd as [Nq, H, D], and weights_qhk |Q_qh - K_kh|^2 as [Nq, H].
    """
    tile, sizes, num_head = config.tile, _sizes(config, weights, values), weights.shape[1]
    values = heads_first(values, tile)
    query, key = tokens_last(query, tile), tokens_last(key, tile)
    result = like(values, sizes.num_query, tile)
    squares_shape = float32(*result.shape[:2])
    sums, squares = call(
        config,
        functools.partial(_sum_over_keys_and_squares_kernel, config=config, sizes=sizes),
        (weights, values, query, key),
        name="ipa_sum_over_keys_and_squares",
        grid=(sizes.num_tile(sizes.num_query), num_head),
        in_specs=(
            own_rows(weights, tile),
            all_tokens(values),
            pl.BlockSpec((None, query.shape[1], tile), lambda i, h: (h, 0, i)),
            pl.BlockSpec((None, *key.shape[1:]), lambda i, h: (h, 0, 0)),
        ),
        out_specs=(own_tile(result, tile), own_tile(squares_shape, tile)),
        out_shape=(result, squares_shape),
    )
    sums = tokens_first(sums, sizes.num_query, sizes.depth)
    return sums, squares[:, : sizes.num_query].T


def _sum_over_keys_and_squares_kernel(
    weights: Any, values: Any, query: Any, key: Any, sums_out: Any, squares_out: Any,
    *, config: KernelConfig, sizes: _Sizes,
) -> None:  # fmt: skip
    i = pl.program_id(0)

    def add_block(b: jax.Array, totals: tuple[jax.Array, jax.Array]) -> tuple:
        block = pl.ds(b * sizes.tile, sizes.tile)
        part = plgpu.load(weights.at[:, block], mask=sizes.mask(i, b), other=0.0)
        sums = totals[0] + dot(config, part, load_channels(values, block, sizes.depth))
        # Where a weight is zero, points may be as far apart as squares overflow.
        squares = jnp.where(part == 0.0, 0.0, part * square_distance(query, key, block))
        return sums, totals[1] + jnp.sum(squares, axis=1)

    zeros = jnp.zeros(sums_out.shape, jnp.float32), jnp.zeros(sizes.tile, jnp.float32)
    sums, squares = jax.lax.fori_loop(0, sizes.num_tile(sizes.num_key), add_block, zeros)
    store_channels(sums_out, sums, sizes.depth)
    squares_out[...] = squares


def sum_over_queries(
    config: KernelConfig, weights: jax.Array, values: jax.Array, softmax: Softmax | None = None
) -> jax.Array:
    """weights_qhk values_qhd summed over q, as [Nk, H, D].

    Args:
      config: tunables.
      weights: [Nq, H, Nk], or logits if `softmax` is given.
      values: [Nq, H, D] float32.
      softmax: turns logits into attention weights.
    """
    tile, sizes, num_head = config.tile, _sizes(config, weights, values), weights.shape[1]
    values = heads_first(values, tile)
    softmax = None if softmax is None else _by_head(softmax, tile)
    result = like(values, sizes.num_key, tile)
    column = (values.shape[1], None, tile)
    sums = call(
        config,
        functools.partial(_sum_over_queries_kernel, config=config, sizes=sizes),
        (weights, values, softmax),
        name="ipa_sum_over_queries",
        grid=(sizes.num_tile(sizes.num_key), num_head),
        in_specs=(
            pl.BlockSpec(column, lambda i, h: (0, h, i)),
            all_tokens(values),
            all_tokens(softmax),
        ),
        out_specs=own_tile(result, tile),
        out_shape=result,
    )
    return tokens_first(sums, sizes.num_key, sizes.depth)


def _sum_over_queries_kernel(
    weights: Any, values: Any, softmax: Any, sums_out: Any, *, config: KernelConfig, sizes: _Sizes
) -> None:
    i, outside = pl.program_id(0), 0.0 if softmax is None else -jnp.inf

    def add_block(b: jax.Array, total: jax.Array) -> jax.Array:
        block = pl.ds(b * sizes.tile, sizes.tile)
        part = plgpu.load(weights.at[block, :], mask=sizes.mask(b, i), other=outside)
        if softmax is not None:
            part = attention_of(part, Softmax(*(x[block] for x in softmax)))
        value = load_channels(values, block, sizes.depth)
        return total + dot(config, part, value, trans_a=True)

    zeros = jnp.zeros(sums_out.shape, jnp.float32)
    total = jax.lax.fori_loop(0, sizes.num_tile(sizes.num_query), add_block, zeros)
    store_channels(sums_out, total, sizes.depth)
