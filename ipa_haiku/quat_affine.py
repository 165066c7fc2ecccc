"""Frames as quaternion, rotation and translation: the twin of AF2's `quat_affine.py`.

Names, arguments and defaults are AF2's, and so is the order of every floating-point operation: in
float32 on CPU the results have AF2's bits, `rot_to_quat` excepted. A 3x3 product is always written
as multiply-adds, never as a matmul, which would lose bits in TF32 or bfloat16.

What differs from AF2:

- `QuatAffine` is a JAX pytree;
- `rot_to_quat` is a closed form instead of an eigenvector decomposition;
- gradients are finite for every rotation, for a zero quaternion and for every backbone;
- all functions take any leading dimensions, where some of AF2's take exactly one.

Quaternions are (real, i, j, k). A rotation is a list of three rows of three arrays, a vector a list
of three arrays, unless a function says "tensor": then the components are in the last dimension(s).
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku.attention.base import assert_shape

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

# AF2's guard in the norms of `make_canonical_transform`, in squared Å: lost beside any real bond
# (float32 keeps 1e-7 of it), it only keeps 0 / 0 away where atoms coincide or lie on a line.
_NORM_EPSILON = 1e-20


def _assert_last_dim(name: str, x: jax.Array, size: int) -> None:
    assert_shape(name, x, f"... {size}", (*x.shape[:-1], size))


def _unstack(tensor: jax.Array) -> list[jax.Array]:
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
    terms = table * left[..., :, None, None] * right[..., None, :, None]  # [..., i, j, k]
    return jnp.sum(terms, axis=(-3, -2))


def _normalize(quaternion: jax.Array) -> jax.Array:
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
    rotation = _rotation_rows("rot", rot, unstack_inputs)
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
    _assert_last_dim("normalized_quat", normalized_quat, 4)
    elements = _unstack(_bilinear(QUAT_TO_ROT.reshape(4, 4, 9), normalized_quat, normalized_quat))
    return [elements[:3], elements[3:6], elements[6:]]


def quat_multiply_by_vec(quat: jax.Array, vec: jax.Array) -> jax.Array:
    """Multiplies quaternions [..., 4] by the pure quaternions (0, vec), vec [..., 3].

    Raises:
      AssertionError: if the last dimension of `quat` is not 4 or that of `vec` not 3.
    """
    _assert_last_dim("quat", quat, 4)
    _assert_last_dim("vec", vec, 3)
    return _bilinear(QUAT_MULTIPLY_BY_VEC, quat, vec)


def quat_multiply(quat1: jax.Array, quat2: jax.Array) -> jax.Array:
    """Multiplies quaternions [..., 4]: the rotation of `quat2` first, then that of `quat1`.

    Raises:
      AssertionError: if a last dimension is not 4.
    """
    _assert_last_dim("quat1", quat1, 4)
    _assert_last_dim("quat2", quat2, 4)
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
    x, y, z = _vector_components("vec", vec, unstack)
    return [row[0] * x + row[1] * y + row[2] * z for row in rot]


def apply_inverse_rot_to_vec(rot: Rotation, vec: Vector) -> list[jax.Array]:
    """Rotates vectors (three arrays [...]) by the inverses, that is transposes, of rotations.

    Raises:
      AssertionError: if `vec` does not have three components.
    """
    return apply_rot_to_vec(_transpose(rot), vec)


def _transpose(rot: Rotation) -> list[list[jax.Array]]:
    return [[row[i] for row in rot] for i in range(3)]


def _multiply(a: Rotation, b: Rotation) -> list[list[jax.Array]]:
    """Returns the matrix product a b, in the order of operations of `apply_rot_to_vec`."""
    return _transpose([apply_rot_to_vec(a, column) for column in _transpose(b)])


def _vector_components(
    name: str, vector: Vector | jax.Array, is_tensor: bool = False
) -> list[jax.Array]:
    """Returns the three components of a list of three arrays or of a tensor [..., 3]."""
    if is_tensor:
        tensor = jnp.asarray(vector)
        _assert_last_dim(name, tensor, 3)
        return _unstack(tensor)
    if len(vector) != 3:
        raise AssertionError(f"{name} must be 3 arrays, got {len(vector)}.")
    return list(vector)


def _rotation_rows(
    name: str, rotation: Rotation | jax.Array, is_tensor: bool
) -> list[list[jax.Array]]:
    """Returns the rows of three rows of three arrays or of a tensor [..., 3, 3]."""
    if is_tensor:
        tensor = jnp.asarray(rotation)
        assert_shape(name, tensor, "... 3 3", (*tensor.shape[:-2], 3, 3))
        return [_unstack(row) for row in jnp.moveaxis(tensor, -2, 0)]
    lengths = [len(row) for row in rotation]
    if lengths != [3, 3, 3]:
        raise AssertionError(f"{name} must be 3 rows of 3 arrays, got rows of {lengths}.")
    return [list(row) for row in rotation]


class QuatAffine:
    """Frames x -> R x + t, the rotation R kept both as a quaternion and as a matrix.

    A JAX pytree: it goes through jit, vmap, grad, scan and tree_map. Its leaves are the arrays
    below, which share the leading dimensions [...]; neither flattening nor unflattening checks or
    normalises anything. AF2's functions accept it in place of AF2's own class.

    Attributes:
      quaternion: unit quaternions [..., 4], or None if only the rotation is known.
      rotation: three rows of three arrays [...].
      translation: three arrays [...], in whatever unit the caller uses.
    """

    quaternion: jax.Array | None
    rotation: list[list[jax.Array]]
    translation: list[jax.Array]

    def __init__(
        self,
        quaternion: jax.Array | None,
        translation: Vector | jax.Array,
        rotation: Rotation | jax.Array | None = None,
        normalize: bool = True,
        unstack_inputs: bool = False,
    ) -> None:
        """Makes frames from a quaternion, a rotation that goes with it, or both.

        Args:
          quaternion: [..., 4], of unit length unless `normalize`; None if `rotation` is given.
          translation: three arrays [...], or a tensor [..., 3] if `unstack_inputs`.
          rotation: the rotation of `quaternion`, computed from it if None: three rows of three
            arrays [...], or a tensor [..., 3, 3] if `unstack_inputs`.
          normalize: whether to divide the quaternion by its norm. A zero quaternion becomes the
            identity, with a zero gradient.
          unstack_inputs: whether `translation` and `rotation` are tensors.

        Raises:
          AssertionError: if the argument it names does not have 4, 3, or 3x3 components.
          ValueError: if both `quaternion` and `rotation` are None.
        """
        if quaternion is not None:
            quaternion = jnp.asarray(quaternion)
            _assert_last_dim("quaternion", quaternion, 4)
            if normalize:
                quaternion = _normalize(quaternion)
        self.quaternion = quaternion
        self.translation = _vector_components("translation", translation, unstack_inputs)
        if rotation is not None:
            self.rotation = _rotation_rows("rotation", rotation, unstack_inputs)
        elif quaternion is not None:
            self.rotation = quat_to_rot(quaternion)
        else:
            raise ValueError("quaternion and rotation must not both be None.")

    @classmethod
    def from_tensor(cls, tensor: jax.Array, normalize: bool = False) -> "QuatAffine":
        """Makes frames from [..., 7]: quaternion, then translation (see `to_tensor`).

        Raises:
          AssertionError: if the last dimension is not 7.
        """
        _assert_last_dim("tensor", tensor, 7)
        return cls(tensor[..., :4], _unstack(tensor[..., 4:]), normalize=normalize)

    @classmethod
    def from_rotation_translation(cls, rotation: jax.Array, translation: jax.Array) -> "QuatAffine":
        """Makes frames from rotations [..., 3, 3] and translations [..., 3].

        The rotations are kept as they are; the quaternions are those of `rot_to_quat`.

        Raises:
          AssertionError: if `rotation` or `translation` does not have these last dimensions.
        """
        rows = _rotation_rows("rotation", rotation, is_tensor=True)
        components = _vector_components("translation", translation, is_tensor=True)
        return cls(rot_to_quat(rows), components, rotation=rows, normalize=False)

    @classmethod
    def from_backbone(cls, n: jax.Array, ca: jax.Array, c: jax.Array) -> "QuatAffine":
        """Makes residue frames from backbone atoms, as `make_transform_from_reference` does.

        CA is the origin, C lies on the positive x axis, N in the xy plane with y > 0.

        Args:
          n: nitrogen atoms [..., 3] in Å.
          ca: alpha carbon atoms [..., 3] in Å.
          c: carbonyl carbon atoms [..., 3] in Å.

        Returns:
          Frames [...] with translations in Å.

        Raises:
          AssertionError: if the shapes differ or are not [..., 3].
        """
        return cls.from_rotation_translation(*make_transform_from_reference(n, ca, c))

    @classmethod
    def identity(cls, n: int | Sequence[int]) -> "QuatAffine":
        """Makes identity frames of shape [n], or of the shape `n` if it is a sequence."""
        shape = (n,) if isinstance(n, int) else tuple(n)
        quaternion = jnp.broadcast_to(jnp.array([1.0, 0.0, 0.0, 0.0]), (*shape, 4))
        return cls(quaternion, jnp.zeros((*shape, 3)), normalize=False, unstack_inputs=True)

    def to_tensor(self) -> jax.Array:
        """Returns quaternion and translation as one array [..., 7].

        Raises:
          ValueError: if the quaternion is None.
        """
        return jnp.concatenate(
            [self._known_quaternion(), vec_list_to_tensor(self.translation)], axis=-1
        )

    def apply_tensor_fn(self, tensor_fn: Callable[[jax.Array], jax.Array]) -> "QuatAffine":
        """Returns frames with `tensor_fn` (stop_gradient, say) applied to each array."""
        return jax.tree_util.tree_map(tensor_fn, self)

    def apply_rotation_tensor_fn(self, tensor_fn: Callable[[jax.Array], jax.Array]) -> "QuatAffine":
        """Returns frames with `tensor_fn` applied to each array of quaternion and rotation."""
        quaternion, rotation = jax.tree_util.tree_map(tensor_fn, (self.quaternion, self.rotation))
        return QuatAffine(quaternion, self.translation, rotation=rotation, normalize=False)

    def scale_translation(self, position_scale: float | jax.Array) -> "QuatAffine":
        """Returns frames with translations times `position_scale`: a change of unit."""
        translation = [x * position_scale for x in self.translation]
        return QuatAffine(self.quaternion, translation, rotation=self.rotation, normalize=False)

    def pre_compose(self, update: jax.Array) -> "QuatAffine":
        """Returns frames that apply the transformation `update` first (Suppl. Alg. 23).

        Args:
          update: [..., 6], three imaginary parts (x, y, z) of the quaternion (1, x, y, z), which
            need not have unit length, then three components of a translation.

        Raises:
          AssertionError: if the last dimension of `update` is not 6.
          ValueError: if the quaternion is None.
        """
        _assert_last_dim("update", update, 6)
        quaternion = self._known_quaternion()
        # q (1, x, y, z) = q + q (0, x, y, z)
        quaternion = quaternion + quat_multiply_by_vec(quaternion, update[..., :3])
        return QuatAffine(quaternion, self.apply_to_point(_unstack(update[..., 3:])))

    def compose(self, other: "QuatAffine") -> "QuatAffine":
        """Returns frames that apply `other` first: x -> self(other(x)).

        The product is normalised again, so that long chains stay rotations. Where a quaternion is
        None, the result's is None and its rotation the matrix product.
        """
        translation = self.apply_to_point(other.translation)
        if self.quaternion is None or other.quaternion is None:
            return QuatAffine(None, translation, rotation=_multiply(self.rotation, other.rotation))
        return QuatAffine(quat_multiply(self.quaternion, other.quaternion), translation)

    def inverse(self) -> "QuatAffine":
        """Returns the inverse frames: x -> R^T (x - t)."""
        quaternion = self.quaternion
        if quaternion is not None:
            quaternion = quaternion * np.array([1, -1, -1, -1], dtype=quaternion.dtype)
        translation = [-x for x in apply_inverse_rot_to_vec(self.rotation, self.translation)]
        return QuatAffine(
            quaternion, translation, rotation=_transpose(self.rotation), normalize=False
        )

    def apply_to_point(self, point: Vector, extra_dims: int = 0) -> list[jax.Array]:
        """Maps points from the local frames to the global one.

        Args:
          point: three arrays [..., D1, .., Dk] with k = `extra_dims`.
          extra_dims: how many dimensions the points have after those of the frames.

        Returns:
          Three arrays of the same shape.

        Raises:
          AssertionError: if the points are not three arrays.
        """
        rotation, translation = self._expand_dims(extra_dims)
        rotated = apply_rot_to_vec(rotation, _vector_components("point", point))
        return [x + t for x, t in zip(rotated, translation)]

    def invert_point(self, transformed_point: Vector, extra_dims: int = 0) -> list[jax.Array]:
        """Maps points from the global frame to the local ones: undoes `apply_to_point`.

        Arguments, result and errors are those of `apply_to_point`.
        """
        rotation, translation = self._expand_dims(extra_dims)
        point = _vector_components("transformed_point", transformed_point)
        shifted = [x - t for x, t in zip(point, translation)]
        return apply_inverse_rot_to_vec(rotation, shifted)

    def _expand_dims(self, extra_dims: int) -> tuple[list[list[jax.Array]], list[jax.Array]]:
        """Returns rotation and translation with `extra_dims` dimensions of size 1 appended."""
        axes = tuple(range(-extra_dims, 0))
        return jax.tree_util.tree_map(
            lambda x: jnp.expand_dims(x, axes), (self.rotation, self.translation)
        )

    def _known_quaternion(self) -> jax.Array:
        if self.quaternion is None:
            raise ValueError(
                "quaternion is None, but needed here: make the frames with "
                "QuatAffine.from_rotation_translation, which computes it."
            )
        return self.quaternion

    def __repr__(self) -> str:
        return f"QuatAffine({self.quaternion!r}, {self.translation!r})"


def _flatten(affine: QuatAffine) -> tuple[tuple[tuple[Any, Any], ...], None]:
    names = ("quaternion", "rotation", "translation")
    return tuple((jax.tree_util.GetAttrKey(name), getattr(affine, name)) for name in names), None


def _unflatten(_: None, children: Iterable[Any]) -> QuatAffine:
    # Not through the constructor: JAX also puts placeholders that are not arrays into a pytree.
    affine = object.__new__(QuatAffine)
    affine.quaternion, affine.rotation, affine.translation = children
    return affine


jax.tree_util.register_pytree_with_keys(QuatAffine, _flatten, _unflatten)


def make_canonical_transform(
    n_xyz: jax.Array, ca_xyz: jax.Array, c_xyz: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the transformations that bring residues to the standard position.

    First the translation, then the rotation is to be applied. CA comes to the origin, C onto the
    positive x axis and N into the xy plane with y > 0, whatever the residue's chirality.

    Where C - CA is exactly parallel to z, AF2's forward result, kept here, is not a rotation: the
    angle around z is undefined and its sine and cosine both come out as zero.

    Args:
      n_xyz: nitrogen atoms [..., 3] in Å.
      ca_xyz: alpha carbon atoms [..., 3] in Å.
      c_xyz: carbonyl carbon atoms [..., 3] in Å.

    Returns:
      The translation [..., 3] in Å and the rotation [..., 3, 3].

    Raises:
      AssertionError: if the shapes differ or are not [..., 3].
    """
    _assert_last_dim("n_xyz", n_xyz, 3)
    assert_shape("ca_xyz", ca_xyz, "... 3, as n_xyz", n_xyz.shape)
    assert_shape("c_xyz", c_xyz, "... 3, as n_xyz", n_xyz.shape)

    translation = -ca_xyz
    n = _unstack(n_xyz + translation)
    x, y, z = _unstack(c_xyz + translation)
    zero, one = jnp.zeros_like(x), jnp.ones_like(x)

    # Around z, until C is in the xz plane.
    sin, cos = _over_norm(-y, x, y), _over_norm(x, x, y)
    around_z = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]]

    # Around y, until C is on the x axis.
    sin, cos = _over_norm(z, x, y, z), _over_norm(_safe_sqrt(x**2 + y**2), x, y, z)
    around_y = [[cos, zero, sin], [zero, one, zero], [-sin, zero, cos]]
    c_to_x = _multiply(around_y, around_z)

    # Around x, until N is in the xy plane.
    _, y, z = apply_rot_to_vec(c_to_x, n)
    sin, cos = _over_norm(-z, y, z), _over_norm(y, y, z)
    around_x = [[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]
    return translation, rot_list_to_tensor(_multiply(around_x, c_to_x))


def _over_norm(numerator: jax.Array, *vector: jax.Array) -> jax.Array:
    """Returns numerator / |vector|, 0 where both are 0.

    Every quotient gets a square root of its own, as in AF2: XLA turns a / sqrt(b) into
    a * rsqrt(b) only where nothing else uses the root, and the bits depend on it.
    """
    return numerator / jnp.sqrt(sum((x**2 for x in vector), start=_NORM_EPSILON))


def _safe_sqrt(x: jax.Array) -> jax.Array:
    """Returns sqrt(x) for x >= 0, with gradient 0 instead of infinity at 0."""
    positive = x > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, x, 1)), 0)


def make_transform_from_reference(
    n_xyz: jax.Array, ca_xyz: jax.Array, c_xyz: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns the transformations that bring standard residues to the given positions.

    First the rotation, then the translation is to be applied: the residues' frames, and the
    inverse of `make_canonical_transform`, whose arguments, limits and errors are the same.

    Returns:
      The rotation [..., 3, 3] and the translation [..., 3] in Å.
    """
    translation, rotation = make_canonical_transform(n_xyz, ca_xyz, c_xyz)
    return jnp.swapaxes(rotation, -1, -2), -translation
