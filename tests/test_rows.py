"""Rows of `inputs_2d` in blocks that a CPU's cache holds: here of a few rows, as 4 MB are many."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from ipa_haiku import invariant_point_attention
from ipa_haiku.attention import rows
from ipa_haiku.attention.base import LogitScales
from ipa_haiku.testing import assert_within_error_budget

SCALES = LogitScales(scalar=0.5, pair=1.0, total=0.5)


pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="only CPUs take blocks that a cache holds"
)


def lower(inputs):
    """The outputs, and outputs and gradients of all floating-point arguments, lowered."""

    def fn(inputs):
        result = invariant_point_attention(
            **inputs._asdict(), logit_scales=SCALES, implementation="xla"
        )
        return result[:3]

    def value_and_gradient(inputs):
        outputs, pull_back = jax.vjp(fn, inputs)
        cotangents = [jnp.cos(jnp.arange(x.size)).reshape(x.shape) for x in outputs]
        cotangents = tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs))
        return fn(inputs), outputs, pull_back(cotangents)

    return jax.jit(value_and_gradient).lower(inputs)


def take_two_rows(inputs, monkeypatch):
    """Makes CPUs take that many rows in a block."""
    monkeypatch.setattr(rows, "_CACHED_BYTES", 2 * 4 * inputs.inputs_2d[0].size)
    monkeypatch.setattr(rows, "_level_2_cache_bytes", lambda: 0)


# With and without rows that two blocks share.
@pytest.mark.parametrize(("num_query", "dtype"), [(9, "float32"), (12, "bfloat16")])
def test_blocks_change_nothing(num_query, dtype, sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), num_query, 7, mask="holed")
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    whole = lower(inputs)
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        exact = jax.device_get(lower(wide).compile()(wide))
    take_two_rows(inputs, monkeypatch)
    in_blocks = lower(inputs)
    assert "while" not in whole.as_text()
    # The outputs alone, within the gradient, and the gradient.
    assert in_blocks.as_text().count("stablehlo.while") >= 3
    assert_within_error_budget(in_blocks.compile()(inputs), whole.compile()(inputs), exact)


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


@pytest.mark.parametrize(("level_2", "in_blocks"), [(0, True), (32 * 2**10, False)])
def test_what_a_few_level_2_caches_hold_is_taken_whole(
    level_2, in_blocks, sizes_of, make_core_inputs, monkeypatch
):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7)
    take_two_rows(inputs, monkeypatch)
    monkeypatch.setattr(rows, "_level_2_cache_bytes", lambda: level_2)
    assert ("stablehlo.while" in lower(inputs).as_text()) == in_blocks


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_large_gradient_of_inputs_2d_is_one_product(
    dtype, sizes_of, make_core_inputs, monkeypatch
):
    inputs = make_core_inputs(sizes_of("tiny"), 12, 7)
    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    take_two_rows(inputs, monkeypatch)
    in_blocks = lower(inputs)
    monkeypatch.setattr(rows, "_LARGE_RESULT_BYTES", 0)
    assert lower(inputs).as_text() == in_blocks.as_text()  # not on cores with small caches
    monkeypatch.setattr(rows, "_LARGE_LEVEL_2_BYTES", 0)
    whole = lower(inputs)
    assert (whole.as_text() != in_blocks.as_text()) == (dtype == "float32")
    with jax.enable_x64(True):
        wide = jax.tree.map(lambda x: np.asarray(x, np.float64), inputs)
        exact = jax.device_get(lower(wide).compile()(wide))
    assert_within_error_budget(whole.compile()(inputs), in_blocks.compile()(inputs), exact)


@pytest.mark.parametrize(("text", "size"), [("512K\n", 512 * 2**10), ("", 0), (None, 0)])
def test_size_of_the_level_2_cache(text, size, tmp_path, monkeypatch):
    path = tmp_path / "size"
    if text is not None:
        path.write_text(text)
    monkeypatch.setattr(rows, "_LEVEL_2_CACHE", path)
    assert rows._level_2_cache_bytes() == size
