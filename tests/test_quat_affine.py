"""The twin of AF2's quat_affine: same bits, and finite gradients where AF2's are not."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import quat_affine as af2
from alphafold.model import r3

from ipa_haiku import quat_affine as ours
from ipa_haiku.quat_affine import QuatAffine

EPS = float(np.finfo(np.float32).eps)


# --- rotations, in float64 and without JAX -------------------------------------------------------


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


# --- one table of calls, made with either module -------------------------------------------------


def split(x):
    return [x[..., i] for i in range(x.shape[-1])]


def parts(affine):
    return affine.quaternion, affine.rotation, affine.translation


def frames(module, x):
    return module.QuatAffine(x["quat"], x["trans"], unstack_inputs=True)


def given_rotation(module, x):
    rot = module.rot_list_to_tensor(module.quat_to_rot(x["unit"]))
    return module.QuatAffine(x["unit"], x["trans"], rot, False, True)


CALLS = {
    "quat_to_rot": lambda m, x: m.quat_to_rot(x["unit"]),
    "quat_multiply": lambda m, x: m.quat_multiply(x["quat"], x["unit"]),
    "quat_multiply_by_vec": lambda m, x: m.quat_multiply_by_vec(x["quat"], x["trans"]),
    "rot_list_to_tensor": lambda m, x: m.rot_list_to_tensor(m.quat_to_rot(x["unit"])),
    "vec_list_to_tensor": lambda m, x: m.vec_list_to_tensor(split(x["trans"])),
    "apply_rot_to_vec": lambda m, x: m.apply_rot_to_vec(
        m.quat_to_rot(x["unit"]), split(x["trans"])
    ),
    "apply_rot_to_vec_unstack": lambda m, x: m.apply_rot_to_vec(
        m.quat_to_rot(x["unit"]), x["trans"], unstack=True
    ),
    "apply_inverse_rot_to_vec": lambda m, x: m.apply_inverse_rot_to_vec(
        m.quat_to_rot(x["unit"]), split(x["trans"])
    ),
    "make_canonical_transform": lambda m, x: m.make_canonical_transform(x["n"], x["ca"], x["c"]),
    "make_transform_from_reference": lambda m, x: m.make_transform_from_reference(
        x["n"], x["ca"], x["c"]
    ),
    "QuatAffine": lambda m, x: parts(frames(m, x)),
    "QuatAffine_lists": lambda m, x: parts(m.QuatAffine(x["quat"], split(x["trans"]))),
    "QuatAffine_rotation": lambda m, x: parts(given_rotation(m, x)),
    "QuatAffine_no_quaternion": lambda m, x: parts(
        m.QuatAffine(None, split(x["trans"]), m.quat_to_rot(x["unit"]))
    ),
    "from_tensor": lambda m, x: parts(
        m.QuatAffine.from_tensor(jnp.concatenate([x["unit"], x["trans"]], -1))
    ),
    "from_tensor_normalize": lambda m, x: parts(
        m.QuatAffine.from_tensor(jnp.concatenate([x["quat"], x["trans"]], -1), normalize=True)
    ),
    "to_tensor": lambda m, x: frames(m, x).to_tensor(),
    "apply_tensor_fn": lambda m, x: parts(frames(m, x).apply_tensor_fn(jnp.sin)),
    "apply_rotation_tensor_fn": lambda m, x: parts(frames(m, x).apply_rotation_tensor_fn(jnp.sin)),
    "scale_translation": lambda m, x: parts(frames(m, x).scale_translation(10.0)),
    "pre_compose": lambda m, x: parts(frames(m, x).pre_compose(x["update"])),
    "pre_compose_twice": lambda m, x: parts(
        frames(m, x).pre_compose(x["update"]).pre_compose(-0.5 * x["update"])
    ),
    "apply_to_point": lambda m, x: frames(m, x).apply_to_point(split(x["trans"])),
    "apply_to_point_1": lambda m, x: frames(m, x).apply_to_point(split(x["point"]), extra_dims=1),
    "apply_to_point_2": lambda m, x: frames(m, x).apply_to_point(
        split(x["point"][..., None, :]), extra_dims=2
    ),
    "invert_point": lambda m, x: frames(m, x).invert_point(split(x["update"])[:3]),
    "invert_point_1": lambda m, x: frames(m, x).invert_point(split(x["point"]), extra_dims=1),
}
NEW_CALLS = {
    "rot_to_quat": lambda m, x: m.rot_to_quat(m.quat_to_rot(x["unit"])),
    "from_backbone": lambda m, x: m.QuatAffine.from_backbone(x["n"], x["ca"], x["c"]),
    "compose": lambda m, x: frames(m, x).compose(given_rotation(m, x)),
    "inverse": lambda m, x: frames(m, x).inverse(),
}


def cotangent(x):
    """A fixed cotangent that differs from element to element."""
    return jnp.cos(jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape)


# Calls that are not jitted compile operation by operation; those of this many frames do so once.
EAGER = 6


def random_inputs(rng, n):
    def normal(*shape):
        return rng.normal(size=(n, *shape)).astype(np.float32)

    ca = 30 * normal(3)
    return {
        "quat": normal(4),
        "unit": random_quaternions(rng, n).astype(np.float32),
        "trans": 10 * normal(3),
        "update": normal(6),
        "point": normal(5, 3),
        "n": ca + normal(3),
        "ca": ca,
        "c": ca + normal(3),
    }


def assert_same_bits(actual, expected):
    actual, expected = jax.tree.leaves(actual), jax.tree.leaves(expected)
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected):
        x, y = np.asarray(x), np.asarray(y)
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
        np.testing.assert_array_equal(x.view(np.int32), y.view(np.int32))


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_as_af2(name):
    # 147: whole vector registers and a rest.
    x, call = random_inputs(np.random.default_rng(0), 147), CALLS[name]
    jitted = [jax.jit(lambda x, m=m: call(m, x))(x) for m in (ours, af2)]
    assert_same_bits(*jitted)


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_as_af2_without_jit(name):
    x = random_inputs(np.random.default_rng(0), EAGER)
    assert_same_bits(CALLS[name](ours, x), CALLS[name](af2, x))


# Seconds to compile, of functions that are made of others here.
SLOW_GRADIENTS = ("make_transform_from_reference", "pre_compose_twice")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_GRADIENTS)) for name in CALLS],
)
def test_same_gradient_as_af2(name):
    x = random_inputs(np.random.default_rng(1), 17)

    def loss(x, module):
        leaves = jax.tree.leaves(CALLS[name](module, x))
        return sum(jnp.vdot(leaf, cotangent(leaf)) for leaf in leaves)

    actual, expected = (jax.jit(jax.grad(loss), static_argnums=1)(x, m) for m in (ours, af2))
    for key in x:
        # The same products in sums of at most 100 terms: 1e-5 is 100 eps.
        np.testing.assert_allclose(
            actual[key], expected[key], rtol=0, atol=1e-5 * np.max(np.abs(expected[key]))
        )


@pytest.mark.parametrize("name", ["QUAT_TO_ROT", "QUAT_MULTIPLY", "QUAT_MULTIPLY_BY_VEC"])
def test_tables_are_af2s(name):
    assert_same_bits(getattr(ours, name), getattr(af2, name))


def test_every_public_name_has_af2s_parameters_and_defaults():
    def public(scope):
        members = inspect.getmembers(scope, lambda x: inspect.isfunction(x) or inspect.ismethod(x))
        return {k: v for k, v in members if k == "__init__" or not k.startswith("_")}

    for theirs, mine in [(af2, ours), (af2.QuatAffine, QuatAffine)]:
        for name, function in public(theirs).items():
            expected = inspect.signature(function).parameters.values()
            actual = inspect.signature(getattr(mine, name)).parameters.values()
            assert [(p.name, p.default) for p in actual] == [(p.name, p.default) for p in expected]


@pytest.mark.slow
def test_af2s_own_unit_tests_pass_with_this_module(monkeypatch):
    import unittest

    from alphafold.model import quat_affine_test

    monkeypatch.setattr(quat_affine_test, "quat_affine", ours)
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(quat_affine_test.QuatAffineTest)
    result = unittest.TestResult()
    suite.run(result)
    assert result.testsRun == 4
    assert result.wasSuccessful(), result.errors + result.failures


def test_af2s_functions_accept_our_frames():
    x = random_inputs(np.random.default_rng(2), EAGER)
    assert_same_bits(*(tuple(r3.rigids_from_quataffine(frames(m, x))) for m in (ours, af2)))
    assert repr(frames(ours, x)) == repr(frames(af2, x))


@pytest.mark.parametrize("name", CALLS)
def test_leading_dimensions(name):
    x = random_inputs(np.random.default_rng(3), EAGER)
    batched = {key: value.reshape(2, 3, *value.shape[1:]) for key, value in x.items()}
    flat, deep = (CALLS[name](ours, inputs) for inputs in (x, batched))
    assert_same_bits(deep, jax.tree.map(lambda a: a.reshape(2, 3, *a.shape[1:]), flat))


# --- rotation to quaternion ----------------------------------------------------------------------

tensor_to_quat = jax.jit(functools.partial(ours.rot_to_quat, unstack_inputs=True))


def test_rot_to_quat_inverts_quat_to_rot():
    q = random_quaternions(np.random.default_rng(4), 10_000)
    rotation = rotation_matrices(q).astype(np.float32)
    actual = np.asarray(ours.rot_to_quat(rotation, unstack_inputs=True))
    assert np.all(actual[..., 0] >= 0)
    # Elements of 4 q_i q are sums of at most four rounded numbers of size one, divided by
    # 4 |q_i| >= 2: two eps, and one for the division.
    np.testing.assert_allclose(actual, same_sign(q, actual), rtol=0, atol=3 * EPS)
    theirs = same_sign(np.asarray(af2.rot_to_quat(rotation, unstack_inputs=True)), actual)
    # AF2's iterative eigenvector solver is itself up to 4 eps away from the float64 quaternions.
    np.testing.assert_allclose(actual, theirs, rtol=0, atol=8 * EPS)


@pytest.mark.parametrize("name", SPECIAL)
def test_rot_to_quat_of_special_rotations(name):
    q, rotation = SPECIAL[name]
    actual = np.asarray(ours.rot_to_quat(rotation.astype(np.float32), unstack_inputs=True))
    np.testing.assert_allclose(actual, same_sign(q, actual), rtol=0, atol=3 * EPS)
    nested = split(rotation.astype(np.float32))
    np.testing.assert_array_equal(
        actual, ours.rot_to_quat([split(row) for row in np.swapaxes(nested, 0, 1)])
    )


@pytest.mark.parametrize("angle", [1e-12, 1e-6, 1e-4])
def test_rot_to_quat_keeps_the_digits_of_tiny_angles(angle):
    q, rotation = axis_angle(OBLIQUE, angle)
    actual = tensor_to_quat(rotation.astype(np.float32))
    np.testing.assert_allclose(actual[1:], q[1:], rtol=4 * EPS)


def tangent(axis, rotation):
    """Derivative of exp(t [axis]x) R at t = 0."""
    x, y, z = axis
    return np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]]) @ rotation


def hamilton(p, q):
    """Quaternion product of two quaternions [4], spelled out."""
    return np.array(
        [
            p[0] * q[0] - p[1:] @ q[1:],
            *(p[0] * q[1:] + q[0] * p[1:] + np.cross(p[1:], q[1:])),
        ]
    )


@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.parametrize("axis", [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0)])
def test_rot_to_quat_derivative_is_half_the_angular_velocity(name, axis):
    _, rotation = SPECIAL[name]
    primal, derivative = jax.jvp(
        tensor_to_quat,
        (rotation.astype(np.float32),),
        (tangent(axis, rotation).astype(np.float32),),
    )
    expected = 0.5 * hamilton(np.array([0.0, *axis]), np.asarray(primal, np.float64))
    # As for the value, and the projection on the unit sphere once more.
    np.testing.assert_allclose(derivative, expected, rtol=0, atol=6 * EPS)


@pytest.mark.parametrize("name", [*SPECIAL, "random"])
def test_rot_to_quat_gradient_against_numerical_differences(name):
    rng = np.random.default_rng(5)
    rotation = rotation_matrices(random_quaternions(rng)) if name == "random" else SPECIAL[name][1]
    axis, weights, step = rng.normal(size=3), rng.normal(size=4), 1e-5
    with jax.enable_x64(True):
        base, pullback = jax.vjp(tensor_to_quat, rotation)
        assert base.dtype == jnp.float64
        (gradient,) = pullback(weights)

        def at(t):
            turned = axis_angle(axis, t * np.linalg.norm(axis))[1] @ rotation
            return same_sign(np.asarray(tensor_to_quat(turned)), np.asarray(base)) @ weights

        # Error of the difference: step^2 = 1e-10 from the third derivative, 1e-11 from rounding.
        expected = (at(step) - at(-step)) / (2 * step)
    actual = np.sum(np.asarray(gradient) * tangent(axis, rotation))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-8)


def test_rot_to_quat_is_finite_for_matrices_that_are_no_rotations():
    matrices = jnp.stack([jnp.zeros((3, 3)), -jnp.eye(3), jnp.ones((3, 3)), 1e4 * jnp.eye(3)])
    value, pullback = jax.vjp(tensor_to_quat, matrices)
    np.testing.assert_allclose(jnp.linalg.norm(value, axis=-1), 1, atol=2 * EPS)
    assert np.all(np.isfinite(pullback(jnp.ones((4, 4)))[0]))


# --- gradients where they are easily NaN ---------------------------------------------------------

# N, CA, C of a standard residue in its own frame, in Å.
STANDARD_RESIDUE = np.array([[-0.525, 1.363, 0.0], [0.0, 0.0, 0.0], [1.526, 0.0, 0.0]])


@pytest.mark.parametrize("name", CALLS | NEW_CALLS)
def test_gradient_is_finite_at_identity_and_half_turns(name):
    quaternions, rotations = (np.stack(x).astype(np.float32) for x in zip(*EXACT.values()))
    n, ca, c = np.einsum("nij,aj->ani", rotations, STANDARD_RESIDUE.astype(np.float32))
    x = random_inputs(np.random.default_rng(6), len(EXACT))
    x |= {"quat": quaternions, "unit": quaternions, "n": n, "ca": ca, "c": c}
    x |= {"update": np.zeros_like(x["update"])}
    value, pullback = jax.vjp(lambda x: (CALLS | NEW_CALLS)[name](ours, x), x)
    gradients = pullback(jax.tree.map(cotangent, value))
    assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((value, gradients)))
    assert any(np.any(g != 0) for g in jax.tree.leaves(gradients))


DEGENERATE_RESIDUES = {
    "c_above_ca": ([1.0, 0.5, 0.2], [0, 0, 0], [0, 0, 1.5]),
    "c_below_ca": ([1.0, 0.5, 0.2], [0, 0, 0], [0, 0, -1.5]),
    "on_one_line": ([-1.0, 0, 0], [0, 0, 0], [1.5, 0, 0]),
    "all_in_one_point": ([1.0, 1, 1], [1.0, 1, 1], [1.0, 1, 1]),
}


@pytest.mark.parametrize("name", DEGENERATE_RESIDUES)
@pytest.mark.parametrize("function", ["make_canonical_transform", "make_transform_from_reference"])
def test_degenerate_residues_have_af2s_value_and_finite_gradients(function, name):
    atoms = [jnp.asarray([atom], jnp.float32) for atom in DEGENERATE_RESIDUES[name]]
    theirs = jax.jit(getattr(af2, function))(*atoms)
    value, pullback = jax.vjp(jax.jit(getattr(ours, function)), *atoms)
    assert_same_bits(value, theirs)
    assert all(np.all(np.isfinite(g)) for g in pullback(jax.tree.map(jnp.ones_like, value)))


@pytest.mark.parametrize("scale", [0.0, 1e-30])
def test_vanishing_quaternion_normalises_to_the_identity(scale):
    q = jnp.array([[0.0, scale, 0.0, -scale], [0.0, 3.0, 0.0, 4.0]])

    def normalised(q):
        return QuatAffine(q, jnp.zeros((2, 3)), unstack_inputs=True).quaternion

    value, pullback = jax.vjp(normalised, q)
    np.testing.assert_allclose(value, [[1, 0, 0, 0], [0, 0.6, 0, 0.8]], atol=EPS)
    (gradient,) = pullback(jnp.ones((2, 4)))
    np.testing.assert_array_equal(gradient[0], 0)
    # (I - q q^T) 1 / 5 with q = (0, 0.6, 0, 0.8)
    np.testing.assert_allclose(gradient[1], [0.2, 0.032, 0.2, -0.024], atol=EPS)


@pytest.mark.parametrize("scale", [1e-18, 1e-6, 1e18])
def test_normalising_any_other_quaternion_keeps_af2s_bits(scale):
    q = np.random.default_rng(6).normal(size=(50, 4)).astype(np.float32) * np.float32(scale)
    x = {"quat": q, "trans": np.zeros((50, 3), np.float32)}
    assert_same_bits(*(jax.jit(lambda x, m=m: parts(frames(m, x)))(x) for m in (ours, af2)))


def test_nan_is_not_hidden_by_normalisation():
    assert np.all(np.isnan(QuatAffine(jnp.full(4, jnp.nan), jnp.zeros(3)).quaternion))


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
