"""What is special to the fused kernels; `test_attention.py` holds what all implementations promise.

They run in Pallas's interpreter here, and on a GPU in `test_gpu.py`.
"""

import functools
import os
import re
import subprocess
import sys

import chex
import haiku as hk
import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np
import pytest
from groups import assert_within_error_budget, in_logits, rms

from ipa_haiku import (
    InvariantPointAttention,
    IPAConfig,
    KernelConfig,
    LogitScales,
    QuatAffine,
    RowSharding,
    invariant_point_attention,
    select_implementation,
)
from ipa_haiku.attention.pallas_triton import core, device
from ipa_haiku.attention.pallas_triton.common import Softmax
from ipa_haiku.attention.pallas_triton.config import heuristic
from ipa_haiku.attention.pallas_triton.sums import sum_over_keys
from ipa_haiku.jax_versions import enable_x64

SCALES = LogitScales(scalar=(1 / 16) ** 0.5, pair=1.0, total=(1 / 3) ** 0.5)
INTERPRET = KernelConfig(forward_block=16, backward_block=16, tile=16, interpret=True)
EPS = float(np.finfo(np.float32).eps)

# No block and no tile is full, and keys have three. One size, so that the cases share what takes
# long: compiling.
NUM_QUERY, NUM_KEY = 20, 35
REFERENCE = {"implementation": "reference"}
WHOLE = {"implementation": "pallas", "kernel_config": INTERPRET}
IN_BLOCKS = WHOLE | {"query_block": 8}  # at most: three of seven, and one row too many
# By default `test_attention.py` runs the kernels over all rows at once, this file in blocks.
BOTH = pytest.mark.parametrize(
    "options",
    [pytest.param(IN_BLOCKS, id="blocks"), pytest.param(WHOLE, id="whole", marks=pytest.mark.slow)],
)


@pytest.fixture
def pretend(monkeypatch):
    """Makes the kernels believe in a device: (platform, compute capability times ten)."""
    return lambda *found: monkeypatch.setattr(device, "_device", lambda mesh: found)


def attend(inputs, **options):
    return invariant_point_attention(**inputs._asdict(), logit_scales=SCALES, **options)[:3]


@functools.cache
def _outputs_and_gradients(options):
    @jax.jit
    def run(inputs, cotangents):
        outputs, pull_back = jax.vjp(lambda x: attend(x, **dict(options)), inputs)
        (gradients,) = pull_back(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs)))
        return {"outputs": outputs, "gradients": in_logits(gradients._asdict())}

    return run


def outputs_and_gradients(draws, float64=False, **options):
    """Those of all draws of inputs and cotangents, stacked."""
    run = _outputs_and_gradients(tuple(options.items()))
    with enable_x64(float64):
        if float64:
            draws = jax.tree.map(lambda x: np.asarray(x, np.float64), draws)
        results = [jax.device_get(run(*draw)) for draw in draws]
    return jax.tree.map(lambda *x: np.stack(x), *results)


@pytest.fixture
def draw(sizes_of, make_core_inputs):
    """From a seed and a case to inputs and cotangents, which are zero in masked rows."""

    def draw(seed, **case):
        inputs = make_core_inputs(sizes_of("odd"), NUM_QUERY, NUM_KEY, seed=seed, **case)
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(functools.partial(attend, **REFERENCE), inputs)
        rows = np.asarray(inputs.q_mask)
        cotangents = [
            np.float32(rng.normal(size=x.shape)) * np.expand_dims(rows, tuple(range(1, x.ndim)))
            for x in shapes
        ]
        return inputs, tuple(cotangents)

    return draw


CASES = {
    "compact": {},
    "holed": {"mask": "holed"},
    "far": {"points": "far"},
    "outlier": {"points": "outlier"},
    "domains": {"points": "domains"},
    "one_hot": {"points": "one_hot"},
    "coincident": {"points": "coincident"},
}


@BOTH
@pytest.mark.parametrize("case", CASES)
def test_error_budget(case, options, draw):
    draws = [draw(seed, **CASES[case]) for seed in range(10)]
    assert_within_error_budget(
        outputs_and_gradients(draws, **options),
        outputs_and_gradients(draws, **REFERENCE),
        outputs_and_gradients(draws, float64=True, **REFERENCE),
    )


