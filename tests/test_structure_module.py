"""The monomer module in place of AF2's own, in the 8 iterations of AF2's structure module."""

import functools

import haiku as hk
import jax
import numpy as np
import pytest
from alphafold.model import config as af2_config
from alphafold.model import folding as af2
from alphafold.model import prng
from draws import assert_draws_within_error_budget
from implementations import REFERENCE_IF_SLOW

from ipa_haiku import InvariantPointAttention
from ipa_haiku.jax_versions import enable_x64

NUM_IN_AF2, NUM_PADDED = 23, 3
REPRESENTATIONS = [
    {
        "single": rng.normal(size=(NUM_IN_AF2, 384)).astype(np.float32),
        "pair": rng.normal(size=(NUM_IN_AF2, NUM_IN_AF2, 128)).astype(np.float32),
    }
    for rng in map(np.random.default_rng, range(6))
]


@pytest.fixture(scope="module")
def structure_module(make_params):
    """AF2's 8 iterations under AF2's own configuration, with whatever IPA is installed there.

    From a name to random parameters and a compiled function of the representations.
    """
    model = af2_config.model_config("model_1").model
    model.global_config.zero_init = False  # the released weights are anything but zero
    batch = {
        "seq_mask": (np.arange(NUM_IN_AF2) < NUM_IN_AF2 - NUM_PADDED).astype(np.float32),
        "aatype": np.arange(NUM_IN_AF2) % 20,
    }

    @functools.cache
    def build(_):
        @hk.transform
        def generate_affines(representations):
            outputs = af2.generate_affines(
                representations, batch, model.heads.structure_module, model.global_config,
                is_training=False, safe_key=prng.SafeKey(hk.next_rng_key()),
            )  # fmt: skip
            # Of 8 iterations and real residues: float32 keeps 8e-3 of the others' logits.
            affine = outputs["affine"][:, :-NUM_PADDED]
            return {
                "quaternion": affine[..., :4],
                "translation": affine[..., 4:],
                "act": outputs["act"][:-NUM_PADDED],
            }

        params = [
            make_params(generate_affines, x, seed=seed) for seed, x in enumerate(REPRESENTATIONS)
        ]
        apply = jax.jit(lambda params, x: generate_affines.apply(params, jax.random.key(1), x))

        def run(float64=False):
            arrays = list(zip(params, REPRESENTATIONS))
            if float64:
                arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), arrays)
            results = [jax.device_get(apply(*draw)) for draw in arrays]
            return jax.tree.map(lambda *x: np.stack(x), *results)

        return params, run

    return build


@pytest.fixture(scope="module")
def af2_in_float64(structure_module):
    _, in_af2 = structure_module("af2")
    # What JAX keeps of float32 runs does not fit AF2's tables of integers, and vice versa.
    jax.clear_caches()
    with enable_x64(True):
        exact = in_af2(float64=True)
    jax.clear_caches()
    assert all(x.dtype == np.float64 for x in exact.values())
    return exact


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_inside_af2(implementation, structure_module, af2_in_float64, monkeypatch, count_bits):
    params, in_af2 = structure_module("af2")
    expected = in_af2()

    ours = functools.partial(InvariantPointAttention, implementation=implementation)
    monkeypatch.setattr(af2, "InvariantPointAttention", ours)
    our_params, with_ours = structure_module(implementation)
    actual = with_ours()

    assert jax.tree.structure(our_params) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, our_params, params)
    if implementation == "reference":
        count_bits("affines and activations after 8 iterations in AF2", actual, expected)
    assert_draws_within_error_budget(actual, expected, af2_in_float64)
