"""Errors against float64 on a real protein: at most twice AF2's own, and far less far from home."""

import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import folding as af2_folding
from alphafold.model import quat_affine as af2_quat_affine
from implementations import ANYWHERE

from benchmarks.structure import read_shipped
from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine
from ipa_haiku import KernelConfig
from ipa_haiku.testing import assert_within_error_budget

FAST = [name for name in ANYWHERE if name != "reference"]
NOT_ZERO_INIT = types.SimpleNamespace(zero_init=False)


def real_inputs(position_scale, offset, seed=0):
    """Random activations on the frames of a real chain, moved by `offset` A, as numpy float32."""
    backbone = read_shipped()
    frames = QuatAffine.from_backbone(backbone.n, backbone.ca, backbone.c)
    affine = np.array(frames.to_tensor(), np.float64)
    affine[:, 4:] -= affine[:, 4:].mean(axis=0) - offset / np.sqrt(3)
    affine[:, 4:] /= position_scale
    rng = np.random.default_rng(seed)
    n = len(affine)
    arrays = (rng.normal(size=(n, 384)), rng.normal(size=(n, n, 128)), affine)
    return tuple(x.astype(np.float32) for x in arrays)


@functools.cache
def our_module(implementation):
    def apply(inputs_1d, inputs_2d, affine):
        module = InvariantPointAttention(
            IPAConfig(),
            NOT_ZERO_INIT,
            implementation=implementation,
            kernel_config=KernelConfig(interpret=True) if implementation == "pallas" else None,
        )
        mask = jnp.ones_like(inputs_1d[:, :1])
        return module(inputs_1d, inputs_2d, mask, QuatAffine.from_tensor(affine))

    return apply


def af2_module(inputs_1d, inputs_2d, affine):
    module = af2_folding.InvariantPointAttention(IPAConfig(), NOT_ZERO_INIT)
    mask = jnp.ones_like(inputs_1d[:, :1])
    return module(inputs_1d, inputs_2d, mask, af2_quat_affine.QuatAffine.from_tensor(affine))


@functools.cache  # the cases differ in numbers alone
def compiled(apply):
    """From parameters, inputs and a cotangent to the output and all gradients."""
    model = hk.without_apply_rng(hk.transform(apply))

    def run(params, inputs, cotangent):
        output, pull_back = jax.vjp(model.apply, params, *inputs)
        # d(pair bias) is exactly zero; AF2's and float64's are rounding.
        gradients = pull_back(cotangent)
        gradients[0]["invariant_point_attention/attention_2d"].pop("bias")
        return {"output": output, "gradients": gradients}

    return model.init, jax.jit(run)


def outputs_and_gradients(apply, inputs, *, float64=False):
    """The output and the gradients of parameters and inputs, for a random cotangent."""
    init, run = compiled(apply)
    rng = np.random.default_rng(1)
    params = jax.eval_shape(init, jax.random.key(0), *inputs)
    params = jax.tree.map(
        lambda x: np.float32(rng.normal(size=x.shape) / np.sqrt(x.shape[0])), params
    )
    cotangent = rng.normal(size=inputs[0].shape).astype(np.float32)
    arguments = (params, inputs, cotangent)
    with jax.enable_x64(float64):
        if float64:
            arguments = jax.tree.map(np.float64, arguments)
        return jax.tree.map(np.asarray, run(*arguments))


def stack(apply, position_scale, offset, **options):
    """For two random inputs, side by side: the error of a short array is a matter of chance."""
    runs = [
        outputs_and_gradients(apply, real_inputs(position_scale, offset, seed), **options)
        for seed in range(2)
    ]
    return jax.tree.map(lambda *x: np.stack(x), *runs)


@functools.cache
def af2_and_exact(position_scale, offset):
    exact = stack(our_module("reference"), position_scale, offset, float64=True)
    return stack(af2_module, position_scale, offset), exact


@pytest.mark.parametrize("implementation", [*FAST, pytest.param("pallas", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("position_scale", "offset", "factor"),
    [(10.0, 0.0, 2.0), (1.0, 0.0, 2.0), (10.0, 1_000.0, 0.25), (10.0, 10_000.0, 0.25)],
)
def test_error_budget(implementation, position_scale, offset, factor):
    af2, exact = af2_and_exact(position_scale, offset)
    fast = stack(our_module(implementation), position_scale, offset)
    assert_within_error_budget(fast, af2, exact, factor=2.0)
    if factor < 1:
        # What depends on coordinates; the rest has no error to lose.
        for part in (lambda x: x["output"], lambda x: x["gradients"][3]):
            assert_within_error_budget(part(fast), part(af2), part(exact), factor=factor)
