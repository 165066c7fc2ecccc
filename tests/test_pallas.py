"""What is special to the fused kernels; `test_attention.py` holds what all implementations promise.

They run in Pallas's interpreter here, and on a GPU in `test_gpu.py`.
"""

import functools
import os
import subprocess
import sys

import haiku as hk
import jax
import jax.experimental.pallas
import jax.numpy as jnp
import numpy as np
import pytest

from ipa_haiku import (
    InvariantPointAttention,
    IPAConfig,
    LogitScales,
    QuatAffine,
    RowSharding,
    invariant_point_attention,
    select_implementation,
)
from ipa_haiku.attention import pallas_triton
from ipa_haiku.attention.pallas_triton import Config

SCALES = LogitScales(scalar=(1 / 16) ** 0.5, pair=1.0, total=(1 / 3) ** 0.5)
INTERPRET = Config(forward_block=16, backward_block=16, tile=16, interpret=True)
EPS = float(np.finfo(np.float32).eps)


@pytest.fixture
def pretend(monkeypatch):
    """Makes the kernels believe in a device: (platform, compute capability times ten)."""
    return lambda *device: monkeypatch.setattr(pallas_triton, "_device", lambda mesh: device)


@functools.partial(jax.jit, static_argnums=(1, 2))
def outputs_and_gradients(inputs, config, query_block=None):
    def fn(inputs):
        return invariant_point_attention(
            **inputs._asdict(),
            logit_scales=SCALES,
            implementation="pallas",
            config=config,
            query_block=query_block,
        )[:3]

    outputs, pull_back = jax.vjp(fn, inputs)
    cotangents = [jnp.cos(jnp.arange(x.size)).reshape(x.shape).astype(x.dtype) for x in outputs]
    return outputs, pull_back(tuple(cotangents))[0]


@pytest.fixture
def inputs(sizes_of, make_core_inputs):
    # Heads, channels and residues are not powers of two and fill no block; 3 blocks of keys.
    return make_core_inputs(sizes_of("odd"), 7, 35, mask="holed")


def assert_same_bits(actual, expected):
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(actual), jax.device_get(expected))


def test_two_runs_give_the_same_bits(inputs):
    assert_same_bits(
        outputs_and_gradients(inputs, INTERPRET), outputs_and_gradients(inputs, INTERPRET)
    )


def test_blocks_of_rows_change_nothing_but_rounding(inputs):
    whole = outputs_and_gradients(inputs, INTERPRET)
    blocks = outputs_and_gradients(inputs, INTERPRET, query_block=3)

    # Sums over rows have another order. What is exactly zero is zero in both.
    def assert_close(x, y):
        np.testing.assert_allclose(x, y, rtol=0, atol=20 * EPS * np.abs(y).max())

    jax.tree.map(assert_close, blocks, whole)


def test_masks_and_pair_bias_have_zero_gradients(inputs):
    _, gradients = outputs_and_gradients(inputs, INTERPRET)
    for name in ("pair_bias", "q_mask", "k_mask"):
        assert not np.any(getattr(gradients, name))


@pytest.mark.parametrize(
    ("dtype", "sizes", "num_channel"),
    [("float32", (5, 33, 16, 40), 70), ("float32", (1,), 1), ("bfloat16", (48, 20), 33)],
)
def test_the_projection_is_that_of_features_side_by_side(dtype, sizes, num_channel):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), dtype)

    arguments = [normal(2, 19, k) for k in sizes], normal(sum(sizes), num_channel)
    arguments += (normal(num_channel),)
    cotangent = normal(2, 19, num_channel)

    def concatenated(features, weights, bias):
        return jnp.concatenate(features, axis=-1) @ weights + bias

    def output_and_gradients(fn, *arguments):
        output, pull_back = jax.vjp(fn, *arguments)
        return output, pull_back(cotangent.astype(output.dtype))

    project = functools.partial(pallas_triton.project, config=INTERPRET)
    actual = output_and_gradients(project, *arguments)
    assert actual[0].dtype == dtype
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), arguments)
        exact = jax.device_get(output_and_gradients(concatenated, *wide))
    tolerance = 10 * EPS if dtype == "float32" else float(jnp.finfo(dtype).eps)

    def assert_close(x, y):
        np.testing.assert_allclose(
            np.asarray(x, np.float64), y, rtol=0, atol=tolerance * np.abs(y).max()
        )

    jax.tree.map(assert_close, actual, exact)


