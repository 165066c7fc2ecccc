"""The output projection on GPUs, of features that nobody has put side by side.

XLA would write out the concatenated features of all residues, and cut the product along them in up
to eight parts, to keep a GPU busy, whose results it writes and adds up.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention.pallas_triton import Config
from ipa_haiku.attention.pallas_triton_base import call, round_up, tile_mask

# Of a program, whose rows are `config.tile`: what shared memory holds whatever that is.
_COLUMNS = 64
_DEPTH = 64


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def project(
    config: Config, parts: Sequence[jax.Array], weights: jax.Array, bias: jax.Array
) -> jax.Array:
    """The affine map of features (Suppl. Alg. 22, line 11); all arguments of one dtype.

    Products are as accurate as JAX's default on GPUs, which is TF32 for float32.

    Args:
      config: tunables.
      parts: matrices [N, K_i], whose columns side by side are the features.
      weights: [sum of K_i, num_channel].
      bias: [num_channel].

    Returns:
      [N, num_channel] in the dtype of the arguments, summed in float32.
    """
    num_row, num_column = len(parts[0]), len(bias)
    sizes = [part.shape[1] for part in parts]
    rows, columns, depth = config.tile, _COLUMNS, _DEPTH

    def kernel(*refs: Any) -> None:
        *parts, weights, bias, out = refs
        i, j = pl.program_id(0), pl.program_id(1)
        column = pl.ds(j * columns, columns)

        def add_block(
            part: Any, start: int, size: int, b: jax.Array, total: jax.Array
        ) -> jax.Array:
            x_mask = tile_mask(rows, depth, (num_row, size), i, b)
            x = plgpu.load(part.at[:, pl.ds(b * depth, depth)], mask=x_mask, other=0.0)
            w_mask = tile_mask(depth, columns, (size, num_column), b, j)
            w = plgpu.load(
                weights.at[pl.ds(start + b * depth, depth), column], mask=w_mask, other=0.0
            )
            return total + jnp.dot(x, w, preferred_element_type=jnp.float32)

        is_column = j * columns + jnp.arange(columns) < num_column
        total = plgpu.load(bias.at[column], mask=is_column, other=0.0).astype(jnp.float32)
        total = jnp.broadcast_to(total[None, :], (rows, columns))
        start = 0
        for part, size in zip(parts, sizes):
            step = functools.partial(add_block, part, start, size)
            total = jax.lax.fori_loop(0, pl.cdiv(size, depth), step, total)
            start += size
        mask = tile_mask(rows, columns, (num_row, num_column), i, j)
        plgpu.store(out.at[:, :], total.astype(out.dtype), mask=mask)

    def part_spec(size: int) -> pl.BlockSpec:
        return pl.BlockSpec((rows, round_up(size, depth)), lambda i, j: (i, 0))

    padded = round_up(num_column, columns)
    return call(
        config,
        kernel,
        grid=(pl.cdiv(num_row, rows), padded // columns),
        in_specs=[
            *map(part_spec, sizes),
            pl.BlockSpec((round_up(len(weights), depth), padded), lambda i, j: (0, 0)),
            pl.BlockSpec((padded,), lambda i, j: (0,)),
        ],
        out_specs=pl.BlockSpec((rows, columns), lambda i, j: (i, j)),
        out_shape=jax.ShapeDtypeStruct((num_row, num_column), weights.dtype),
    )(*parts, weights, bias)


def _project_fwd(
    config: Config, parts: Sequence[jax.Array], weights: jax.Array, bias: jax.Array
) -> tuple[jax.Array, tuple]:
    return project(config, parts, weights, bias), (parts, weights, bias)


def _project_bwd(config: Config, residuals: tuple, cotangent: jax.Array) -> tuple:
    del config

    def as_one_product(
        parts: Sequence[jax.Array], weights: jax.Array, bias: jax.Array
    ) -> jax.Array:
        return jnp.concatenate(parts, axis=-1) @ weights + bias

    return jax.vjp(as_one_product, *residuals)[1](cotangent)


project.defvjp(_project_fwd, _project_bwd)
