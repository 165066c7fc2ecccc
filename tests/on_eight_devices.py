"""What holds over eight devices; `test_sharding.py` runs this file in a process that has them."""

import functools
import math
import re
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groups import assert_within_error_budget
from implementations import QUICKLY
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from ipa_haiku import (
    FactorizedPair,
    KernelConfig,
    LogitScales,
    QuatAffine,
    RowSharding,
    folding,
    folding_multimer,
    invariant_point_attention,
)
from ipa_haiku.jax_versions import enable_x64

TOLERANCE = 2e-6  # of the largest element
SCALES = LogitScales(scalar=(1 / 48) ** 0.5, pair=(1 / 3) ** 0.5)
MASKS = ("q_mask", "k_mask")
BY_ROW = ("q_scalar", "q_point", "inputs_2d", "q_mask", "q_segment_ids")


# JAX before 0.7 cannot move arrays of explicit axes; there all axes are automatic.
EXPLICIT = AxisType.Explicit if hasattr(jax.sharding, "reshard") else AxisType.Auto


def make_mesh(shape=(8,), names=("rows",), axis_type=EXPLICIT):
    return jax.make_mesh(shape, names, axis_types=(axis_type,) * len(shape))


def assert_close(actual, expected, tolerance=TOLERANCE):
    for (path, x), y in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(expected)):
        x, y = np.asarray(x), np.asarray(y)
        # The pair bias has no gradient but the rounding of sums of terms of size 1.
        error = np.max(np.abs(x - y)) / max(np.max(np.abs(y)), 1.0)
        assert error <= tolerance, f"{jax.tree_util.keystr(path)} is off by {error:.1e}"


@functools.cache
def core(is_optimized=False, **options):
    """From `IPAInputs` to the outputs, and the gradients of <outputs, cos(outputs)>."""

    @functools.partial(jax.jit, compiler_options=None if is_optimized else QUICKLY)
    def run(inputs):
        def fn(arrays):
            result = invariant_point_attention(
                **arrays,
                q_mask=inputs.q_mask,
                k_mask=inputs.k_mask,
                q_segment_ids=inputs.q_segment_ids,
                k_segment_ids=inputs.k_segment_ids,
                logit_scales=SCALES,
                **options,
            )
            return result[:3]

        arrays = {k: x for k, x in inputs._asdict().items() if k not in MASKS and "seg" not in k}
        outputs, pull_back = jax.vjp(fn, arrays)

        # float32 keeps 8e-3 of a masked row's logits: such rows have nothing to compare to 2e-6.
        def of_real_queries(x):
            return x * jnp.expand_dims(inputs.q_mask, range(inputs.q_mask.ndim, x.ndim))

        gradients = pull_back(tuple(of_real_queries(jnp.cos(x)) for x in outputs))
        return tuple(map(of_real_queries, outputs)), *gradients

    return run


@pytest.mark.parametrize(
    ("n", "axis_type"),
    [
        pytest.param(64, AxisType.Auto, marks=pytest.mark.slow),
        (64, EXPLICIT),
        (100, EXPLICIT),
        (257, AxisType.Auto),
    ],
)
def test_core_is_within_the_error_budget(n, axis_type, sizes_of, make_core_inputs):
    mesh = make_mesh(axis_type=axis_type)
    rows = NamedSharding(mesh, P("rows"))
    sharding = RowSharding(mesh, "rows")
    sharded = core(True, sharding=sharding)
    # Sharded, too: XLA sums small arrays in another order, with more rounding.
    reference = core(True, sharding=sharding, implementation="reference")
    # Many, as the gradient of the point weights is two numbers, sums that may cancel.
    draws = [make_core_inputs(sizes_of("tiny"), n, mask="holed", seed=seed) for seed in range(10)]

    def of_all(run, draws):
        results = [run(inputs) for inputs in draws]
        outputs, gradients = jax.tree.map(lambda *x: np.stack(x), *results)
        return {"outputs": outputs, "gradients": gradients}, results[0]

    expected, _ = of_all(reference, draws)
    with enable_x64(True):
        exact, _ = of_all(reference, jax.tree.map(in_float64, draws))
    if n % 8 == 0:
        draws = [x._replace(inputs_2d=jax.device_put(x.inputs_2d, rows)) for x in draws]
    actual, (outputs, gradients) = of_all(sharded, draws)
    if n % 8 == 0:
        for x in (*outputs, gradients["inputs_2d"]):
            assert x.sharding.shard_shape(x.shape)[0] == n // 8
    assert_within_error_budget(actual, expected, exact)


