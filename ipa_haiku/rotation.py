"""Quaternions, rotations and vectors: the functions of AF2's `quat_affine.py` below its class.

`ipa_haiku.quat_affine` has them all under AF2's names, and says how they differ from AF2's.

Quaternions are (real, i, j, k). A rotation is a list of three rows of three arrays, a vector a list
of three arrays, unless a function says "tensor": then the components are in the last dimension(s).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku.checks import assert_shape

Vector = Sequence[jax.Array]
Rotation = Sequence[Vector]


def _quaternion_product_table() -> np.ndarray:
    """Returns table[i, j, k]: the coefficient of unit k in the product of units i and j."""
    table = np.zeros((4, 4, 4), dtype=int)
    units = np.arange(4)
    table[0, units, units] = table[units, 0, units] = 1
    table[units[1:], units[1:], 0] = -1  # i^2 = j^2 = k^2 = -1
    for i, j, k in [(1, 2, 3), (2, 3, 1), (3, 1, 2)]:  # ij = k and cyclic, ji = -k
        table[i, j, k], table[j, i, k] = 1, -1
    return table


def _quaternion_rotation_table() -> np.ndarray:
    """Returns table[i, j, a, b]: the coefficient of q_i q_j, i <= j, in element (a, b) of R(q)."""
    product = _quaternion_product_table()
    conjugate = np.array([1, -1, -1, -1])
    # R(q) v is the vector part of q v q*.
    table = np.einsum("ibm,mja,j->ijab", product[:, 1:], product[:, :, 1:], conjugate)
    above, diagonal = np.triu(np.ones((4, 4), dtype=int), 1), np.eye(4, dtype=int)
    # q_i q_j = q_j q_i: all of a mixed product goes above the diagonal, as in AF2.
    table_of_pairs = above[..., None, None] * (table + table.swapaxes(0, 1))
    return table_of_pairs + diagonal[..., None, None] * table


QUAT_TO_ROT = _quaternion_rotation_table().astype(np.float32)  # [4, 4, 3, 3]
QUAT_MULTIPLY = _quaternion_product_table().astype(np.float32)  # [4, 4, 4]
QUAT_MULTIPLY_BY_VEC = QUAT_MULTIPLY[:, 1:]  # [4, 3, 4]


def assert_last_dim(name: str, x: jax.Array, size: int) -> None:
    """Asserts that the last dimension of `x` is `size`, naming the argument."""
    assert_shape(name, x, f"... {size}", (*x.shape[:-1], size))


def unstack(tensor: jax.Array) -> list[jax.Array]:
    """Splits the last dimension [..., K] into a list of K arrays [...].

    By a transposition before the slices, as in AF2's class: XLA merges plain slices with equal
    ones around them, and the last bit of a sum of products may then come out differently.
    """
    return list(jnp.moveaxis(tensor, -1, 0))


def _bilinear(table: np.ndarray, left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns sum over i, j of table[i, j] left[..., i] right[..., j]: AF2's order of operations.

    Closed multiply-adds would be shorter to run, but leave it to the compiler which of two
    products it fuses into the addition, so that the last bit would depend on the surroundings.
    """
    table = np.expand_dims(table, tuple(range(left.ndim - 1)))
    terms = table * left[..., :, None, None] * right[..., None, :, None]  # [..., i, j, k]
    return jnp.sum(terms, axis=(-3, -2))


def normalize_quaternion(quaternion: jax.Array) -> jax.Array:
    """Returns quaternion / |quaternion| [..., 4]; the identity where the norm vanishes.

    A squared norm below the smallest normal number counts as zero: it has lost its digits or,
    depending on the device, been flushed to zero, and its gradient would overflow.
    """
    norm = jnp.linalg.norm(quaternion, axis=-1, keepdims=True)
    vanishes = norm < float(jnp.finfo(norm.dtype).tiny) ** 0.5
    identity = np.array([1, 0, 0, 0], dtype=quaternion.dtype)
    # The norm that divides is taken after the selection: selecting the quotient instead would
    # still send the gradient through 0 / 0.
    quaternion = jnp.where(vanishes, identity, quaternion)
    return quaternion / jnp.linalg.norm(quaternion, axis=-1, keepdims=True)


def rot_to_quat(rot: Rotation | jax.Array, unstack_inputs: bool = False) -> jax.Array:
    """Converts rotations to unit quaternions.

    Every row of 4 q q^T is a multiple of q and linear in the rotation; the row with the largest
    diagonal element, which is at least 1, is the accurate one (Shepperd 1978), and normalising it
    never divides by less than 1. Value and gradient are therefore accurate for every rotation, and
    finite for every finite matrix. There is no branch and no eigenvector decomposition.

    The sign is chosen so that the real part is not negative (AF2's sign is arbitrary). It jumps
    only at half turns, where the real part is zero and both signs are right.

    Args:
      rot: three rows of three arrays [...], or a tensor [..., 3, 3] if `unstack_inputs`.
      unstack_inputs: whether `rot` is a tensor.

    Returns:
      Unit quaternions [..., 4], equal to AF2's `rot_to_quat` up to the sign.

    Raises:
      AssertionError: if `rot` is not 3x3.
    """
    rotation = rotation_rows("rot", rot, unstack_inputs)
    (xx, xy, xz), (yx, yy, yz), (zx, zy, zz) = rotation
    rows = [
        [1.0 + xx + yy + zz, zy - yz, xz - zx, yx - xy],
        [zy - yz, 1.0 + xx - yy - zz, xy + yx, xz + zx],
        [xz - zx, xy + yx, 1.0 - xx + yy - zz, yz + zy],
        [yx - xy, xz + zx, yz + zy, 1.0 - xx - yy + zz],
    ]
    candidates = jnp.stack([jnp.stack(row, axis=-1) for row in rows], axis=-2)  # [..., 4, 4]
    diagonal = jnp.stack([rows[i][i] for i in range(4)], axis=-1)  # [..., 4], sums to 4
    largest = jnp.argmax(diagonal, axis=-1)[..., None, None] == np.arange(4)[:, None]  # [..., 4, 1]
    row = jnp.sum(jnp.where(largest, candidates, 0), axis=-2)  # [..., 4]
    sign = jnp.where(row[..., :1] < 0, -1, 1).astype(row.dtype)
    return sign * row / jnp.linalg.norm(row, axis=-1, keepdims=True)


