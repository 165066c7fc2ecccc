"""Rows of `inputs_2d` in blocks that a CPU's cache holds: here of a few rows, as 2 MB are many."""

import chex
import jax
import jax.numpy as jnp
import pytest

from ipa_haiku import invariant_point_attention
from ipa_haiku.attention import rows
from ipa_haiku.attention.base import LogitScales

SCALES = LogitScales(scalar=0.5, pair=1.0, total=0.5)


pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="only CPUs take blocks that a cache holds"
)


def lower(inputs, dtype):
    """The outputs and the gradients of all floating-point arguments, lowered."""

    def fn(inputs):
        result = invariant_point_attention(
            **inputs._asdict(), logit_scales=SCALES, implementation="xla"
        )
        return result[:3]

    def value_and_gradient(inputs):
        outputs, pull_back = jax.vjp(fn, inputs)
        return fn(inputs), outputs, pull_back(jax.tree.map(jnp.sin, outputs))

    inputs = inputs._replace(inputs_2d=jnp.asarray(inputs.inputs_2d, dtype))
    return jax.jit(value_and_gradient).lower(inputs), inputs


# With and without rows that two blocks share.
@pytest.mark.parametrize(("num_query", "dtype"), [(9, "float32"), (12, "bfloat16")])
def test_blocks_change_nothing(num_query, dtype, sizes_of, make_core_inputs, monkeypatch):
    inputs = make_core_inputs(sizes_of("tiny"), num_query, 7, mask="holed")
    whole, inputs = lower(inputs, dtype)
    monkeypatch.setattr(rows, "_CACHED_BYTES", 2 * 4 * inputs.inputs_2d[0].size)
    in_blocks, _ = lower(inputs, dtype)
    assert "while" not in whole.as_text()
    # The outputs alone, within the gradient, and the gradient.
    assert in_blocks.as_text().count("stablehlo.while") >= 3
    expected, actual = (program.compile()(inputs) for program in (whole, in_blocks))
    chex.assert_tree_all_finite(actual)
    for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected)):
        # Gradients that are exactly zero round to that of terms of 1e-2.
        rounding = 4 * jnp.finfo(y.dtype).eps * max(jnp.max(jnp.abs(y)), 1e-2)
        chex.assert_trees_all_close(x, y, rtol=0, atol=float(rounding))
