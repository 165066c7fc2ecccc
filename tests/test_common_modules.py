"""Linear against AF2's own."""

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import common_modules as af2

from ipa_haiku.common_modules import Linear

SHAPES = {
    "[N, C]": ((5, 6), {"num_output": 4}),
    "[N, M, C]": ((5, 3, 6), {"num_output": np.int64(4)}),
    "no batch": ((6,), {"num_output": 4}),
    "two in": ((5, 3, 6), {"num_output": 4, "num_input_dims": 2}),
    "two out": ((5, 6), {"num_output": (4, 2)}),
    "two in and out": ((5, 3, 6), {"num_output": [4, 2], "num_input_dims": 2}),
    "no bias": ((5, 6), {"num_output": 4, "use_bias": False}),
    "bias": ((5, 6), {"num_output": 4, "bias_init": 0.5}),
    "highest": ((5, 6), {"num_output": 4, "precision": jax.lax.Precision.HIGHEST}),
    "named": ((5, 6), {"num_output": 4, "name": "q_scalar"}),
}


CASES = [(shape, "linear", "float32") for shape in SHAPES]
CASES += [("two in and out", *case) for case in (("relu", "float32"), ("zeros", "float32"))]
CASES += [("bias", *case) for case in (("relu", "bfloat16"), ("linear", "float16"))]


@pytest.mark.parametrize(("shape", "initializer", "dtype"), CASES)
def test_parameters_and_outputs_have_af2s_bits(shape, initializer, dtype):
    shape, options = SHAPES[shape]
    x = np.random.default_rng(0).normal(size=shape).astype(jnp.dtype(dtype))

    @jax.jit
    def run(key):
        results = []
        for cls in (Linear, af2.Linear):
            module = hk.transform(lambda x, cls=cls: cls(initializer=initializer, **options)(x))
            params = module.init(key, x)
            results.append((params, module.apply(params, None, x)))
        return results

    (params, output), (af2_params, af2_output) = run(jax.random.key(3))
    assert jax.tree.structure(params) == jax.tree.structure(af2_params)
    jax.tree.map(np.testing.assert_array_equal, params, af2_params)
    assert output.dtype == dtype
    np.testing.assert_array_equal(output, af2_output)


@pytest.mark.parametrize(("initializer", "gain"), [("linear", 1), ("relu", 2)])
def test_initial_variance(initializer, gain):
    module = hk.transform(lambda x: Linear((40, 50), initializer, num_input_dims=2)(x))
    params = jax.jit(module.init)(jax.random.key(0), jnp.zeros((1, 5, 10)))["linear"]
    # 100,000 numbers: their variance is known to 0.5%; the two tails are cut off.
    np.testing.assert_allclose(np.var(params["weights"]), gain / 50, rtol=0.02)
    assert np.max(np.abs(params["weights"])) < 2.3 * (gain / 50) ** 0.5
    assert not np.any(params["bias"])


def test_weights_and_bias_are_those_of_the_call():
    x = jnp.ones((3, 4))

    def call(fused):
        linear = Linear(2)
        if not fused:
            return linear(x)
        weights, bias = linear.weights_and_bias(x)
        return x @ weights + bias

    params = hk.transform(lambda: call(False)).init(jax.random.key(0))
    one, other = (hk.transform(lambda f=f: call(f)).apply(params, None) for f in (False, True))
    np.testing.assert_array_equal(one, other)


def test_an_unknown_initializer_is_refused():
    with pytest.raises(ValueError, match="initializer must be 'linear', 'relu' or 'zeros', got 'g"):
        hk.transform(lambda: Linear(2, initializer="glorot")).init(jax.random.key(0))


@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        (np.ones((2, 3), int), AssertionError, "inputs must be floating-point, got int64"),
        ([[1.0]], TypeError, "inputs must be an array, got list"),
    ],
)
def test_bad_inputs_are_refused(inputs, error, message):
    with pytest.raises(error, match=message):
        hk.transform(lambda: Linear(2)(inputs)).init(jax.random.key(0))
