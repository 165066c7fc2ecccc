"""Pair representations that are not N x N arrays: equal to the array, in blocks of rows."""

import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from implementations import QUICKLY

from ipa_haiku import (
    FactorizedPair,
    LogitScales,
    RelativePositionPair,
    invariant_point_attention,
)
from ipa_haiku.attention.types import IPAInputs
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.testing import assert_gradients_close, assert_within_error_budget

EPS = float(np.finfo(np.float32).eps)
MONOMER = LogitScales(scalar=(1 / 48) ** 0.5, pair=(1 / 3) ** 0.5)
MULTIMER = LogitScales(scalar=(1 / 16) ** 0.5, pair=1.0, total=(1 / 3) ** 0.5)
FORMS = ("rank_1", "rank_2", "rank_4", "relative", "none")
MAX_DISTANCE = 3

# Each case is drawn until there are as many residues: a few would have their errors by chance.
NUM_RESIDUES = 200


def replace_pair(inputs, form, seed=0, dtype="float32"):
    """`IPAInputs` with another form of pair representation, or with none."""
    rng = np.random.default_rng(seed)
    *batch, num_query, num_key, num_channel = inputs.inputs_2d.shape

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape).astype(dtype))

    if form == "none":
        return inputs._replace(inputs_2d=None, pair_weights=None, pair_bias=None)
    if form == "relative":
        # Unordered numbers with gaps.
        index = [
            jnp.asarray(np.sort(rng.choice(2 * n + 1, (*batch, n)), axis=-1), jnp.int32)
            for n in (num_query, num_key)
        ]
        table = normal(2 * MAX_DISTANCE + 1, num_channel)
        return inputs._replace(inputs_2d=RelativePositionPair(table, *index))
    rank = int(form.removeprefix("rank_"))
    factors = (normal(*batch, n, rank, num_channel) for n in (num_query, num_key))
    return inputs._replace(inputs_2d=FactorizedPair(*factors))


@pytest.fixture
def make_pair_inputs(sizes_of, make_core_inputs):
    """As `make_core_inputs`, with the form of the pair representation first."""

    def make(form, size="tiny", num_query=6, num_key=7, dtype="float32", seed=0, **options):
        inputs = make_core_inputs(
            sizes_of(size), num_query, num_key, dtype=dtype, seed=seed, **options
        )
        return replace_pair(inputs, form, seed, dtype)

    return make


def split(inputs):
    """What is differentiable, by name, and a function that puts `IPAInputs` together again."""
    pair = inputs.inputs_2d
    named = inputs._asdict()
    constant = {
        name: named.pop(name) for name in ("q_mask", "k_mask", "q_segment_ids", "k_segment_ids")
    }
    if isinstance(pair, RelativePositionPair):
        named["inputs_2d"] = pair.table

    def merge(arrays):
        if isinstance(pair, RelativePositionPair):
            table = arrays["inputs_2d"]
            arrays = arrays | {"inputs_2d": RelativePositionPair(table, pair.q_index, pair.k_index)}
        return IPAInputs(**arrays, **constant)

    return named, merge


def attend(inputs, scales=MONOMER, implementation="xla", **options):
    if implementation == "xla":
        options = {"query_block": 4} | options
    return invariant_point_attention(
        **inputs._asdict(), logit_scales=scales, implementation=implementation, **options
    )


def test_indices_of_any_integer_type():
    table = np.arange(14.0, dtype=np.float32).reshape(7, 2)
    index = np.array([9, 2, 5, 120])
    rows = np.clip(index[None, :] - index[:, None], -3, 3) + 3
    for dtype in (np.int8, np.uint8, np.uint32, np.int32):
        pair = RelativePositionPair(jnp.asarray(table), *[jnp.asarray(index.astype(dtype))] * 2)
        np.testing.assert_array_equal(pair.to_dense(), table[rows])


# --- equal to the array --------------------------------------------------------------------------


class Case(NamedTuple):
    form: str
    options: dict[str, Any]  # of `make_pair_inputs`
    masked_rows: bool = False  # whether to look at rows of masked queries too
    scales: LogitScales = MONOMER
    num_segment: int | None = None


