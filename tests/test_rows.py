"""Rows of `inputs_2d` in blocks that a CPU's cache holds: here of a few rows, as 4 MB are many."""

import collections
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipa_haiku import invariant_point_attention
from ipa_haiku.attention import rows, xla_forward
from ipa_haiku.attention.types import LogitScales
from ipa_haiku.testing import assert_within_error_budget

SCALES = LogitScales(scalar=0.5, pair=1.0, total=0.5)


pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="only CPUs take blocks that a cache holds"
)


def lower(inputs, implementation="xla", platform="cpu"):
    """The outputs, and outputs and gradients of all floating-point arguments, lowered."""

    def fn(inputs):
        result = invariant_point_attention(
            **inputs._asdict(), logit_scales=SCALES, implementation=implementation
        )
        return result[:3]

    def value_and_gradient(inputs):
        outputs, pull_back = jax.vjp(fn, inputs)
        cotangents = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in outputs]
        cotangents = tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs))
        return fn(inputs), outputs, pull_back(cotangents)

    return jax.jit(value_and_gradient).trace(inputs).lower(lowering_platforms=(platform,))


def exact_result(inputs):
    """What `lower(inputs)` computes, in float64 and by other code."""
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        outputs, again, gradient = jax.device_get(lower(wide, "reference").compile()(wide))
    # The gradient of masks is zero by definition, but not that of `reference`.
    masks = {name: np.zeros_like(getattr(gradient[0], name)) for name in ("q_mask", "k_mask")}
    return outputs, again, (gradient[0]._replace(**masks),)


def num_loop(lowered):
    return lowered.as_text().count("stablehlo.while")


def take_two_rows(inputs, monkeypatch):
    """Makes CPUs take that many rows in a block."""
    monkeypatch.setattr(rows, "_CACHED_BYTES", 2 * 4 * inputs.inputs_2d[0].size)
    monkeypatch.setattr(rows, "_LEAST_ROWS", 1)
    monkeypatch.setattr(rows, "_has_large_caches", lambda: False)


# With and without rows that two blocks share.
@pytest.mark.parametrize(("num_query", "dtype"), [(9, "float32"), (12, "bfloat16")])
def test_blocks_change_nothing(num_query, dtype, sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), num_query, 7, mask="holed")
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    whole = lower(inputs)
    exact = exact_result(inputs)
    take_two_rows(inputs, monkeypatch)
    in_blocks = lower(inputs)
    # The outputs alone, within the gradient, and the gradient.
    assert num_loop(in_blocks) >= num_loop(whole) + 3
    assert_within_error_budget(in_blocks.compile()(inputs), whole.compile()(inputs), exact)


@pytest.mark.parametrize(("num_key", "num_part"), [(8, 4), (9, 3), (10, 2), (7, 1)])
def test_sums_over_keys_in_parts(num_key, num_part, sizes_of, make_core_inputs, monkeypatch):
    assert xla_forward._num_part(num_key) == num_part
    inputs = make_core_inputs(sizes_of("tiny"), 5, num_key, mask="holed")
    exact = exact_result(inputs)
    in_parts = lower(inputs)
    monkeypatch.setattr(xla_forward, "_num_part", lambda num_key: 1)
    whole = lower(inputs)
    assert (in_parts.as_text() != whole.as_text()) == (num_part > 1)
    assert_within_error_budget(in_parts.compile()(inputs), whole.compile()(inputs), exact)


def test_attention_weights_need_not_be_there_all_at_once(sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7, mask="holed")
    exact = exact_result(inputs)
    take_two_rows(inputs, monkeypatch)
    all_at_once = lower(inputs)
    num_weight = inputs.q_scalar.shape[-2] * 12 * 7
    monkeypatch.setattr(xla_forward, "_MANY_WEIGHTS_BYTES", 4 * num_weight)
    assert lower(inputs).as_text() == all_at_once.as_text()
    monkeypatch.setattr(xla_forward, "_MANY_WEIGHTS_BYTES", 4 * num_weight - 1)
    in_parts = lower(inputs)
    assert in_parts.as_text() != all_at_once.as_text()
    assert_within_error_budget(in_parts.compile()(inputs), all_at_once.compile()(inputs), exact)


def second_derivative(inputs, implementation):
    """Of the sum of squared outputs in q_scalar and inputs_2d, along a direction: a gradient."""

    def loss(q_scalar, inputs_2d):
        arrays = inputs._replace(q_scalar=q_scalar, inputs_2d=inputs_2d)._asdict()
        result = invariant_point_attention(
            **arrays, logit_scales=SCALES, implementation=implementation
        )
        return sum(jnp.sum(jnp.square(x.astype(jnp.float32))) for x in result[:3])

    def slope(*args):
        gradients = jax.grad(loss, (0, 1))(*args)
        return sum(jnp.sum(jnp.sin(g.astype(jnp.float32))) for g in gradients)

    return jax.jit(jax.grad(slope, (0, 1)))(inputs.q_scalar, inputs.inputs_2d)


