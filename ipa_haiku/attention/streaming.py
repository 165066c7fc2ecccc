"""Exact attention whose memory is linear in N: for pair representations that are not N x N arrays.

The logits of a block of queries and a block of keys exist one block at a time, forward (an online
softmax) and backward (from the statistics of each row); no array of Nq * Nk numbers is formed.
As in `xla`, point distances are sums of squared differences, coordinates are expected near the
origin, and the gradient is written by hand.

The pair term never meets C_z channels of a pair. With z_ij = sum_r left_ir right_jr, bias and
output of head h are products with the factors of the keys, which all heads share:

    (z W)_ijh = sum_rc (left_irc W_ch) right_jrc
    pair_ihc = sum_r left_irc (sum_j a_hij right_jrc)

Relative positions are such a product, too: right_j becomes the one-hot row of the table that
stands for (i, j), made for one block at a time, and left_i W becomes table W. `_features` is the
only function that tells the two apart. The bias b of the pair term shifts all logits of a row
alike, so the softmax does not see it: it is left out.

Below, arrays are those of one protein in float32 (or float64), heads first. Letters: h heads, q and
k queries and keys of a block, c channels, f pair features (R * C_z, or rows of the table).
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import (
    MASK_PENALTY,
    SEGMENT_PENALTY,
    IPAInputs,
    IPAOutput,
    LogitScales,
    for_each_protein,
    sum_of_squares,
    weighted_squares,
    widen,
)
from ipa_haiku.pair import FactorizedPair, RelativePositionPair, rows_of_table

# Products that involve points: never bfloat16 or TF32.
_HIGHEST = jax.lax.Precision.HIGHEST

# Rows and columns of a block, the fastest on two CPU cores of those that keep a block of 12 heads
# near the size of a last-level cache. Matrix products have a side of `KEY_BLOCK` at least.
QUERY_BLOCK = 256
KEY_BLOCK = 1024


class _Static(NamedTuple):
    scales: LogitScales
    precision: jax.lax.PrecisionLike


class _Queries(NamedTuple):
    """Blocks of queries; the leading axis counts blocks, but inside a loop over them."""

    scalar: jax.Array  # [blocks, H, q, C] scaled
    point: jax.Array  # [blocks, H, q, P*3]
    pair: Any  # [blocks, H, q, f] scaled; what multiplies the pair features
    position: Any  # [blocks, q] positions, of relative positions
    mask: jax.Array  # [blocks, q]
    segment: Any  # [blocks, q] segment ids, if any


class _Keys(NamedTuple):
    """Blocks of keys, likewise."""

    scalar: jax.Array  # [blocks, H, k, C]
    point: jax.Array  # [blocks, H, k, P*3]
    value: jax.Array  # [blocks, H, k, Cv+Pv*3]
    pair: Any  # [blocks, k, f] pair features, of factors
    position: Any  # [blocks, k] positions, of relative positions
    mask: jax.Array  # [blocks, k]
    segment: Any  # [blocks, k] segment ids, if any
    exists: jax.Array  # [blocks, k] False where a block is longer than what is left of the keys


class _Result(NamedTuple):
    """Attention-weighted sums over keys, for blocks of queries."""

    value: jax.Array  # [blocks, H, q, Cv+Pv*3]
    pair: Any  # [blocks, H, q, f]


class _Statistics(NamedTuple):
    """Of the softmax of each row: attention = exp(logits - max) / total."""

    max: jax.Array  # [blocks, H, q]
    total: jax.Array  # [blocks, H, q]


def attend(
    inputs: IPAInputs,
    scales: LogitScales,
    *,
    precision: jax.lax.PrecisionLike = None,
    query_block: int | None = None,
) -> IPAOutput:
    """Invariant point attention for structured pair representations, or none.

    Args:
      inputs: the array arguments, checked; points near the origin; `inputs_2d` is a structured pair
        or None.
      scales: static factors of the logit terms.
      precision: of the matrix products over scalar and pair channels.
      query_block: how many queries to process at a time; None for `QUERY_BLOCK`.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode differentiation, which only `reference` supports.
    """
    attend_one = functools.partial(
        _attend_one, _Static(scales, precision), query_block or QUERY_BLOCK
    )
    return for_each_protein(attend_one, inputs, "xla")


def _attend_one(static: _Static, query_block: int, inputs: IPAInputs) -> IPAOutput:
    """The attention of one protein: inputs to blocks, and results back."""
    x = widen(inputs)
    queries, keys = _queries(static, x, query_block), _keys(x, KEY_BLOCK)
    result = _attend(static, queries, keys, x.point_weights)
    value, features = jax.tree.map(lambda a: _from_blocks(a, x.num_query), result)
    scalar, point = jnp.split(value, [x.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(
        scalar=scalar.astype(inputs.v_scalar.dtype),
        point=point.reshape(*point.shape[:2], -1, 3),
        pair=_pair_output(static, x, features, inputs),
    )


def _queries(static: _Static, x: IPAInputs, block: int) -> _Queries:
    pair: Any = None
    position = None
    if x.pair_weights is not None:
        weights = static.scales.pair * x.pair_weights  # [C_z, H]
        if isinstance(x.inputs_2d, FactorizedPair):
            pair = x.inputs_2d.left[:, None] * weights.T[:, None, :]  # [Nq, H, R, C_z]
            pair = pair.reshape(x.num_query, x.num_head, -1)
        elif isinstance(x.inputs_2d, RelativePositionPair):
            pair = jnp.matmul(x.inputs_2d.table, weights, precision=static.precision).T
            pair = jnp.broadcast_to(pair, (x.num_query, *pair.shape))
            position = _to_blocks(x.inputs_2d.q_index, block)
        pair = _to_blocks_of_heads(pair, block)
    return _Queries(
        scalar=_to_blocks_of_heads(static.scales.scalar * x.q_scalar, block),
        point=_to_blocks_of_heads(_flat(x.q_point), block),
        pair=pair,
        position=position,
        mask=_to_blocks(x.q_mask, block),
        segment=None if x.q_segment_ids is None else _to_blocks(x.q_segment_ids, block),
    )


def _keys(x: IPAInputs, block: int) -> _Keys:
    pair, position = None, None
    if isinstance(x.inputs_2d, FactorizedPair):
        pair = _to_blocks(x.inputs_2d.right.reshape(x.num_key, -1), block)
    elif isinstance(x.inputs_2d, RelativePositionPair):
        position = _to_blocks(x.inputs_2d.k_index, block)
    values = jnp.concatenate([x.v_scalar, _flat(x.v_point)], axis=-1)
    return _Keys(
        scalar=_to_blocks_of_heads(x.k_scalar, block),
        point=_to_blocks_of_heads(_flat(x.k_point), block),
        value=_to_blocks_of_heads(values, block),
        pair=pair,
        position=position,
        mask=_to_blocks(x.k_mask, block),
        segment=None if x.k_segment_ids is None else _to_blocks(x.k_segment_ids, block),
        exists=_to_blocks(jnp.ones(x.num_key, bool), block),
    )


def _pair_output(
    static: _Static, x: IPAInputs, features: Any, inputs: IPAInputs
) -> jax.Array | None:
    """Pair output [Nq, H, C_z] from attention-weighted sums of pair features [Nq, H, f]."""
    if isinstance(x.inputs_2d, FactorizedPair):
        left = x.inputs_2d.left[:, None]  # [Nq, 1, R, C_z]
        pair = jnp.sum(left * features.reshape(*features.shape[:2], *left.shape[2:]), axis=2)
    elif isinstance(x.inputs_2d, RelativePositionPair):
        pair = jnp.matmul(features, x.inputs_2d.table, precision=static.precision)
    else:
        return None
    return pair.astype(inputs.inputs_2d.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: _Static, queries: _Queries, keys: _Keys, point_weights: jax.Array) -> _Result:
    return _attend_fwd(static, queries, keys, point_weights)[0]


def _attend_fwd(
    static: _Static, queries: _Queries, keys: _Keys, point_weights: jax.Array
) -> tuple[_Result, tuple]:
    rows = functools.partial(_forward_rows, static, keys, point_weights)
    result, statistics = jax.lax.map(rows, queries)
    return result, (queries, keys, point_weights, result, statistics)


def _forward_rows(
    static: _Static, keys: _Keys, point_weights: jax.Array, q: _Queries
) -> tuple[_Result, _Statistics]:
    """Result and statistics of one block of queries, by an online softmax over blocks of keys."""

    def step(carry: tuple, k: _Keys) -> tuple[tuple, None]:
        result, statistics = carry
        logits = _logits(static, q, k, point_weights)
        block_max = jax.lax.stop_gradient(jnp.max(logits, axis=-1))
        # Finite: a block has a key that exists.
        new_max = jnp.maximum(statistics.max, block_max)
        weights = jnp.exp(logits - new_max[..., None])
        decay = jnp.exp(statistics.max - new_max)
        result = jax.tree.map(
            lambda a, b: decay[..., None] * a + b, result, _weighted_sums(static, weights, q, k)
        )
        total = decay * statistics.total + jnp.sum(weights, axis=-1)
        return (result, _Statistics(new_max, total)), None

    like_rows = q.scalar[..., 0]
    value = jnp.zeros((*like_rows.shape, keys.value.shape[-1]), like_rows.dtype)
    pair = None if q.pair is None else jnp.zeros_like(q.pair)
    empty = _Statistics(jnp.full_like(like_rows, -jnp.inf), jnp.zeros_like(like_rows))
    (sums, statistics), _ = jax.lax.scan(step, (_Result(value, pair), empty), keys)
    result = jax.tree.map(lambda a: a / statistics.total[..., None], sums)
    return result, statistics


def _logits(static: _Static, q: _Queries, k: _Keys, point_weights: jax.Array) -> jax.Array:
    """Logits [H, q, k] of a block but for the pair bias b; -inf for keys that do not exist."""
    logits = jnp.einsum("hqc,hkc->hqk", q.scalar, k.scalar, precision=static.precision)
    if q.pair is not None:
        features, axes = _features(q, k)
        logits += jnp.einsum(f"hqf,{axes}->hqk", q.pair, features, precision=static.precision)
    penalty = MASK_PENALTY * (1.0 - q.mask[:, None] * k.mask)
    if q.segment is not None:
        penalty += SEGMENT_PENALTY * (q.segment[:, None] != k.segment)
    terms = -0.5 * point_weights[:, None, None] * sum_of_squares(*_coordinates(q, k)) - penalty
    return jnp.where(k.exists, static.scales.total * (logits + terms), -jnp.inf)


def _coordinates(q: _Queries, k: _Keys) -> tuple[jax.Array, jax.Array]:
    """Of points, [H, P*3, q] and [H, P*3, k]."""
    return jnp.swapaxes(q.point, -1, -2), jnp.swapaxes(k.point, -1, -2)


def _features(q: _Queries, k: _Keys) -> tuple[jax.Array, str]:
    """Pair features of a block, and their axes: [k, f] of factors, [q, k, f] of positions."""
    if q.position is None:
        return k.pair, "kf"
    num_rows = q.pair.shape[-1]
    rows = rows_of_table(q.position, k.position, num_rows)
    return jax.nn.one_hot(rows, num_rows, dtype=q.pair.dtype), "qkf"


def _weighted_sums(static: _Static, weights: jax.Array, q: _Queries, k: _Keys) -> _Result:
    """Sums over the keys of a block with weights [H, q, k] (lines 8 to 10)."""
    value = jnp.einsum("hqk,hkc->hqc", weights, k.value, precision=_HIGHEST)
    if q.pair is None:
        return _Result(value, None)
    features, axes = _features(q, k)
    pair = jnp.einsum(f"hqk,{axes}->hqf", weights, features, precision=static.precision)
    return _Result(value, pair)


class _QuerySums(NamedTuple):
    """What the gradient of a block of queries is made of: sums over keys."""

    key: jax.Array  # [blocks, H, q, C+P*3+1] of dlogits * (scalar, point, 1)
    pair: Any  # [blocks, H, q, f] of dlogits * features
    square_distance: jax.Array  # [blocks, H, q] of dlogits * squared distances


class _KeySums(NamedTuple):
    """What the gradient of a block of keys is made of: sums over queries."""

    query: jax.Array  # [blocks, H, k, C+P*3+1] of dlogits * (scalar, point, 1)
    value: jax.Array  # [blocks, H, k, Cv+Pv*3] of attention * d(value)
    pair: Any  # [blocks, k, f], of factors


def _attend_bwd(
    static: _Static, residuals: tuple, cotangent: _Result
) -> tuple[_Queries, _Keys, jax.Array]:
    queries, keys, point_weights, result, statistics = residuals
    # dlogits = total * attention * (dattention - sum_k attention * dattention), and that sum is
    # the dot product of the results with their cotangents.
    products = jax.tree.map(lambda a, b: jnp.sum(a * b, axis=-1), cotangent, result)
    delta = sum(jax.tree.leaves(products))  # [blocks, H, q]

    def rows(key_sums: _KeySums, block: tuple) -> tuple[_KeySums, _QuerySums]:
        def step(query_sums: _QuerySums, k: _Keys) -> tuple[_QuerySums, _KeySums]:
            more, of_keys = _backward_block(static, block, k, point_weights)
            return jax.tree.map(jnp.add, query_sums, more), of_keys

        q = block[0]
        empty = _QuerySums(*jax.tree.map(jnp.zeros_like, (_with_one(q), q.pair, q.scalar[..., 0])))
        query_sums, more = jax.lax.scan(step, empty, keys)
        return jax.tree.map(jnp.add, key_sums, more), query_sums

    empty = _KeySums(*jax.tree.map(jnp.zeros_like, (_with_one(keys), keys.value, keys.pair)))
    blocks = (queries, statistics, delta, cotangent)
    key_sums, query_sums = jax.lax.scan(rows, empty, blocks)
    return _gradients(queries, keys, point_weights, query_sums, key_sums)


def _backward_block(
    static: _Static, block: tuple, k: _Keys, point_weights: jax.Array
) -> tuple[_QuerySums, _KeySums]:
    """What a block of queries and a block of keys add to each other's gradient."""
    q, statistics, delta, cotangent = block
    precision = static.precision
    logits = _logits(static, q, k, point_weights)
    attention = jnp.exp(logits - statistics.max[..., None]) / statistics.total[..., None]
    dattention = jnp.einsum("hqc,hkc->hqk", cotangent.value, k.value, precision=_HIGHEST)
    if q.pair is not None:
        features, axes = _features(q, k)
        dattention += jnp.einsum(f"hqf,{axes}->hqk", cotangent.pair, features, precision=precision)
    dlogits = static.scales.total * attention * (dattention - delta[..., None])

    query_pair, key_pair = None, None
    if q.pair is not None:
        query_pair = jnp.einsum(f"hqk,{axes}->hqf", dlogits, features, precision=precision)
    if k.pair is not None:
        key_pair = sum(
            jnp.einsum("hqk,hqf->kf", a, b, precision=precision)
            for a, b in ((dlogits, q.pair), (attention, cotangent.pair))
        )
    return (
        _QuerySums(
            jnp.einsum("hqk,hkc->hqc", dlogits, _with_one(k), precision=_HIGHEST),
            query_pair,
            jnp.sum(weighted_squares(dlogits, *_coordinates(q, k)), axis=-1),
        ),
        _KeySums(
            jnp.einsum("hqk,hqc->hkc", dlogits, _with_one(q), precision=_HIGHEST),
            jnp.einsum("hqk,hqc->hkc", attention, cotangent.value, precision=_HIGHEST),
            key_pair,
        ),
    )


