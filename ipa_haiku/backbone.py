"""Residue frames from backbone atoms: these functions of AF2's `quat_affine.py`.

`ipa_haiku.quat_affine` has them all under AF2's names, and says how they differ from AF2's.
"""

import jax
import jax.numpy as jnp

from ipa_haiku.checks import assert_shape
from ipa_haiku.rotation import (
    apply_rot_to_vec,
    assert_last_dim,
    multiply_rotations,
    rot_list_to_tensor,
    unstack,
)

# AF2's guard in the norms of `make_canonical_transform`, in squared Å: lost beside any real bond
# (float32 keeps 1e-7 of it), it only keeps 0 / 0 away where atoms coincide or lie on a line.
_NORM_EPSILON = 1e-20


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
    assert_last_dim("n_xyz", n_xyz, 3)
    assert_shape("ca_xyz", ca_xyz, "... 3, as n_xyz", n_xyz.shape)
    assert_shape("c_xyz", c_xyz, "... 3, as n_xyz", n_xyz.shape)

    translation = -ca_xyz
    n = unstack(n_xyz + translation)
    x, y, z = unstack(c_xyz + translation)
    zero, one = jnp.zeros_like(x), jnp.ones_like(x)

    # Around z, until C is in the xz plane.
    sin, cos = _over_norm(-y, x, y), _over_norm(x, x, y)
    around_z = [[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]]

    # Around y, until C is on the x axis.
    sin, cos = _over_norm(z, x, y, z), _over_norm(_safe_sqrt(x**2 + y**2), x, y, z)
    around_y = [[cos, zero, sin], [zero, one, zero], [-sin, zero, cos]]
    c_to_x = multiply_rotations(around_y, around_z)

    # Around x, until N is in the xy plane.
    _, y, z = apply_rot_to_vec(c_to_x, n)
    sin, cos = _over_norm(-z, y, z), _over_norm(y, y, z)
    around_x = [[one, zero, zero], [zero, cos, -sin], [zero, sin, cos]]
    return translation, rot_list_to_tensor(multiply_rotations(around_x, c_to_x))


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