@BOTH
def test_soft_masks_have_af2s_gradient(options, draw):
    draws = []
    for seed in range(10):
        inputs, cotangents = draw(seed)
        masks = {
            name: 1 - np.float32(2e-5 * np.random.default_rng(seed).uniform(size=n))
            for name, n in (("q_mask", NUM_QUERY), ("k_mask", NUM_KEY))
        }
        draws.append((inputs._replace(**masks), cotangents))
    exact = outputs_and_gradients(draws, float64=True, **REFERENCE)
    assert rms(exact["gradients"]["k_mask"]) > rms(exact["gradients"]["inputs_2d"])
    assert_within_error_budget(
        outputs_and_gradients(draws, **options), outputs_and_gradients(draws, **REFERENCE), exact
    )


@BOTH
def test_gradients_vanish_where_each_query_sees_one_key(options, draw):
    actual = outputs_and_gradients([draw(0, points="one_hot")], **options)["gradients"]
    largest = max(np.max(np.abs(x)) for x in jax.tree.leaves(actual))
    for name in ("q_scalar", "k_scalar", "q_point", "k_point", "pair_weights", "point_weights"):
        assert np.max(np.abs(actual[name])) <= 1e-7 * largest, name


@BOTH
def test_what_shifts_all_logits_of_a_row_has_no_gradient(options, draw):
    draws = []
    for seed in range(10):
        inputs, cotangents = draw(seed, points="domains")
        constant = inputs.inputs_2d.at[..., 0].set(1.0)
        draws.append((inputs._replace(inputs_2d=constant), cotangents))
    actual, reference = (outputs_and_gradients(draws, **x) for x in (options, REFERENCE))
    # All are exactly zero. What the kernels' sums over keys are not, they take away.
    ours, theirs = (
        (x["gradients"]["pair_weights"][:, 0], x["gradients"]["q_mask"])
        for x in (actual, reference)
    )
    assert all(rms(x) < 0.1 * rms(y) for x, y in zip(ours, theirs))
    assert not np.any(actual["gradients"]["pair_bias"])


@BOTH
def test_masked_keys_may_be_as_far_as_squares_overflow(options, draw):
    inputs, cotangents = draw(0)
    is_masked = np.arange(NUM_KEY) < 16  # the first block of keys
    inputs = inputs._replace(k_mask=jnp.where(is_masked, 0.0, inputs.k_mask))
    away = jnp.where(is_masked[:, None, None, None], 1e20, inputs.k_point)
    near, far = (
        outputs_and_gradients([(x, cotangents)], **options)
        for x in (inputs, inputs._replace(k_point=away))
    )
    chex.assert_trees_all_equal(far, near)


def test_two_runs_give_the_same_bits(draw):
    first, second = (outputs_and_gradients([draw(0)], **IN_BLOCKS) for _ in range(2))
    chex.assert_trees_all_equal(first, second)


@pytest.mark.slow
def test_blocks_of_rows_change_nothing_but_rounding(draw):
    whole, blocks = (outputs_and_gradients([draw(0)], **x) for x in (WHOLE, IN_BLOCKS))
    del whole["gradients"]["q_mask"], blocks["gradients"]["q_mask"]  # rounding alone

    # Sums over rows have another order. What is exactly zero is zero in both.
    def assert_close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=20 * EPS * np.abs(y).max())

    jax.tree.map(assert_close, blocks, whole)


def test_values_of_the_only_key_keep_all_bits():
    own, num_head = np.arange(NUM_QUERY), 2
    logits = np.full((NUM_QUERY, num_head, NUM_KEY), -1e3, np.float32)
    logits[own, :, own] = 0.0
    values = np.random.default_rng(0).normal(size=(NUM_KEY, num_head, 9)).astype(np.float32)
    softmax = Softmax(np.zeros(logits.shape[:2], np.float32), np.ones(logits.shape[:2], np.float32))
    result = jax.jit(functools.partial(sum_over_keys, INTERPRET))(logits, values, softmax)
    np.testing.assert_array_equal(result, values[:NUM_QUERY])


