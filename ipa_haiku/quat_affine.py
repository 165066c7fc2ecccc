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
The functions of these alone are in `rotation.py`, those of backbone atoms in `backbone.py`; all can
be imported from here.
"""

import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku.backbone import make_canonical_transform, make_transform_from_reference
from ipa_haiku.rotation import (
    QUAT_MULTIPLY,
    QUAT_MULTIPLY_BY_VEC,
    QUAT_TO_ROT,
    Rotation,
    Vector,
    apply_inverse_rot_to_vec,
    apply_rot_to_vec,
    assert_last_dim,
    multiply_rotations,
    normalize_quaternion,
    quat_multiply,
    quat_multiply_by_vec,
    quat_to_rot,
    rot_list_to_tensor,
    rot_to_quat,
    rotation_rows,
    transpose_rotation,
    unstack,
    vec_list_to_tensor,
    vector_components,
)

# AF2's names.
__all__ = [
    "QUAT_MULTIPLY",
    "QUAT_MULTIPLY_BY_VEC",
    "QUAT_TO_ROT",
    "QuatAffine",
    "apply_inverse_rot_to_vec",
    "apply_rot_to_vec",
    "make_canonical_transform",
    "make_transform_from_reference",
    "quat_multiply",
    "quat_multiply_by_vec",
    "quat_to_rot",
    "rot_list_to_tensor",
    "rot_to_quat",
    "vec_list_to_tensor",
]


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
            assert_last_dim("quaternion", quaternion, 4)
            if normalize:
                quaternion = normalize_quaternion(quaternion)
        self.quaternion = quaternion
        self.translation = vector_components("translation", translation, unstack_inputs)
        if rotation is not None:
            self.rotation = rotation_rows("rotation", rotation, unstack_inputs)
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
        assert_last_dim("tensor", tensor, 7)
        return cls(tensor[..., :4], unstack(tensor[..., 4:]), normalize=normalize)

    @classmethod
    def from_rotation_translation(cls, rotation: jax.Array, translation: jax.Array) -> "QuatAffine":
        """Makes frames from rotations [..., 3, 3] and translations [..., 3].

        The rotations are kept as they are; the quaternions are those of `rot_to_quat`.

        Raises:
          AssertionError: if `rotation` or `translation` does not have these last dimensions.
        """
        rows = rotation_rows("rotation", rotation, is_tensor=True)
        components = vector_components("translation", translation, is_tensor=True)
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
        shape = tuple(n) if isinstance(n, Sequence) else (operator.index(n),)
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
        assert_last_dim("update", update, 6)
        quaternion = self._known_quaternion()
        # q (1, x, y, z) = q + q (0, x, y, z)
        quaternion = quaternion + quat_multiply_by_vec(quaternion, update[..., :3])
        return QuatAffine(quaternion, self.apply_to_point(unstack(update[..., 3:])))

    def compose(self, other: "QuatAffine") -> "QuatAffine":
        """Returns frames that apply `other` first: x -> self(other(x)).

        The product is normalised again, so that long chains stay rotations. Where a quaternion is
        None, the result's is None and its rotation the matrix product.
        """
        translation = self.apply_to_point(other.translation)
        if self.quaternion is None or other.quaternion is None:
            return QuatAffine(
                None, translation, rotation=multiply_rotations(self.rotation, other.rotation)
            )
        return QuatAffine(quat_multiply(self.quaternion, other.quaternion), translation)

    def inverse(self) -> "QuatAffine":
        """Returns the inverse frames: x -> R^T (x - t)."""
        quaternion = self.quaternion
        if quaternion is not None:
            quaternion = quaternion * np.array([1, -1, -1, -1], dtype=quaternion.dtype)
        translation = [-x for x in apply_inverse_rot_to_vec(self.rotation, self.translation)]
        return QuatAffine(
            quaternion, translation, rotation=transpose_rotation(self.rotation), normalize=False
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
        rotated = apply_rot_to_vec(rotation, vector_components("point", point))
        return [x + t for x, t in zip(rotated, translation)]

    def invert_point(self, transformed_point: Vector, extra_dims: int = 0) -> list[jax.Array]:
        """Maps points from the global frame to the local ones: undoes `apply_to_point`.

        Arguments, result and errors are those of `apply_to_point`.
        """
        rotation, translation = self._expand_dims(extra_dims)
        point = vector_components("transformed_point", transformed_point)
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
