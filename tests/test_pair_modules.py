"""The modules with other pair representations than an array: results, memory, other devices."""

import functools
import itertools
import math
import re
import subprocess
import sys
import types
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import QUICKLY

from ipa_haiku import (
    FactorizedPair,
    InvariantPointAttention,
    IPAConfig,
    QuatAffine,
    RelativePositionPair,
    folding_multimer,
    select_implementation,
)

FORMS = ("rank_1", "rank_2", "rank_4", "relative", "none")
MODULES = {"monomer": InvariantPointAttention, "multimer": folding_multimer.InvariantPointAttention}


def make_model(variant, config, **options):
    def call(inputs_1d, inputs_2d, mask, affine):
        module = MODULES[variant](config, types.SimpleNamespace(zero_init=False), **options)
        return module(inputs_1d, inputs_2d, mask, QuatAffine.from_tensor(affine))

    return hk.without_apply_rng(hk.transform(call))


@pytest.mark.parametrize(
    ("variant", "form"),
    [("monomer", "rank_2"), pytest.param("multimer", "relative", marks=pytest.mark.slow)],
)
def test_modules_take_it_for_the_array(form, variant, sizes_of, make_inputs, make_params):
    sizes = sizes_of("odd")
    inputs_1d, inputs_2d, mask, affine = make_inputs(sizes, 13, mask="padded")
    rng = np.random.default_rng(0)
    if form == "rank_2":
        parts = jnp.asarray(rng.normal(size=(2, 13, 2, sizes.pair_channel)), jnp.float32)
        to_pair = FactorizedPair
    else:
        parts = [jnp.asarray(rng.normal(size=(7, sizes.pair_channel)), jnp.float32)]
        to_pair = functools.partial(
            RelativePositionPair, q_index=jnp.arange(13), k_index=jnp.arange(13)
        )
    fast = make_model(variant, sizes.config, query_block=5)  # the last block is shorter
    reference = make_model(variant, sizes.config, implementation="reference")
    params = make_params(reference, inputs_1d, inputs_2d, mask, affine)
    assert (
        params.keys()
        == jax.eval_shape(
            lambda *x: fast.init(jax.random.key(0), inputs_1d, to_pair(*x), mask, affine), *parts
        ).keys()
    )

    def gradients(model, to_pair):
        def loss(params, inputs_1d, parts, affine):
            out = mask * model.apply(params, inputs_1d, to_pair(*parts), mask, affine)
            return jnp.sum(jnp.square(out)), out

        run = jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True), compiler_options=QUICKLY)
        gradients, out = run(params, inputs_1d, parts, affine)
        # Exactly zero here, rounding in AF2's order.
        gradients[0]["invariant_point_attention/attention_2d"].pop("bias")
        return gradients, out

    actual = gradients(fast, to_pair)
    expected = gradients(reference, lambda *x: to_pair(*x).to_dense())
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.max(np.abs(y)))


@pytest.mark.parametrize("variant", MODULES)
def test_modules_without_pair(variant, sizes_of, make_inputs, make_params):
    sizes = sizes_of("odd")
    inputs_1d, inputs_2d, mask, affine = make_inputs(sizes, 7, batch=(2,))
    model = make_model(variant, sizes.config)
    with_pair = jax.eval_shape(model.init, jax.random.key(0), inputs_1d, inputs_2d, mask, affine)
    params = make_params(model, inputs_1d, None, mask, affine)
    scope = "invariant_point_attention"
    assert with_pair.keys() - params.keys() == {f"{scope}/attention_2d"}
    c = sizes.config
    features = c.num_head * (c.num_scalar_v + 4 * c.num_point_v)
    weights = params[f"{scope}/output_projection"]["weights"]
    assert weights.shape == (features, c.num_channel)

    # The array's answer, with weights that do not see it.
    rest = jnp.zeros((c.num_head * sizes.pair_channel, c.num_channel))
    blind = params | {
        f"{scope}/attention_2d": jax.tree.map(
            lambda x: jnp.zeros(x.shape), with_pair[f"{scope}/attention_2d"]
        ),
        f"{scope}/output_projection": params[f"{scope}/output_projection"]
        | {"weights": jnp.concatenate([weights, rest])},
    }
    expected = jax.jit(model.apply, compiler_options=QUICKLY)(
        blind, inputs_1d, inputs_2d, mask, affine
    )
    actual = jax.jit(model.apply, compiler_options=QUICKLY)(params, inputs_1d, None, mask, affine)
    np.testing.assert_allclose(actual, expected, atol=1e-5 * np.max(np.abs(expected)))