def in_float64(x):
    return np.asarray(x, np.float64) if jnp.issubdtype(x.dtype, jnp.floating) else x


def test_explicitly_sharded_queries_with_segments(sizes_of, make_core_inputs):
    mesh, n = make_mesh(), 136  # enough for more than one batch of segments' centers
    inputs = make_core_inputs(sizes_of("tiny"), n, mask="full")
    inputs = inputs._replace(q_segment_ids=jnp.arange(n) % 3, k_segment_ids=jnp.arange(n) % 3)
    expected = core()(inputs)
    rows = NamedSharding(mesh, P("rows"))
    placed = {name: jax.device_put(getattr(inputs, name), rows) for name in BY_ROW}
    assert_close(core(sharding=RowSharding(mesh, "rows"))(inputs._replace(**placed)), expected)


def test_pair_representations_that_are_no_array(sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("tiny"), 20, 18, mask="holed")
    rng = np.random.default_rng(0)
    channels = inputs.inputs_2d.shape[-1]
    factors = (jnp.asarray(rng.normal(size=(n, 2, channels)), jnp.float32) for n in (20, 18))
    inputs = inputs._replace(inputs_2d=FactorizedPair(*factors))
    sharding = RowSharding(make_mesh(), "rows")
    # One row is badly conditioned: against float64 its factor's gradient is off by 1.5e-6 on one
    # device and in AF2's order, too, by up to 3.3e-6 on eight.
    assert_close(core(sharding=sharding)(inputs), core()(inputs), tolerance=4 * TOLERANCE)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"implementation": "reference"}, marks=pytest.mark.slow),
        {"implementation": "xla"},
        {"query_block": 2},
        pytest.param(
            {
                "implementation": "pallas",
                "kernel_config": KernelConfig(
                    forward_block=16, backward_block=16, tile=16, interpret=True
                ),
            },
            marks=pytest.mark.slow,
        ),
    ],
)
def test_every_implementation_segments_and_batches(options, sizes_of, make_core_inputs):
    # Keys differ in number from queries, and an axis of the mesh has no part in it.
    mesh = make_mesh((2, 2, 2), ("data", "rows", "other"))
    inputs = make_core_inputs(sizes_of("tiny"), 9, 7, batch=(2, 2), mask="padded")
    inputs = inputs._replace(
        q_segment_ids=jnp.broadcast_to(jnp.arange(9) % 3, (2, 2, 9)),
        k_segment_ids=jnp.broadcast_to(jnp.arange(7) % 3, (2, 2, 7)),
    )
    sharding = RowSharding(mesh, "rows", "data")
    assert_close(core(**options, sharding=sharding)(inputs), core(**options)(inputs))


def test_gradients_in_half_precision_are_rounded_once(sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("tiny"), 24, 40, mask="holed", dtype="bfloat16")
    rng = np.random.default_rng(0)

    def gradients(inputs, **options):
        def fn(inputs):
            return invariant_point_attention(**inputs._asdict(), logit_scales=SCALES, **options)[:3]

        outputs, pull_back = jax.vjp(fn, inputs)
        return pull_back(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs)))[0]

    shapes = ((24, 2, 3), (24, 2, 3, 3), (24, 2, 6))
    cotangents = [jnp.asarray(rng.normal(size=shape), jnp.bfloat16) for shape in shapes]
    sharding = RowSharding(make_mesh(axis_type=AxisType.Auto), "rows")
    narrow = jax.jit(functools.partial(gradients, sharding=sharding))(inputs)
    wide = jax.jit(gradients)(jax.tree.map(lambda x: x.astype(jnp.float32), inputs))
    for name, x in narrow._asdict().items():
        if x is None:
            continue
        assert x.dtype == getattr(inputs, name).dtype
        x, y = np.asarray(x, np.float32), np.asarray(getattr(wide, name))
        rounding = 2.0**-8 if getattr(inputs, name).dtype == jnp.bfloat16 else 0
        error = np.abs(x - y) - rounding * np.abs(y)
        assert np.max(error) <= TOLERANCE * max(np.max(np.abs(y)), 1.0), name


def test_return_attention(sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("tiny"), 9, 7)

    def attention(**options):
        @jax.jit
        def run(inputs):
            return invariant_point_attention(
                **inputs._asdict(), logit_scales=SCALES, return_attention=True, **options
            )

        return run(inputs).attention

    assert_close(attention(sharding=RowSharding(make_mesh(), "rows")), attention())


