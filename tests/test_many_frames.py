"""Tens of thousands of frames at once, and many leading dimensions: where XLA:CPU has had faults.

jaxlib 0.10.2 multiplies matrices of three rows wrongly from some 33,000 columns on, and crashes on
products of many dimensions. Nothing here may depend on either.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rotations import (
    EPS,
    STANDARD_RESIDUE,
    random_quaternions,
    rotation_matrices,
    same_sign,
    split,
)

from ipa_haiku import FactorizedPair, LogitScales, QuatAffine, invariant_point_attention
from ipa_haiku import quat_affine as ours


def draw(num_frame):
    """Arguments in float32."""
    rng = np.random.default_rng(0)
    quaternion = random_quaternions(rng, num_frame)
    rotation = rotation_matrices(quaternion)
    translation = 10 * rng.normal(size=(num_frame, 3))
    residue = np.einsum("nij,aj->ani", rotation, STANDARD_RESIDUE) + translation
    arrays = {
        "quaternion": quaternion,
        "other": random_quaternions(rng, num_frame),
        "rotation": rotation,
        "translation": translation,
        "point": 10 * rng.normal(size=(num_frame, 3)),
        "residue": residue,
    }
    return {name: x.astype(np.float32) for name, x in arrays.items()}


@jax.jit
def of_package(quaternion, other, rotation, translation, point, residue):
    frames = QuatAffine(quaternion, translation, unstack_inputs=True)
    given = QuatAffine.from_rotation_translation(rotation, translation)
    product = frames.compose(given)
    inverse = given.inverse()
    backbone = QuatAffine.from_backbone(*residue)
    point = split(point)
    return {
        "quat_to_rot": ours.rot_list_to_tensor(ours.quat_to_rot(quaternion)),
        "rot_to_quat": given.quaternion,
        "quat_multiply": ours.quat_multiply(quaternion, other),
        "compose": ours.rot_list_to_tensor(product.rotation),
        "compose_translation": ours.vec_list_to_tensor(product.translation),
        "inverse_translation": ours.vec_list_to_tensor(inverse.translation),
        "apply_to_point": jnp.stack(given.apply_to_point(point), axis=-1),
        "invert_point": jnp.stack(given.invert_point(point), axis=-1),
        "from_backbone": ours.rot_list_to_tensor(backbone.rotation),
        # What a sum and a maximum over components give, which XLA fuses with all of the above.
        "sum": sum(given.apply_to_point(point)),
        "maximum": jnp.max(jnp.stack(given.invert_point(point), axis=-1), axis=-1),
    }


def in_numpy(quaternion, other, rotation, translation, point, residue):
    """The same in float64 and by matrices."""

    def turn(matrix, vector):
        return np.einsum("nij,nj->ni", matrix, vector)

    def hamilton(p, q):
        vector = p[:, :1] * q[:, 1:] + q[:, :1] * p[:, 1:] + np.cross(p[:, 1:], q[:, 1:])
        return np.concatenate([p[:, :1] * q[:, :1] - np.sum(p[:, 1:] * q[:, 1:], -1)[:, None],
                               vector], axis=-1)  # fmt: skip

    unit = quaternion / np.linalg.norm(quaternion, axis=-1, keepdims=True)
    own, back = rotation_matrices(unit), np.swapaxes(rotation, -1, -2)
    n, ca, c = residue
    x = (c - ca) / np.linalg.norm(c - ca, axis=-1, keepdims=True)
    y = (n - ca) - np.sum(x * (n - ca), axis=-1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    there, here = turn(rotation, point) + translation, turn(back, point - translation)
    return {
        "quat_to_rot": rotation_matrices(quaternion),
        "quat_multiply": hamilton(quaternion, other),
        "compose": own @ rotation,
        "compose_translation": turn(own, translation) + translation,
        "inverse_translation": turn(back, -translation),
        "apply_to_point": there,
        "invert_point": here,
        "from_backbone": np.stack([x, y, np.cross(x, y)], axis=-1),
        "sum": np.sum(there, axis=-1),
        "maximum": np.max(here, axis=-1),
    }


@pytest.mark.parametrize("num_frame", [40_000, 100_000])
def test_against_numpy(num_frame):
    arrays = draw(num_frame)
    actual = jax.device_get(of_package(**arrays))
    expected = in_numpy(**{name: x.astype(np.float64) for name, x in arrays.items()})
    quaternion = actual.pop("rot_to_quat")
    expected_quaternion = random_quaternions(np.random.default_rng(0), num_frame)
    expected_quaternion = same_sign(expected_quaternion, quaternion)
    np.testing.assert_allclose(quaternion, expected_quaternion, rtol=0, atol=4 * EPS)
    assert actual.keys() == expected.keys()
    for name, x in expected.items():
        # A dozen roundings of numbers that are at most as large as coordinates and their sums; a
        # float32 atom 40 units away is known to 2 eps * 40, of bonds of 1.4.
        size = 40 / 1.4 if name == "from_backbone" else max(np.max(np.abs(x)), 1.0)
        np.testing.assert_allclose(actual[name], x, rtol=0, atol=12 * EPS * size, err_msg=name)


def test_factors_with_three_leading_dimensions():
    """The core and its gradient, jitted, against one protein at a time."""
    rng = np.random.default_rng(0)
    batch, num_query, num_key, num_head, num_channel = (2, 1, 3), 4, 5, 2, 3

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    def of_queries(*shape):
        return normal(*batch, num_query, *shape)

    def of_keys(*shape):
        return normal(*batch, num_key, *shape)

    batched = {
        "q_scalar": of_queries(num_head, 4), "k_scalar": of_keys(num_head, 4),
        "v_scalar": of_keys(num_head, 3), "q_point": of_queries(num_head, 2, 3),
        "k_point": of_keys(num_head, 2, 3), "v_point": of_keys(num_head, 2, 3),
        "inputs_2d": FactorizedPair(of_queries(2, num_channel), of_keys(2, num_channel)),
    }  # fmt: skip
    weights = {
        "pair_weights": normal(num_channel, num_head),
        "pair_bias": normal(num_head),
        "point_weights": jnp.ones(num_head),
    }

    def loss(batched, weights):
        masks = [jnp.ones(batched[name].shape[:-2]) for name in ("q_scalar", "k_scalar")]
        result = invariant_point_attention(
            **batched,
            **weights,
            q_mask=masks[0],
            k_mask=masks[1],
            logit_scales=LogitScales(0.5, 0.5),
        )
        return sum(jnp.sum(jnp.square(x)) for x in result[:3])

    run = jax.jit(jax.value_and_grad(loss, (0, 1)))
    value, (of_batched, of_weights) = run(batched, weights)
    ones = [
        run(jax.tree.map(lambda x, i=index: x[i], batched), weights) for index in np.ndindex(batch)
    ]
    np.testing.assert_allclose(value, sum(x for x, _ in ones), rtol=20 * EPS)
    stacked = jax.tree.map(lambda *x: np.stack(x).reshape(*batch, *x[0].shape),
                           *[x for _, (x, _) in ones])  # fmt: skip
    total = jax.tree.map(lambda *x: sum(x), *[x for _, (_, x) in ones])
    for x, y in zip(jax.tree.leaves((of_batched, of_weights)), jax.tree.leaves((stacked, total))):
        np.testing.assert_allclose(x, y, rtol=0, atol=40 * EPS * max(np.max(np.abs(y)), 1.0))