def test_the_projection_refuses_what_does_not_fit():
    features, weights, bias = [jnp.ones((3, 2)), jnp.ones((3, 4))], jnp.ones((6, 5)), jnp.ones(5)
    project = functools.partial(pallas_triton.project, config=INTERPRET)
    for name, arguments in {
        r"features\[1\]": ([features[0], jnp.ones((4, 4))], weights, bias),
        "weights": (features, jnp.ones((7, 5)), bias),
        "bias": (features, weights, jnp.ones(6)),
        r"features\[1\] must be float32": (
            [features[0], features[1].astype("bfloat16")],
            weights,
            bias,
        ),
        "weights must be float32": (features, weights.astype("bfloat16"), bias),
        "bias must be float32": (features, weights, bias.astype("float16")),
    }.items():
        with pytest.raises(AssertionError, match=name):
            project(*arguments)


def kernels_of_a_module(dtype="float32", **options):
    """How many kernels its program has: three of the core, and the output projection."""

    def call(inputs_1d, inputs_2d, mask):
        module = InvariantPointAttention(IPAConfig(num_head=2, num_channel=8), **options)
        return module(inputs_1d, inputs_2d, mask, QuatAffine.identity(len(mask)))

    shapes = [jax.ShapeDtypeStruct(x, dtype) for x in ((9, 6), (9, 9, 5), (9, 1))]
    model = hk.without_apply_rng(hk.transform(call))
    parameters = jax.eval_shape(model.init, jax.random.key(0), *shapes)
    return str(jax.make_jaxpr(model.apply)(parameters, *shapes)).count("pallas_call[")


@pytest.mark.parametrize(("precision", "num_kernel"), [(None, 4), ("highest", 3)])
def test_modules_project_by_a_kernel_unless_told_how_precisely(precision, num_kernel):
    options = {"implementation": "pallas", "kernel_config": INTERPRET, "precision": precision}
    assert kernels_of_a_module(**options) == num_kernel


def test_modules_use_no_kernel_for_float64(pretend):
    pretend("gpu", 90)
    assert kernels_of_a_module() == 4
    with jax.enable_x64(True):
        assert kernels_of_a_module("float64") == 0
        assert kernels_of_a_module("float32") == 0  # the frames are float64 here


def test_modules_project_by_no_kernel_over_several_devices():
    mesh = jax.sharding.Mesh(jax.devices()[:1], ("rows",))
    options = {"implementation": "pallas", "kernel_config": INTERPRET}
    assert kernels_of_a_module(sharding=RowSharding(mesh, "rows"), **options) == 3


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


@pytest.mark.parametrize("config", [None, INTERPRET])
def test_without_the_triton_backend_xla_is_the_default(config, pretend, no_triton):
    pretend("gpu", 90)
    select = functools.partial(select_implementation, (12, 64, 64), config=config)
    with pytest.raises(NotImplementedError, match="has no Triton backend of Pallas"):
        select(implementation="pallas")
    selection = select()
    assert selection.implementation == "xla"
    assert "has no Triton backend of Pallas" in selection.reason


def test_importing_the_library_imports_no_pallas():
    program = """
import sys
import ipa_haiku, ipa_haiku.folding_multimer, ipa_haiku.alphafold
ipa_haiku.select_implementation((12, 64, 64))
assert not [name for name in sys.modules if name.startswith("jax.experimental.pallas")]
"""
    subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:ipa_haiku", "-c", program],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )


def test_the_function_refuses_too(inputs):
    with pytest.raises(NotImplementedError, match="and the device is a cpu"):
        invariant_point_attention(**inputs._asdict(), logit_scales=SCALES, implementation="pallas")


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
        Config(**arguments)


def test_heuristics():
    assert pallas_triton.heuristic(12, 128, "float32") == Config()
    assert pallas_triton.heuristic(12, 128, "bfloat16").forward_block == 64
    assert pallas_triton.heuristic(12, 256, "float32").forward_block == 16
    assert pallas_triton.heuristic(32, 128, "float32").num_stages == 1
    assert pallas_triton.heuristic(32, 128, "bfloat16").num_stages == 2
