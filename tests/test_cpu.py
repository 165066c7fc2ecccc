"""What programs for CPUs do otherwise: same results, still of use, and nowhere else.

Blocks have a few rows here, as the 4 MB of real ones are many.
"""

import builtins
import functools
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipa_haiku import LogitScales, invariant_point_attention
from ipa_haiku.attention.xla import cpu, forward
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.testing import assert_within_error_budget

EPS = float(np.finfo(np.float32).eps)
SCALES = LogitScales(scalar=0.5, pair=1.0, total=0.5)
PLATFORMS = ("cpu", "cuda", "tpu")

needs_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="compiles for CPUs")


def attend(inputs, implementation="xla"):
    return invariant_point_attention(
        **inputs._asdict(), logit_scales=SCALES, implementation=implementation
    )[:3]


def value_and_gradient(inputs, implementation="xla"):
    """The outputs alone, and outputs and gradients of all arguments."""
    fn = functools.partial(attend, implementation=implementation)
    outputs, pull_back = jax.vjp(fn, inputs)
    cotangents = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in outputs]
    cotangents = tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs))
    return fn(inputs), outputs, pull_back(cotangents)


def lower(fn, *args, platform="cpu"):
    # A new function each time, so that JAX does not find the trace of another constant.
    return jax.jit(lambda *args: fn(*args)).trace(*args).lower(lowering_platforms=(platform,))


def exact_result(inputs):
    """`value_and_gradient` in float64 and by other code."""
    with enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        fn = functools.partial(value_and_gradient, implementation="reference")
        # Rounding in float64 is nothing, however little the compiler does.
        compiled = lower(fn, wide).compile({"xla_backend_optimization_level": 0})
        return jax.device_get(compiled(wide))


def take_two_rows(inputs, monkeypatch):
    """Makes CPUs take that many rows in a block."""
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 2 * 4 * inputs.inputs_2d[0].size)
    monkeypatch.setattr(cpu, "_LEAST_ROWS", 1)


def count(operation, text):
    return len(re.findall(rf"\bstablehlo\.{operation}\b", text))


def num_conditional(text):
    """How many choices among two branches there are; of one is none."""
    constant = r"\{\s*%\S+ = stablehlo\.constant dense<\d> : .*\s*stablehlo\.return .*\s*\}"
    without_platform = re.sub(rf"stablehlo\.case\"\(%\w+\) \({constant}, {constant}\)", "", text)
    return without_platform.count("}, {")


# --- nothing but rounding ------------------------------------------------------------------------


# With and without rows that two blocks share.
@needs_cpu
@pytest.mark.parametrize(
    ("num_query", "dtype"), [(9, "bfloat16"), pytest.param(12, "float32", marks=pytest.mark.slow)]
)
def test_blocks_change_nothing(num_query, dtype, sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), num_query, 8)
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    whole = lower(value_and_gradient, inputs)
    exact = exact_result(inputs)
    take_two_rows(inputs, monkeypatch)
    in_blocks = lower(value_and_gradient, inputs)
    # The outputs alone, within the gradient, and the gradient.
    assert count("while", in_blocks.as_text()) >= count("while", whole.as_text()) + 3
    assert_within_error_budget(in_blocks.compile()(inputs), whole.compile()(inputs), exact)


@pytest.mark.parametrize(
    ("num_row", "bytes_per_row", "block"),
    [(100, 2**30, 15), (100, 2**17, 25), (100, 2**14, 100), (17, 2**30, 9), (3, 2**30, 3)],
)
def test_blocks_are_about_equally_long(num_row, bytes_per_row, block):
    assert cpu.block_rows(num_row, bytes_per_row) == block


