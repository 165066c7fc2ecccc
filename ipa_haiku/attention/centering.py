"""The centre that coordinates are counted from, so that they lose no digits to their distance.

No result depends on the centre but by rounding, as long as all points that see each other move by
the very same numbers. It is the midhinge, axis by axis: halfway between two coordinates that exist,
a quarter of the others below the one and a quarter above the other. So its bits are the same in
whatever order XLA goes over the residues, no outlier moves it, and of two domains of one size that
are far apart it is in the middle, where a median would be in one of them and twice as far from the
other.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from ipa_haiku.attention.types import IPAInputs, IPAOutput


def center(
    points: jax.Array,
    mask: jax.Array,
    segment_ids: jax.Array | None = None,
    of_segment_ids: jax.Array | None = None,
) -> jax.Array:
    """Midhinge of the unmasked points, or of those in the segment that each of M residues is in.

    Segments may be far from each other; distances between them are never asked for.

    Args:
      points: [..., N, 3], finite also where masked.
      mask: [..., N].
      segment_ids: [..., N] of the points, any integers; None for one segment.
      of_segment_ids: [..., M] segments whose centres to return; None for `segment_ids`.

    Returns:
      [..., 1, 3], or [..., M, 3] with segments, without gradient; zero where all are masked.
    """
    points = jax.lax.stop_gradient(points)
    find = _midhinges
    for _ in range(mask.ndim - 1):
        find = jax.vmap(find)
    return find(points, mask > 0, segment_ids, of_segment_ids)


def _midhinges(
    points: jax.Array,
    is_real: jax.Array,
    segment_ids: jax.Array | None,
    of_segment_ids: jax.Array | None,
) -> jax.Array:
    """Midhinges [M, 3] of points [N, 3] by segment, M = 1 without segments."""
    # Axis by axis sorted by segment, in it by coordinate, the masked ones last.
    coordinates = jnp.where(is_real[:, None], points, jnp.inf).T
    if segment_ids is None:
        coordinates = jnp.sort(coordinates, axis=1)
        first, count = jnp.zeros(1, jnp.int32), jnp.sum(is_real, dtype=jnp.int32)[None]
    else:
        segments = jnp.broadcast_to(segment_ids, (3, *segment_ids.shape))
        _, coordinates = jax.lax.sort((segments, coordinates), dimension=1, num_keys=2)
        # By comparing each with each: a bisection cannot be sharded, and no [M, N] is written.
        of = (segment_ids if of_segment_ids is None else of_segment_ids)[:, None]
        first = jnp.sum(segment_ids[None] < of, axis=1, dtype=jnp.int32)
        is_counted = (segment_ids[None] == of) & is_real[None]
        count = jnp.sum(is_counted, axis=1, dtype=jnp.int32)
    last = jnp.maximum(count - 1, 0)
    low, high = (
        coordinates[:, jnp.minimum(first + i, points.shape[0] - 1)]
        for i in (last // 4, last - last // 4)
    )
    # Halved before the sum, which then does not overflow.
    return jnp.where(count > 0, 0.5 * low + 0.5 * high, 0.0).T


def centers_of(inputs: IPAInputs) -> tuple[jax.Array, jax.Array]:
    """What to subtract from points of queries and of keys, [..., Nq or 1, 1, 1, 3] and so on.

    A query and the keys that it sees have the same centre: that of their segment.
    """
    # Of each key the first point stands for all: heads and points of a residue are neighbours.
    points = inputs.k_point[..., 0, 0, :].astype(inputs.logits_dtype)
    q_center, k_center = (
        center(points, inputs.k_mask, inputs.k_segment_ids, segment_ids)[..., None, None, :]
        for segment_ids in (inputs.q_segment_ids, inputs.k_segment_ids)
    )
    return q_center, k_center


def at_center(attend: Callable[[IPAInputs], IPAOutput], inputs: IPAInputs) -> IPAOutput:
    """`attend(inputs)` with all points near the origin, where they have the most digits."""
    q_center, k_center = centers_of(inputs)
    inputs = inputs._replace(
        q_point=inputs.q_point - q_center, k_point=inputs.k_point - k_center,
        v_point=inputs.v_point - k_center,
    )  # fmt: skip
    out = attend(inputs)
    return out._replace(point=out.point + q_center)
