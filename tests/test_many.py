"""Both modules on many proteins in one call: batches, and packed sequences (`segment_ids`)."""

import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import QUICKLY

from ipa_haiku import QuatAffine, folding, folding_multimer

EPS = float(np.finfo(np.float32).eps)
MASKS = ["holed", "padded", "full"]
BY_PAIR = "inputs_2d"

pytestmark = pytest.mark.usefixtures("debug_nans")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((folding, {"implementation": "reference"}), marks=pytest.mark.slow),
        (folding, {"implementation": "xla"}),
        pytest.param((folding, {"query_block": 3}), marks=pytest.mark.slow),
        (folding_multimer, {}),
    ],
    ids=lambda param: "-".join([param[0].__name__.split(".")[-1], *map(str, param[1].values())]),
)
def run(request, sizes_of, make_params):
    """From `ModuleInputs`, cotangent and segments to the output and the gradients of all else."""
    sizes, (variant, options) = sizes_of("tiny"), request.param

    def call(inputs_1d, inputs_2d, mask, affine, segment_ids):
        module = variant.InvariantPointAttention(
            sizes.config, types.SimpleNamespace(zero_init=False), **options
        )
        frames = QuatAffine.from_tensor(affine)
        return module(inputs_1d, inputs_2d, mask, frames, segment_ids=segment_ids)

    module = hk.without_apply_rng(hk.transform(call))

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def value_and_gradients(params, inputs, segment_ids, cotangent):
        def fn(params, arrays):
            return module.apply(params, **arrays, mask=inputs.mask, segment_ids=segment_ids)

        arrays = inputs._asdict()
        del arrays["mask"]
        output, pull_back = jax.vjp(fn, params, arrays)
        return output, *pull_back(cotangent)

    def run(inputs, cotangent, segment_ids=None):
        params = make_params(module, *inputs, segment_ids)
        return jax.device_get(value_and_gradients(params, inputs, segment_ids, cotangent))

    return run


def assert_close(actual, expected, roundings=40):
    """Up to a number of roundings of the largest element: sums are in another order."""
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        # The pair bias has no gradient but the rounding of sums of terms of size 1.
        scale = max(np.max(np.abs(y)), 1.0)
        error = np.max(np.abs(x - y)) / scale
        assert error <= roundings * EPS, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"


def add(trees):
    return jax.tree.map(lambda *x: functools.reduce(np.add, x), *trees)


def test_a_batch_equals_a_loop(run, sizes_of, make_inputs):
    proteins = [make_inputs(sizes_of("tiny"), 8, mask=mask, seed=i) for i, mask in enumerate(MASKS)]
    batch = jax.tree.map(lambda *x: jnp.stack(x)[:, None], *proteins)  # [3, 1, ...]
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=(3, 1, 8, 8)).astype(np.float32)
    # float32 keeps 8e-3 of a masked row's logits: of those rows there is nothing to compare.
    cotangent *= batch.mask
    output, d_params, d_arrays = run(batch, cotangent)
    one_by_one = [run(x, c[0]) for x, c in zip(proteins, cotangent)]
    outputs, ds_params, ds_arrays = zip(*one_by_one)
    assert_close(output[:, 0] * batch.mask[:, 0], np.stack(outputs) * batch.mask[:, 0])
    assert_close(d_params, add(ds_params))
    assert_close(
        jax.tree.map(lambda x: x[:, 0], d_arrays), jax.tree.map(lambda *x: np.stack(x), *ds_arrays)
    )


def test_packed_sequences_equal_each_alone(run, sizes_of, make_inputs):
    proteins = [make_inputs(sizes_of("tiny"), 8, mask=mask, seed=i) for i, mask in enumerate(MASKS)]
    # Residue j of protein i is residue 3 * j + i of the packed sequence.
    where = [np.arange(8) * 3 + i for i in range(3)]
    packed = {
        name: jnp.stack(x, axis=1).reshape(24, -1)
        for name, x in zip(proteins[0]._fields, zip(*proteins))
        if name != BY_PAIR
    }
    pair = np.full((24, 24, proteins[0].inputs_2d.shape[-1]), 100, np.float32)  # nobody looks
    for at, x in zip(where, proteins):
        pair[np.ix_(at, at)] = x.inputs_2d
    inputs = proteins[0]._replace(**packed, inputs_2d=jnp.asarray(pair))
    rng = np.random.default_rng(0)
    cotangent = rng.normal(size=(24, 8)).astype(np.float32) * inputs.mask
    segment_ids = jnp.tile(jnp.array([4, -1, 4000]), 8)
    output, d_params, d_arrays = run(inputs, cotangent, segment_ids)
    one_by_one = [run(x, cotangent[at]) for at, x in zip(where, proteins)]
    for at, protein, (output_alone, _, d_alone) in zip(where, proteins, one_by_one):
        assert_close(output[at] * protein.mask, output_alone * protein.mask)
        part = {
            name: x[np.ix_(at, at)] if name == BY_PAIR else x[at] for name, x in d_arrays.items()
        }
        assert_close(part, d_alone)
    assert_close(d_params, add(d for _, d, _ in one_by_one))
    between = segment_ids[:, None] != segment_ids
    assert not np.any(d_arrays[BY_PAIR][between])


def test_wrong_segments_are_named(run, sizes_of, make_inputs):
    inputs = make_inputs(sizes_of("tiny"), 6)
    cotangent = np.zeros((6, 8), np.float32)
    with pytest.raises(AssertionError, match=r"segment_ids must have shape \[... N\].*got \(5,\)"):
        run(inputs, cotangent, jnp.zeros(5, jnp.int32))
    with pytest.raises(AssertionError, match="segment_ids must be integers, got float32"):
        run(inputs, cotangent, jnp.zeros(6))
    with pytest.raises(TypeError, match="segment_ids must be an array, got list"):
        run(inputs, cotangent, [0] * 6)