@needs_cpu
def test_sums_over_keys_in_parts():
    num_part = {7: 1, 8: 4, 9: 3, 10: 2, 1280: 10}
    rng = np.random.default_rng(0)
    arguments = {
        n: [rng.normal(size=shape).astype(np.float32) for shape in ((2, 3, n), (2, n, 5))]
        for n in num_part
    }

    def sums(arguments):
        highest = jax.lax.Precision.HIGHEST
        return {n: cpu.sum_over_keys(*x, highest, may_copy=False) for n, x in arguments.items()}

    texts = {
        platform: lower(sums, arguments, platform=platform).as_text() for platform in PLATFORMS
    }
    for n, num in num_part.items():
        factor = "x".join(map(str, (2, num, n // num, 5) if num > 1 else (2, n, 5)))
        product = re.compile(rf"stablehlo\.dot_general.* : \(.*tensor<{factor}xf32>.*\) ->")
        for platform, text in texts.items():
            in_parts = num > 1 and platform == "cpu"
            assert bool(product.search(text)) == (in_parts or num == 1), (platform, n)
    for n, x in jax.jit(sums)(arguments).items():
        weights, values = (a.astype(np.float64) for a in arguments[n])
        np.testing.assert_allclose(x, weights @ values, rtol=0, atol=n * EPS)


def second_derivative(implementation, inputs):
    """Of the sum of squared outputs in q_scalar and inputs_2d, along a direction: a gradient."""

    def loss(q_scalar, inputs_2d):
        arrays = inputs._replace(q_scalar=q_scalar, inputs_2d=inputs_2d)
        return sum(
            jnp.sum(jnp.square(x.astype(jnp.float32))) for x in attend(arrays, implementation)
        )

    def slope(*args):
        gradients = jax.grad(loss, (0, 1))(*args)
        return sum(jnp.sum(jnp.sin(g.astype(jnp.float32))) for g in gradients)

    return jax.jit(jax.grad(slope, (0, 1)))(inputs.q_scalar, inputs.inputs_2d)


@needs_cpu
@pytest.mark.parametrize(
    ("num_query", "dtype"), [(9, "bfloat16"), pytest.param(12, "float32", marks=pytest.mark.slow)]
)
def test_second_derivatives_in_blocks(num_query, dtype, sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), num_query, 7)
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    # Gradients of bfloat16 are rounded to it on the way to the second derivative.
    tolerance = 1e-5 if dtype == "float32" else 2.0**-6
    expected = second_derivative("reference", inputs)
    take_two_rows(inputs, monkeypatch)
    for x, y in zip(second_derivative("xla", inputs), expected):
        assert x.dtype == y.dtype
        x, y = (np.asarray(a, np.float64) for a in (x, y))
        np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * np.max(np.abs(y)))


# --- still of use --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(sizes_of, make_core_inputs):
    return make_core_inputs(sizes_of("tiny"), 12, 8)


@needs_cpu
def test_the_compiler_removes_no_rounding_that_changes_nothing(small, monkeypatch):
    def num_rounding():
        return lower(attend, small).compile().as_text().count(" reduce-precision(")

    assert num_rounding() > 0
    monkeypatch.setattr(cpu, "unfused", lambda x: x)
    assert num_rounding() == 0  # it is this one's


@needs_cpu
def test_a_block_of_rows_is_copied_once(small, monkeypatch):
    take_two_rows(small, monkeypatch)
    shape = ",".join(map(str, (2, *small.inputs_2d.shape[1:])))

    def copies():
        """Of rows: conditionals that return them, and slices that are them."""
        text = lower(attend, small).compile().as_text()
        rows = rf"f32\[{shape}\]\S*"
        conditionals = re.findall(rf"= \(?{rows}\)? conditional\(.*branch_computations=", text)
        return len(conditionals), len(re.findall(rf"= {rows} dynamic-slice\(", text))

    # Both branches of the conditional, of which one runs.
    assert copies() == (1, 2)
    monkeypatch.setattr(forward.cpu, "one_array", lambda compute, is_true: compute())
    num_conditional, num_copy = copies()
    assert num_conditional == 0
    assert num_copy > 1  # without it, one for each product


# --- nowhere else, and the same wherever it is traced --------------------------------------------


@pytest.mark.parametrize("platform", PLATFORMS)
def test_programs_do_not_depend_on_the_machine_that_traces_them(platform, small, monkeypatch):
    def text():
        return lower(value_and_gradient, small, platform=platform).as_text()

    expected = text()

    def refuse(*args, **options):
        raise AssertionError(f"tracing asks this machine: {args}")

    with monkeypatch.context() as patch:
        for where, name in (
            (builtins, "open"),
            (os, "open"),
            (os, "cpu_count"),
            (os, "sched_getaffinity"),
            (pathlib.Path, "read_text"),
            (pathlib.Path, "read_bytes"),
        ):
            patch.setattr(where, name, refuse)
        actual = text()
    assert actual == expected


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_devices_hold_none_of_it(platform, small, monkeypatch):
    def text():
        return lower(value_and_gradient, small, platform=platform).as_text()

    take_two_rows(small, monkeypatch)
    as_it_is = text()
    on_cpu = lower(value_and_gradient, small).as_text()
    monkeypatch.setattr(cpu, "either", lambda on_cpu, elsewhere: elsewhere())
    monkeypatch.setattr(cpu, "unfused", lambda x: x)
    plain = text()
    for operation in ("dot_general", "while", "reduce", "reduce_precision", "dynamic_slice"):
        assert count(operation, as_it_is) == count(operation, plain), operation
    assert count("dot_general", plain) > 0
    assert num_conditional(as_it_is) == num_conditional(plain) < num_conditional(on_cpu)
    assert count("reduce_precision", plain) < count("reduce_precision", on_cpu)
