"""Parts of the logits (Suppl. Alg. 22, line 7) and of their gradient that implementations share."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.types import IPAInputs, LogitScales

# What every logit loses where query or key is masked (AF2's constant). It is large enough that
# exp() of the difference to any unmasked logit is zero, and finite: a fully masked row gives what
# it would give without a mask, of logits rounded to 1/128, instead of NaN.
MASK_PENALTY = 1e5


def mask_penalty(q_mask: jax.Array, k_mask: jax.Array) -> jax.Array:
    """What masks [..., Nq] and [..., Nk] take from the logits, [..., Nq, Nk]."""
    return MASK_PENALTY * (1.0 - q_mask[..., :, None] * k_mask[..., None, :])


def only_own_segment(
    logits: jax.Array, q_segment_ids: jax.Array | None, k_segment_ids: jax.Array | None
) -> jax.Array:
    """Logits [..., H, Nq, Nk], the least number where segments differ.

    Whatever is masked in a query's own segment, and however far away, comes before that.
    """
    if q_segment_ids is None or k_segment_ids is None:
        return logits
    differ = q_segment_ids[..., None, :, None] != k_segment_ids[..., None, None, :]
    return jnp.where(differ, float(jnp.finfo(logits.dtype).min), logits)


def flat(points: jax.Array) -> jax.Array:
    """[..., P, 3] -> [..., P*3]."""
    return points.reshape(*points.shape[:-2], -1)


def sum_of_squares(q: jax.Array, k: jax.Array) -> jax.Array:
    """Squared differences of coordinates [..., P*3, Nq] and [..., P*3, Nk], summed over them.

    Never expanded to q^2 - 2 q k + k^2, which cancels: exact at any coordinates.
    """
    squares = (jnp.square(q[..., i, :, None] - k[..., i, None, :]) for i in range(q.shape[-2]))
    return sum(squares, start=jnp.zeros((), q.dtype))


class Side(NamedTuple):
    """What queries, or keys, put into the logits beside the pair term; one protein."""

    scalar: jax.Array  # [N, H, C]
    point: jax.Array  # [N, H, P*3] near the origin
    mask: jax.Array  # [N]
    segment: Any  # [N] segment ids, if any


def query_side(x: IPAInputs) -> Side:
    """That of the queries."""
    return Side(x.q_scalar, flat(x.q_point), x.q_mask, x.q_segment_ids)


def key_side(x: IPAInputs) -> Side:
    """That of the keys."""
    return Side(x.k_scalar, flat(x.k_point), x.k_mask, x.k_segment_ids)


def summands(side: Side) -> jax.Array:
    """Scalars, coordinates, 1 and the mask, [N, H, C+P*3+2].

    Their sums over one side, with the gradient of the logits as weights, make that of the other.
    """
    ones = jnp.ones_like(side.point[..., :1])
    return jnp.concatenate(
        [side.scalar, side.point, ones, ones * side.mask[:, None, None]], axis=-1
    )


def side_gradients(
    scales: LogitScales, side: Side, sums: jax.Array, point_weights: jax.Array
) -> Side:
    """Gradients of one side's scalars, points and mask.

    With g = dlogits (before `scales.total`), of queries

        d(scalar_q) = scale sum_k g_qk scalar_k
        d(Q_q) = -w sum_k g_qk (Q_q - K_k) = w (sum_k g_qk K_k - Q_q sum_k g_qk)
        d(mask_q) = 1e5 sum_hk g_hqk mask_k

    and of keys likewise. The point weights' gradient could come from these sums, too, but as a
    difference of squares of coordinates, which are larger than those of distances.

    Args:
      scales: static factors of the logit terms.
      side: of which to give the gradients.
      sums: [N, H, C+P*3+2] of g times `summands` of the other side, over that side.
      point_weights: [H].
    """
    at = [side.scalar.shape[-1], sums.shape[-1] - 2, sums.shape[-1] - 1]
    scalar, point, one, mask = jnp.split(sums, at, axis=-1)
    dpoint = point_weights[None, :, None] * (point - side.point * one)
    dmask = MASK_PENALTY * jnp.sum(mask[..., 0], axis=-1)
    return Side(scales.scalar * scalar, dpoint, dmask, segment=None)