@pytest.mark.parametrize(
    ("num_row", "most", "block"), [(5000, 4473, 2500), (20, 8, 7), (20, 20, 20), (7, 1, 1)]
)
def test_blocks_of_rows_are_of_about_equal_length(num_row, most, block):
    assert core.rows_of_block(num_row, most) == block


FORWARD = ["ipa_logits", "ipa_pair_forward", "ipa_sum_over_keys"]
BACKWARD = [
    "ipa_attention_gradient", "ipa_pair_backward", "ipa_sum_over_keys_and_squares",
    "ipa_sum_over_queries", "ipa_sum_over_queries",
]  # fmt: skip


def kernels(fn, *arguments):
    """The names of the kernels in a program, in its order."""
    return re.findall(r"\bname=(ipa_\w+)", str(jax.make_jaxpr(fn)(*arguments)))


def test_what_runs(draw):
    inputs, _ = draw(0)

    def gradient(query_block):
        def loss(inputs):
            return sum(jnp.sum(x) for x in attend(inputs, **WHOLE, query_block=query_block))

        return jax.grad(loss)

    assert kernels(functools.partial(attend, **WHOLE), inputs) == FORWARD
    assert kernels(gradient(None), inputs) == FORWARD + BACKWARD
    # Logits are not kept, but computed again.
    assert kernels(gradient(8), inputs) == FORWARD + FORWARD[:2] + BACKWARD


def kernels_of_a_module(dtype="float32", **options):
    def call(inputs_1d, inputs_2d, mask):
        module = InvariantPointAttention(IPAConfig(num_head=2, num_channel=8), **options)
        return module(inputs_1d, inputs_2d, mask, QuatAffine.identity(len(mask)))

    shapes = [jax.ShapeDtypeStruct(x, dtype) for x in ((9, 6), (9, 9, 5), (9, 1))]
    model = hk.without_apply_rng(hk.transform(call))
    parameters = jax.eval_shape(model.init, jax.random.key(0), *shapes)
    return kernels(model.apply, parameters, *shapes)


def test_modules_run_them():
    assert kernels_of_a_module(**WHOLE) == FORWARD
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("rows",))
    assert kernels_of_a_module(sharding=RowSharding(mesh, "rows"), **WHOLE) == FORWARD


def test_modules_use_no_kernel_for_float64(pretend):
    pretend("gpu", 90)
    assert kernels_of_a_module() == FORWARD
    with enable_x64(True):
        assert not kernels_of_a_module("float64")
        assert not kernels_of_a_module("float32")  # the frames are float64 here


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        jax.numpy_rank_promotion("raise"),
        jax.numpy_dtype_promotion("strict"),
        enable_x64(True),
        jax.checking_leaks(),
    ],
    ids=["rank_promotion", "dtype_promotion", "x64", "leaks"],
)
def test_runs_under_strict_settings(setting, draw):
    inputs, cotangents = draw(0)
    segments = {f"{x}_segment_ids": jnp.arange(n) // 10 for x, n in (("q", 20), ("k", 35))}
    inputs = inputs._replace(inputs_2d=inputs.inputs_2d.astype(jnp.bfloat16), **segments)

    def gradient(inputs, cotangents):
        outputs, pull_back = jax.vjp(lambda x: attend(x, **IN_BLOCKS), inputs)
        return pull_back(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs)))

    with setting:
        jax.jit(gradient).lower(inputs, cotangents)


def test_the_default_is_the_kernels_on_recent_nvidia_gpus(pretend):
    pretend("gpu", 80)
    assert select_implementation((12, 64, 64)).implementation == "pallas"
    assert select_implementation((12, 64, 64), dtype="bfloat16").implementation == "pallas"
    assert select_implementation((12, 64, 64), implementation="xla").implementation == "xla"
    for capability, num_head, pair_channel in ((89, 16, 256), (89, 32, 128), (90, 32, 256)):
        pretend("gpu", capability)
        selection = select_implementation((num_head, 64, 64), pair_channel=pair_channel)
        assert selection.implementation == "pallas"


