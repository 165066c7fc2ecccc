"""The forward pass of the fused GPU kernels."""

import jax
import jax.numpy as jnp

from ipa_haiku.attention.logits import Side, flat, key_side, query_side
from ipa_haiku.attention.pallas_triton.common import Arrays, Static
from ipa_haiku.attention.pallas_triton.pair_rows import Attention, add_pair_term
from ipa_haiku.attention.pallas_triton.sums import sum_over_keys
from ipa_haiku.attention.pallas_triton.tiles import logits_without_pair
from ipa_haiku.attention.types import IPAInputs, IPAOutput, narrow, widen


def arrays_of(inputs: IPAInputs) -> Arrays:
    """What the kernels need of the arguments; the pair bias, which no result depends on, is not."""
    x = widen(inputs._replace(inputs_2d=None, pair_weights=None))
    return Arrays(
        query_side(x),
        key_side(x),
        jnp.concatenate([x.v_scalar, flat(x.v_point)], axis=-1),
        x.point_weights,
        inputs.inputs_2d,
        inputs.pair_weights,
    )


def output_of(value: jax.Array, pair: jax.Array, inputs: IPAInputs) -> IPAOutput:
    """The result from sums over keys of values [Nq, H, Cv + Pv*3] and of `inputs_2d`."""
    scalar, point = jnp.split(value, [inputs.v_scalar.shape[-1]], axis=-1)
    return narrow(IPAOutput(scalar, point.reshape(*point.shape[:-1], -1, 3), pair), inputs)


def attend_rows(static: Static, x: Arrays, start: jax.Array, query: Side) -> Attention:
    """Logits, softmax and pair output of the rows from `start` [1] on."""
    logits = logits_without_pair(static, query, x.key, x.point_weights)
    return add_pair_term(static, x, start, logits)


def value_sums(static: Static, x: Arrays, attention: Attention) -> jax.Array:
    """Sums over keys of values [Nq, H, Cv + Pv*3] (lines 9 and 10)."""
    return sum_over_keys(static.config, attention.logits, x.value, attention.softmax)