def rot_list_to_tensor(rot_list: Rotation) -> jax.Array:
    """Stacks three rows of three arrays [...] into a tensor [..., 3, 3]."""
    return jnp.stack([jnp.stack(row, axis=-1) for row in rot_list], axis=-2)


def vec_list_to_tensor(vec_list: Vector) -> jax.Array:
    """Stacks three arrays [...] into a tensor [..., 3]."""
    return jnp.stack(vec_list, axis=-1)


def quat_to_rot(normalized_quat: jax.Array) -> list[list[jax.Array]]:
    """Converts unit quaternions [..., 4] to rotations: three rows of three arrays [...].

    Raises:
      AssertionError: if the last dimension is not 4.
    """
    assert_last_dim("normalized_quat", normalized_quat, 4)
    elements = unstack(_bilinear(QUAT_TO_ROT.reshape(4, 4, 9), normalized_quat, normalized_quat))
    return [elements[:3], elements[3:6], elements[6:]]


def quat_multiply_by_vec(quat: jax.Array, vec: jax.Array) -> jax.Array:
    """Multiplies quaternions [..., 4] by the pure quaternions (0, vec), vec [..., 3].

    Raises:
      AssertionError: if the last dimension of `quat` is not 4 or that of `vec` not 3.
    """
    assert_last_dim("quat", quat, 4)
    assert_last_dim("vec", vec, 3)
    return _bilinear(QUAT_MULTIPLY_BY_VEC, quat, vec)


def quat_multiply(quat1: jax.Array, quat2: jax.Array) -> jax.Array:
    """Multiplies quaternions [..., 4]: the rotation of `quat2` first, then that of `quat1`.

    Raises:
      AssertionError: if a last dimension is not 4.
    """
    assert_last_dim("quat1", quat1, 4)
    assert_last_dim("quat2", quat2, 4)
    return _bilinear(QUAT_MULTIPLY, quat1, quat2)


def apply_rot_to_vec(
    rot: Rotation, vec: Vector | jax.Array, unstack: bool = False
) -> list[jax.Array]:
    """Rotates vectors; returns three arrays.

    Args:
      rot: three rows of three arrays [...].
      vec: three arrays [...], or a tensor [..., 3] if `unstack`.
      unstack: whether `vec` is a tensor.

    Raises:
      AssertionError: if `vec` does not have three components.
    """
    x, y, z = vector_components("vec", vec, unstack)
    return [row[0] * x + row[1] * y + row[2] * z for row in rot]


def apply_inverse_rot_to_vec(rot: Rotation, vec: Vector) -> list[jax.Array]:
    """Rotates vectors (three arrays [...]) by the inverses, that is transposes, of rotations.

    Raises:
      AssertionError: if `vec` does not have three components.
    """
    return apply_rot_to_vec(transpose_rotation(rot), vec)


def transpose_rotation(rot: Rotation) -> list[list[jax.Array]]:
    """Returns the transposes, that is inverses, of rotations."""
    return [[row[i] for row in rot] for i in range(3)]


def multiply_rotations(a: Rotation, b: Rotation) -> list[list[jax.Array]]:
    """Returns the matrix product a b, in the order of operations of `apply_rot_to_vec`."""
    return transpose_rotation([apply_rot_to_vec(a, column) for column in transpose_rotation(b)])


def vector_components(
    name: str, vector: Vector | jax.Array, is_tensor: bool = False
) -> list[jax.Array]:
    """Returns the three components of a list of three arrays or of a tensor [..., 3]."""
    if is_tensor:
        tensor = jnp.asarray(vector)
        assert_last_dim(name, tensor, 3)
        return unstack(tensor)
    if len(vector) != 3:
        raise AssertionError(f"{name} must be 3 arrays, got {len(vector)}.")
    return list(vector)


def rotation_rows(
    name: str, rotation: Rotation | jax.Array, is_tensor: bool
) -> list[list[jax.Array]]:
    """Returns the rows of three rows of three arrays or of a tensor [..., 3, 3]."""
    if is_tensor:
        tensor = jnp.asarray(rotation)
        assert_shape(name, tensor, "... 3 3", (*tensor.shape[:-2], 3, 3))
        return [unstack(row) for row in jnp.moveaxis(tensor, -2, 0)]
    lengths = [len(row) for row in rotation]
    if lengths != [3, 3, 3]:
        raise AssertionError(f"{name} must be 3 rows of 3 arrays, got rows of {lengths}.")
    return [list(row) for row in rotation]