# Of one shape where it does not matter, so that cases of one form are one compilation.
SHAPE = {"num_query": 13, "num_key": 18}
CASES = {
    **{form: Case(form, SHAPE | {"mask": "holed"}) for form in ("rank_2", "relative", "none")},
    "all_masked": Case("relative", SHAPE | {"mask": "zero"}, masked_rows=True),
    "segments": Case("rank_1", SHAPE | {"mask": "holed"}, num_segment=3),
    "far": Case("none", SHAPE | {"points": "far"}),
    "bfloat16": Case("rank_4", SHAPE | {"dtype": "bfloat16"}),
}
SLOW_CASES = {
    **{form: Case(form, SHAPE | {"mask": "holed"}) for form in ("rank_1", "rank_4")},
    "batches": Case("rank_2", {"size": "odd", "batch": (2, 1, 2), "mask": "holed"}),
    "multimer": Case("rank_2", {"num_query": 11, "mask": "padded"}, scales=MULTIMER),
    "masked_rows": Case("rank_1", SHAPE | {"mask": "holed"}, masked_rows=True),
    "batches_relative": Case("relative", {"size": "odd", "batch": (3,), "mask": "padded"}),
    "one_residue": Case("rank_1", {"num_query": 1, "num_key": 1}),
    "less_than_a_block": Case("rank_1", {"num_query": 3, "num_key": 3}),
    "coincident": Case("rank_1", SHAPE | {"points": "coincident"}),
    "bfloat16_relative": Case("relative", SHAPE | {"dtype": "bfloat16"}),
    "float16": Case("rank_1", SHAPE | {"dtype": "float16", "mask": "padded"}),
}


def run(scales, implementation, inputs, rows, cotangents):
    """Outputs and gradients of everything differentiable, that of the pair bias apart."""
    arrays, merge = split(inputs)

    def fn(arrays):
        result = attend(merge(arrays), scales, implementation)
        return tuple(
            x * jnp.expand_dims(rows, range(rows.ndim, x.ndim)).astype(x.dtype)
            for x in result[:3]
            if x is not None
        )

    outputs, pull_back = jax.vjp(fn, arrays)
    (gradients,) = pull_back(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs)))
    # The softmax does not see the bias: its gradient is zero but for the rounding of AF2.
    bias = gradients.pop("pair_bias")
    return outputs, gradients, bias


compiled = functools.partial(jax.jit, static_argnums=(0, 1))
run_as_it_is, run_in_float64 = compiled(run), compiled(run, compiler_options=QUICKLY)


def value_and_gradients(case, implementation, draws, float64=False):
    """What `run` gives but for the pair bias, of all draws, stacked."""

    def widen(x):
        x = np.asarray(x)
        return x if np.issubdtype(x.dtype, np.integer) else x.astype(np.float64)

    with enable_x64(float64):
        draws = jax.tree.map(widen, draws) if float64 else draws
        fn = run_in_float64 if float64 else run_as_it_is
        results = [jax.device_get(fn(case.scales, implementation, *draw)) for draw in draws]
    if implementation == "xla":
        assert not any(np.any(bias) for *_, bias in results if bias is not None)
    return jax.tree.map(lambda *x: np.stack(x), *[result[:2] for result in results])


