"""Every implementation lowers for GPU and TPU on a machine that has neither."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine
from ipa_haiku.attention.api import IMPLEMENTATIONS

NUM_RESIDUE, SINGLE_CHANNEL, PAIR_CHANNEL = 128, 384, 128


def loss(implementation, query_block=None):
    """A scalar of the whole module, and the shapes of its arguments."""

    def apply(inputs_1d, inputs_2d, mask, affine):
        module = InvariantPointAttention(
            IPAConfig(), implementation=implementation, query_block=query_block
        )
        return jnp.sum(module(inputs_1d, inputs_2d, mask, QuatAffine.from_tensor(affine)))

    model = hk.without_apply_rng(hk.transform(apply))
    n = NUM_RESIDUE
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((n, SINGLE_CHANNEL), (n, n, PAIR_CHANNEL), (n, 1), (n, 7))
    ]
    parameters = jax.eval_shape(model.init, jax.random.key(0), *shapes)
    return model.apply, (parameters, *shapes)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("implementation", "query_block"), [*((name, None) for name in IMPLEMENTATIONS), ("xla", 32)]
)
def test_lowers_for(platform, implementation, query_block):
    apply, shapes = loss(implementation, query_block)
    gradient = jax.jit(jax.grad(apply, argnums=(0, 1, 2, 4)))
    exported = jax.export.export(gradient, platforms=[platform])(*shapes)
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    # Products that involve points are float32 products on every device.
    assert "HIGHEST" in text
