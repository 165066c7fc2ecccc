"""Core and modules, every implementation, inside of programs with other settings and transforms."""

import contextlib
import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipa_haiku import (
    FactorizedPair,
    KernelConfig,
    LogitScales,
    QuatAffine,
    RelativePositionPair,
    folding,
    folding_multimer,
    invariant_point_attention,
)
from ipa_haiku.jax_versions import enable_x64

N = 7
SCALES = LogitScales(scalar=0.5, pair=1.0, total=0.6)
OPTIONS = {
    "default": {},
    "reference": {"implementation": "reference"},
    "xla": {"implementation": "xla"},
    "blocks": {"implementation": "xla", "query_block": 3},
    "pallas": {
        "implementation": "pallas",
        "kernel_config": KernelConfig(forward_block=16, backward_block=16, tile=16, interpret=True),
    },
}
PAIRS = ["array", "factors", "positions", "none"]
WHAT = ["core", "monomer", "multimer"]
CASES = [
    *(("core", option, pair) for option in ("reference", "xla", "blocks") for pair in PAIRS),
    *(("monomer", option, "array") for option in OPTIONS),
    ("core", "pallas", "array"),
    ("multimer", "default", "array"),
]


def make_pair(kind, rng, dtype):
    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    return {
        "array": lambda: normal(N, N, 6),
        "factors": lambda: FactorizedPair(normal(N, 2, 6), normal(N, 2, 6)),
        "positions": lambda: RelativePositionPair(normal(9, 6), jnp.arange(N), jnp.arange(N)),
        "none": lambda: None,
    }[kind]()


def make(what, option, pair, dtype="float32"):
    """A function of differentiable arrays, and these; float32 geometry, all else of `dtype`."""
    rng = np.random.default_rng(0)

    def normal(dtype, *shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    segment_ids = jnp.arange(N) // 4
    mask = jnp.ones(N)
    if what == "core":
        arrays = {
            **{f"{x}_scalar": normal(dtype, N, 2, 4) for x in "qkv"},
            **{f"{x}_point": normal("float32", N, 2, 3, 3) for x in "qkv"},
            "inputs_2d": make_pair(pair, rng, dtype),
            "pair_weights": None if pair == "none" else normal(dtype, 6, 2),
            "pair_bias": None if pair == "none" else normal(dtype, 2),
            "point_weights": jnp.abs(normal("float32", 2)),
        }

        def call(arrays):
            masks = {f"{x}_mask": mask for x in "qk"}
            segments = {f"{x}_segment_ids": segment_ids for x in "qk"}
            result = invariant_point_attention(
                **arrays, **masks, **segments, logit_scales=SCALES, **OPTIONS[option]
            )
            return [x for x in result[:3] if x is not None]

        return call, arrays

    module = {"monomer": folding, "multimer": folding_multimer}[what]
    sizes = types.SimpleNamespace(
        num_head=2, num_scalar_qk=4, num_scalar_v=4, num_point_qk=2, num_point_v=3, num_channel=5
    )

    def layer(inputs_1d, inputs_2d, frames):
        layer = module.InvariantPointAttention(
            sizes, types.SimpleNamespace(zero_init=False), **OPTIONS[option]
        )
        frames = QuatAffine.from_tensor(frames)
        return layer(inputs_1d, inputs_2d, mask[:, None], frames, segment_ids=segment_ids)

    model = hk.without_apply_rng(hk.transform(layer))
    frames = QuatAffine.from_rotation_translation(
        jnp.broadcast_to(jnp.eye(3), (N, 3, 3)), normal("float32", N, 3)
    )
    inputs = normal(dtype, N, 5), make_pair(pair, rng, dtype), frames.to_tensor()
    params = jax.eval_shape(model.init, jax.random.key(0), *inputs)
    params = jax.tree.map(lambda x: normal(x.dtype, *x.shape), params)
    return lambda arrays: [model.apply(*arrays)], (params, *inputs)


def vjp(call, arrays):
    """Outputs and gradients of all floating-point arrays, for cotangents of ones."""

    def is_whole(x):
        return jnp.issubdtype(x.dtype, jnp.integer)

    leaves, tree = jax.tree.flatten(arrays)
    moving = [x for x in leaves if not is_whole(x)]

    def fn(moving):
        moving = iter(moving)
        return call(jax.tree.unflatten(tree, [x if is_whole(x) else next(moving) for x in leaves]))

    outputs, pull_back = jax.vjp(fn, moving)
    return outputs, pull_back([jnp.ones_like(x) for x in outputs])


@pytest.mark.parametrize(("what", "option", "pair"), CASES)
def test_traced_under_other_settings(what, option, pair):
    call, arrays = make(what, option, pair)
    expected = jax.eval_shape(functools.partial(vjp, call), arrays)
    call, _ = make(what, option, pair)
    numpy_arrays = jax.tree.map(np.asarray, arrays)
    with (
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        jax.checking_leaks(),
        enable_x64(True),  # float32 arguments, float32 results
    ):
        assert jax.eval_shape(lambda: vjp(call, numpy_arrays)) == expected


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("what", "option", "pair"), CASES)
def test_half_precision(what, option, pair, dtype):
    call, arrays = make(what, option, pair, dtype)
    outputs = jax.eval_shape(call, arrays)
    narrow = [x.dtype for i, x in enumerate(outputs) if i != 1]  # points are float32
    assert all(x == dtype for x in narrow)


def kernels_are_slow(cases):
    return [pytest.param(*case, marks=[pytest.mark.slow] * ("pallas" in case)) for case in cases]


@pytest.mark.parametrize("option", kernels_are_slow([(x,) for x in OPTIONS if x != "default"]))
def test_vmap_with_each_argument_alone_unbatched(option):
    call, arrays = make("core", option, "array")
    rng = np.random.default_rng(1)
    batch = jax.tree.map(lambda x: x + np.float32(0.1) * rng.normal(size=(2, *x.shape)), arrays)
    batch = jax.tree.map(lambda x: x.astype(jnp.float32), batch)

    @jax.jit
    def mapped(batch):
        def without(name):
            axes = {k: None if k == name else 0 for k in batch}
            return jax.vmap(call, (axes,))(batch | {name: batch[name][0]})

        return {name: without(name) for name in batch}

    @jax.jit
    def one(arrays):
        return call(arrays)

    results = mapped(batch)
    for name in batch:
        for i in range(2):
            alone = one({k: x[0 if k == name else i] for k, x in batch.items()})
            for x, y in zip(results[name], alone):
                np.testing.assert_allclose(x[i], y, rtol=0, atol=3e-6 * np.max(np.abs(y)))


@pytest.mark.parametrize(
    ("option", "pair"),
    kernels_are_slow([("xla", "array"), ("blocks", "factors"), ("pallas", "array")]),
)
def test_cotangents_of_zero_give_gradients_of_zero(option, pair):
    call, arrays = make("core", option, pair)

    @jax.jit
    def gradients(arrays):
        outputs, pull_back = jax.vjp(call, arrays)
        return pull_back([jnp.zeros_like(x) for x in outputs])

    with contextlib.ExitStack() as stack:
        stack.enter_context(jax.debug_nans(True))
        assert not any(np.any(x) for x in jax.tree.leaves(gradients(arrays)))
