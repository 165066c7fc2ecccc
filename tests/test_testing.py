"""The public assertions pass what is right, and fail what is wrong with a message that says so."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from draws import assert_draws_within_error_budget

from ipa_haiku import QuatAffine
from ipa_haiku.quat_affine import rot_list_to_tensor, vec_list_to_tensor
from ipa_haiku.testing import (
    assert_gradients_close,
    assert_se3_invariant,
    assert_within_error_budget,
    random_frames,
    random_motion,
    random_rotation,
)

KEY = jax.random.key(0)
EPS = float(np.finfo(np.float32).eps)


# --- random frames -------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(), (5,), (2, 3)])
def test_random_rotations_are_rotations(shape):
    rotation = np.asarray(random_rotation(KEY, shape), np.float64)
    assert rotation.shape == (*shape, 3, 3)
    identity = np.broadcast_to(np.eye(3), rotation.shape)
    np.testing.assert_allclose(rotation @ np.swapaxes(rotation, -1, -2), identity, atol=8 * EPS)
    np.testing.assert_allclose(np.linalg.det(rotation), 1, atol=8 * EPS)


def test_random_rotations_are_uniform():
    rotation = np.asarray(random_rotation(KEY, (20_000,)))
    # Of uniform rotations every element has mean 0 and variance 1/3.
    np.testing.assert_allclose(np.mean(rotation, axis=0), 0, atol=0.02)
    np.testing.assert_allclose(np.var(rotation, axis=0), 1 / 3, atol=0.01)


@pytest.mark.parametrize(
    ("batch", "options", "unit"), [((), {}, 10), ((2, 3), {"position_scale": 20.0}, 20)]
)
def test_random_frames_are_a_chain(batch, options, unit):
    frames = random_frames(KEY, 20, batch, **options)
    position = vec_list_to_tensor(frames.translation)
    assert position.shape == (*batch, 20, 3)
    steps = np.linalg.norm(np.diff(position, axis=-2), axis=-1)
    np.testing.assert_allclose(steps, 3.8 / unit, rtol=1e-5)
    np.testing.assert_allclose(np.mean(position, axis=-2), 0, atol=1e-5)
    assert rot_list_to_tensor(frames.rotation).shape == (*batch, 20, 3, 3)
    np.testing.assert_allclose(np.linalg.norm(frames.quaternion, axis=-1), 1, rtol=4 * EPS)


def test_random_motion_moves_by_the_distance():
    motion = random_motion(KEY, 100.0)
    np.testing.assert_allclose(np.linalg.norm(motion.translation), 100, rtol=4 * EPS)


def test_one_residue_and_one_key_again():
    frames = [random_frames(KEY, 1).to_tensor() for _ in range(2)]
    np.testing.assert_array_equal(*frames)
    np.testing.assert_array_equal(frames[0][:, 4:], 0)


# --- SE(3) invariance ----------------------------------------------------------------------------


def positions(frames):
    return vec_list_to_tensor(frames.translation)


def distances(frames):
    x = positions(frames)
    return jnp.linalg.norm(x[:, None] - x[None] + 1e-12, axis=-1)


def local(frames):
    """Positions of all residues in the frames of all others: invariant."""
    x = [t[None] - t[:, None] for t in frames.translation]
    rotation = frames.rotation
    return jnp.stack([sum(rotation[j][i][:, None] * x[j] for j in range(3)) for i in range(3)])


INVARIANT = {"distances": distances, "local positions": local}
RIGHT = {
    **INVARIANT,
    "a pytree": lambda f: {"d": distances(f), "l": [local(f)]},
    "constant": lambda f: jnp.ones(3),
}
WRONG = {
    "positions": positions,
    "norms, without the translation": lambda f: jnp.linalg.norm(positions(f), axis=-1),
    "differences, without the rotation": lambda f: positions(f)[1:] - positions(f)[:-1],
    "rotations": lambda f: rot_list_to_tensor(f.rotation),
    "NaN": lambda f: distances(f) * jnp.nan,
}


@pytest.mark.parametrize("translation", [1.0, 10.0, 1000.0])
@pytest.mark.parametrize("name", RIGHT)
def test_what_is_invariant_passes(name, translation):
    # Two coordinates are subtracted, each rounded when it is moved and after it is rotated.
    tolerance = 10 * EPS * (translation + 1)
    assert_se3_invariant(
        RIGHT[name], random_frames(KEY, 20), key=KEY, translation=translation, tolerance=tolerance
    )


@pytest.mark.parametrize("name", WRONG)
def test_what_is_not_invariant_fails(name):
    with pytest.raises(AssertionError, match="the result changed by"):
        assert_se3_invariant(WRONG[name], random_frames(KEY, 20), key=KEY)


def test_failures_are_named_with_motion_tolerance_and_change():
    def fn(frames):
        return {"good": distances(frames), "bad": positions(frames), "zero": jnp.zeros(3)}

    with pytest.raises(AssertionError) as error:
        assert_se3_invariant(fn, random_frames(KEY, 20), key=KEY, translation=50.0, tolerance=1e-3)
    message = str(error.value)
    assert "translation by 50 units, tolerance 1.0e-03" in message
    assert "['bad'] changed by" in message
    assert "['zero'] is zero everywhere" in message
    assert "good" not in message


def test_new_weights_on_each_call_are_caught():
    rng = np.random.default_rng(0)
    with pytest.raises(AssertionError, match="changed by"):
        assert_se3_invariant(lambda f: rng.normal() * distances(f), random_frames(KEY, 20), key=KEY)


def test_frames_without_quaternions_are_moved_too():
    frames = random_frames(KEY, 20)
    frames = QuatAffine(None, frames.translation, rotation=frames.rotation)
    assert_se3_invariant(local, frames, key=KEY)


def test_another_structure_after_the_motion_fails():
    results = iter([{"a": jnp.ones(3)}, {"a": jnp.ones(4)}])
    with pytest.raises(AssertionError):
        assert_se3_invariant(lambda f: next(results), random_frames(KEY, 20), key=KEY)


# --- gradients -----------------------------------------------------------------------------------


def cube(x, y):
    return {"a": x**3 * y["w"], "b": jnp.sum(y["w"])}


@jax.custom_vjp
def wrong_cube(x, y):
    return cube(x, y)


def _fwd(x, y):
    return cube(x, y), (x, y)


def _bwd(residuals, cotangent):
    gradients = jax.vjp(cube, *residuals)[1](cotangent)
    return gradients[0].at[1].mul(1.01), gradients[1]


wrong_cube.defvjp(_fwd, _bwd)


def test_equal_gradients_pass_and_others_are_named():
    args = jnp.array([1.0, 2.0, 3.0]), {"w": jnp.array([0.5, 1.0, -1.0])}
    assert_gradients_close(jax.jit(cube), cube, *args, key=KEY)
    assert_gradients_close(wrong_cube, cube, *args, key=KEY, tolerance=0.011)
    with pytest.raises(AssertionError, match=r"gradient of args\[0\] is off by") as error:
        assert_gradients_close(wrong_cube, cube, *args, key=KEY)
    assert "args[1]" not in str(error.value)


# --- error budget --------------------------------------------------------------------------------


def off_by(exact, error):
    return {k: x * (1 + error * (-1) ** np.arange(x.size)) for k, x in exact.items()}


@pytest.fixture
def exact():
    rng = np.random.default_rng(0)
    return {"a": rng.normal(size=100), "b": 1e6 * rng.normal(size=3)}


@pytest.mark.parametrize(
    ("fast", "reference", "passes"),
    [
        (1.9e-6, 1e-6, True),
        (2.1e-6, 1e-6, False),
        (0.9 * EPS, 0.0, True),  # the floor
        (1.1 * EPS, 0.0, False),
        (0.0, 0.0, True),
        (np.nan, 1e-6, False),
    ],
)
def test_error_budget(fast, reference, passes, exact):
    arguments = off_by(exact, fast), off_by(exact, reference), exact
    if passes:
        assert_within_error_budget(*arguments)
    else:
        with pytest.raises(AssertionError, match=r"\['b'\] is off by .*, the reference by"):
            assert_within_error_budget(*arguments)


def test_factor_and_floor_of_the_error_budget(exact):
    arguments = off_by(exact, 3e-6), off_by(exact, 1e-6), exact
    assert_within_error_budget(*arguments, factor=4)
    assert_within_error_budget(*arguments, floor=4e-6)
    with pytest.raises(AssertionError, match="error over 2 times the reference's"):
        assert_within_error_budget(*arguments)


def test_only_zero_is_within_the_budget_of_zero():
    zero, tiny = np.zeros(3), np.full(3, 1e-30)
    assert_within_error_budget(zero, tiny, zero)
    with pytest.raises(AssertionError, match=r"the result is off by 1\.0e-30"):
        assert_within_error_budget(tiny, zero, zero)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_budget_of_half_precision(dtype):
    exact = np.random.default_rng(0).normal(size=50)
    rounded = exact.astype(jnp.dtype(dtype))
    assert_within_error_budget(rounded, rounded, exact, factor=1, floor=0)


def test_shapes_must_agree():
    with pytest.raises(AssertionError):
        assert_within_error_budget(np.ones(3), np.ones(3), np.ones(1))


def test_nothing_to_compare_fails():
    frames = random_frames(jax.random.key(0), 3)
    for fn in (lambda _: {}, lambda _: None):
        with pytest.raises(AssertionError, match="no arrays"):
            assert_se3_invariant(fn, frames, key=jax.random.key(1))
    with pytest.raises(AssertionError, match="no arrays"):
        assert_within_error_budget({}, {}, {})


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_a_reference_that_is_not_finite_is_no_measure(value):
    with pytest.raises(AssertionError, match="the reference by"):
        assert_within_error_budget(np.ones(3), np.full(3, value), np.ones(3))


@pytest.mark.parametrize(
    ("factors", "message"),
    [
        (np.ones(12), None),
        (1.5 * np.ones(12), None),
        (3.0 * np.ones(12), "error over 2 times"),
        (np.where(np.arange(12) == 3, 30.0, 1.0), "error over 4 times"),
    ],
    ids=["equal", "within", "all_worse", "one_far_worse"],
)
def test_draws_of_unequal_conditioning(factors, message):
    rng = np.random.default_rng(0)
    exact = {"x": rng.normal(size=(12, 5, 3)), "zero": np.zeros((12, 4))}
    scale = 1e-6 * np.where(np.arange(12) % 4 == 3, 20.0, 1.0)[:, None, None]
    # Errors of few numbers, as of one badly conditioned angle, are large and small by chance.
    noise = rng.normal(size=(2, 12, 5, 1)) * scale
    reference = exact | {"x": exact["x"] + noise[0]}
    fast = exact | {"x": exact["x"] + noise[1] * factors[:, None, None]}
    if message is None:
        assert_draws_within_error_budget(fast, reference, exact)
    else:
        with pytest.raises(AssertionError, match=message):
            assert_draws_within_error_budget(fast, reference, exact)
