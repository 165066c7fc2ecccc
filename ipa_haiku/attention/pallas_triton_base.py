"""What the kernels share: exact products, arguments, query rows in blocks, rows of `inputs_2d`.

Array sizes inside a kernel are powers of two: blocks are padded, loads and stores masked. An array
that two kernels hand to each other is [Nq, H, Nk], so that a query's row of all heads is one block.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.base import MASK_PENALTY, SEGMENT_PENALTY, IPAInputs, LogitScales
from ipa_haiku.attention.pallas_triton import LEAST_BLOCK, Config, Static

# Mantissa bits of TF32, and of bfloat16 parts that together hold a float32.
_TF32_BITS = 10
_NUM_BFLOAT16_PARTS = 3


class Softmax(NamedTuple):
    """attention = scale * exp(logits - maximum), per query and head [Nq, H].

    Not one log-sum-exp: at a masked query's logits of -1e5 it would keep two digits.
    """

    maximum: jax.Array
    scale: jax.Array


def padded_size(size: int) -> int:
    """The power of two that holds `size` and fills a tensor core."""
    return max(pl.next_power_of_2(size), LEAST_BLOCK)


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
    point: jax.Array  # [N, H, P*3] near the origin
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


def whole(*sizes: int) -> pl.BlockSpec:
    """All of an array of these sizes, which may be padded."""
    return pl.BlockSpec(sizes, lambda *_: (0,) * len(sizes))


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
    return RowSpecs(
        start=whole(1),
        row=pl.BlockSpec((None, heads, num_key), lambda i: (i, 0, 0)),
        pair=whole(inputs.inputs_2d.shape[0], num_key, channels),
        weights=whole(heads, channels),
        head_channels=pl.BlockSpec((None, heads, channels), lambda i: (i, 0, 0)),
        heads=pl.BlockSpec((None, heads), lambda i: (i, 0)),
    )


def row_index(start: Any, z: Any) -> jax.Array:
    """Row of `inputs_2d` of this program; rows filled in at the end work on the last one."""
    return jnp.minimum(start[0] + pl.program_id(0), z.shape[0] - 1)


def row_mask(b: jax.Array, heads: int, block: int, shape: tuple[int, int]) -> jax.Array:
    """Where block b of a row [heads, block] is inside [H, Nk]."""
    return tile_mask(heads, block, shape, 0, b)


def load_pair(
    z: Any, row: jax.Array, b: jax.Array, block: int, shape: tuple[int, int]
) -> jax.Array:
    """Block b of a row of `inputs_2d` [block, C_z padded], zero outside of `shape`."""
    mask = tile_mask(block, z.shape[-1], shape, b, 0)
    return plgpu.load(z.at[row, pl.ds(b * block, block), :], mask=mask, other=0.0)


def transposed_pair_weights(inputs: IPAInputs) -> jax.Array:
    """[H padded, C_z padded], bfloat16 if both it and `inputs_2d` are, else float32."""
    dtype = jnp.result_type(inputs.inputs_2d, inputs.pair_weights)
    weights = inputs.pair_weights.astype(dtype if dtype == jnp.bfloat16 else jnp.float32).T
    return pad(weights, [padded_size(size) for size in weights.shape])


def tile_mask(
    rows: int, columns: int, shape: tuple[int, int], i: jax.Array | int, j: jax.Array | int
) -> jax.Array:
    """Where block (i, j) is inside an array of `shape`."""
    row = i * rows + jnp.arange(rows)
    column = j * columns + jnp.arange(columns)
    return (row < shape[0])[:, None] & (column < shape[1])[None, :]


def combine(
    scales: LogitScales,
    scalar: jax.Array,
    square_distance: jax.Array,
    point_weights: jax.Array,
    mask: jax.Array,
    differ: jax.Array | None,
) -> jax.Array:
    """Logits but for the pair term (Suppl. Alg. 22, line 7), inside a kernel.

    Args:
      scales: static factors of the terms.
      scalar: products of queries and keys; all arrays are of one shape, or broadcast to it.
      square_distance: summed over points.
      point_weights: of the heads.
      mask: 1 where query and key are real.
      differ: whether their segments differ, if there are any.
    """
    penalty = MASK_PENALTY * (1.0 - mask)
    if differ is not None:
        penalty = penalty + SEGMENT_PENALTY * differ.astype(jnp.float32)
    logits = scales.scalar * scalar - 0.5 * point_weights * square_distance - penalty
    return scales.total * logits
