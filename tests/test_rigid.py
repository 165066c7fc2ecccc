"""Any frames object becomes the same two arrays; points move between frames with AF2's bits."""

import functools
import re
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import geometry
from alphafold.model import quat_affine as af2

from ipa_haiku import rigid
from ipa_haiku.quat_affine import QuatAffine, quat_to_rot, rot_list_to_tensor


def random_frames(*shape):
    """Rotation [..., 3, 3] and translation [..., 3] of random frames."""
    rng = np.random.default_rng(0)
    q = rng.normal(size=(*shape, 4))
    q = jnp.asarray(q / np.linalg.norm(q, axis=-1, keepdims=True), jnp.float32)
    translation = jnp.asarray(10 * rng.normal(size=(*shape, 3)), jnp.float32)
    return rot_list_to_tensor(quat_to_rot(q)), translation


KINDS = {
    "ours": lambda r, t: QuatAffine(None, t, rotation=r, unstack_inputs=True),
    "af2_quat_affine": lambda r, t: af2.QuatAffine(None, t, rotation=r, unstack_inputs=True),
    "af2_rigid3array": lambda r, t: geometry.Rigid3Array(
        geometry.Rot3Array.from_array(r), geometry.Vec3Array.from_array(t)
    ),
    "tuple": lambda r, t: (r, t),
    "list": lambda r, t: [r, t],
    "numpy": lambda r, t: (np.asarray(r), np.asarray(t)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1,), (17,), (2, 3, 5)])
def test_every_kind_gives_the_same_arrays(kind, shape):
    rotation, translation = random_frames(*shape)
    affine = KINDS[kind](rotation, translation)
    results = [rigid.to_rotation_translation(affine)]
    results.append(jax.jit(lambda: rigid.to_rotation_translation(affine))())
    if kind.startswith("af2_quat"):
        del affine.quaternion  # only rotation and translation are looked at
        results.append(rigid.to_rotation_translation(affine))
    for actual in results:
        np.testing.assert_array_equal(actual[0], rotation)
        np.testing.assert_array_equal(actual[1], translation)


@pytest.mark.parametrize("kind", ["ours", "af2_rigid3array", "tuple"])
def test_frames_as_an_argument_of_jit_and_grad(kind):
    rotation, translation = random_frames(4)
    affine = KINDS[kind](rotation, translation)

    def loss(affine):
        r, t = rigid.to_rotation_translation(affine)
        return jnp.sum(r**2) / 2 + jnp.sum(t**2) / 2

    gradient = jax.jit(jax.grad(loss))(affine)
    actual = rigid.to_rotation_translation(gradient)
    np.testing.assert_array_equal(actual[0], rotation)
    np.testing.assert_array_equal(actual[1], translation)


def move(method, rotation, translation, point):
    """What a module does with arrays of frames and points."""
    frames = rigid.to_quat_affine(rotation, translation)
    extra_dims = point.ndim - translation.ndim
    return jnp.stack(getattr(frames, method)([point[..., i] for i in range(3)], extra_dims), -1)


@pytest.mark.parametrize("extra", [(), (5,), (3, 4)], ids=["N", "NK", "NHP"])
@pytest.mark.parametrize("method", ["apply_to_point", "invert_point"])
@pytest.mark.parametrize("shape", [(17,), (2, 9)])
def test_points_have_af2s_bits(shape, method, extra):
    rotation, translation = random_frames(*shape)
    point = jnp.asarray(np.random.default_rng(1).normal(size=(*shape, *extra, 3)), jnp.float32)

    @jax.jit
    def theirs(rotation, translation, point):
        affine = af2.QuatAffine(None, translation, rotation=rotation, unstack_inputs=True)
        components = getattr(affine, method)([point[..., i] for i in range(3)], len(extra))
        return jnp.stack(components, axis=-1)

    actual = jax.jit(functools.partial(move, method))(rotation, translation, point)
    assert actual.shape == point.shape
    expected = np.asarray(theirs(rotation, translation, point))
    np.testing.assert_array_equal(np.asarray(actual).view(np.int32), expected.view(np.int32))


