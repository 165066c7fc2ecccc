"""A data-parallel training step as users write it; `test_shard_map.py` runs this file.

`jax.shard_map` with its default arguments over eight devices: proteins are sharded, weights are
not. JAX then follows what varies over the devices, also through gradients that are written by hand.
"""

import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from ipa_haiku import (
    FactorizedPair,
    LogitScales,
    QuatAffine,
    RelativePositionPair,
    folding,
    folding_multimer,
    invariant_point_attention,
)
from ipa_haiku.attention.xla import cpu

SCALES = LogitScales(scalar=0.5, pair=1.0, total=0.5)
BATCH, N = 8, 9
WEIGHTS = ("pair_weights", "point_weights")


@pytest.fixture
def small_blocks(monkeypatch):
    """CPUs take a few rows of `inputs_2d` at a time."""
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 1)
    monkeypatch.setattr(cpu, "_LEAST_ROWS", 2)


def assert_step_equals_one_device(loss, exact_loss, weights, proteins):
    """Of a training step over devices and one on one device: loss and all gradients.

    Args:
      loss: of weights and proteins to a number, a sum over proteins.
      exact_loss: the same by AF2's operations.
      weights: parameters.
      proteins: what differs by protein, arrays [8, ...].
    """
    proteins, constants = split(proteins)

    def step(weights, proteins, constants):
        def total(weights, proteins):
            return jax.lax.psum(loss(weights, merge(proteins, constants)), "data")

        value, gradients = jax.value_and_grad(total, (0, 1))(weights, proteins)
        return value, *gradients

    sharded = jax.shard_map(
        step,
        mesh=jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,)),
        in_specs=(P(), P("data"), P("data")),
        out_specs=(P(), P(), P("data")),
    )

    def on_one_device(weights, proteins, constants):
        def total(weights, proteins):
            return exact_loss(weights, merge(proteins, constants))

        value, gradients = jax.value_and_grad(total, (0, 1))(weights, proteins)
        return value, *gradients

    actual, expected = (
        compiled(fn, weights, proteins, constants) for fn in (sharded, on_one_device)
    )
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        x, y = np.asarray(x), np.asarray(y)
        error = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1.0)
        assert error <= 1e-5, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"


def compiled(fn, *args):
    """`fn(*args)`, jitted: in seconds, not for seconds."""
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(fn).lower(*args).compile(options)(*args)


def split(tree):
    """What has a gradient, and what has none, with None in the other's place."""
    is_floating = jax.tree.map(lambda x: jnp.issubdtype(x.dtype, jnp.floating), tree)
    return (
        jax.tree.map(lambda x, keep: x if keep else None, tree, is_floating),
        jax.tree.map(lambda x, keep: None if keep else x, tree, is_floating),
    )


def merge(tree, other):
    return jax.tree.map(
        lambda x, y: y if x is None else x, tree, other, is_leaf=lambda x: x is None
    )


def pair_of(form, rng, inputs_2d):
    """A pair representation [8, N, N, C_z] of another form, and weights beside it."""
    num_channel = inputs_2d.shape[-1]

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    if form == "factors":
        return FactorizedPair(*[normal(BATCH, N, 2, num_channel) for _ in range(2)]), {}
    if form == "positions":
        index = jnp.asarray(np.sort(rng.choice(2 * N, (BATCH, N))), jnp.int32)
        return {"q_index": index, "k_index": index}, {"table": normal(5, num_channel)}
    return (None if form == "none" else inputs_2d), {}


CASES = {
    "reference": ("array", {"implementation": "reference"}),
    "xla": ("array", {"implementation": "xla"}),
    "default": ("array", {}),
    "query_block": ("array", {"query_block": 4}),
    "factors": ("factors", {}),
    "factors_in_blocks": ("factors", {"query_block": 4}),
    "positions": ("positions", {}),
    "none": ("none", {}),
    "none_in_blocks": ("none", {"query_block": 4}),
}
SLOW = ("reference", "xla", "factors", "none")  # JAX's own gradient; others do the same and more


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=[pytest.mark.slow] * (x in SLOW)) for x in CASES]
)
def test_core(name, sizes_of, make_core_inputs):
    form, options = CASES[name]
    inputs = make_core_inputs(sizes_of("tiny"), N, batch=(BATCH,))._asdict()
    inputs["inputs_2d"], table = pair_of(form, np.random.default_rng(0), inputs["inputs_2d"])
    inputs |= {name: jnp.tile(jnp.arange(N) % 2, (BATCH, 1)) for name in
               ("q_segment_ids", "k_segment_ids")}  # fmt: skip
    # The softmax does not see the bias: rounding is all that its gradient is.
    bias = inputs.pop("pair_bias")
    weights = {name: inputs.pop(name) for name in WEIGHTS} | table
    masks = {name: inputs.pop(name).astype(jnp.int32) for name in ("q_mask", "k_mask")}

    def loss_of(**options):
        def loss(weights, proteins):
            arrays = weights | proteins | {"pair_bias": bias}
            if "table" in arrays:
                arrays["inputs_2d"] = RelativePositionPair(
                    arrays.pop("table"), **arrays["inputs_2d"]
                )
            if form == "none":
                arrays |= {"inputs_2d": None, "pair_weights": None, "pair_bias": None}
            result = invariant_point_attention(**arrays, logit_scales=SCALES, **options)
            return sum(jnp.sum(jnp.square(x)) for x in result[:3] if x is not None)

        return loss

    exact_loss = loss_of(implementation="reference")
    assert_step_equals_one_device(loss_of(**options), exact_loss, weights, inputs | masks)


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize(
    ("variant", "implementation"),
    [
        (folding, None),
        pytest.param(folding, "reference", marks=pytest.mark.slow),
        pytest.param(folding_multimer, None, marks=pytest.mark.slow),
    ],
)
def test_module(variant, implementation, sizes_of, make_inputs, make_params):
    sizes = sizes_of("tiny")

    def module(implementation):
        def call(inputs_1d, inputs_2d, mask, affine):
            module = variant.InvariantPointAttention(
                sizes.config, types.SimpleNamespace(zero_init=False), implementation=implementation
            )
            return module(inputs_1d, inputs_2d, mask, QuatAffine.from_tensor(affine))

        return hk.without_apply_rng(hk.transform(call))

    inputs = make_inputs(sizes, N, batch=(BATCH,))
    params = make_params(module("reference"), *inputs)

    def loss_of(implementation):
        def loss(weights, proteins):
            mask = proteins["mask"].astype(jnp.float32)
            arrays = proteins["inputs_1d"], proteins["inputs_2d"], mask, proteins["affine"]
            return jnp.sum(jnp.square(module(implementation).apply(weights, *arrays)))

        return loss

    proteins = inputs._asdict() | {"mask": inputs.mask.astype(jnp.int32)}
    assert_step_equals_one_device(loss_of(implementation), loss_of("reference"), params, proteins)
