"""The fused kernels on a GPU: `pytest -m gpu` where JAX sees an NVIDIA GPU of capability >= 8.0."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groups import assert_within_error_budget, in_logits

from ipa_haiku import (
    KernelConfig,
    LogitScales,
    invariant_point_attention,
    select_implementation,
)
from ipa_haiku.attention.pallas_triton.device import unsupported
from ipa_haiku.jax_versions import enable_x64

AF2_HEADS, AF2_PAIR_CHANNEL = 12, 128
REASON = unsupported(AF2_HEADS, AF2_PAIR_CHANNEL, "float32")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(REASON is not None, reason=f"no GPU for the kernels: {REASON}"),
]

SCALES = LogitScales(scalar=(1 / 48) ** 0.5, pair=(1 / 3) ** 0.5)

CASES = {
    "one": {"num_query": 1},
    "prime": {"num_query": 61},
    "a_block_and_one": {"num_query": 65, "mask": "holed"},
    "128": {"num_query": 128, "mask": "padded"},
    "fewer_queries": {"num_query": 37, "num_key": 200},
    "odd_sizes": {"size": "odd", "num_query": 50, "num_key": 77, "mask": "holed"},
    "batch": {"num_query": 50, "batch": (2,)},
    "far": {"num_query": 128, "points": "far"},
    "coincident": {"num_query": 40, "points": "coincident"},
    "outlier": {"num_query": 100, "points": "outlier"},
    "domains": {"num_query": 100, "points": "domains"},
    "one_hot": {"num_query": 100, "points": "one_hot"},
    "all_masked": {"num_query": 40, "mask": "zero"},
    "256": {"num_query": 256},
    "bfloat16": {"num_query": 256, "dtype": "bfloat16"},
    "float16": {"num_query": 100, "dtype": "float16"},
    "segments": {"num_query": 150, "mask": "holed", "segments": 3},
    "segments_of_fewer_queries": {"num_query": 37, "num_key": 200, "segments": 2},
    "blocks_of_rows": {"num_query": 150, "mask": "holed", "query_block": 64},
    "segments_in_blocks_of_rows": {"num_query": 150, "segments": 3, "query_block": 64},
    "512": {"num_query": 512, "mask": "holed"},
    "1024": {"num_query": 1024, "mask": "padded"},
}


@functools.partial(jax.jit, static_argnames=("implementation", "query_block"))
def run(inputs, cotangents, implementation, query_block=None):
    """Outputs and the gradients of floating-point arguments."""

    def fn(inputs):
        return invariant_point_attention(
            **inputs._asdict(), logit_scales=SCALES,
            implementation=implementation, query_block=query_block,
            # What the fast one is compared with must not go through TF32.
            precision=jax.lax.Precision.HIGHEST,
        )[:3]  # fmt: skip

    outputs, pull_back = jax.vjp(fn, inputs)
    (gradients,) = pull_back(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs)))
    gradients = gradients._asdict()
    for name in ("q_segment_ids", "k_segment_ids"):
        del gradients[name]  # of a type that has no numbers
    return {"outputs": outputs, "gradients": in_logits(gradients)}


@pytest.fixture
def problem(sizes_of, make_core_inputs):
    """From a case to inputs and cotangents, which are zero in rows of masked queries."""

    def problem(size="af2", num_key=None, segments=0, **options):
        inputs = make_core_inputs(sizes_of(size), num_key=num_key, **options)
        if segments:  # of about equal length; every query has keys
            q_ids, k_ids = (
                jnp.arange(n) * segments // n for n in (inputs.num_query, inputs.num_key)
            )
            inputs = inputs._replace(q_segment_ids=q_ids, k_segment_ids=k_ids)
        rng = np.random.default_rng(1)
        shapes = jax.eval_shape(
            lambda: invariant_point_attention(
                **inputs._asdict(), logit_scales=SCALES, implementation="reference"
            )[:3]
        )
        rows = np.asarray(inputs.q_mask) if np.any(inputs.q_mask) else 1 + 0 * inputs.q_mask
        cotangents = [
            jnp.asarray(rng.normal(size=x.shape), x.dtype)
            * jnp.expand_dims(rows, range(rows.ndim, x.ndim)).astype(x.dtype)
            for x in shapes
        ]
        return inputs, tuple(cotangents), rows

    return problem


@pytest.mark.parametrize("name", CASES)
def test_error_budget(name, problem):
    case = dict(CASES[name])
    query_block = case.pop("query_block", None)
    draws = [problem(seed=seed, **case) for seed in range(3)]  # twelve point weights are few

    def of_all_draws(*options, float64=False):
        results = []
        for inputs, cotangents, rows in draws:
            arguments = (inputs, cotangents)
            if float64:
                arguments = jax.tree.map(widen, arguments)
            result = jax.device_get(run(*arguments, *options))
            results.append(result | {"outputs": [x[rows == 1] for x in result["outputs"]]})
        return jax.tree.map(lambda *x: np.stack(x), *results)

    def widen(x):
        return np.asarray(x, np.float64 if jnp.issubdtype(x.dtype, jnp.floating) else None)

    with enable_x64(True):
        exact = of_all_draws("reference", float64=True)
    assert_within_error_budget(
        of_all_draws("pallas", query_block), of_all_draws("reference"), exact
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_two_runs_give_the_same_bits(dtype, problem):
    inputs, cotangents, _ = problem(num_query=300, dtype=dtype)
    first, second = (jax.device_get(run(inputs, cotangents, "pallas")) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_blocks_of_rows_change_nothing_but_rounding(problem):
    inputs, cotangents, _ = problem(num_query=200, mask="holed")
    whole = run(inputs, cotangents, "pallas")
    blocks = run(inputs, cotangents, "pallas", query_block=64)
    del whole["gradients"]["q_mask"], blocks["gradients"]["q_mask"]  # rounding alone

    def assert_close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * np.abs(y).max())

    jax.tree.map(assert_close, *jax.device_get((blocks, whole)))


def test_the_kernels_are_the_default(problem):
    inputs, cotangents, _ = problem(num_query=64)
    assert select_implementation((12, 64, 64)).implementation == "pallas"
    chex.assert_trees_all_equal(run(inputs, cotangents, None), run(inputs, cotangents, "pallas"))


def test_the_interpreter_agrees(problem):
    inputs, _, _ = problem(num_query=64)
    attend = functools.partial(
        invariant_point_attention,
        **inputs._asdict(),
        logit_scales=SCALES,
        implementation="pallas",
    )
    interpreted = attend(kernel_config=KernelConfig(interpret=True))
    for x, y in zip(attend()[:3], interpreted[:3]):
        np.testing.assert_allclose(x, y, rtol=0, atol=2e-6 * np.abs(y).max())
