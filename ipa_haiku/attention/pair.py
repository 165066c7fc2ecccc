"""Pair representations that are not an [N, N, C_z] array, exact, for long sequences.

Either goes where `inputs_2d` goes, to `invariant_point_attention` and to the modules. Memory grows
with N, as [N, H, R * C_z] numbers: neither the [N, N, C_z] array that it stands for nor any other
array of N * N numbers is formed, except by implementation='reference'.
"""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FactorizedPair:
    """z_ij = sum_r left_ir * right_jr, channel by channel: a pair representation of rank R.

    Attributes:
      left: [..., Nq, R, C_z] factors of the queries (rows of z), floating-point.
      right: [..., Nk, R, C_z] factors of the keys (columns of z), floating-point.
    """

    left: jax.Array
    right: jax.Array

    AXES: ClassVar[dict[str, str]] = {"left": "... Nq R C_z", "right": "... Nk R C_z"}

    @property
    def dtype(self) -> jnp.dtype:
        """That of `to_dense`."""
        return jnp.result_type(self.left, self.right)

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `to_dense`, [..., Nq, Nk, C_z]."""
        *batch, num_query, _, num_channel = self.left.shape
        return (*batch, num_query, self.right.shape[-3], num_channel)

    def to_dense(self) -> jax.Array:
        """The array z [..., Nq, Nk, C_z] that this stands for; summed in float32 or wider."""
        wide = jnp.result_type(jnp.float32, self.dtype)
        left, right = self.left.astype(wide), self.right.astype(wide)
        # Products and a sum, not a matmul, which TF32 or bfloat16 units would round; rank by rank,
        # as one array [..., Nq, Nk, R, C_z] with three batch dimensions, differentiated, makes
        # XLA:CPU of jaxlib 0.10.2 crash.
        ranks = range(left.shape[-2])
        products = [left[..., :, None, r, :] * right[..., None, :, r, :] for r in ranks]
        return functools.reduce(jnp.add, products).astype(self.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RelativePositionPair:
    """z_ij = table[clip(k_index_j - q_index_i, -m, m) + m] with m = `max_distance`.

    The indices are AF2's `residue_index` or any other numbering: gaps in the numbering of a chain
    count, and a large jump between two chains sets them m apart.

    Attributes:
      table: [2 * m + 1, C_z] one row for each relative position, floating-point.
      q_index: [..., Nq] integer positions of the queries (rows of z).
      k_index: [..., Nk] integer positions of the keys (columns of z).
    """

    table: jax.Array
    q_index: jax.Array
    k_index: jax.Array

    AXES: ClassVar[dict[str, str]] = {
        "table": "2*max_distance+1 C_z",
        "q_index": "... Nq",
        "k_index": "... Nk",
    }

    @property
    def dtype(self) -> jnp.dtype:
        """That of `to_dense`."""
        return self.table.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `to_dense`, [..., Nq, Nk, C_z]."""
        return (*self.q_index.shape, self.k_index.shape[-1], self.table.shape[-1])

    def to_dense(self) -> jax.Array:
        """The array z [..., Nq, Nk, C_z] that this stands for."""
        return self.table[rows_of_table(self.q_index, self.k_index, self.table.shape[0])]


StructuredPair = FactorizedPair | RelativePositionPair


def is_dense(inputs_2d: jax.Array | StructuredPair | None) -> bool:
    """Whether a pair representation is an [N, N, C_z] array, neither structured nor absent."""
    return inputs_2d is not None and not isinstance(inputs_2d, StructuredPair)


def dense_channel(inputs_2d: jax.Array | StructuredPair | None) -> int | None:
    """Channels C_z of a pair representation that is an [N, N, C_z] array; else None."""
    return inputs_2d.shape[-1] if is_dense(inputs_2d) else None  # type: ignore[union-attr]


def rows_of_table(q_index: jax.Array, k_index: jax.Array, num_rows: int) -> jax.Array:
    """Row of `RelativePositionPair.table` for all pairs of [..., Nq] and [..., Nk] positions.

    A distance may be larger than the dtype of the positions holds.
    """
    max_distance = num_rows // 2
    q_index, k_index = jnp.asarray(q_index), jnp.asarray(k_index)
    dtype = jnp.promote_types(q_index.dtype, k_index.dtype)
    signed = jnp.int64 if dtype.itemsize == 8 else jnp.int32
    if dtype.itemsize < 4:
        dtype = signed
    q_index, k_index = q_index.astype(dtype)[..., :, None], k_index.astype(dtype)[..., None, :]
    # A distance that wraps around has the wrong sign.
    distance = (k_index - q_index).astype(signed)
    is_after, seems_after = k_index >= q_index, distance >= 0
    clipped = jnp.clip(distance, -max_distance, max_distance)
    far = jnp.where(is_after, max_distance, -max_distance).astype(signed)
    return jnp.where(is_after == seems_after, clipped, far) + max_distance
