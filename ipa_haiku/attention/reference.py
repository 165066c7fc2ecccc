"""The executable specification: AlphaFold 2's operations in AlphaFold 2's order.

Suppl. Alg. 22, lines 7 to 10, and `InvariantPointAttention.__call__` of AF2's `folding.py`. In
float32 every operation is AF2's own, so that XLA can give AF2's own bits; half-precision inputs
are widened to float32 first.
"""

import jax
import jax.numpy as jnp

from ipa_haiku.attention.logits import mask_penalty, only_own_segment
from ipa_haiku.attention.options import Options
from ipa_haiku.attention.pair import StructuredPair
from ipa_haiku.attention.types import (
    AttentionTerms,
    IPAInputs,
    IPAOutput,
    LogitScales,
    narrow,
    widen,
)


def attend(inputs: IPAInputs, scales: LogitScales, options: Options) -> IPAOutput:
    """Invariant point attention with every logit and every attention weight written out.

    Args:
      inputs: the array arguments, checked.
      scales: static factors of the logit terms.
      options: `precision` of the matrix products over scalar and pair channels, and
        `return_attention` count.

    Returns:
      `IPAOutput`, with `attention` set if asked for.
    """
    precision = options.precision
    wide = widen(inputs)
    if isinstance(wide.inputs_2d, StructuredPair):
        wide = wide._replace(inputs_2d=wide.inputs_2d.to_dense())

    # Line 7, the three terms and the mask.
    scalar_logits = _scalar_logits(wide, scales, precision)
    point_logits = _point_logits(wide)
    pair_logits = _pair_logits(wide, scales, precision)
    logits = scalar_logits + point_logits
    if pair_logits is not None:
        logits += pair_logits
    logits -= mask_penalty(wide.q_mask, wide.k_mask)[..., None, :, :]
    logits = only_own_segment(scales.total * logits, wide.q_segment_ids, wide.k_segment_ids)
    weights = jax.nn.softmax(logits)  # [..., H, Nq, Nk]

    # Line 9.
    v_scalar = jnp.swapaxes(wide.v_scalar, -2, -3)
    scalar = jnp.swapaxes(jnp.matmul(weights, v_scalar, precision=precision), -2, -3)

    # Line 10. A product and a sum instead of a matmul keeps points out of bfloat16 and TF32 units.
    point = jnp.stack(
        [
            jnp.sum(weights[..., None] * _component(wide.v_point, d)[..., None, :, :], axis=-2)
            for d in range(3)
        ],
        axis=-1,
    )  # [..., H, Nq, Pv, 3]

    # Line 8.
    pair = None
    if wide.inputs_2d is not None:
        pair = jnp.einsum("...hij,...ijc->...ihc", weights, wide.inputs_2d, precision=precision)

    attention = None
    if options.return_attention:
        terms = (scalar_logits, point_logits, pair_logits)
        attention = AttentionTerms(weights, *jax.tree.map(lambda x: scales.total * x, terms))
    return narrow(IPAOutput(scalar, jnp.swapaxes(point, -3, -4), pair, attention), inputs)


def _scalar_logits(
    x: IPAInputs, scales: LogitScales, precision: jax.lax.PrecisionLike
) -> jax.Array:
    q = jnp.swapaxes(scales.scalar * x.q_scalar, -2, -3)  # [..., H, Nq, C]
    k = jnp.swapaxes(x.k_scalar, -2, -3)  # [..., H, Nk, C]
    return jnp.matmul(q, jnp.swapaxes(k, -2, -1), precision=precision)


def _point_logits(x: IPAInputs) -> jax.Array:
    squares = [
        jnp.square(
            _component(x.q_point, d)[..., :, None, :] - _component(x.k_point, d)[..., None, :, :]
        )
        for d in range(3)
    ]  # 3 x [..., H, Nq, Nk, P]
    weights = jnp.expand_dims(x.point_weights, (*range(squares[0].ndim - 4), -3, -2, -1))
    return -0.5 * jnp.sum(weights * (squares[0] + squares[1] + squares[2]), axis=-1)


def _pair_logits(
    x: IPAInputs, scales: LogitScales, precision: jax.lax.PrecisionLike
) -> jax.Array | None:
    if x.inputs_2d is None:
        return None
    bias = jnp.einsum("...c,ch->...h", x.inputs_2d, x.pair_weights, precision=precision)
    pair_bias = jnp.expand_dims(x.pair_bias, range(bias.ndim - 1))
    return scales.pair * jnp.moveaxis(bias + pair_bias, -1, -3)


def _component(points: jax.Array, d: int) -> jax.Array:
    """x, y or z of points [..., N, H, P, 3] as [..., H, N, P]."""
    return jnp.swapaxes(points[..., d], -2, -3)
