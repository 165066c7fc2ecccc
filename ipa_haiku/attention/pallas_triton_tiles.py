"""Kernels over [Nq, H, Nk]: tiles of queries and keys of one head; none touches `inputs_2d`."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.base import LogitScales
from ipa_haiku.attention.pallas_triton import Config
from ipa_haiku.attention.pallas_triton_base import (
    Side,
    Softmax,
    Static,
    call,
    combine,
    dot,
    pad,
    padded_size,
    round_up,
    tile_mask,
)


def logits_without_pair(
    static: Static, query: Side, key: Side, point_weights: jax.Array
) -> jax.Array:
    """Logits [Nq, H, Nk] but for the pair term (Suppl. Alg. 22, line 7).

    Sums of products and of squared differences of float32, nothing expanded.
    """
    config = static.config
    num_query, num_head, _ = query.scalar.shape
    num_key = key.scalar.shape[0]

    def side_specs(side: Side, axis: int) -> Side:
        def matrix(x: jax.Array) -> Any:
            shape = (None, x.shape[1], config.tile)
            return pl.BlockSpec(shape, lambda *ids: (ids[2], 0, ids[axis]))

        vector: Any = pl.BlockSpec((config.tile,), lambda *ids: (ids[axis],))
        segment = None if side.segment is None else vector
        return Side(matrix(side.scalar), matrix(side.point), vector, segment)

    query, key = jax.tree.map(functools.partial(_tokens_last, config), (query, key))
    return call(
        config,
        functools.partial(_logits_kernel, scales=static.scales, shape=(num_query, num_key)),
        grid=(pl.cdiv(num_query, config.tile), pl.cdiv(num_key, config.tile), num_head),
        in_specs=[
            side_specs(query, 0), side_specs(key, 1), pl.BlockSpec((1,), lambda i, j, h: (h,)),
        ],
        out_specs=pl.BlockSpec((config.tile, None, config.tile), lambda i, j, h: (i, h, j)),
        out_shape=jax.ShapeDtypeStruct((num_query, num_head, num_key), jnp.float32),
    )(query, key, point_weights)  # fmt: skip


def _logits_kernel(
    query: Any, key: Any, point_weights: Any, out: Any,
    *, scales: LogitScales, shape: tuple[int, int],
) -> None:  # fmt: skip
    tile = out.shape[0]

    def add_product(c: jax.Array, total: jax.Array) -> jax.Array:
        return total + query.scalar[c, :][:, None] * key.scalar[c, :][None, :]

    zeros = jnp.zeros((tile, tile), jnp.float32)
    product = jax.lax.fori_loop(0, query.scalar.shape[0], add_product, zeros)
    mask = query.mask[...][:, None] * key.mask[...][None, :]
    differ = None
    if query.segment is not None:
        differ = query.segment[...][:, None] != key.segment[...][None, :]
    square_distance = _square_distance(query.point, key.point, slice(None))
    logits = combine(scales, product, square_distance, point_weights[0], mask, differ)
    plgpu.store(out.at[:, :], logits, mask=tile_mask(tile, tile, shape, *_program_ids()))


def _square_distance(query: Any, key: Any, block: Any) -> jax.Array:
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


def _program_ids() -> tuple[jax.Array, jax.Array]:
    return pl.program_id(0), pl.program_id(1)


def products(config: Config, query: jax.Array, key: jax.Array, minus: jax.Array) -> jax.Array:
    """query_qhd key_khd summed over d, minus minus_qh, as [Nq, H, Nk] float32.

    Args:
      config: tunables.
      query: [Nq, H, D] float32.
      key: [Nk, H, D] float32.
      minus: [Nq, H] float32.
    """
    (num_query, num_head, depth), num_key = query.shape, key.shape[0]
    query, key = (_heads_first(config, x) for x in (query, key))
    minus = pad(minus.T, (num_head, query.shape[1]))
    block_depth = padded_size(depth)

    def kernel(query: Any, key: Any, minus: Any, out: Any) -> None:
        query, key = (_load_channels(x, slice(None), depth) for x in (query, key))
        result = dot(config, query, key, trans_b=True) - minus[...][:, None]
        mask = tile_mask(config.tile, config.tile, (num_query, num_key), *_program_ids())
        plgpu.store(out.at[:, :], result, mask=mask)

    return call(
        config,
        kernel,
        grid=(pl.cdiv(num_query, config.tile), pl.cdiv(num_key, config.tile), num_head),
        in_specs=[
            pl.BlockSpec((None, config.tile, block_depth), lambda i, j, h: (h, i, 0)),
            pl.BlockSpec((None, config.tile, block_depth), lambda i, j, h: (h, j, 0)),
            pl.BlockSpec((None, config.tile), lambda i, j, h: (h, i)),
        ],
        out_specs=pl.BlockSpec((config.tile, None, config.tile), lambda i, j, h: (i, h, j)),
        out_shape=jax.ShapeDtypeStruct((num_query, num_head, num_key), jnp.float32),
    )(query, key, minus)


def sum_over_keys(
    config: Config, weights: jax.Array, values: jax.Array, softmax: Softmax | None = None
) -> jax.Array:
    """weights_qhk values_khd summed over k, as [Nq, H, D].

    Args:
      config: tunables.
      weights: [Nq, H, Nk], or logits if `softmax` is given.
      values: [Nk, H, D] float32.
      softmax: turns logits into attention weights.
    """
    return _weighted_sum(config, weights, values, softmax, over_keys=True)[0]


def sum_over_queries(
    config: Config, weights: jax.Array, values: jax.Array, softmax: Softmax | None = None
) -> jax.Array:
    """weights_qhk values_qhd summed over q, as [Nk, H, D]; see `sum_over_keys`."""
    return _weighted_sum(config, weights, values, softmax, over_keys=False)[0]


def sum_over_keys_and_squares(
    config: Config, weights: jax.Array, values: jax.Array, query: jax.Array, key: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """`sum_over_keys`, and weights_qhk |Q_qh - K_kh|^2 summed over k as [Nq, H], in one reading.

    Args:
      config: tunables.
      weights: [Nq, H, Nk].
      values: [Nk, H, D] float32.
      query: [Nq, H, P*3] float32 coordinates.
      key: [Nk, H, P*3].
    """
    points = tuple(_tokens_last(config, x) for x in (query, key))
    total, squares = _weighted_sum(config, weights, values, None, over_keys=True, points=points)
    return total, squares[:, : len(query)].T


def _weighted_sum(
    config: Config,
    weights: jax.Array,
    values: jax.Array,
    softmax: Softmax | None,
    over_keys: bool,
    points: tuple[jax.Array, ...] = (),
) -> list[jax.Array]:
    """The sum, and with `points` of queries and keys that of squares [H, Nq padded]."""
    num_query, num_head, num_key = weights.shape
    num_out = num_query if over_keys else num_key
    tile, depth = config.tile, values.shape[-1]
    block_depth = padded_size(depth)
    values = _heads_first(config, values)
    rows = round_up(num_query, tile)
    statistics = tuple(pad(x.T, (num_head, rows)) for x in softmax or ())  # [H, Nq padded]
    num_block = pl.cdiv(num_key if over_keys else num_query, tile)

    def kernel(weights: Any, values: Any, statistics: Any, points: Any, *out: Any) -> None:
        i = pl.program_id(0)

        def add_block(b: jax.Array, totals: list[jax.Array]) -> list[jax.Array]:
            block = pl.ds(b * tile, tile)
            own = (i, b) if over_keys else (b, i)
            part = plgpu.load(
                weights.at[:, block] if over_keys else weights.at[block, :],
                mask=tile_mask(tile, tile, (num_query, num_key), *own),
                other=-jnp.inf if statistics else 0.0,
            )
            if statistics:
                maximum, scale = (x[...] if over_keys else x[block] for x in statistics)
                part = jnp.exp(part - maximum[:, None]) * scale[:, None]
            value = _load_channels(values, block, depth)
            terms = [dot(config, part, value, trans_a=not over_keys)]
            if points:
                # Where a weight is zero, points may be as far apart as squares overflow.
                squares = part * _square_distance(points[0], points[1], block)
                terms.append(jnp.sum(jnp.where(part == 0.0, 0.0, squares), axis=1))
            return [total + term for total, term in zip(totals, terms)]

        zeros = [jnp.zeros(x.shape, jnp.float32) for x in out]
        total, *squares = jax.lax.fori_loop(0, num_block, add_block, zeros)
        is_channel = jnp.arange(block_depth) < _padded_depth(depth)
        plgpu.store(out[0].at[:, :], total, mask=is_channel[None, :])
        for ref, square in zip(out[1:], squares):
            ref[...] = square

    of_tile = pl.BlockSpec((None, tile), lambda i, h: (h, i))
    of_head = pl.BlockSpec((None, rows), lambda i, h: (h, 0))
    weights_spec = (
        pl.BlockSpec((tile, None, round_up(num_key, tile)), lambda i, h: (i, h, 0))
        if over_keys
        else pl.BlockSpec((rows, None, tile), lambda i, h: (0, h, i))
    )
    size = round_up(num_out, tile)
    shapes = [(num_head, size, _padded_depth(depth)), (num_head, size)][: 2 if points else 1]
    out = call(
        config,
        kernel,
        grid=(size // tile, num_head),
        in_specs=[
            weights_spec,
            pl.BlockSpec((None, values.shape[1], block_depth), lambda i, h: (h, 0, 0)),
            tuple(of_tile if over_keys else of_head for _ in statistics),
            tuple(
                pl.BlockSpec((None, x.shape[1], width), index)
                for x, width, index in zip(
                    points,
                    (tile, points[-1].shape[2]) if points else (),
                    (lambda i, h: (h, 0, i), lambda i, h: (h, 0, 0)),
                )
            ),
        ],
        out_specs=[
            pl.BlockSpec((None, tile, block_depth), lambda i, h: (h, i, 0)), of_tile,
        ][: len(shapes)],
        out_shape=[jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes],
    )(weights, values, statistics, points)  # fmt: skip
    return [jnp.swapaxes(out[0], 0, 1)[:num_out, :, :depth], *out[1:]]


def _heads_first(config: Config, x: jax.Array) -> jax.Array:
    """[N, H, D] -> [H, N padded, D padded so that every row starts at a multiple of 32 bytes]."""
    x = jnp.swapaxes(x, 0, 1)
    num_head, num_token, depth = x.shape
    return pad(x, (num_head, round_up(num_token, config.tile), _padded_depth(depth)))


def _padded_depth(depth: int) -> int:
    return round_up(depth, 8)


def _load_channels(x: Any, tokens: Any, depth: int) -> jax.Array:
    """Tokens of an array of `_heads_first` [tokens, D padded to what a block holds]."""
    # With the zeros that it is padded with: Triton then moves 16 bytes at a time, not 4.
    mask = (jnp.arange(x.shape[-1]) < _padded_depth(depth))[None, :]
    return plgpu.load(x.at[tokens, :], mask=mask, other=0.0)


def _tokens_last(config: Config, x: jax.Array) -> jax.Array:
    """[N, ...] -> [..., N padded]."""
    x = jnp.moveaxis(x, 0, -1)
    return pad(x, (*x.shape[:-1], round_up(x.shape[-1], config.tile)))
