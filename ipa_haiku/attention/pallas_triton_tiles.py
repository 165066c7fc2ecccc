"""What the forward and the backward kernels share: tunables, exact products, tiles of logits.

Array sizes inside a kernel are powers of two: blocks are padded, loads and stores masked. An array
that two kernels hand to each other is [Nq, H, Nk], so that a query's row of all heads is one block.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.base import MASK_PENALTY, SEGMENT_PENALTY, IPAInputs, LogitScales

# Rows and columns that a tensor core takes at least.
_LEAST_BLOCK = 16

# Mantissa bits of TF32, and of bfloat16 parts that together hold a float32.
_TF32_BITS = 10
_NUM_BFLOAT16_PARTS = 3


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables of the kernels; results depend on them by rounding only.

    Attributes:
      forward_block: keys at a time in the pass over `inputs_2d`.
      backward_block: the same in the gradient, which holds more at a time.
      tile: queries and keys at a time in kernels that do not touch `inputs_2d`.
      num_warps: warps of a program.
      num_stages: depth of the pipeline of loads.
      interpret: run in Pallas's interpreter, on any device: for tests, far too slow for use.

    Raises:
      ValueError: naming the field whose value is of no use.
    """

    forward_block: int = 32
    backward_block: int = 32
    tile: int = 32
    num_warps: int = 4
    num_stages: int = 2
    interpret: bool = False

    def __post_init__(self) -> None:
        least = dict.fromkeys(("forward_block", "backward_block", "tile"), _LEAST_BLOCK)
        least["num_warps"] = 1
        for name, size in (least | {"num_stages": 1}).items():
            value = getattr(self, name)
            if value < size:
                raise ValueError(f"{name} must be at least {size}, got {value}.")
            if name in least and value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}.")


class Static(NamedTuple):
    """What is known when tracing: `scales` of the logits, tunables, query rows at a time."""

    scales: LogitScales
    config: Config
    query_block: int  # Nq for all rows at once


class Softmax(NamedTuple):
    """attention = scale * exp(logits - maximum), per query and head [Nq, H].

    Not one log-sum-exp: at a masked query's logits of -1e5 it would keep two digits.
    """

    maximum: jax.Array
    scale: jax.Array


def padded_size(size: int) -> int:
    """The power of two that holds `size` and fills a tensor core."""
    return max(pl.next_power_of_2(size), _LEAST_BLOCK)


