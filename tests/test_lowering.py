"""Every implementation lowers for GPU and TPU on a machine that has neither."""

import contextlib
import functools

import haiku as hk
import jax
import jax.numpy as jnp
import pytest
from implementations import ANYWHERE

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine
from ipa_haiku.jax_versions import enable_x64

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


def pretend(kind, platform, **axes):
    """A context in which programs are lowered for a mesh of devices that need not be there."""
    device = jax.sharding.AbstractDevice(kind, None, platform)
    mesh = jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


def count_kernels(fn, shapes):
    checks = [jax.export.DisabledSafetyCheck.custom_call(TRITON)]
    exported = jax.export.export(jax.jit(fn), platforms=["cuda"], disabled_checks=checks)(*shapes)
    return exported.mlir_module().count(TRITON)


# The forward pass has 3 kernels, the gradient 5, and 2 more where it computes the logits anew.
BLOCKS = pytest.mark.parametrize(("query_block", "num_kernel"), [(None, 8), (32, 10)])


@BLOCKS
@pytest.mark.parametrize("x64", [False, True])
def test_kernels_are_the_default_on_an_nvidia_gpu(query_block, num_kernel, x64):
    with pretend("NVIDIA H200", "cuda"):
        apply, shapes = loss(None, query_block)
        with enable_x64(True) if x64 else contextlib.nullcontext():
            assert count_kernels(jax.grad(apply, argnums=(0, 1, 2, 4)), shapes) == num_kernel


@BLOCKS
def test_kernels_lower_inside_of_shard_map(query_block, num_kernel):
    def gradient(apply, parameters, *arrays):
        def mean(*arguments):
            return jax.lax.pmean(jnp.mean(jax.vmap(apply, (None, 0, 0, 0, 0))(*arguments)), "data")

        return jax.grad(mean, argnums=(0, 1, 2, 4))(parameters, *arrays)

    with pretend("NVIDIA H200", "cuda"):
        apply, (parameters, *shapes) = loss("pallas", query_block)
    with pretend("NVIDIA H200", "cuda", data=2):
        mesh = jax.sharding.get_abstract_mesh()
        by_protein = jax.sharding.NamedSharding(mesh, jax.P("data"))
        batch = [jax.ShapeDtypeStruct((4, *x.shape), x.dtype, sharding=by_protein) for x in shapes]
        mapped = jax.shard_map(
            functools.partial(gradient, apply), mesh=mesh,
            in_specs=(jax.P(), *[by_protein.spec] * 4),
            out_specs=(jax.P(), *[by_protein.spec] * 3),
        )  # fmt: skip
        assert count_kernels(mapped, (parameters, *batch)) == num_kernel


def test_kernels_do_not_lower_for_tpu():
    with (
        pretend("TPU v5 lite", "tpu"),
        pytest.raises(NotImplementedError, match="needs an NVIDIA GPU, and the device is a tpu"),
    ):
        loss("pallas")