@pytest.mark.parametrize(
    ("device", "arguments", "reason"),
    [
        (("cpu", None), {}, "needs an NVIDIA GPU, and the device is a cpu"),
        (("tpu", None), {}, "needs an NVIDIA GPU, and the device is a tpu"),
        (("gpu", 75), {}, "compute capability 8.0 or higher, this one has 7.5"),
        (("gpu", None), {}, "compute capability 8.0 or higher, this one has another"),
        (("gpu", 90), {"dtype": "float64"}, "it computes in float32, not float64"),
        (("gpu", 90), {"num_head": 33}, "it takes up to 32 heads, not 33"),
        (("gpu", 90), {"pair_channel": 257}, "up to 256 channels of inputs_2d, not 257"),
        (("gpu", 90), {"pair_channel": None}, "inputs_2d as an array only"),
        (
            ("gpu", 89),
            {"num_head": 17, "pair_channel": 129},
            "need more shared memory than a GPU",
        ),
        (("gpu", 80), {"num_head": 32, "pair_channel": 256}, "of compute capability 8.0 has"),
    ],
)
def test_what_kernels_cannot_do_is_refused_and_xla_is_the_default(
    device, arguments, reason, pretend
):
    pretend(*device)
    num_head = arguments.pop("num_head", 12)
    pair_channel = arguments.pop("pair_channel", 128)
    select = functools.partial(
        select_implementation,
        (num_head, 64, 64),
        pair_channel=pair_channel,
        **arguments,
    )
    with pytest.raises(NotImplementedError, match=reason):
        select(implementation="pallas")
    selection = select()
    assert selection.implementation == "xla"
    assert reason in selection.reason


@pytest.fixture
def no_triton(monkeypatch):
    """A JAX that has done without Pallas's Triton backend."""
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    monkeypatch.delattr(jax.experimental.pallas, "triton", raising=False)


@pytest.mark.parametrize("kernel_config", [None, INTERPRET])
def test_without_the_triton_backend_xla_is_the_default(kernel_config, pretend, no_triton):
    pretend("gpu", 90)
    select = functools.partial(select_implementation, (12, 64, 64), kernel_config=kernel_config)
    with pytest.raises(NotImplementedError, match=r"has no jax\.experimental\.pallas\.triton"):
        select(implementation="pallas")
    selection = select()
    assert selection.implementation == "xla"
    assert "has no jax.experimental.pallas.triton" in selection.reason


def test_importing_the_library_imports_no_pallas():
    program = """
import sys
import ipa_haiku, ipa_haiku.folding_multimer, ipa_haiku.alphafold
ipa_haiku.select_implementation((12, 64, 64))
ipa_haiku.KernelConfig()
assert not [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
"""
    subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:ipa_haiku", "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )


def test_the_function_refuses_too(draw):
    with pytest.raises(NotImplementedError, match="and the device is a cpu"):
        attend(draw(0)[0], implementation="pallas")


def test_large_inputs_are_processed_in_blocks(pretend):
    pretend("gpu", 90)
    # Two arrays [H, Nq, Nk] of float32.
    assert select_implementation((12, 4096, 4096)).query_block is None
    selection = select_implementation((12, 8192, 8192))
    assert selection.query_block == 2 * 2**30 // (2 * 4 * 12 * 8192)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"forward_block": 48}, "forward_block must be a power of two, got 48"),
        ({"backward_block": 8}, "backward_block must be an integer, at least 16, got 8"),
        ({"tile": 0}, "tile must be an integer, at least 16, got 0"),
        ({"tile": 16.5}, "tile must be an integer, at least 16, got 16.5"),
        ({"num_warps": 3}, "num_warps must be a power of two, got 3"),
        ({"num_stages": 0}, "num_stages must be a positive integer, got 0"),
    ],
)
def test_useless_tunables_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        KernelConfig(**arguments)


def test_heuristics():
    assert heuristic(12, 128, "float32") == KernelConfig()
    assert heuristic(12, 128, "bfloat16").forward_block == 64
    assert heuristic(12, 256, "float32").forward_block == 16
    assert heuristic(32, 128, "float32").num_stages == 1
    assert heuristic(32, 128, "bfloat16").num_stages == 2