@pytest.mark.parametrize("num_query", [9, 12])
def test_second_derivatives_in_blocks(num_query, sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), num_query, 7)
    expected = second_derivative(inputs, "reference")
    take_two_rows(inputs, monkeypatch)
    for x, y in zip(second_derivative(inputs, "xla"), expected):
        np.testing.assert_allclose(x, y, rtol=0, atol=1e-5 * jnp.max(jnp.abs(y)))


def test_second_derivatives_of_bfloat16_in_blocks_are_refused(
    sizes_of, make_core_inputs, monkeypatch
):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7)
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, "bfloat16"))
    take_two_rows(inputs, monkeypatch)
    with pytest.raises(TypeError, match="implementation='reference'"):
        second_derivative(inputs, "xla")


@pytest.mark.parametrize(
    ("has_large_caches", "missing_bytes", "in_blocks"),
    [(True, 0, False), (True, 1, True), (False, 0, True)],
)
def test_what_large_caches_hold_is_taken_whole(
    has_large_caches, missing_bytes, in_blocks, sizes_of, make_core_inputs, monkeypatch
):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7)
    take_two_rows(inputs, monkeypatch)
    blocks = lower(inputs)
    monkeypatch.setattr(rows, "_has_large_caches", lambda: has_large_caches)
    monkeypatch.setattr(rows, "_UNCUT_BYTES", inputs.inputs_2d.nbytes - missing_bytes)
    assert (num_loop(lower(inputs)) == num_loop(blocks)) == in_blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_gradient_of_inputs_2d_is_one_product(
    dtype, sizes_of, make_core_inputs, monkeypatch
):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7)
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    exact = exact_result(inputs)
    take_two_rows(inputs, monkeypatch)
    in_blocks = lower(inputs)
    monkeypatch.setattr(rows, "_LARGE_RESULT_BYTES", 4 * inputs.inputs_2d.size)
    assert lower(inputs).as_text() == in_blocks.as_text()  # not on cores with small caches
    monkeypatch.setattr(rows, "_has_large_caches", lambda: True)
    monkeypatch.setattr(rows, "_UNCUT_BYTES", 0)
    whole = lower(inputs)
    assert (whole.as_text() != in_blocks.as_text()) == (dtype == "float32")
    assert_within_error_budget(whole.compile()(inputs), in_blocks.compile()(inputs), exact)
    monkeypatch.setattr(rows, "_LARGE_RESULT_BYTES", 4 * inputs.inputs_2d.size + 1)
    assert lower(inputs).as_text() == in_blocks.as_text()


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_programs_for_other_devices_do_not_depend_on_this_machine(
    platform, sizes_of, make_core_inputs, monkeypatch
):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7)

    def operations():
        text = lower(inputs, platform=platform).as_text()
        count = collections.Counter(re.findall(r"stablehlo\.(\w+)", text))
        # What else there is computes nothing: choices among one, slices that nobody takes.
        names = "dot_general while reduce reduce_precision exponential transpose multiply add"
        return {name: count[name] for name in names.split()}

    here = operations()
    take_two_rows(inputs, monkeypatch)
    in_blocks = operations()
    monkeypatch.setattr(rows, "_LARGE_RESULT_BYTES", 0)
    monkeypatch.setattr(rows, "_has_large_caches", lambda: True)
    assert here == in_blocks == operations()
    assert here["dot_general"] > 0


def test_laid_out_changes_nothing():
    x, number = jnp.arange(6.0).reshape(2, 3).T, jnp.float32(1)
    for n in (number, jnp.float32("nan")):
        np.testing.assert_array_equal(jax.jit(rows.laid_out)(x, n), x)
    gradient = jax.grad(lambda x, n: jnp.sum(rows.laid_out(x, n) ** 2), (0, 1))(x, number)
    np.testing.assert_array_equal(gradient[0], 2 * x)
    assert gradient[1] == 0
    numbers = jnp.array([1, jnp.inf, 1])
    np.testing.assert_array_equal(jax.vmap(rows.laid_out)(x, numbers), x)


@pytest.mark.parametrize(
    ("level", "size", "is_large"),
    [
        ("2", "2048K\n", True),
        ("2", "1024K\n", False),
        ("3", "2048K\n", False),
        ("2", "", False),
        ("2", "K", False),
        ("2", "2M", False),
        ("2", None, False),
    ],
)
def test_whether_there_are_large_caches(level, size, is_large, tmp_path, monkeypatch):
    (tmp_path / "level").write_text(f"{level}\n")
    if size is not None:
        (tmp_path / "size").write_text(size)
    monkeypatch.setattr(rows, "_LEVEL_2_CACHE", tmp_path)
    assert rows._has_large_caches() == is_large
