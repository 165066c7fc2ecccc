"""`QuatAffine` as a value: a JAX pytree, constructors, compose and inverse, bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import quat_affine as af2
from rotations import (
    EAGER,
    EPS,
    STANDARD_RESIDUE,
    assert_same_bits,
    parts,
    random_quaternions,
    rotation_matrices,
    split,
)

from ipa_haiku import quat_affine as ours
from ipa_haiku.quat_affine import QuatAffine

# --- a JAX pytree --------------------------------------------------------------------------------


def random_frames(seed, *shape, far=10.0):
    rng = np.random.default_rng(seed)
    trans = far * rng.normal(size=(*shape, 3)).astype(np.float32)
    quat = random_quaternions(rng, *shape).astype(np.float32)
    return QuatAffine(quat, trans, unstack_inputs=True)


def without_quaternion(affine):
    return QuatAffine(None, affine.translation, rotation=affine.rotation)


@pytest.mark.parametrize("change", [lambda affine: affine, without_quaternion], ids=["all", "none"])
def test_flattening_keeps_everything(change):
    affine = change(random_frames(0, EAGER))
    leaves, structure = jax.tree.flatten(affine)
    assert len(leaves) == (12 if affine.quaternion is None else 13)
    again = jax.tree.unflatten(structure, leaves)
    assert (again.quaternion is None) == (affine.quaternion is None)
    assert_same_bits(parts(again), parts(affine))
    assert_same_bits(parts(jax.jit(lambda a: a)(affine)), parts(affine))


def test_unflattening_does_not_check_or_normalise():
    affine = random_frames(0, EAGER)
    doubled = jax.tree.map(lambda x: 2 * x, affine)
    assert_same_bits(doubled.quaternion, 2 * affine.quaternion)
    placeholders = jax.tree.map(lambda x: object(), affine)
    assert len(placeholders.rotation) == 3
    shapes = jax.eval_shape(lambda a: a.inverse(), affine)
    assert shapes.quaternion.shape == (EAGER, 4)


def test_vmap_equals_batched_call():
    affine, other = random_frames(1, 4, 3), random_frames(2, 4, 3)
    assert_same_bits(jax.vmap(QuatAffine.compose)(affine, other), affine.compose(other))


def test_grad_with_respect_to_frames():
    affine = random_frames(3, EAGER)
    gradient = jax.grad(lambda a: jnp.sum(a.to_tensor() ** 2))(affine)
    assert isinstance(gradient, QuatAffine)
    np.testing.assert_allclose(gradient.to_tensor(), 2 * affine.to_tensor(), rtol=EPS)
    np.testing.assert_array_equal(jnp.stack(gradient.rotation[0]), 0)


def test_scan_over_a_carry_of_frames():
    update = jnp.asarray(np.random.default_rng(7).normal(size=(8, 5, 6)), jnp.float32)

    def step(affine, u):
        affine = affine.pre_compose(u)
        return affine, affine.to_tensor()

    last, trajectory = jax.lax.scan(step, QuatAffine.identity(5), update)
    expected = af2.QuatAffine(jnp.tile(jnp.array([1.0, 0, 0, 0]), (5, 1)), [jnp.zeros(5)] * 3)
    for u in update:
        expected = expected.pre_compose(u)
    # Eight products of rotations, compiled together here and one by one there; translations
    # of a few units.
    np.testing.assert_allclose(last.to_tensor(), expected.to_tensor(), atol=8 * 8 * EPS)
    assert_same_bits(last.to_tensor(), trajectory[-1])


# --- constructors, compose, inverse --------------------------------------------------------------


@pytest.mark.parametrize("n", [4, (4,), (2, 3), ()])
def test_identity(n):
    affine = QuatAffine.identity(n)
    shape = (n,) if isinstance(n, int) else n
    assert affine.to_tensor().shape == (*shape, 7)
    np.testing.assert_array_equal(affine.to_tensor(), np.broadcast_to(np.eye(1, 7)[0], (*shape, 7)))
    rotation = ours.rot_list_to_tensor(affine.rotation)
    np.testing.assert_array_equal(rotation, np.broadcast_to(np.eye(3), (*shape, 3, 3)))


def test_from_rotation_translation_keeps_the_rotation():
    q = random_quaternions(np.random.default_rng(8), 2, 5)
    rotation = rotation_matrices(q).astype(np.float32)
    translation = np.arange(30, dtype=np.float32).reshape(2, 5, 3)
    affine = QuatAffine.from_rotation_translation(rotation, translation)
    assert_same_bits(ours.rot_list_to_tensor(affine.rotation), rotation)
    assert_same_bits(ours.vec_list_to_tensor(affine.translation), translation)
    assert_same_bits(affine.quaternion, ours.rot_to_quat(rotation, unstack_inputs=True))


def gram_schmidt(n, ca, c):
    """Frames of residues in float64: x along CA-C, N in the xy plane with y > 0."""
    x = c - ca
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    y = n - ca
    y -= np.sum(x * y, axis=-1, keepdims=True) * x
    y /= np.linalg.norm(y, axis=-1, keepdims=True)
    return np.stack([x, y, np.cross(x, y)], axis=-1)


@pytest.mark.parametrize("far", [0.0, 1000.0])
def test_from_backbone(far):
    rng = np.random.default_rng(9)
    rotation = rotation_matrices(random_quaternions(rng, 200))
    centre = far * rng.normal(size=(200, 1, 3))
    residues = np.einsum("nij,aj->nai", rotation, STANDARD_RESIDUE) + centre
    n, ca, c = np.moveaxis(residues.astype(np.float32), 1, 0)
    affine = jax.jit(QuatAffine.from_backbone)(n, ca, c)
    actual = ours.rot_list_to_tensor(affine.rotation)
    # The differences of nearby float32 atoms are exact, so that the distance from the origin costs
    # nothing. Each element is a product of three sines or cosines (1 eps each) in a sum of two;
    # an error of the direction of N grows by 1 / sin(N-CA-C) = 1.1.
    expected = gram_schmidt(*(a.astype(np.float64) for a in (n, ca, c)))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=6 * EPS)
    assert_same_bits(ours.vec_list_to_tensor(affine.translation), ca)
    reference, _ = jax.jit(ours.make_transform_from_reference)(n, ca, c)
    assert_same_bits(actual, reference)
    from_quaternion = ours.rot_list_to_tensor(ours.quat_to_rot(affine.quaternion))
    # R is quadratic in q: twice the 3 eps of rot_to_quat more.
    np.testing.assert_allclose(from_quaternion, expected, rtol=0, atol=12 * EPS)


@pytest.mark.parametrize("change", [lambda affine: affine, without_quaternion], ids=["all", "none"])
def test_compose_applies_the_other_first(change):
    first, second = random_frames(10, EAGER), change(random_frames(11, EAGER))
    point = split(jnp.asarray(np.random.default_rng(12).normal(size=(6, 3)), jnp.float32))
    product = second.compose(first)
    assert (product.quaternion is None) == (second.quaternion is None)
    expected = jnp.stack(second.apply_to_point(first.apply_to_point(point)))
    # Coordinates of up to 30 through two rotations.
    np.testing.assert_allclose(
        jnp.stack(product.apply_to_point(point)), expected, rtol=0, atol=30 * 8 * EPS
    )


@pytest.mark.parametrize("change", [lambda affine: affine, without_quaternion], ids=["all", "none"])
def test_inverse(change):
    affine = change(random_frames(13, EAGER))
    inverse = affine.inverse()
    assert (inverse.quaternion is None) == (affine.quaternion is None)
    point = split(jnp.asarray(np.random.default_rng(14).normal(size=(6, 3)), jnp.float32))
    # Coordinates of up to 30 through two rotations.
    np.testing.assert_allclose(
        jnp.stack(inverse.apply_to_point(point)),
        jnp.stack(affine.invert_point(point)),
        rtol=0,
        atol=30 * 8 * EPS,
    )
    if affine.quaternion is not None:
        identity = affine.compose(inverse).to_tensor()
        np.testing.assert_allclose(identity[:, :4], [[1, 0, 0, 0]] * 6, atol=4 * EPS)
        rotation = ours.rot_list_to_tensor(ours.quat_to_rot(inverse.quaternion))
        np.testing.assert_allclose(
            rotation, ours.rot_list_to_tensor(inverse.rotation), atol=4 * EPS
        )


def test_long_chains_of_compose_stay_rotations():
    turn = random_frames(15, 5, far=0.0)
    last, _ = jax.lax.scan(lambda a, _: (a.compose(turn), None), turn, length=1000)
    rotation = ours.rot_list_to_tensor(last.rotation)
    gram = jnp.einsum("nij,nkj->nik", rotation, rotation, precision="highest")
    np.testing.assert_allclose(gram, np.broadcast_to(np.eye(3), (5, 3, 3)), atol=8 * EPS)


# --- bad input -----------------------------------------------------------------------------------

Q, T, R = jnp.ones((5, 4)), jnp.ones((5, 3)), jnp.ones((5, 3, 3))
BAD_SHAPES = {
    "quaternion must": lambda: QuatAffine(T, T, unstack_inputs=True),
    "translation must have shape": lambda: QuatAffine(Q, Q, unstack_inputs=True),
    "translation must be 3 arrays, got 5": lambda: QuatAffine(Q, T),
    "rotation must have shape": lambda: QuatAffine(Q, T, R[:, :2], unstack_inputs=True),
    r"rotation must be 3 rows of 3 arrays, got rows of \[3, 3\]": lambda: QuatAffine(
        Q, split(T), [split(T), split(T)]
    ),
    "tensor must": lambda: QuatAffine.from_tensor(Q),
    "update must": lambda: QuatAffine.identity(5).pre_compose(T),
    "rot must have shape": lambda: ours.rot_to_quat(R[..., :2], unstack_inputs=True),
    "rot must be 3 rows": lambda: ours.rot_to_quat([split(Q)] * 3),
    "vec must have shape": lambda: ours.apply_rot_to_vec(ours.quat_to_rot(Q), Q, unstack=True),
    "vec must be 3 arrays": lambda: ours.apply_rot_to_vec(ours.quat_to_rot(Q), split(Q)),
    "^(?!transformed).*point must be 3": lambda: QuatAffine.identity(5).apply_to_point(split(Q)),
    "transformed_point must be 3": lambda: QuatAffine.identity(5).invert_point(split(Q)),
    "normalized_quat must": lambda: ours.quat_to_rot(T),
    "quat2 must": lambda: ours.quat_multiply(Q, T),
    "n_xyz must": lambda: ours.make_canonical_transform(Q, Q, Q),
    "ca_xyz must": lambda: ours.make_canonical_transform(T, T[:4], T),
    "c_xyz must": lambda: QuatAffine.from_backbone(T, T, T[None]),
}


@pytest.mark.parametrize("message", BAD_SHAPES)
def test_wrong_shapes_are_named(message):
    with pytest.raises(AssertionError, match=message):
        BAD_SHAPES[message]()
    with pytest.raises(AssertionError, match=message):
        jax.eval_shape(BAD_SHAPES[message])


def test_frames_without_a_quaternion_say_so():
    with pytest.raises(ValueError, match="quaternion and rotation"):
        QuatAffine(None, split(T))
    affine = without_quaternion(QuatAffine.identity(5))
    for call in (affine.to_tensor, lambda: affine.pre_compose(jnp.zeros((5, 6)))):
        with pytest.raises(ValueError, match="quaternion is None"):
            call()