# --- what runs -----------------------------------------------------------------------------------


def test_selection():
    def select(n, **options):
        return select_implementation((12, n, n), pair_channel=None, **options)

    chosen = select(8192)
    assert chosen.implementation == "xla"
    # Blocks are as large as is fast, whatever there is room for.
    assert 16 <= chosen.query_block <= 64
    assert chosen.query_block == select(8192, memory_budget=2**40).query_block
    assert chosen.reason.endswith("; in blocks, as inputs_2d is no array")
    assert select(9).query_block is None
    assert select(9, query_block=4).query_block == 4
    assert select(8192, memory_budget=2**10).query_block == 1
    assert select(9, implementation="reference").implementation == "reference"


def test_modules_check_the_parts(sizes_of, make_inputs):
    sizes = sizes_of("tiny")
    inputs_1d, _, mask, affine = make_inputs(sizes, 6)
    model = make_model("monomer", sizes.config)
    pair = FactorizedPair(jnp.zeros((6, 1, 8)), jnp.zeros((5, 1, 8)))
    with pytest.raises(AssertionError, match=r"inputs_2d.right must have shape"):
        model.init(jax.random.key(0), inputs_1d, pair, mask, affine)


# --- memory, and other devices -------------------------------------------------------------------


MODES = ("forward", "grad")


def lowered(form, n, mode, platform=None):
    """The monomer module at AF2's sizes, its forward pass or its gradient, lowered."""
    config = IPAConfig()
    model = make_model("monomer", config)

    def shape(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype)

    if form == "none":
        pair: Any = None
    elif form == "relative":
        pair = RelativePositionPair(shape(65, 128), *[shape(n, dtype=jnp.int32)] * 2)
    else:
        pair = FactorizedPair(*[shape(n, int(form.removeprefix("rank_")), 128)] * 2)
    arguments = (shape(n, 384), pair, shape(n, 1), shape(n, 7))
    params = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    if mode == "forward":
        return jax.jit(model.apply).trace(params, *arguments).lower(lowering_platforms=platform)

    def loss(params, inputs_1d, pair, mask, affine):
        return jnp.sum(jnp.square(model.apply(params, inputs_1d, pair, mask, affine)))

    argnums = (0, 1, 4) if form == "relative" else (0, 1, 2, 4)
    gradient = jax.jit(jax.grad(loss, argnums))
    return gradient.trace(params, *arguments).lower(lowering_platforms=platform)


@pytest.mark.parametrize(
    ("form", "mode"),
    [
        pytest.param(form, mode, marks=[pytest.mark.slow] * ((form, mode) != ("rank_1", "forward")))
        for form, mode in itertools.product(("rank_1", "rank_4", "relative", "none"), MODES)
    ],
)
def test_memory_is_linear(form, mode):
    temporary = {}
    for n in (2048, 8192):
        compiled = lowered(form, n, mode).compile(QUICKLY)
        temporary[n] = compiled.memory_analysis().temp_size_in_bytes
        sizes = re.findall(r"\b(?:f32|s32|pred)\[([\d,]+)\]", compiled.as_text())
        largest = max(math.prod(map(int, size.split(","))) for size in sizes)
        if n == 8192:
            assert largest < n * n  # no array of a number for each pair, let alone for each head
    assert temporary[8192] <= 4.5 * temporary[2048]


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("form", ["rank_2", "relative", "none"])
def test_lowers_for(form, platform):
    text = lowered(form, 128, "grad", (platform,)).as_text()
    assert "HIGHEST" in text  # products that involve points are float32 products on every device


_LONG = """
import resource, sys, jax
sys.path.insert(0, {tests!r})
from test_pair_modules import lowered
compiled = lowered("rank_1", {n}, {mode!r}).compile()
arguments = jax.tree.map(lambda x: jax.numpy.full(x.shape, 0.1, x.dtype), compiled.in_avals)
args, kwargs = arguments
result = compiled(*args, **kwargs)
assert all(bool(jax.numpy.all(jax.numpy.isfinite(x))) for x in jax.tree.leaves(result))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("n", "mode"), [(16384, "forward"), (8192, "grad")])
def test_long_sequences_fit(n, mode):
    program = _LONG.format(tests=str(__file__).rpartition("/")[0], n=n, mode=mode)
    ran = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert int(ran.stdout) < 4e9