def test_points_against_a_matrix_product():
    rotation, translation = (np.asarray(x, np.float64) for x in random_frames(6))
    point = np.random.default_rng(2).normal(size=(6, 2, 5, 3))
    expected = np.einsum("nij,nhpj->nhpi", rotation, point) + translation[:, None, None]
    arrays = [jnp.asarray(x, jnp.float32) for x in (rotation, translation, point)]
    there = move("apply_to_point", *arrays)
    back = move("invert_point", arrays[0], arrays[1], there)
    # Coordinates of up to 30, three products each way.
    tolerance = 30 * 4 * np.finfo(np.float32).eps
    np.testing.assert_allclose(there, expected, rtol=0, atol=tolerance)
    np.testing.assert_allclose(back, point, rtol=0, atol=2 * tolerance)


@pytest.mark.parametrize(
    "affine",
    [
        None,
        jnp.zeros((5, 7)),
        random_frames(3)[:1],
        (*random_frames(3), None),
        ([[1.0]], [1.0]),
        {"rotation": 1, "translation": 2},
        types.SimpleNamespace(rotation=jnp.zeros((3, 3, 3)), translation=jnp.zeros((3, 3))),
    ],
    ids=["none", "array", "one", "three", "nested_lists", "dict", "object"],
)
def test_other_objects_are_refused(affine):
    with pytest.raises(TypeError, match=r"affine must be a QuatAffine.*Rigid3Array.*pair"):
        rigid.to_rotation_translation(affine)


@pytest.mark.parametrize("shape", [(5, 7), (5, 4, 4), (5, 3, 3), ()])
def test_af2s_seven_numbers_are_told_what_makes_frames_of_them(shape):
    with pytest.raises(TypeError, match=re.escape(f"of shape {shape}.")) as error:
        rigid.to_rotation_translation(jnp.zeros(shape))
    assert ("QuatAffine.from_tensor" in str(error.value)) == (shape == (5, 7))


R, T = random_frames(6)
WRONG = {
    "rotation_columns": (R[..., :2], T, "affine's rotation must have shape"),
    "rotation_rows": (R[:, :2], T, "affine's rotation must have shape"),
    "rotation_without_n": (R[0], T[0], "affine's rotation must have shape"),
    "rotation_rank": (T[0], T, "affine's rotation must have shape"),
    "translation_components": (R, jnp.zeros((6, 4)), "affine's translation must have shape"),
    "translation_rank": (R, T[None], "affine's translation must have shape"),
    "number": (R, T[:5], "affine's translation must have shape"),
    "batch": (jnp.stack([R, R]), jnp.stack([T, T, T]), "affine's translation must have shape"),
    "integer_rotation": (R.astype(int), T, "affine's rotation must be floating-point"),
    "integer_translation": (R, T.astype(int), "affine's translation must be floating-point"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arrays_are_named(name):
    rotation, translation, message = WRONG[name]
    with pytest.raises(AssertionError, match=message):
        rigid.to_rotation_translation((rotation, translation))


@pytest.mark.parametrize("kind", ["ours", "af2_quat_affine"])
def test_wrong_components_of_objects_are_named(kind):
    affine = KINDS[kind](R, T)
    affine.translation[1] = affine.translation[1][:5]
    with pytest.raises(AssertionError, match="affine's translation"):
        rigid.to_rotation_translation(affine)
    affine = KINDS[kind](R, T[:5])
    with pytest.raises(AssertionError, match="affine's translation"):
        rigid.to_rotation_translation(affine)
    affine = KINDS[kind](R[0], T[0])  # frames without N
    with pytest.raises(AssertionError, match="affine's rotation"):
        rigid.to_rotation_translation(affine)
