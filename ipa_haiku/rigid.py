"""One adapter from any frames object to plain arrays, and from those to frames that move points.

The only place that knows what frames objects look like. AF2's classes are recognised by their
attributes, so that `alphafold` need not be installed.
"""

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp

from ipa_haiku.checks import assert_floating, assert_shape
from ipa_haiku.quat_affine import QuatAffine, rot_list_to_tensor, vec_list_to_tensor

_ACCEPTED = (
    "must be a QuatAffine (ipa_haiku's or AlphaFold's), AlphaFold's Rigid3Array, "
    "or a (rotation, translation) pair of arrays, got "
)


def to_rotation_translation(affine: Any, name: str = "affine") -> tuple[jax.Array, jax.Array]:
    """Returns rotation [..., N, 3, 3] and translation [..., N, 3] of any frames object.

    Args:
      affine: our `QuatAffine`, AF2's `QuatAffine`, AF2's `Rigid3Array`, or a tuple or list
        (rotation, translation) of arrays; floating-point.
      name: what the caller calls them, for the errors.

    Returns:
      Rotation and translation in the dtype and unit of `affine`. Only slices and stacks: no bit
      of an element changes.

    Raises:
      TypeError: if `affine` is none of these.
      AssertionError: if rotation or translation has another shape, the two have different
        leading dimensions or number of frames, or one is not floating-point.
    """
    rotation, translation = _as_pair(affine, name)
    assert_floating(f"{name}'s rotation", rotation)
    assert_floating(f"{name}'s translation", translation)
    batch = rotation.shape[:-2] or (None,)  # there is at least N
    assert_shape(f"{name}'s rotation", rotation, "... N 3 3", (*batch, 3, 3))
    assert_shape(f"{name}'s translation", translation, "... N 3", (*batch, 3))
    return rotation, translation


def _as_pair(affine: Any, name: str) -> tuple[jax.Array, jax.Array]:
    if isinstance(affine, (tuple, list)):
        if len(affine) == 2 and all(hasattr(x, "shape") and hasattr(x, "dtype") for x in affine):
            return affine[0], affine[1]
        raise TypeError(f"{name} {_ACCEPTED}a {type(affine).__name__} of something else.")
    rotation, translation = getattr(affine, "rotation", None), getattr(affine, "translation", None)
    if isinstance(rotation, list) and isinstance(translation, list):
        return _stack(rotation, translation, name)
    if hasattr(rotation, "xx") and hasattr(translation, "x"):
        rows = [[getattr(rotation, row + column) for column in "xyz"] for row in "xyz"]
        return _stack(rows, [getattr(translation, axis) for axis in "xyz"], name)
    shape = getattr(affine, "shape", None)
    got = type(affine).__name__ + ("" if shape is None else f" of shape {shape}")
    hint = " `QuatAffine.from_tensor` makes frames of that." if (shape or ())[-1:] == (7,) else ""
    raise TypeError(f"{name} {_ACCEPTED}{got}.{hint}")


def _stack(
    rotation: Sequence[Sequence[jax.Array]], translation: Sequence[jax.Array], name: str
) -> tuple[jax.Array, jax.Array]:
    chex.assert_equal_shape(
        [element for row in rotation for element in row],
        custom_message=f"{name}'s rotation must have elements of one shape",
    )
    chex.assert_equal_shape(
        translation, custom_message=f"{name}'s translation must have components of one shape"
    )
    return rot_list_to_tensor(rotation), vec_list_to_tensor(translation)


def to_quat_affine(rotation: jax.Array, translation: jax.Array) -> QuatAffine:
    """Frames that map points, from the arrays that `to_rotation_translation` returns.

    Args:
      rotation: [..., N, 3, 3].
      translation: [..., N, 3], of the same leading dimensions.

    Returns:
      Frames without a quaternion.
    """
    # Slices of a stack made by `to_rotation_translation` cost nothing under jit. The gradient of a
    # split is one concatenation, quick to compile.
    rows = [_components(row) for row in _components(rotation, axis=-2)]
    return QuatAffine(None, _components(translation), rotation=rows)


def _components(tensor: jax.Array, axis: int = -1) -> list[jax.Array]:
    return [jnp.squeeze(x, axis) for x in jax.lax.split(tensor, (1, 1, 1), axis=tensor.ndim + axis)]
