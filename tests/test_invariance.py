"""What must not change the result: rigid motions, order, padding, the sign of a quaternion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import QUICKLY, REFERENCE_IF_SLOW

from ipa_haiku import LogitScales, QuatAffine, invariant_point_attention
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.testing import assert_se3_invariant, random_motion

EPS = float(np.finfo(np.float32).eps)
KEY = jax.random.key(5)


@pytest.fixture(scope="module")
def prepare(sizes_of, make_inputs, make_module, make_params):
    """From a size and an implementation to inputs and a compiled function of them.

    It returns the output and, from `reference`, the attention weights.
    """

    @functools.cache
    def prepare(size, implementation, n=24, mask="full"):
        inputs = make_inputs(sizes_of(size), n, mask=mask)
        options = {"return_attention": True} if implementation == "reference" else {}
        module = make_module(sizes_of(size), implementation=implementation, **options)
        params = make_params(module, *inputs)

        @jax.jit
        def run(inputs):
            result = module.apply(
                jax.tree.map(lambda x: x.astype(inputs[0].dtype), params), *inputs
            )
            output, attention = result if options else (result, None)
            return {"output": output} | ({"weights": attention.weights} if attention else {})

        return inputs, run

    return prepare


def of_frames(run, inputs):
    return lambda frames: run(inputs._replace(affine=frames.to_tensor()))


def relative_change(actual, expected):
    def change(x, y):
        return float(np.max(np.abs(np.subtract(x, y, dtype=np.float64))) / np.max(np.abs(y)))

    return max(jax.tree.leaves(jax.tree.map(change, actual, expected)))


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_rigid_motion_in_float64(implementation, prepare):
    with enable_x64(True):
        inputs, run = prepare("odd", implementation)
        inputs = jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), inputs)
        frames = QuatAffine.from_tensor(inputs.affine, normalize=True)
        # Coordinates of 1,000 units are stored to 1e-13; logits make about ten times as much of it.
        assert_se3_invariant(
            of_frames(run, inputs), frames, key=KEY, translation=1000, tolerance=1e-11
        )


@pytest.mark.parametrize("translation", [0, 1, 100, 1000])  # units of 10 A
@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_rigid_motion_in_float32(implementation, translation, prepare):
    inputs, run = prepare("af2", implementation)
    frames = QuatAffine.from_tensor(inputs.affine)
    # Moved frames are rounded to float32. What that alone changes is seen in float64, where the
    # test above shows that nothing else does; float32 arithmetic rounds coordinates three times
    # more: those of queries, of keys and of the output points.
    moved = random_motion(KEY, translation).compose(frames)
    with enable_x64(True):
        _, exact = prepare("af2", "reference")
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        affines = (np.asarray(x.to_tensor(), np.float64) for x in (frames, moved))
        before, after = (exact(wide._replace(affine=x)) for x in affines)
    tolerance = 4 * relative_change(after, before) + 10 * EPS
    assert_se3_invariant(
        of_frames(run, inputs), frames, key=KEY, translation=translation, tolerance=tolerance
    )


@pytest.mark.parametrize("mask", ["full", "holed"])
@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_order_of_residues(implementation, mask, prepare):
    inputs, run = prepare("odd", implementation, mask=mask)
    order = np.random.default_rng(0).permutation(24)
    permuted = inputs._replace(
        inputs_1d=inputs.inputs_1d[order],
        inputs_2d=inputs.inputs_2d[order][:, order],
        mask=inputs.mask[order],
        affine=inputs.affine[order],
    )
    before, after = run(inputs), run(permuted)
    valid = np.asarray(permuted.mask[:, 0] == 1)
    expected = {"output": before["output"][order][valid]}
    actual = {"output": after["output"][valid]}
    if "weights" in before:
        expected["weights"] = before["weights"][:, order][..., order][:, valid]
        actual["weights"] = after["weights"][:, valid]
    assert relative_change(actual, expected) <= 20 * EPS  # sums of 24 in another order


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_sign_of_quaternions(implementation, prepare):
    inputs, run = prepare("odd", implementation)
    sign = np.random.default_rng(0).choice([-1, 1], size=(24, 1)).astype(np.float32)
    flipped = inputs.affine * np.concatenate([np.tile(sign, 4), np.ones((24, 3), "f")], axis=-1)
    jax.tree.map(np.testing.assert_array_equal, run(inputs._replace(affine=flipped)), run(inputs))


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_padding(implementation, prepare):
    inputs, run = prepare("odd", implementation, mask="padded")
    n = int(inputs.mask.sum())
    assert 0 < n < 24
    garbage = inputs._replace(
        inputs_1d=inputs.inputs_1d.at[n:].set(1e2),
        inputs_2d=inputs.inputs_2d.at[n:].set(-1e3).at[:, n:].set(1e3),
        affine=inputs.affine.at[n:, 4:].set(1e4),
    )
    cut = type(inputs)(
        inputs.inputs_1d[:n], inputs.inputs_2d[:n, :n], inputs.mask[:n], inputs.affine[:n]
    )
    expected = run(inputs)["output"][:n]
    np.testing.assert_array_equal(run(garbage)["output"][:n], expected)
    assert relative_change(run(cut)["output"], expected) <= 20 * EPS  # sums in another order


@pytest.mark.parametrize("mask", ["full", "holed", "zero"])
@pytest.mark.parametrize(
    "frames", ["identity", "half turns", "coincident", "padded with garbage", "padded with zeros"]
)
@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
@pytest.mark.usefixtures("debug_nans")
def test_gradients_are_finite(
    implementation, frames, mask, sizes_of, make_inputs, gradients_of_module
):
    inputs = make_inputs(sizes_of("tiny"), 7, mask=mask)
    affine = {
        "identity": inputs.affine * 0 + jnp.eye(7)[0],
        "half turns": inputs.affine.at[:, :4].set(jnp.eye(4)[jnp.array([1, 2, 3, 1, 2, 3, 1])]),
        "coincident": jnp.broadcast_to(inputs.affine[:1], (7, 7)),
        "padded with garbage": inputs.affine.at[:, 4:].add(1e6 * (1 - inputs.mask)),
        "padded with zeros": inputs.affine * inputs.mask,
    }[frames]
    gradients = gradients_of_module(implementation)(inputs._replace(affine=affine))
    assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(gradients))


@pytest.fixture(scope="module")
def gradients_of_module(sizes_of, make_inputs, make_module, make_params):
    @functools.cache
    def compile(implementation):
        module = make_module(sizes_of("tiny"), implementation=implementation)
        params = make_params(module, *make_inputs(sizes_of("tiny"), 7))

        def loss(params, inputs):
            return jnp.sum(jnp.square(module.apply(params, *inputs)))

        gradients = functools.partial(jax.grad(loss, argnums=(0, 1)), params)
        return jax.jit(gradients, compiler_options=QUICKLY)

    return compile


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_float16_points_far_away_count_as_what_they_are(implementation, sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("odd"), 6)
    names = ("q_point", "k_point", "v_point")
    # 16 times as much is more than float16's largest number.
    half = {name: (getattr(inputs, name) + 6000.0).astype(jnp.float16) for name in names}

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def attend(points):
        return invariant_point_attention(
            **inputs._asdict() | points,
            logit_scales=LogitScales(scalar=0.5, pair=1.0),
            implementation=implementation,
        )[:3]

    results = [
        attend({name: x.astype(dtype) for name, x in half.items()})
        for dtype in (jnp.float16, jnp.float32)
    ]
    assert relative_change(*(result[::2] for result in results)) <= 20 * EPS
    half_point, point = (result[1] for result in results)
    assert relative_change(half_point, point) <= float(jnp.finfo(jnp.float16).eps) / 2
