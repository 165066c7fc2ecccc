"""Every implementation lowers for GPU and TPU on a machine that has neither."""

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from implementations import ANYWHERE

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine

NUM_RESIDUE, SINGLE_CHANNEL, PAIR_CHANNEL = 128, 384, 128


def loss(implementation, query_block=None):
    """A scalar of the whole module, and the shapes of its arguments."""

    def apply(inputs_1d, inputs_2d, mask, affine):
        module = InvariantPointAttention(
            IPAConfig(), implementation=implementation, query_block=query_block
        )
        output = module(inputs_1d, inputs_2d, mask, QuatAffine.from_tensor(affine))
        return jnp.sum(jnp.sin(output))  # whose gradient needs the output

    model = hk.without_apply_rng(hk.transform(apply))
    n = NUM_RESIDUE
    shapes = [
        jax.ShapeDtypeStruct(shape, jnp.float32)
        for shape in ((n, SINGLE_CHANNEL), (n, n, PAIR_CHANNEL), (n, 1), (n, 7))
    ]
    parameters = jax.eval_shape(model.init, jax.random.key(0), *shapes)
    return model.apply, (parameters, *shapes)


# What Pallas's Triton kernels are called in a lowered program.
TRITON = "__gpu$xla.gpu.triton"


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("implementation", "query_block"), [*((name, None) for name in ANYWHERE), ("xla", 32)]
)
def test_lowers_for(platform, implementation, query_block):
    apply, shapes = loss(implementation, query_block)
    gradient = jax.jit(jax.grad(apply, argnums=(0, 1, 2, 4)))
    exported = jax.export.export(gradient, platforms=[platform])(*shapes)
    assert exported.platforms == (platform,)
    text = exported.mlir_module()
    # Products that involve points are float32 products on every device.
    assert "HIGHEST" in text


def pretend(kind, platform):
    """A context in which programs are lowered for a device that need not be there."""
    device = jax.sharding.AbstractDevice(kind, None, platform)
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


# The forward pass has 4 kernels, the gradient 5, or 6 where it computes the logits anew.
@pytest.mark.parametrize(("query_block", "num_kernel"), [(None, 9), (32, 10)])
def test_kernels_are_the_default_on_an_nvidia_gpu(query_block, num_kernel):
    with pretend("NVIDIA H200", "cuda"):
        apply, shapes = loss(None, query_block)
        gradient = jax.jit(jax.grad(apply, argnums=(0, 1, 2, 4)))
        checks = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
        exported = jax.export.export(gradient, platforms=["cuda"], disabled_checks=checks)(*shapes)
    assert exported.mlir_module().count(TRITON) == num_kernel


def test_kernels_do_not_lower_for_tpu():
    with (
        pretend("TPU v5 lite", "tpu"),
        pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, and the device is a tpu"),
    ):
        loss("pallas")
