"""The one entry to the attention core: checks, chooses an implementation, calls it."""

import jax

from ipa_haiku.attention import reference
from ipa_haiku.attention.base import IPAInputs, IPAOutput, LogitScales, check_inputs

IMPLEMENTATIONS = {"reference": reference.attend}


def invariant_point_attention(
    q_scalar: jax.Array,
    k_scalar: jax.Array,
    v_scalar: jax.Array,
    q_point: jax.Array,
    k_point: jax.Array,
    v_point: jax.Array,
    inputs_2d: jax.Array,
    pair_weights: jax.Array,
    pair_bias: jax.Array,
    point_weights: jax.Array,
    q_mask: jax.Array,
    k_mask: jax.Array,
    logit_scales: LogitScales,
    *,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
    return_attention: bool = False,
) -> IPAOutput:
    """Invariant point attention over arrays (Suppl. Alg. 22, lines 7 to 10).

    The logits are `total * (scalar * q.k - 1/2 point_weights * sum |Q - K|^2 + pair * (z W + b) -
    1e5 * (1 - mask_i mask_j))` with `LogitScales(scalar, pair, total)`. Shape letters are those of
    `ipa_haiku.attention.base`; every argument is floating-point.

    Args:
      q_scalar: [..., Nq, H, C] scalar queries.
      k_scalar: [..., Nk, H, C] scalar keys.
      v_scalar: [..., Nk, H, Cv] scalar values.
      q_point: [..., Nq, H, P, 3] query points in the global frame, in the unit of the translations.
      k_point: [..., Nk, H, P, 3] key points in the global frame.
      v_point: [..., Nk, H, Pv, 3] value points in the global frame.
      inputs_2d: [..., Nq, Nk, C_z] pair representation z.
      pair_weights: [C_z, H] weights W of the pair bias.
      pair_bias: [H] bias b of the pair bias.
      point_weights: [H] weight of squared distances, after softplus and scaling.
      q_mask: [..., Nq] 1 where a query is real.
      k_mask: [..., Nk] 1 where a key is real.
      logit_scales: static factors of the logit terms.
      implementation: a name in `IMPLEMENTATIONS`, or None for the best one here.
      precision: of matrix products over scalar and pair channels, as in `jax.lax.dot`. Point
        distances and softmax statistics are float32 (float64 if any argument is) regardless.
      return_attention: also return the attention weights and the three logit terms.

    Returns:
      `IPAOutput`: scalar [..., Nq, H, Cv], point [..., Nq, H, Pv, 3] in the global frame, pair
      [..., Nq, H, C_z], and `attention` (None unless asked for).

    Raises:
      TypeError: if an argument is not an array.
      AssertionError: at trace time, naming the argument whose shape or dtype does not fit.
      ValueError: if there is no such implementation.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    inputs = IPAInputs(
        q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
        inputs_2d, pair_weights, pair_bias, point_weights, q_mask, k_mask,
    )  # fmt: skip
    check_inputs(inputs)
    return reference.attend(
        inputs, logit_scales, precision=precision, return_attention=return_attention
    )
