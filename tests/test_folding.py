"""The monomer module against the real AlphaFold 2, and its own promises.

`python tests/test_folding.py` rewrites `tests/data/parameters_monomer.json`.
"""

import dataclasses
import functools
import json
import types
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import config as af2_config
from alphafold.model import folding as af2
from alphafold.model.quat_affine import QuatAffine as AF2QuatAffine
from implementations import QUICKLY, REFERENCE_IF_SLOW

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine, rigid
from ipa_haiku.attention.selection import IMPLEMENTATIONS

GOLDEN = Path(__file__).parent / "data" / "parameters_monomer.json"
MASKS = ["full", "padded", "holed", "zero"]
NUM_RESIDUES = [1, 147, *(pytest.param(n, marks=pytest.mark.slow) for n in (2, 17, 64))]


def largest(tree):
    return max(float(np.max(np.abs(x))) for x in jax.tree.leaves(tree))


def difference(actual, expected):
    """Largest difference of two pytrees."""
    return largest(jax.tree.map(lambda x, y: np.subtract(x, y, dtype=np.float64), actual, expected))


# --- against AF2 ---------------------------------------------------------------------------------


def af2_module(sizes, zero_init=False):
    def call(inputs_1d, inputs_2d, mask, affine):
        global_config = types.SimpleNamespace(zero_init=zero_init)
        module = af2.InvariantPointAttention(sizes.config, global_config)
        return module(inputs_1d, inputs_2d, mask, AF2QuatAffine.from_tensor(affine))

    return hk.without_apply_rng(hk.transform(call))


@pytest.mark.parametrize("size", ["af2", "odd", pytest.param("tiny", marks=pytest.mark.slow)])
def test_initial_parameters_have_af2s_bits(size, sizes_of, make_inputs, make_module, count_bits):
    sizes = sizes_of(size)
    inputs = make_inputs(sizes, 2)

    @functools.partial(jax.jit, compiler_options=QUICKLY)  # the two are one program
    def init(key):
        return [
            [
                module.init(key, *inputs)
                for module in (make_module(sizes, zero_init=z), af2_module(sizes, z))
            ]
            for z in (True, False)
        ]

    for zero_init, (ours, theirs) in zip((True, False), init(jax.random.key(7))):
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
        assert count_bits("sets of initial parameters", ours, theirs)
        weights = ours["invariant_point_attention/output_projection"]["weights"]
        assert np.any(weights) != zero_init


@pytest.fixture(scope="module")
def outputs_and_gradients(sizes_of, make_inputs, make_module, make_params):
    """From N and a mask to (ours, AF2's) outputs and gradients by group, at AF2's sizes."""
    sizes = sizes_of("af2")

    def compiled(module):
        @functools.partial(jax.jit, compiler_options=QUICKLY)
        def gradients(params, inputs, cotangent):
            def loss(params, inputs_1d, inputs_2d, affine):
                output = module.apply(params, inputs_1d, inputs_2d, inputs.mask, affine)
                return jnp.sum(cotangent * output)

            return jax.grad(loss, argnums=(0, 1, 2, 3))(
                params, inputs.inputs_1d, inputs.inputs_2d, inputs.affine
            )

        return jax.jit(module.apply), gradients

    modules = make_module(sizes, implementation="reference"), af2_module(sizes)
    functions = [compiled(module) for module in modules]

    @functools.cache
    def compute(n, mask):
        inputs = make_inputs(sizes, n, mask=mask)
        params = make_params(modules[1], *inputs)
        cotangent = np.random.default_rng(2).normal(size=(n, sizes.config.num_channel))
        cotangent = cotangent.astype(np.float32)
        results = []
        for apply, gradients in functions:
            of_params, *of_inputs = gradients(params, inputs, cotangent)
            groups = {**of_params, **dict(zip(("inputs_1d", "inputs_2d", "affine"), of_inputs))}
            results.append(jax.device_get((apply(params, *inputs), groups)))
        return results

    return compute


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("n", NUM_RESIDUES)
def test_outputs_and_gradients_are_af2s(n, mask, outputs_and_gradients):
    (output, gradients), (af2_output, af2_gradients) = outputs_and_gradients(n, mask)
    assert difference(output, af2_output) <= 1e-6 * largest(af2_output)
    assert gradients.keys() == af2_gradients.keys()
    for group, expected in af2_gradients.items():
        assert difference(gradients[group], expected) <= 1e-5 * largest(expected), group