def _gradients(
    queries: _Queries,
    keys: _Keys,
    point_weights: jax.Array,
    query_sums: _QuerySums,
    key_sums: _KeySums,
) -> tuple[_Queries, _Keys, jax.Array]:
    """Gradients from the sums over all blocks; None (zero) for masks, positions and segments.

    With g = dlogits, d(q_point) = -w sum_k g_qk (Q_q - K_k) = w (sum_k g K_k - Q_q sum_k g), and
    likewise for keys.
    """
    at = [queries.scalar.shape[-1], query_sums.key.shape[-1] - 1]
    dq_scalar, sum_k_point, sum_q_one = jnp.split(query_sums.key, at, axis=-1)
    dk_scalar, sum_q_point, sum_k_one = jnp.split(key_sums.query, at, axis=-1)
    to_q = sum_k_point - queries.point * sum_q_one
    to_k = sum_q_point - keys.point * sum_k_one
    w = point_weights[:, None, None]
    dpoint_weights = -0.5 * jnp.sum(query_sums.square_distance, axis=(0, 2))
    none: Any = None
    dqueries = _Queries(
        dq_scalar, w * to_q, query_sums.pair, position=none, mask=none, segment=none
    )
    dkeys = _Keys(
        dk_scalar, w * to_k, key_sums.value, key_sums.pair,
        position=none, mask=none, segment=none, exists=none,
    )  # fmt: skip
    return dqueries, dkeys, dpoint_weights


