"""Any pair representation as features f of pairs, whose products with weights are the pair term.

    logits_hqk += sum_f weights_hf features_qkf
    sums_qhf = sum_k attention_hqk features_qkf

`inputs_2d` as an array is its own features, f are its channels. For the others C_z channels of a
pair never meet. With z_qk = sum_r left_qr right_kr channel by channel, features are right_k, the
same for all queries, f counts ranks and channels, and the weights of each query are its own:

    (z W)_qkh = sum_rc (left_qrc W_ch) right_krc
    pair_qhc = sum_r left_qrc (sum_k a_hqk right_krc)

Of relative positions, features are the one-hot row of the table that stands for (q, k), made for
the rows at hand only, and weights are table W. The pair bias b shifts all logits of a row alike, so
the softmax does not see it: it is left out.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.pair import FactorizedPair, RelativePositionPair, StructuredPair


class PairTerm(NamedTuple):
    """What queries, keys and weights hold of the pair term; None where there is nothing."""

    rows: Any = None  # [Nq, Nk, f] features, or [Nq] positions
    keys: Any = None  # [Nk, f] features, or [Nk] positions
    weights: Any = None  # [H, f]
    query_weights: Any = None  # [Nq, H, f]


def of(
    inputs_2d: jax.Array | StructuredPair | None,
    pair_weights: jax.Array | None,
    pair_scale: float,
    precision: jax.lax.PrecisionLike,
) -> PairTerm:
    """The pair term of one protein, but for `inputs_2d` as an array in the dtype of the weights."""
    if inputs_2d is None or pair_weights is None:
        return PairTerm()
    weights = pair_scale * pair_weights.T  # [H, C_z]
    if isinstance(inputs_2d, FactorizedPair):
        left, right = (x.astype(weights.dtype) for x in (inputs_2d.left, inputs_2d.right))
        of_queries = left[:, None] * weights[None, :, None, :]  # [Nq, H, R, C_z]
        of_queries = of_queries.reshape(*of_queries.shape[:2], -1)
        return PairTerm(keys=right.reshape(len(right), -1), query_weights=of_queries)
    if isinstance(inputs_2d, RelativePositionPair):
        table = inputs_2d.table.astype(weights.dtype)
        weights = jnp.matmul(weights, table.T, precision=precision)
        return PairTerm(inputs_2d.q_index, inputs_2d.k_index, weights)
    return PairTerm(inputs_2d, weights=weights)


def output(
    inputs_2d: jax.Array | StructuredPair | None,
    sums: jax.Array | None,
    precision: jax.lax.PrecisionLike,
) -> jax.Array | None:
    """Pair output [Nq, H, C_z] (line 8) from attention-weighted sums of features [Nq, H, f]."""
    if sums is None:
        return None
    if isinstance(inputs_2d, FactorizedPair):
        left = inputs_2d.left.astype(sums.dtype)[:, None]  # [Nq, 1, R, C_z]
        return jnp.sum(left * sums.reshape(*sums.shape[:2], *left.shape[2:]), axis=2)
    if isinstance(inputs_2d, RelativePositionPair):
        return jnp.matmul(sums, inputs_2d.table.astype(sums.dtype), precision=precision)
    return sums
