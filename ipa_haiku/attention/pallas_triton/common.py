"""What the kernels share: their arguments, exact products, padding, query rows in blocks.

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

from ipa_haiku.attention.batching import as_varying
from ipa_haiku.attention.logits import Side
from ipa_haiku.attention.pallas_triton.config import LEAST_BLOCK, KernelConfig
from ipa_haiku.attention.types import LogitScales
from ipa_haiku.jax_versions import shape_like

# Mantissa bits of TF32; the bits of a float32 that it keeps, and two of it; and how many bfloat16
# parts hold a float32.
_TF32_BITS = 10
_TF32_MASK = 0xFFFFE000
_TWO_TF32_MASK = 0xFFFFFFFC
_NUM_BFLOAT16_PARTS = 3


class Static(NamedTuple):
    """What is known when tracing."""

    scales: LogitScales
    config: KernelConfig
    query_block: int  # Nq for all rows at once


class Arrays(NamedTuple):
    """What the kernels need of one protein, in float32 but for the pair representation."""

    query: Side
    key: Side
    value: jax.Array  # [Nk, H, Cv + Pv*3] scalar and point values side by side
    point_weights: jax.Array  # [H]
    inputs_2d: jax.Array  # [Nq, Nk, C_z], any dtype
    pair_weights: jax.Array  # [C_z, H], any dtype

    @property
    def num_query(self) -> int:
        """Number of queries, Nq."""
        return self.query.scalar.shape[0]


class Softmax(NamedTuple):
    """attention = scale * exp(logits - maximum), per query and head [Nq, H].

    Not one log-sum-exp: at a masked query's logits of -1e5 it would keep two digits.
    """

    maximum: jax.Array
    scale: jax.Array


def attention_of(logits: jax.Array, softmax: Softmax) -> jax.Array:
    """Attention weights of logits [rows, keys], the same numbers in every kernel."""
    return jnp.exp(logits - softmax.maximum[:, None]) * softmax.scale[:, None]


def call(
    config: KernelConfig, kernel: Any, arguments: Sequence[Any], out_shape: Any, **options: Any
) -> Any:
    """`pl.pallas_call` with the tunables of `config`, also inside of `jax.shard_map`.

    There is no cost estimate: Pallas's Triton backend does not hand it on.
    """
    # JAX does not find out which axes of a mesh a kernel's results vary over.
    arguments = as_varying(tuple(arguments), arguments)
    first = jax.tree.leaves(arguments)[0]
    return pl.pallas_call(
        kernel,
        out_shape=jax.tree.map(lambda shape: shape_like(shape, first), out_shape),
        compiler_params=plgpu.CompilerParams(
            num_warps=config.num_warps, num_stages=config.num_stages
        ),
        interpret=config.interpret,
        **options,
    )(*arguments)


def float32(*shape: int) -> jax.ShapeDtypeStruct:
    """Shape of a result."""
    return jax.ShapeDtypeStruct(shape, jnp.float32)


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


# --- products ------------------------------------------------------------------------------------


def dot(
    config: KernelConfig,
    a: jax.Array,
    b: jax.Array,
    *,
    trans_a: bool = False,
    trans_b: bool = False,
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


def dot_with_all_bits(config: KernelConfig, a: jax.Array, b: jax.Array) -> jax.Array:
    """`dot` of float32 by one more product, with which no bit of `b` is dropped.

    It is for coordinates of a residue far from others, to which its own attention is 1.
    """
    kept = _with_bits(b, _TWO_TF32_MASK)
    rest = b - kept
    if config.interpret:
        more = jax.lax.dot(_tf32_parts(a)[0], rest, precision=jax.lax.Precision.HIGHEST)
    else:
        more = jax.lax.dot(
            a,
            rest,
            precision=jax.lax.DotAlgorithmPreset.TF32_TF32_F32,
            preferred_element_type=jnp.float32,
        )
    return more + dot(config, a, kept)


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
    """As Triton cuts float32 into TF32: the first part is rounded, of the second bits are cut off.

    So what the two parts add up to has the same parts.
    """
    high = jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=_TF32_BITS)
    return high, _with_bits(x - high, _TF32_MASK)


def _with_bits(x: jax.Array, mask: int) -> jax.Array:
    """float32 numbers without the bits that are not in `mask`."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(mask)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


# --- padding -------------------------------------------------------------------------------------


def padded_size(size: int) -> int:
    """The power of two that holds `size` and fills a tensor core."""
    return max(pl.next_power_of_2(size), LEAST_BLOCK)


def pad(x: jax.Array, sizes: Sequence[int]) -> jax.Array:
    """`x` with zeros appended up to `sizes`."""
    return jnp.pad(x, [(0, size - now) for size, now in zip(sizes, x.shape)])


def round_up(size: int, block: int) -> int:
    """The multiple of `block` that holds `size`."""
    return pl.cdiv(size, block) * block


def tile_mask(
    rows: int, columns: int, shape: tuple[int, int], i: jax.Array | int, j: jax.Array | int
) -> jax.Array:
    """Where block (i, j) of [rows, columns] is inside an array of `shape`."""
    return is_inside(i, rows, shape[0])[:, None] & is_inside(j, columns, shape[1])[None, :]


def is_inside(i: jax.Array | int, block: int, size: int) -> jax.Array:
    """Which elements of block i of an axis there are."""
    return i * block + jnp.arange(block, dtype=jnp.int32) < size


# --- query rows in blocks ------------------------------------------------------------------------


def block_starts(static: Static, num_query: int) -> jax.Array:
    """The first query row of each block of rows [blocks, 1]."""
    num_block = pl.cdiv(num_query, static.query_block)
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