def pad(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """`x` with zeros appended up to `sizes`."""
    return jnp.pad(x, [(0, size - now) for size, now in zip(sizes, x.shape)])


def round_up(size: int, block: int) -> int:
    """The multiple of `block` that holds `size`."""
    return pl.cdiv(size, block) * block


def call(config: Config, kernel: Any, **options: Any) -> Any:
    """`pl.pallas_call` with the tunables of `config`."""
    return pl.pallas_call(
        kernel,
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=config.interpret,
        **options,
    )


def dot(
    config: Config, a: jax.Array, b: jax.Array, *, trans_a: bool = False, trans_b: bool = False
) -> jax.Array:
    """Matrix product inside a kernel, summed in float32 and about as accurate.

    bfloat16 is multiplied as it is, by float32 cut into bfloat16 parts that hold all its bits.
    Everything else is multiplied as float32 by three TF32 products, which drop 2^-22 of a term;
    float16 fits into TF32. The interpreter would hide what TF32 loses, so there it is imitated.
    """
    dimensions = (((0 if trans_a else 1,), (1 if trans_b else 0,)), ((), ()))
    product = functools.partial(
        jax.lax.dot_general, dimension_numbers=dimensions, preferred_element_type=jnp.float32
    )
    if jnp.bfloat16 in (a.dtype, b.dtype):
        pairs = [(x, y) for x in _bfloat16_parts(a) for y in _bfloat16_parts(b)]
        return sum((product(x, y) for x, y in pairs[-2::-1]), start=product(*pairs[-1]))
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    if not config.interpret:
        return product(a, b, precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3)
    exact = functools.partial(product, precision=jax.lax.Precision.HIGHEST)
    (a_high, a_low), (b_high, b_low) = _tf32_parts(a), _tf32_parts(b)
    return exact(a_low, b_high) + exact(a_high, b_low) + exact(a_high, b_high)


def _bfloat16_parts(x: jax.Array) -> list[jax.Array]:
    """bfloat16 arrays, largest first, whose sum is `x`."""
    if x.dtype == jnp.bfloat16:
        return [x]
    parts = []
    for _ in range(_NUM_BFLOAT16_PARTS):
        parts.append(x.astype(jnp.bfloat16))
        x = x - parts[-1].astype(jnp.float32)
    return parts


def _tf32_parts(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_TF32_BITS)
    return high, jax.lax.reduce_precision(x - high, exponent_bits=8, mantissa_bits=_TF32_BITS)


def once_differentiable(fn: Callable[..., Any]) -> Callable[..., Any]:
    """`fn`, a part of a custom gradient, with an error for those who differentiate that."""

    def refuse(*_: Any) -> Any:
        raise TypeError(
            "implementation='pallas' has no second derivatives; use implementation='xla' or "
            "implementation='reference' for those."
        )

    guarded = jax.custom_jvp(fn)
    guarded.defjvp(refuse)
    return guarded


class Side(NamedTuple):
    """What the logits without the pair term are made of, of queries or of keys, in float32."""

    scalar: jax.Array  # [N, H, C]
    point: jax.Array  # [N, H, P*3] recentred
    mask: jax.Array  # [N]
    segment: Any  # [N] segment ids, if any


def query_side(inputs: IPAInputs) -> Side:
    """The queries' side of the logits."""
    return _widen(Side(inputs.q_scalar, flat(inputs.q_point), inputs.q_mask, inputs.q_segment_ids))


def key_side(inputs: IPAInputs) -> Side:
    """The keys' side of the logits."""
    return _widen(Side(inputs.k_scalar, flat(inputs.k_point), inputs.k_mask, inputs.k_segment_ids))


def values(inputs: IPAInputs) -> jax.Array:
    """Scalar and point values side by side, [Nk, H, Cv + Pv*3] float32."""
    return jnp.concatenate(_widen((inputs.v_scalar, flat(inputs.v_point))), axis=-1)


def flat(points: jax.Array) -> jax.Array:
    """[..., P, 3] -> [..., P*3]."""
    return points.reshape(*points.shape[:-2], -1)


def _widen(tree: Any) -> Any:
    """Floating-point arrays as float32."""
    return jax.tree.map(
        lambda x: x.astype(jnp.float32) if jnp.issubdtype(x.dtype, jnp.floating) else x, tree
    )


# --- query rows in blocks ------------------------------------------------------------------------


def block_starts(static: Static, inputs: IPAInputs) -> jax.Array:
    """The first query row of each block of rows [blocks, 1]."""
    num_block = pl.cdiv(inputs.num_query, static.query_block)
    return static.query_block * jnp.arange(num_block, dtype=jnp.int32)[:, None]


def split_rows(static: Static, tree: Any) -> Any:
    """Arrays [Nq, ...] in blocks of rows [blocks, rows, ...], the last one filled with zeros."""
    block = static.query_block

    def split(x: jax.Array) -> jax.Array:
        x = pad(x, (round_up(len(x), block), *x.shape[1:]))
        return x.reshape(-1, block, *x.shape[1:])

    return jax.tree.map(split, tree)


def join_rows(tree: Any, num_query: int) -> Any:
    """The inverse of `split_rows`."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:num_query], tree)


# --- kernels over a row of inputs_2d -------------------------------------------------------------


class RowSpecs(NamedTuple):
    """Blocks of a program that works on one query row; sizes are padded, stores masked."""

    start: pl.BlockSpec  # of [1], the first row of `inputs_2d` that counts
    row: pl.BlockSpec  # of [Nq, H, Nk]
    pair: pl.BlockSpec  # of [Nq, Nk, C_z], all of it: its rows are counted from `start`
    weights: pl.BlockSpec  # of [H padded, C_z padded]
    head_channels: pl.BlockSpec  # of [Nq, H, C_z]
    heads: pl.BlockSpec  # of [Nq, H]


def row_specs(inputs: IPAInputs, heads: int, channels: int, block: int) -> RowSpecs:
    """`RowSpecs` for keys taken `block` at a time."""
    num_key = round_up(inputs.num_key, block)
    num_row = inputs.inputs_2d.shape[0]
    return RowSpecs(
        start=pl.BlockSpec((1,), lambda i: (0,)),
        row=pl.BlockSpec((None, heads, num_key), lambda i: (i, 0, 0)),
        pair=pl.BlockSpec((num_row, num_key, channels), lambda i: (0, 0, 0)),
        weights=pl.BlockSpec((heads, channels), lambda i: (0, 0)),
        head_channels=pl.BlockSpec((None, heads, channels), lambda i: (i, 0, 0)),
        heads=pl.BlockSpec((None, heads), lambda i: (i, 0)),
    )


def row_index(start: Any, z: Any) -> jax.Array:
    """Row of `inputs_2d` of this program; rows filled in at the end work on the last one."""
    return jnp.minimum(start[0] + pl.program_id(0), z.shape[0] - 1)


def row_mask(b: jax.Array, heads: int, block: int, shape: tuple[int, int]) -> jax.Array:
    """Where block b of a row [heads, block] is inside [H, Nk]."""
    return _tile_mask(heads, block, shape, 0, b)


def load_pair(
    z: Any, row: jax.Array, b: jax.Array, block: int, shape: tuple[int, int]
) -> jax.Array:
    """Block b of a row of `inputs_2d` [block, C_z padded], zero outside of `shape`."""
    mask = _tile_mask(block, z.shape[-1], shape, b, 0)
    return plgpu.load(z.at[row, pl.ds(b * block, block), :], mask=mask, other=0.0)


def transposed_pair_weights(inputs: IPAInputs) -> jax.Array:
    """[H padded, C_z padded], bfloat16 if both it and `inputs_2d` are, else float32."""
    dtype = jnp.result_type(inputs.inputs_2d, inputs.pair_weights)
    weights = inputs.pair_weights.astype(dtype if dtype == jnp.bfloat16 else jnp.float32).T
    return pad(weights, [padded_size(size) for size in weights.shape])


# --- kernels over [Nq, H, Nk] --------------------------------------------------------------------


def logits_without_pair(
    static: Static, query: Side, key: Side, point_weights: jax.Array
) -> jax.Array:
    """Logits [Nq, H, Nk] but for the pair term (Suppl. Alg. 22, line 7).

    Sums of products and of squared differences of float32, nothing expanded.
    """
    config = static.config
    num_query, num_head, _ = query.scalar.shape
    num_key = key.scalar.shape[0]

    def rows(x: jax.Array) -> jax.Array:  # [N, ...] -> [..., N padded]
        x = jnp.moveaxis(x, 0, -1)
        return pad(x, (*x.shape[:-1], round_up(x.shape[-1], config.tile)))

    q_scalar, q_point, q_mask = map(rows, query[:3])  # [H, C, Nq padded], ...
    k_scalar, k_point, k_mask = map(rows, key[:3])

    def spec(x: jax.Array, axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((None, x.shape[1], config.tile), lambda *ids: (ids[2], 0, ids[axis]))

    def mask_spec(axis: int) -> pl.BlockSpec:
        return pl.BlockSpec((config.tile,), lambda *ids: (ids[axis],))

    logits = call(
        config,
        functools.partial(_logits_kernel, scales=static.scales, shape=(num_query, num_key)),
        grid=(pl.cdiv(num_query, config.tile), pl.cdiv(num_key, config.tile), num_head),
        in_specs=[
            spec(q_scalar, 0), spec(k_scalar, 1), spec(q_point, 0), spec(k_point, 1),
            pl.BlockSpec((1,), lambda i, j, h: (h,)), mask_spec(0), mask_spec(1),
        ],
        out_specs=pl.BlockSpec((config.tile, None, config.tile), lambda i, j, h: (i, h, j)),
        out_shape=jax.ShapeDtypeStruct((num_query, num_head, num_key), jnp.float32),
    )(q_scalar, k_scalar, q_point, k_point, point_weights, q_mask, k_mask)  # fmt: skip
    if query.segment is None:
        return logits
    differ = query.segment[:, None, None] != key.segment
    return logits - static.scales.total * SEGMENT_PENALTY * differ


def _logits_kernel(
    q_scalar: Any, k_scalar: Any, q_point: Any, k_point: Any, point_weights: Any,
    q_mask: Any, k_mask: Any, out: Any,
    *, scales: LogitScales, shape: tuple[int, int],
) -> None:  # fmt: skip
    tile = out.shape[0]

    def add_product(c: jax.Array, total: jax.Array) -> jax.Array:
        return total + q_scalar[c, :][:, None] * k_scalar[c, :][None, :]

    def add_square(c: jax.Array, total: jax.Array) -> jax.Array:
        return total + jnp.square(q_point[c, :][:, None] - k_point[c, :][None, :])

    zeros = jnp.zeros((tile, tile), jnp.float32)
    scalar = jax.lax.fori_loop(0, q_scalar.shape[0], add_product, zeros)
    square_distance = jax.lax.fori_loop(0, q_point.shape[0], add_square, zeros)
    penalty = MASK_PENALTY * (1.0 - q_mask[...][:, None] * k_mask[...][None, :])
    logits = scales.scalar * scalar - 0.5 * point_weights[0] * square_distance - penalty
    plgpu.store(
        out.at[:, :], scales.total * logits, mask=_tile_mask(tile, tile, shape, *_program_ids())
    )


def _program_ids() -> tuple[jax.Array, jax.Array]:
    return pl.program_id(0), pl.program_id(1)


def _tile_mask(
    rows: int, columns: int, shape: tuple[int, int], i: jax.Array | int, j: jax.Array | int
) -> jax.Array:
    """Where block (i, j) is inside an array of `shape`."""
    row = i * rows + jnp.arange(rows)
    column = j * columns + jnp.arange(columns)
    return (row < shape[0])[:, None] & (column < shape[1])[None, :]


def products(config: Config, query: jax.Array, key: jax.Array, minus: jax.Array) -> jax.Array:
    """query_qhd key_khd summed over d, minus minus_qh, as [Nq, H, Nk] float32.

    Args:
      config: tunables.
      query: [Nq, H, D] float32.
      key: [Nk, H, D] float32.
      minus: [Nq, H] float32.
    """
    (num_query, num_head, depth), num_key = query.shape, key.shape[0]
    query, key = (_heads_first(config, x, padded_size(depth)) for x in (query, key))
    depth = query.shape[-1]
    minus = pad(minus.T, (num_head, query.shape[1]))

    def kernel(query: Any, key: Any, minus: Any, out: Any) -> None:
        result = dot(config, query[:, :], key[:, :], trans_b=True) - minus[...][:, None]
        mask = _tile_mask(config.tile, config.tile, (num_query, num_key), *_program_ids())
        plgpu.store(out.at[:, :], result, mask=mask)

    return call(
        config,
        kernel,
        grid=(pl.cdiv(num_query, config.tile), pl.cdiv(num_key, config.tile), num_head),
        in_specs=[
            pl.BlockSpec((None, config.tile, depth), lambda i, j, h: (h, i, 0)),
            pl.BlockSpec((None, config.tile, depth), lambda i, j, h: (h, j, 0)),
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
    return _weighted_sum(config, weights, values, softmax, over_keys=True)


def sum_over_queries(
    config: Config, weights: jax.Array, values: jax.Array, softmax: Softmax | None = None
) -> jax.Array:
    """weights_qhk values_qhd summed over q, as [Nk, H, D]; see `sum_over_keys`."""
    return _weighted_sum(config, weights, values, softmax, over_keys=False)


def _weighted_sum(
    config: Config, weights: jax.Array, values: jax.Array, softmax: Softmax | None, over_keys: bool
) -> jax.Array:
    num_query, num_head, num_key = weights.shape
    num_out = num_query if over_keys else num_key
    tile, depth = config.tile, values.shape[-1]
    values = _heads_first(config, values, padded_size(depth))
    rows = round_up(num_query, tile)
    statistics = [pad(x.T, (num_head, rows)) for x in softmax or ()]  # [H, Nq padded]
    num_block = pl.cdiv(num_key if over_keys else num_query, tile)

    def kernel(weights: Any, values: Any, *refs: Any) -> None:
        *statistics, out = refs
        i = pl.program_id(0)

        def add_block(b: jax.Array, total: jax.Array) -> jax.Array:
            block = pl.ds(b * tile, tile)
            own = (i, b) if over_keys else (b, i)
            part = plgpu.load(
                weights.at[:, block] if over_keys else weights.at[block, :],
                mask=_tile_mask(tile, tile, (num_query, num_key), *own),
                other=-jnp.inf if statistics else 0.0,
            )
            if statistics:
                maximum, scale = (x[...] if over_keys else x[block] for x in statistics)
                part = jnp.exp(part - maximum[:, None]) * scale[:, None]
            return total + dot(config, part, values[block, :], trans_a=not over_keys)

        zeros = jnp.zeros((tile, values.shape[-1]), jnp.float32)
        out[:, :] = jax.lax.fori_loop(0, num_block, add_block, zeros)

    statistics_spec = (
        pl.BlockSpec((None, tile), lambda i, h: (h, i))
        if over_keys
        else pl.BlockSpec((None, rows), lambda i, h: (h, 0))
    )
    weights_spec = (
        pl.BlockSpec((tile, None, round_up(num_key, tile)), lambda i, h: (i, h, 0))
        if over_keys
        else pl.BlockSpec((rows, None, tile), lambda i, h: (0, h, i))
    )
    out = call(
        config,
        kernel,
        grid=(pl.cdiv(num_out, tile), num_head),
        in_specs=[
            weights_spec,
            pl.BlockSpec((None, *values.shape[1:]), lambda i, h: (h, 0, 0)),
            *(statistics_spec for _ in statistics),
        ],
        out_specs=pl.BlockSpec((None, tile, values.shape[-1]), lambda i, h: (h, i, 0)),
        out_shape=jax.ShapeDtypeStruct(
            (num_head, round_up(num_out, tile), values.shape[-1]), jnp.float32
        ),
    )(weights, values, *statistics)
    return jnp.swapaxes(out, 0, 1)[:num_out, :, :depth]


def _heads_first(config: Config, x: jax.Array, depth: int) -> jax.Array:
    """[N, H, D] -> [H, N padded, `depth`]."""
    x = jnp.swapaxes(x, 0, 1)
    return pad(x, (x.shape[0], round_up(x.shape[1], config.tile), depth))
