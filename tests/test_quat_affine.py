"""The twin of AF2's quat_affine: same bits, and finite gradients where AF2's are not."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import quat_affine as af2
from alphafold.model import r3
from implementations import QUICKLY
from rotations import (
    EAGER,
    EPS,
    EXACT,
    OBLIQUE,
    SPECIAL,
    STANDARD_RESIDUE,
    assert_same_bits,
    axis_angle,
    parts,
    random_quaternions,
    rotation_matrices,
    same_sign,
    split,
)

from ipa_haiku import quat_affine as ours
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.quat_affine import QuatAffine

# --- one table of calls, made with either module -------------------------------------------------


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


def all_calls(module, x):
    """Of every name in `CALLS`; in one program, as compiling one for each takes minutes."""
    return {name: call(module, x) for name, call in CALLS.items()}


def test_compiled_as_af2(count_bits):
    # 147: whole vector registers and a rest. XLA may fuse the two programs differently.
    x = random_inputs(np.random.default_rng(0), 147)
    actual, expected = (jax.jit(functools.partial(all_calls, m))(x) for m in (ours, af2))
    for name in CALLS:
        count_bits("compiled functions of frames", actual[name], expected[name])
        for a, b in zip(jax.tree.leaves(actual[name]), jax.tree.leaves(expected[name])):
            np.testing.assert_allclose(a, b, rtol=0, atol=1e-6 * max(np.abs(b).max(), 1.0))


@pytest.mark.parametrize("name", CALLS)
def test_same_bits_as_af2_without_jit(name):
    x = random_inputs(np.random.default_rng(0), EAGER)
    assert_same_bits(CALLS[name](ours, x), CALLS[name](af2, x))


@pytest.mark.slow
def test_same_gradients_as_af2():
    x = random_inputs(np.random.default_rng(1), 17)

    def gradients(module, x):
        def loss(x, name):
            leaves = jax.tree.leaves(CALLS[name](module, x))
            return sum(jnp.vdot(leaf, cotangent(leaf)) for leaf in leaves)

        return {name: jax.grad(loss)(x, name) for name in CALLS}

    actual, expected = (
        jax.jit(functools.partial(gradients, m), compiler_options=QUICKLY)(x) for m in (ours, af2)
    )
    for name in CALLS:
        for key in x:
            # The same products in sums of at most 100 terms: 1e-5 is 100 eps.
            y = expected[name][key]
            np.testing.assert_allclose(
                actual[name][key], y, rtol=0, atol=1e-5 * np.max(np.abs(y)), err_msg=name
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
    with enable_x64(True):
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
def test_gradients_are_finite_at_identity_and_half_turns():
    quaternions, rotations = (np.stack(x).astype(np.float32) for x in zip(*EXACT.values()))
    n, ca, c = np.einsum("nij,aj->ani", rotations, STANDARD_RESIDUE.astype(np.float32))
    x = random_inputs(np.random.default_rng(6), len(EXACT))
    x |= {"quat": quaternions, "unit": quaternions, "n": n, "ca": ca, "c": c}
    x |= {"update": np.zeros_like(x["update"])}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def values_and_gradients(x):
        results = {}
        for name, call in (CALLS | NEW_CALLS).items():
            value, pullback = jax.vjp(functools.partial(call, ours), x)
            results[name] = value, pullback(jax.tree.map(cotangent, value))
        return results

    for name, (value, gradients) in values_and_gradients(x).items():
        assert all(np.all(np.isfinite(g)) for g in jax.tree.leaves((value, gradients))), name
        assert any(np.any(g != 0) for g in jax.tree.leaves(gradients)), name


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
