"""Rotations in float64, and what the tests of frames share."""

import jax
import numpy as np

EPS = float(np.finfo(np.float32).eps)
# Calls that are not jitted compile operation by operation; those of this many frames do so once.
EAGER = 6
STANDARD_RESIDUE = np.array([[-0.525, 1.363, 0.0], [0.0, 0.0, 0.0], [1.526, 0.0, 0.0]])


def axis_angle(axis, angle):
    """Unit quaternion [4] and rotation matrix [3, 3] of a rotation, by Rodrigues' formula."""
    axis = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    x, y, z = axis
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    rotation = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return np.array([np.cos(angle / 2), *(np.sin(angle / 2) * axis)]), rotation


def half_turn(axis):
    """The rotation by exactly 180 degrees, without the 1e-16 that is left of sin(pi)."""
    axis = np.asarray(axis, np.float64) / np.linalg.norm(axis)
    return np.array([0.0, *axis]), 2 * np.outer(axis, axis) - np.eye(3)


OBLIQUE = (1.0, -2.0, 3.0)
EXACT = {
    "identity": axis_angle([1, 0, 0], 0.0),
    "half_turn_x": half_turn([1, 0, 0]),
    "half_turn_y": half_turn([0, 1, 0]),
    "half_turn_z": half_turn([0, 0, 1]),
    "half_turn_oblique": half_turn(OBLIQUE),
    "half_turn_diagonal": half_turn([1, 1, 1]),
}
NEAR = {
    "tiny_1e-6": axis_angle(OBLIQUE, 1e-6),
    "tiny_1e-4": axis_angle(OBLIQUE, 1e-4),
    "near_half_turn_1e-3": axis_angle(OBLIQUE, np.pi - 1e-3),
    "near_half_turn_1e-6": axis_angle(OBLIQUE, np.pi - 1e-6),
    "beyond_half_turn_1e-3": axis_angle(OBLIQUE, np.pi + 1e-3),
    "four_equal_candidates": axis_angle([1, 1, 1], 2 * np.pi / 3),
    "two_equal_candidates": axis_angle([0, 0, 1], np.pi / 2),
}
SPECIAL = EXACT | NEAR


def random_quaternions(rng, *shape):
    q = rng.normal(size=(*shape, 4))
    return q / np.linalg.norm(q, axis=-1, keepdims=True)


def rotation_matrices(q):
    """Rotation matrices [..., 3, 3] of unit quaternions, in float64."""
    w, v = q[..., 0, None, None], q[..., 1:]
    x, y, z = np.moveaxis(v, -1, 0)
    zero = np.zeros_like(x)
    cross = np.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(*x.shape, 3, 3)
    outer = v[..., :, None] * v[..., None, :]
    return outer + w**2 * np.eye(3) + 2 * w * cross + cross @ cross


def same_sign(q, reference):
    """The one of q and -q that is closer to the reference."""
    return q * np.where(np.sum(q * reference, axis=-1, keepdims=True) < 0, -1, 1)


def split(x):
    return [x[..., i] for i in range(x.shape[-1])]


def parts(affine):
    return affine.quaternion, affine.rotation, affine.translation


def assert_same_bits(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(x.view(np.int32), y.view(np.int32))