@pytest.mark.parametrize("n", NUM_RESIDUES)
def test_compiled_bits_that_are_af2s_are_counted(n, outputs_and_gradients, count_bits):
    # XLA may fuse the two programs differently: what must hold is the test above.
    for mask in MASKS:
        (output, gradients), (af2_output, af2_gradients) = outputs_and_gradients(n, mask)
        count_bits("outputs", output, af2_output)
        for group, expected in af2_gradients.items():
            count_bits("groups of gradients", gradients[group], expected)


@pytest.mark.parametrize("mask", MASKS)
def test_operation_by_operation_outputs_have_af2s_bits(
    mask, sizes_of, make_inputs, make_module, make_params
):
    sizes = sizes_of("af2")
    inputs = make_inputs(sizes, 17, mask=mask)
    theirs, ours = af2_module(sizes), make_module(sizes, implementation="reference")
    params = make_params(theirs, *inputs)
    np.testing.assert_array_equal(ours.apply(params, *inputs), theirs.apply(params, *inputs))


# --- parameters ----------------------------------------------------------------------------------


def parameter_shapes():
    """Names and shapes at AF2's sizes."""

    def call():
        frames = QuatAffine.identity(2)
        module = InvariantPointAttention(IPAConfig())
        return module(jnp.zeros((2, 384)), jnp.zeros((2, 2, 128)), jnp.ones((2, 1)), frames)

    params = jax.eval_shape(hk.transform(call).init, jax.random.key(0))
    return {
        scope: {name: list(x.shape) for name, x in arrays.items()}
        for scope, arrays in params.items()
    }


def test_parameter_names_and_shapes():
    assert parameter_shapes() == json.loads(GOLDEN.read_text())


# --- the module itself ---------------------------------------------------------------------------


def test_any_frames_and_af2s_config_serve(sizes_of, make_inputs, make_module, make_params):
    sizes = sizes_of("af2")
    inputs = make_inputs(sizes, 4)
    params = make_params(make_module(sizes), *inputs)
    ours = QuatAffine.from_tensor(inputs.affine)
    pair = rigid.to_rotation_translation(ours)

    def run(config, frames):
        def call():
            module = InvariantPointAttention(config, types.SimpleNamespace(zero_init=False))
            return module(inputs.inputs_1d, inputs.inputs_2d, inputs.mask, frames)

        return jax.jit(hk.transform(call).apply, compiler_options=QUICKLY)(params, None)

    af2_sizes = af2_config.model_config("model_1").model.heads.structure_module
    expected = run(sizes.config, ours)
    np.testing.assert_array_equal(
        run(af2_sizes, AF2QuatAffine.from_tensor(inputs.affine)), expected
    )
    np.testing.assert_array_equal(run(sizes.config, pair), expected)


