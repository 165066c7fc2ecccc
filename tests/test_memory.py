"""What XLA sets aside for intermediate results, against AF2's module: compiled, not run."""

import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from alphafold.model import folding as af2_folding
from alphafold.model import quat_affine as af2_quat_affine
from implementations import QUICKLY

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine

N = 512


def temporary_bytes(module, frames):
    """Of the gradient of parameters, activations and frames at AF2's sizes."""

    @hk.transform
    def call(inputs_1d, inputs_2d, affine):
        ipa = module(IPAConfig(), types.SimpleNamespace(zero_init=False))
        return ipa(inputs_1d, inputs_2d, jnp.ones((N, 1)), frames.from_tensor(affine))

    def loss(params, *inputs):
        return jnp.sum(jnp.square(call.apply(params, None, *inputs)))

    inputs = [jax.ShapeDtypeStruct(s, jnp.float32) for s in ((N, 384), (N, N, 128), (N, 7))]
    params = jax.eval_shape(call.init, jax.random.key(0), *inputs)
    gradient = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    return gradient.lower(params, *inputs).compile(QUICKLY).memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def af2_bytes():
    return temporary_bytes(af2_folding.InvariantPointAttention, af2_quat_affine.QuatAffine)


@pytest.mark.parametrize(("options", "factor"), [({}, 14), ({"query_block": 16}, 30)])
def test_the_gradient_is_leaner_than_af2s(options, factor, af2_bytes):
    module = functools.partial(InvariantPointAttention, implementation="xla", **options)
    assert temporary_bytes(module, QuatAffine) * factor <= af2_bytes


def test_automatic_blocks_keep_to_their_budget():
    def of_blocks(**options):
        module = functools.partial(InvariantPointAttention, implementation="xla", **options)
        return temporary_bytes(module, QuatAffine)

    budget = 16 * 2**20
    assert of_blocks(memory_budget=budget) - of_blocks(query_block=1) <= budget