def module_gradients(variant, sizes, **options):
    """The module, and a function to its output and the gradients of all but mask and segments."""

    def call(inputs_1d, inputs_2d, mask, affine, segment_ids=None):
        module = variant.InvariantPointAttention(
            sizes.config, types.SimpleNamespace(zero_init=False), **options
        )
        frames = QuatAffine.from_tensor(affine)
        return module(inputs_1d, inputs_2d, mask, frames, segment_ids=segment_ids)

    module = hk.without_apply_rng(hk.transform(call))

    def run(params, inputs_1d, inputs_2d, mask, affine, segment_ids=None):
        output, pull_back = jax.vjp(
            # float32 keeps 8e-3 of a masked row's logits: such rows do not agree to 2e-6.
            lambda p, x, z, frames: mask * module.apply(p, x, z, mask, frames, segment_ids),
            params, inputs_1d, inputs_2d, affine,
        )  # fmt: skip
        return output, pull_back(jnp.cos(output))

    return module, jax.jit(run, compiler_options=QUICKLY)


@pytest.mark.parametrize(
    ("axis_type", "variant", "n"),
    [
        pytest.param(AxisType.Auto, folding_multimer, 13, marks=pytest.mark.slow),
        # More than one batch of segments' centers.
        (EXPLICIT, folding, 136),
    ],
)
def test_modules_equal_one_device(axis_type, variant, n, sizes_of, make_inputs, make_params):
    mesh, sizes = make_mesh((2, 4), ("data", "rows"), axis_type), sizes_of("tiny")
    inputs = make_inputs(sizes, n, batch=(2,), mask="padded")
    module, run = module_gradients(variant, sizes)
    params = make_params(module, *inputs)
    segment_ids = jnp.broadcast_to(jnp.arange(n) % 2, (2, n))
    expected = run(params, *inputs, segment_ids)
    spec = P("data", "rows") if n % 4 == 0 else P("data")
    inputs, segment_ids = jax.device_put((inputs, segment_ids), NamedSharding(mesh, spec))
    params = jax.device_put(params, NamedSharding(mesh, P()))
    _, run_sharded = module_gradients(variant, sizes, sharding=RowSharding(mesh, "rows", "data"))
    assert_close(run_sharded(params, *inputs, segment_ids), expected)


def test_old_jax_refuses_explicit_axes(monkeypatch, sizes_of, make_core_inputs):
    monkeypatch.delattr(jax.sharding, "reshard", raising=False)
    sharding = RowSharding(make_mesh(axis_type=AxisType.Explicit), "rows")
    with pytest.raises(NotImplementedError, match="explicit axes needs JAX"):
        core(sharding=sharding)(make_core_inputs(sizes_of("tiny"), 8))


def test_memory_falls_and_no_pair_array_travels(sizes_of):
    n, sizes = 1024, sizes_of("af2")

    def compile_gradient(sharding, rows, everywhere):
        def shape(sharding, *shape):
            return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

        module, run = module_gradients(folding, sizes, sharding=sharding)
        inputs = (
            shape(everywhere, n, sizes.single_channel),
            shape(rows, n, n, sizes.pair_channel),
            shape(everywhere, n, 1),
            shape(everywhere, n, 7),
        )
        params = jax.eval_shape(module.init, jax.random.key(0), *inputs)
        params = jax.tree.map(lambda x: shape(everywhere, *x.shape), params)
        return run.lower(params, *inputs).compile()

    def memory(compiled):
        analysis = compiled.memory_analysis()
        return analysis.temp_size_in_bytes + analysis.argument_size_in_bytes

    mesh = make_mesh()
    one = compile_gradient(None, None, None)
    eight = compile_gradient(
        RowSharding(mesh, "rows"), NamedSharding(mesh, P("rows")), NamedSharding(mesh, P())
    )
    assert memory(eight) <= memory(one) / 6
    names = "all-gather|all-to-all|all-reduce|reduce-scatter|collective-permute"
    results = re.findall(rf"= (.*?) (?:{names})(?:-start)?\(", eight.as_text())
    travel = [
        math.prod(map(int, dimensions.split(",")))
        for result in results
        for dimensions in re.findall(r"\w\[([\d,]+)\]", result)
    ]
    # Gradients of keys, values and weights; the largest is that of the output projection.
    assert max(travel) == 2112 * 384