_attend.defvjp(_attend_fwd, _attend_bwd)


def _with_one(x: _Queries | _Keys) -> jax.Array:
    """Scalars, points and a 1 side by side, [..., C+P*3+1]."""
    return jnp.concatenate([x.scalar, x.point, jnp.ones_like(x.point[..., :1])], axis=-1)


def _to_blocks(a: jax.Array, block: int) -> jax.Array:
    """[N, ...] to [blocks, block, ...] with zeros after the end; blocks as even as can be."""
    num_block = -(-a.shape[0] // block)
    block = -(-a.shape[0] // num_block)
    padding = [(0, num_block * block - a.shape[0]), *[(0, 0)] * (a.ndim - 1)]
    return jnp.pad(a, padding).reshape(num_block, block, *a.shape[1:])


def _to_blocks_of_heads(a: jax.Array, block: int) -> jax.Array:
    """[N, H, c] to [blocks, H, block, c]."""
    return jnp.swapaxes(_to_blocks(a, block), 1, 2)


def _from_blocks(a: jax.Array, n: int) -> jax.Array:
    """[blocks, H, block, c] to [N, H, c]."""
    a = jnp.swapaxes(a, 1, 2)
    return a.reshape(-1, *a.shape[2:])[:n]


def _flat(points: jax.Array) -> jax.Array:
    """[N, H, P, 3] -> [N, H, P*3]."""
    return points.reshape(*points.shape[:2], -1)