@pytest.mark.usefixtures("debug_nans")
@pytest.mark.parametrize(
    "name", [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW_CASES)]
)
def test_error_budget(name, make_pair_inputs):
    case = (CASES | SLOW_CASES)[name]

    def draw(seed):
        inputs = make_pair_inputs(case.form, seed=seed, **case.options)
        if case.num_segment:
            segment_ids = [
                np.arange(len(x)) % case.num_segment for x in (inputs.q_mask, inputs.k_mask)
            ]
            inputs = inputs._replace(q_segment_ids=segment_ids[0], k_segment_ids=segment_ids[1])
        rows = np.ones_like(inputs.q_mask) if case.masked_rows else inputs.q_mask
        rng = np.random.default_rng(seed)
        outputs = jax.eval_shape(functools.partial(attend, implementation="reference"), inputs)[:3]
        # Rounded once, so that half-precision and float64 runs pull back the same numbers.
        cotangents = tuple(
            rng.normal(size=x.shape).astype(inputs.q_scalar.dtype) for x in outputs if x is not None
        )
        return inputs, rows, cotangents

    num_query = case.options.get("num_query", 6)
    draws = [draw(seed) for seed in range(-(-NUM_RESIDUES // num_query))]
    fast = value_and_gradients(case, "xla", draws)
    reference = value_and_gradients(case, "reference", draws)
    exact = value_and_gradients(case, "reference", draws, float64=True)
    # Of gradients that are exactly zero, such as the queries' with a single key, rounding is left:
    # 1e-6 of terms that are up to 100.
    fast = jax.tree.map(
        lambda x, y: x if np.any(y) else np.where(np.abs(x) < 1e-4, 0, x), fast, exact
    )
    assert_within_error_budget(fast, reference, exact)


@pytest.mark.parametrize("form", ["rank_2", "relative"])
def test_reference_goes_through_the_array(form, make_pair_inputs):
    inputs = make_pair_inputs(form)
    dense = inputs._replace(inputs_2d=inputs.inputs_2d.to_dense())
    run = jax.jit(functools.partial(attend, implementation="reference"), compiler_options=QUICKLY)
    chex.assert_trees_all_equal(run(inputs), run(dense))


@pytest.mark.parametrize("form", ["rank_4", "relative"])
def test_float64(form, make_pair_inputs):
    with enable_x64(True):
        inputs = jax.tree.map(
            lambda x: x if x.dtype == np.int32 else jnp.asarray(x, jnp.float64),
            make_pair_inputs(form, num_query=13, mask="padded"),
        )
        fast, exact = (
            jax.jit(functools.partial(attend, implementation=name), compiler_options=QUICKLY)(
                inputs
            )
            for name in ("xla", "reference")
        )
    valid = np.asarray(inputs.q_mask) == 1
    for x, y in zip(*(jax.tree.leaves(jax.device_get(result)) for result in (fast, exact))):
        assert x.dtype == jnp.float64
        np.testing.assert_allclose(x[valid], y[valid], rtol=1e-12, atol=1e-12)


def test_to_dense(make_pair_inputs):
    pair = make_pair_inputs("rank_2", batch=(2,)).inputs_2d
    left, right = np.asarray(pair.left), np.asarray(pair.right)
    z = sum(left[:, :, None, r] * right[:, None, :, r] for r in range(2))
    np.testing.assert_allclose(pair.to_dense(), z, rtol=4 * EPS, atol=4 * EPS)
    assert pair.shape == z.shape

    # Residue numbers with a gap: 5 lies 3 after 2, and 99 as far as the table goes.
    table = jnp.arange(10.0).reshape(5, 2)
    pair = RelativePositionPair(table, jnp.array([2, 5]), jnp.array([1, 2, 5, 99]))
    assert pair.to_dense().shape == pair.shape
    np.testing.assert_array_equal(pair.to_dense()[..., 0] / 2, [[1, 2, 4, 4], [0, 0, 2, 4]])


# --- gradients and transformations ---------------------------------------------------------------


def test_masks_have_af2s_gradient(make_pair_inputs):
    inputs = make_pair_inputs("rank_1")
    rng = np.random.default_rng(0)

    def gradients(implementation, inputs, masks):
        def loss(q_mask, k_mask):
            arrays = inputs._replace(q_mask=q_mask, k_mask=k_mask)
            return jnp.sum(jnp.square(attend(arrays, implementation=implementation).pair))

        return jax.grad(loss, (0, 1))(*masks)

    # float32 keeps masks near 1 to 6e-8, and with them logits to 6e-3.
    with enable_x64(True):
        inputs = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        # The penalty is 1e5 times what is missing to 1: up to 2.
        masks = [1 - 1e-5 * rng.random(len(x)) for x in (inputs.q_mask, inputs.k_mask)]
        run = jax.jit(
            lambda *x: [gradients(name, *x) for name in ("xla", "reference")],
            compiler_options=QUICKLY,
        )
        actual, expected = jax.device_get(run(inputs, masks))
    for x, y in zip(actual, expected):
        assert np.any(y)
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-6 * np.max(np.abs(y)))


@pytest.mark.parametrize("form", ["rank_2", pytest.param("relative", marks=pytest.mark.slow)])
def test_vmap_equals_loop(form, make_pair_inputs):
    draws = [make_pair_inputs(form, seed=seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *draws)

    def outputs(inputs):
        return attend(inputs)[:3]

    loop = jax.tree.map(lambda *x: np.stack(x), *map(jax.jit(outputs), draws))
    chex.assert_trees_all_close(
        jax.jit(jax.vmap(outputs))(stacked), loop, rtol=20 * EPS, atol=20 * EPS
    )


def test_runs_give_the_same_bits(make_pair_inputs):
    arrays, merge = split(make_pair_inputs("rank_2", num_query=13))
    gradient = jax.jit(jax.grad(lambda x: jnp.sum(jnp.square(attend(merge(x)).pair))))
    chex.assert_trees_all_equal(gradient(arrays), gradient(arrays))


def test_other_derivatives_are_right_or_refused(make_pair_inputs):
    arrays, merge = split(make_pair_inputs("rank_2", num_query=3, num_key=6))
    q_point = arrays["q_point"]

    def loss(q_point, implementation):
        result = attend(merge(arrays | {"q_point": q_point}), implementation=implementation)
        return jnp.sum(jnp.square(result.pair))

    hessian, expected = (
        jax.jit(jax.jacrev(jax.grad(loss)), static_argnums=1, compiler_options=QUICKLY)(
            q_point, name
        )
        for name in ("xla", "reference")
    )
    chex.assert_trees_all_close(hessian, expected, atol=1e-5 * jnp.max(jnp.abs(expected)))
    with pytest.raises(TypeError, match="implementation='reference'"):
        jax.jvp(lambda x: loss(x, "xla"), (q_point,), (q_point,))


@pytest.mark.slow
def test_checkpoint_and_scan(make_pair_inputs):
    arrays, merge = split(make_pair_inputs("rank_1", num_query=6, num_key=6))

    def step(arrays):
        return arrays | {"v_scalar": jnp.tanh(attend(merge(arrays)).scalar)}

    def scanned(arrays):
        return jax.lax.scan(lambda x, _: (jax.checkpoint(step)(x), None), arrays, length=3)[0]

    assert_gradients_close(
        jax.jit(lambda x: scanned(x)["v_scalar"]),
        jax.jit(lambda x: step(step(step(x)))["v_scalar"]),
        {name: x for name, x in arrays.items() if name != "pair_bias"} | {"pair_bias": jnp.ones(2)},
        key=jax.random.key(0),
        tolerance=1e-5,
    )


@pytest.mark.parametrize("form", ["rank_2", pytest.param("relative", marks=pytest.mark.slow)])
def test_masked_keys_are_not_seen(form, make_pair_inputs):
    inputs = make_pair_inputs(form, mask="holed")
    masked, valid = np.asarray(inputs.k_mask == 0), np.asarray(inputs.q_mask == 1)
    garbage = {"k_scalar": 1e2, "v_scalar": 1e4, "k_point": -1e4, "v_point": 1e4}
    arrays = {
        name: jnp.asarray(
            np.where(masked[:, None, None].reshape(-1, *[1] * (x.ndim - 1)), value, x)
        )
        for name, value in garbage.items()
        for x in (getattr(inputs, name),)
    }
    bad = inputs._replace(**arrays)
    if form == "rank_2":
        right = jnp.where(masked[:, None, None], -1e3, inputs.inputs_2d.right)
        bad = bad._replace(inputs_2d=FactorizedPair(inputs.inputs_2d.left, right))
    outputs = jax.jit(lambda x: attend(x)[:3])
    for actual, expected in zip(outputs(bad), outputs(inputs)):
        np.testing.assert_array_equal(actual[valid], expected[valid])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("form", ["rank_2", "relative"])
@pytest.mark.parametrize("implementation", ["xla", "reference"])
def test_dtypes(dtype, form, implementation, make_pair_inputs):
    inputs = make_pair_inputs(form, dtype=dtype)
    result = jax.eval_shape(functools.partial(attend, implementation=implementation), inputs)
    chex.assert_type([result.scalar, result.pair, result.point], [dtype, dtype, "float32"])


def test_return_attention_without_pair(make_pair_inputs):
    result = attend(make_pair_inputs("none"), implementation="reference", return_attention=True)
    assert result.pair is None
    assert result.attention.pair_logits is None
    np.testing.assert_allclose(jnp.sum(result.attention.weights, axis=-1), 1, atol=7 * EPS)


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "changes", "error", "message"),
    [
        ("rank_2", {"left": np.zeros((5, 2, 3))}, AssertionError, "left must have shape"),
        ("rank_2", {"left": np.zeros((6, 8))}, AssertionError, "left must have shape"),
        ("rank_2", {"left": np.zeros((6, 2, 8), int)}, AssertionError, "left must be floating"),
        ("rank_2", {"right": np.zeros((7, 1, 8))}, AssertionError, "right must have shape"),
        ("rank_2", {"right": [1.0]}, TypeError, "right must be an array, got list"),
        ("relative", {"table": np.zeros((6, 8))}, AssertionError, "table must have an odd number"),
        ("relative", {"q_index": np.zeros(5, int)}, AssertionError, "q_index must have shape"),
        ("relative", {"k_index": np.zeros(7)}, AssertionError, "k_index must be integers"),
        ("relative", {"k_index": [1]}, TypeError, "k_index must be an array, got list"),
    ],
)
def test_bad_parts_are_refused(form, changes, error, message, make_pair_inputs):
    inputs = make_pair_inputs(form)
    parts = {name: getattr(inputs.inputs_2d, name) for name in inputs.inputs_2d.AXES}
    bad = inputs._replace(inputs_2d=type(inputs.inputs_2d)(**parts | changes))
    for implementation in ("xla", "reference"):
        with pytest.raises(error, match=rf"inputs_2d\.{message}"):
            attend(bad, implementation=implementation)


@pytest.mark.parametrize("name", ["pair_weights", "pair_bias"])
def test_pair_weights_come_with_a_pair(name, make_pair_inputs):
    inputs = make_pair_inputs("none")
    with pytest.raises(ValueError, match=f"{name} must be None, as inputs_2d is"):
        attend(inputs._replace(**{name: jnp.ones(2)}))
    inputs = make_pair_inputs("rank_1")._replace(**{name: None})
    with pytest.raises(TypeError, match=f"{name} must be an array, got NoneType"):
        attend(inputs)
