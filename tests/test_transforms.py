"""The module under the transformations of JAX and Haiku."""

import functools

import chex
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import QUICKLY, REFERENCE_IF_SLOW

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine

N, NUM_LAYER = 6, 3
CONFIG = IPAConfig(2, 4, 3, 2, 3, num_channel=8)  # as many channels out as in
# Roundings of a few dozen operations, in another order once a compiler has fused them.
TOLERANCE = 30 * float(np.finfo(np.float32).eps)

pytestmark = [
    pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW),
    pytest.mark.usefixtures("debug_nans"),
]


@pytest.fixture(scope="module")
def inputs(sizes_of, make_inputs):
    return make_inputs(sizes_of("tiny"), N, mask="padded")


def transformed(implementation, update):
    """`update(module, x)` is how often and through what `module` is called; x [N, 8]."""

    def call(x, inputs):
        module = InvariantPointAttention(CONFIG, NonZero, implementation=implementation)
        frames = QuatAffine.from_tensor(inputs.affine)

        def layer(x):
            return jnp.tanh(x + module(x, inputs.inputs_2d, inputs.mask, frames))

        return update(layer, x)

    return hk.without_apply_rng(hk.transform(call))


class NonZero:
    zero_init = False


def loop(layer, x):
    for _ in range(NUM_LAYER):
        x = layer(x)
    return x


def scan(layer, x):
    return hk.scan(lambda x, _: (layer(x), None), x, None, length=NUM_LAYER)[0]


def fori_loop(layer, x):
    return hk.fori_loop(0, NUM_LAYER, lambda _, x: layer(x), x)


def rematerialized(layer, x):
    return scan(hk.remat(layer), x)


def values_and_gradients(module, params, inputs):
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(params, x):
        output, pull_back = jax.vjp(lambda *args: module.apply(*args, inputs), params, x)
        return output, pull_back(jnp.cos(output))

    return run(params, inputs.inputs_1d)


def assert_close(actual, expected):
    chex.assert_trees_all_equal_shapes(actual, expected)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        # The pair bias has no gradient but rounding: 1e-6 of what its weights have.
        np.testing.assert_allclose(x, y, rtol=0, atol=TOLERANCE * max(np.max(np.abs(y)), 0.1))


@pytest.fixture(scope="module")
def looped(inputs, make_params):
    """From an implementation to parameters, and values and gradients of three calls in a row."""

    @functools.cache
    def run(implementation):
        module = transformed(implementation, loop)
        params = make_params(module, inputs.inputs_1d, inputs)
        return params, values_and_gradients(module, params, inputs)

    return run


@pytest.mark.parametrize("update", [scan, pytest.param(rematerialized, marks=pytest.mark.slow)])
def test_one_set_of_weights_over_iterations(update, implementation, inputs, looped):
    params, expected = looped(implementation)
    module = transformed(implementation, update)
    shapes = jax.eval_shape(module.init, jax.random.key(0), inputs.inputs_1d, inputs)
    chex.assert_trees_all_equal_shapes(shapes, params)
    assert_close(values_and_gradients(module, params, inputs), expected)


def test_fori_loop(implementation, inputs, looped):
    params, (expected, _) = looped(implementation)
    module = transformed(implementation, fori_loop)
    assert_close(
        jax.jit(module.apply, compiler_options=QUICKLY)(params, inputs.inputs_1d, inputs), expected
    )


def test_layer_stack(implementation, inputs, make_params):
    module = transformed(implementation, lambda layer, x: layer(x))

    def stack(x):
        def call(x):
            frames = QuatAffine.from_tensor(inputs.affine)
            layer = InvariantPointAttention(CONFIG, NonZero, implementation=implementation)
            return jnp.tanh(x + layer(x, inputs.inputs_2d, inputs.mask, frames))

        return hk.experimental.layer_stack(2)(call)(x)

    stacked = hk.without_apply_rng(hk.transform(stack))
    params = make_params(stacked, inputs.inputs_1d)
    x = inputs.inputs_1d
    for i in range(2):
        one = {scope[scope.index("invariant") :]: arrays for scope, arrays in params.items()}
        x = jax.jit(module.apply)(jax.tree.map(lambda p, i=i: p[i], one), x, inputs)
    assert_close(jax.jit(stacked.apply)(params, inputs.inputs_1d), x)


def test_vmap_over_proteins_and_over_weights(implementation, sizes_of, make_inputs, make_params):
    module = transformed(implementation, lambda layer, x: layer(x))
    batch = [make_inputs(sizes_of("tiny"), N, mask="padded", seed=seed) for seed in range(3)]
    params = [make_params(module, x.inputs_1d, x, seed=seed) for seed, x in enumerate(batch)]

    def apply(params, inputs):
        return module.apply(params, inputs.inputs_1d, inputs)

    run = jax.jit(apply, compiler_options=QUICKLY)
    stacked = jax.tree.map(lambda *x: np.stack(x), *batch)
    for weights, axis in ((params[:1] * 3, None), (params, 0)):
        stacked_weights = (
            params[0] if axis is None else jax.tree.map(lambda *x: np.stack(x), *params)
        )
        mapped = jax.jit(jax.vmap(apply, in_axes=(axis, 0)), compiler_options=QUICKLY)(
            stacked_weights, stacked
        )
        assert_close(mapped, np.stack([run(p, x) for p, x in zip(weights, batch)]))


def test_frames_pass_through_jit_and_grad_as_a_pytree(implementation, inputs, make_params):
    def call(frames):
        module = InvariantPointAttention(CONFIG, NonZero, implementation=implementation)
        return jnp.sum(jnp.square(module(inputs.inputs_1d, inputs.inputs_2d, inputs.mask, frames)))

    module = hk.without_apply_rng(hk.transform(call))
    frames = QuatAffine.from_tensor(inputs.affine)
    params = make_params(module, frames)
    gradient = jax.jit(jax.grad(module.apply, argnums=1), compiler_options=QUICKLY)(params, frames)
    assert isinstance(gradient, QuatAffine)
    assert all(np.any(x) for x in gradient.translation)
    # The output is the same wherever all frames are, so the sum over residues vanishes.
    total = [abs(float(jnp.sum(x))) for x in gradient.translation]
    largest = max(float(jnp.max(jnp.abs(x))) for x in gradient.translation)
    assert max(total) <= N * TOLERANCE * largest