def test_output_starts_as_zero_by_default():
    def call():
        module = InvariantPointAttention(IPAConfig(2, 2, 2, 1, 1, 5))
        return module(
            jnp.ones((3, 4)), jnp.ones((3, 3, 2)), jnp.ones((3, 1)), QuatAffine.identity(3)
        )

    transformed = hk.transform(call)

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def run(key):
        return transformed.apply(transformed.init(key), None)

    output = run(jax.random.key(0))
    np.testing.assert_array_equal(output, np.zeros((3, 5)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_output_has_the_dtype_of_the_activations(
    dtype, implementation, sizes_of, make_inputs, make_module, make_params
):
    sizes = sizes_of("tiny")
    inputs = make_inputs(sizes, 9)
    module = make_module(sizes, implementation=implementation)
    params = make_params(module, *inputs)
    apply = jax.jit(module.apply, compiler_options=QUICKLY)
    expected = apply(params, *inputs)
    half = inputs._replace(
        inputs_1d=inputs.inputs_1d.astype(dtype), inputs_2d=inputs.inputs_2d.astype(dtype)
    )
    actual = apply(jax.tree.map(lambda x: x.astype(dtype), params), *half)
    assert actual.dtype == dtype
    # Inputs, parameters and projections are each rounded to `dtype`; a logit of size 10 makes ten
    # times as much of it.
    assert difference(actual, expected) <= 40 * float(jnp.finfo(dtype).eps) * largest(expected)


def test_half_precision_activations_with_float32_parameters_are_af2s(
    sizes_of, make_inputs, make_module, make_params
):
    sizes = sizes_of("af2")
    inputs = make_inputs(sizes, 17)
    params = make_params(af2_module(sizes), *inputs)
    inputs = inputs._replace(inputs_1d=inputs.inputs_1d.astype("bfloat16"))
    actual, expected = (
        jax.jit(module.apply)(params, *inputs)
        for module in (make_module(sizes, implementation="reference"), af2_module(sizes))
    )
    assert actual.dtype == expected.dtype == jnp.float32
    assert difference(actual, expected) <= 1e-6 * largest(expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_half_precision_frames_count_as_what_they_are(
    dtype, implementation, sizes_of, make_inputs, make_params
):
    sizes = sizes_of("tiny")
    inputs = make_inputs(sizes, 52)
    rotation, _ = rigid.to_rotation_translation(QuatAffine.from_tensor(inputs.affine))
    # Sums and differences of these, in units of 1/1024, pass float16's largest number.
    translation = jnp.repeat(jnp.linspace(0.0, 200.0, 52)[:, None], 3, axis=1)
    half = (rotation.astype(dtype), translation.astype(dtype))

    def call(inputs_1d, inputs_2d, mask, frames):
        global_config = types.SimpleNamespace(zero_init=False)
        module = InvariantPointAttention(sizes.config, global_config, implementation=implementation)
        return module(inputs_1d, inputs_2d, mask, frames)

    module = hk.without_apply_rng(hk.transform(call))
    params = make_params(module, *inputs[:3], half)
    actual, expected = (
        jax.jit(module.apply, compiler_options=QUICKLY)(
            params, *inputs[:3], tuple(x.astype(d) for x in half)
        )
        for d in (dtype, "float32")
    )
    assert actual.dtype == jnp.float32
    assert difference(actual, expected) <= 40 * np.finfo(np.float32).eps * largest(expected)


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_batch_equals_loop(implementation, sizes_of, make_inputs, make_module, make_params):
    sizes = sizes_of("odd")
    inputs = make_inputs(sizes, 5, batch=(2, 3))
    module = make_module(sizes, implementation=implementation)
    params = make_params(module, *inputs)
    apply = jax.jit(module.apply, compiler_options=QUICKLY)
    batched = apply(params, *inputs)
    assert batched.shape == (2, 3, 5, sizes.config.num_channel)
    for i in np.ndindex(2, 3):
        one = apply(params, *(x[i] for x in inputs))
        assert difference(batched[i], one) <= 20 * np.finfo(np.float32).eps * largest(one)


def test_return_attention(sizes_of, make_inputs, make_module, make_params):
    sizes = sizes_of("odd")
    inputs = make_inputs(sizes, 8, mask="padded")
    params = make_params(make_module(sizes), *inputs)
    plain = jax.jit(make_module(sizes, implementation="reference").apply)(params, *inputs)
    with_attention = make_module(sizes, return_attention=True)
    output, attention = jax.jit(with_attention.apply)(params, *inputs)
    np.testing.assert_array_equal(output, plain)
    mask_2d = inputs.mask * inputs.mask.T
    logits = attention.scalar_logits + attention.point_logits + attention.pair_logits
    assert logits.shape == (sizes.config.num_head, 8, 8)
    np.testing.assert_allclose(
        attention.weights, jax.nn.softmax(logits - 1e5 * (1 - mask_2d), axis=-1), atol=1e-6
    )
    np.testing.assert_allclose(jnp.sum(attention.weights, axis=-1), 1, atol=1e-6)


# --- bad input -----------------------------------------------------------------------------------

BAD_INPUTS = {
    "rank of inputs_1d": ("inputs_1d", lambda x: x[0], r"inputs_1d must have shape \[\.\.\., N"),
    "no channels": ("inputs_1d", lambda x: x[:, :0], "inputs_1d must have shape .* zero"),
    "no residues": ("inputs_1d", lambda x: x[:0], "inputs_1d must have shape .* zero"),
    "integer inputs_1d": ("inputs_1d", lambda x: x.astype(int), "inputs_1d must be floating"),
    "n of inputs_1d": ("inputs_1d", lambda x: x[1:], "inputs_2d must have shape"),
    "rank of inputs_2d": ("inputs_2d", lambda x: x[0], "inputs_2d must have shape"),
    "columns of inputs_2d": ("inputs_2d", lambda x: x[:, 1:], "inputs_2d must have shape"),
    "rows of inputs_2d": ("inputs_2d", lambda x: x[1:], "inputs_2d must have shape"),
    "integer inputs_2d": ("inputs_2d", lambda x: x.astype(int), "inputs_2d must be floating"),
    "mask [N]": (
        "mask",
        lambda x: x[:, 0],
        r"mask must have shape \[\.\.\. N 1\].*\(6, 1\).*\(6,\)",
    ),
    "mask [N, N]": ("mask", lambda x: x * x.T, "mask must have shape"),
    "n of mask": ("mask", lambda x: x[1:], "mask must have shape"),
    "complex mask": ("mask", lambda x: x.astype(complex), "mask must be floating"),
    "n of affine": ("affine", lambda x: x[1:], "affine's rotation must have shape"),
    "rank of affine": ("affine", lambda x: x[None], "affine's rotation must have shape"),
}


@pytest.mark.parametrize("name", BAD_INPUTS)
def test_bad_inputs_are_named_at_trace_time(name, sizes_of, make_inputs, make_module):
    argument, spoil, message = BAD_INPUTS[name]
    sizes = sizes_of("tiny")
    inputs = jax.tree.map(np.asarray, make_inputs(sizes, 6))
    inputs = inputs._replace(**{argument: spoil(getattr(inputs, argument))})
    with pytest.raises(AssertionError, match=message):
        jax.eval_shape(make_module(sizes).init, jax.random.key(0), *inputs)


@pytest.mark.parametrize("argument", ["inputs_1d", "inputs_2d", "mask"])
def test_what_is_no_array_is_refused(argument, sizes_of, make_inputs, make_module):
    inputs = make_inputs(sizes_of("tiny"), 6)._replace(**{argument: "ARNDC"})
    with pytest.raises(TypeError, match=f"{argument} must be an array, got str"):
        jax.eval_shape(lambda: make_module(sizes_of("tiny")).init(jax.random.key(0), *inputs))


@pytest.mark.parametrize("value", [0, -1, 2.0, None, True])
@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(IPAConfig)])
def test_a_bad_config_is_named(name, value):
    config = types.SimpleNamespace(**dataclasses.asdict(IPAConfig()) | {name: value})
    with pytest.raises(ValueError, match=f"config.{name} must be a positive integer, got {value}"):
        hk.transform(lambda: InvariantPointAttention(config)).init(None)


def test_an_unknown_implementation_is_refused(sizes_of, make_inputs, make_module):
    module = make_module(sizes_of("tiny"), implementation="cuda")
    with pytest.raises(ValueError, match=".*".join(sorted(IMPLEMENTATIONS))):
        jax.eval_shape(module.init, jax.random.key(0), *make_inputs(sizes_of("tiny"), 3))


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(parameter_shapes(), indent=2) + "\n")
