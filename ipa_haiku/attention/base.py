"""What every implementation of the attention core shares: arguments, result, checks, constants.

Shape letters, here and in the implementations:

    ...  any leading batch dimensions, the same for every batched argument
    Nq   queries (rows of `inputs_2d`)        Nk  keys (columns of `inputs_2d`)
    H    heads                                C   scalar channels of queries and keys
    Cv   scalar channels of values            P   points of queries and keys
    Pv   points of values                     C_z channels of `inputs_2d`

`inputs_2d` is an array, a `FactorizedPair` or `RelativePositionPair` that stands for one, or None
(then `pair_weights` and `pair_bias` are None, too).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ipa_haiku.pair import StructuredPair

# What every logit loses where query or key is masked (AF2's constant). It is large enough that
# exp() of the difference to any unmasked logit is zero, and finite: a fully masked row gives what
# it would give without a mask, of logits rounded to 1/128, instead of NaN.
MASK_PENALTY = 1e5

# What a logit loses on top where query and key are of different segments. Twice the above, so that
# even what is masked in a query's own segment comes before all of the others, and a row that sees
# only masked keys averages over those that it would average over alone.
SEGMENT_PENALTY = 2 * MASK_PENALTY


class LogitScales(NamedTuple):
    """Static factors of the logit terms (Suppl. Alg. 22, line 7); the points' is in the weights.

    logits = total * (scalar * q.k - 1/2 point_weights * |Q - K|^2 + pair * (z W + b) - mask term)
    """

    scalar: float
    pair: float
    total: float = 1.0


class IPAInputs(NamedTuple):
    """The array arguments of the core, in the order of `invariant_point_attention`."""

    q_scalar: jax.Array  # [..., Nq, H, C]
    k_scalar: jax.Array  # [..., Nk, H, C]
    v_scalar: jax.Array  # [..., Nk, H, Cv]
    q_point: jax.Array  # [..., Nq, H, P, 3] global frame
    k_point: jax.Array  # [..., Nk, H, P, 3] global frame
    v_point: jax.Array  # [..., Nk, H, Pv, 3] global frame
    inputs_2d: Any  # [..., Nq, Nk, C_z], `StructuredPair` or None
    pair_weights: Any  # [C_z, H], or None
    pair_bias: Any  # [H], or None
    point_weights: jax.Array  # [H] softplus'ed and scaled
    q_mask: jax.Array  # [..., Nq]
    k_mask: jax.Array  # [..., Nk]
    q_segment_ids: jax.Array | None = None  # [..., Nq] integers
    k_segment_ids: jax.Array | None = None  # [..., Nk]

    @property
    def num_query(self) -> int:
        """Number of queries, Nq."""
        return self.q_scalar.shape[-3]

    @property
    def num_key(self) -> int:
        """Number of keys, Nk."""
        return self.k_scalar.shape[-3]

    @property
    def num_head(self) -> int:
        """Number of heads, H."""
        return self.q_scalar.shape[-2]

    @property
    def logits_dtype(self) -> jnp.dtype:
        """float32, or float64 if any argument is: of points, logits and softmax statistics."""
        return jnp.result_type(jnp.float32, *jax.tree.leaves(self))


class AttentionTerms(NamedTuple):
    """The attention weights and the scaled logit terms they come from, each [..., H, Nq, Nk].

    The logits are the sum of the three terms and what masks and segments take from them.
    """

    weights: jax.Array
    scalar_logits: jax.Array
    point_logits: jax.Array
    pair_logits: jax.Array | None  # None without inputs_2d


class IPAOutput(NamedTuple):
    """Result of the core (Suppl. Alg. 22, lines 8 to 10, before the inverse frames of line 10)."""

    scalar: jax.Array  # [..., Nq, H, Cv], dtype of v_scalar
    point: jax.Array  # [..., Nq, H, Pv, 3] global frame, float32 (float64 if any argument is)
    pair: Any  # [..., Nq, H, C_z], dtype of inputs_2d; None without it
    attention: AttentionTerms | None = None


_AXES = {
    "q_scalar": "... Nq H C",
    "k_scalar": "... Nk H C",
    "v_scalar": "... Nk H Cv",
    "q_point": "... Nq H P 3",
    "k_point": "... Nk H P 3",
    "v_point": "... Nk H Pv 3",
    "inputs_2d": "... Nq Nk C_z",
    "pair_weights": "C_z H",
    "pair_bias": "H",
    "point_weights": "H",
    "q_mask": "... Nq",
    "k_mask": "... Nk",
    "q_segment_ids": "... Nq",
    "k_segment_ids": "... Nk",
}


def axes_of(inputs: IPAInputs) -> IPAInputs:
    """The names of the axes of every array, such as "... Nq H C", in place of the array."""

    def axes(name: str, x: Any) -> Any:
        # A pair representation that is no array tells those of its parts.
        return type(x)(**x.AXES) if hasattr(x, "AXES") else _AXES[name]

    fields: Any = {k: None if x is None else axes(k, x) for k, x in inputs._asdict().items()}
    return IPAInputs(**fields)


def assert_floating(name: str, x: jax.Array) -> None:
    """Asserts that `x` is an array of floating-point numbers, naming the argument.

    Raises:
      TypeError: if it is not an array.
      AssertionError: if its dtype is not a floating-point one.
    """
    _assert_array(name, x)
    chex.assert_type(x, float, custom_message=f"{name} must be floating-point, got {x.dtype}")


def assert_integer(name: str, x: jax.Array) -> None:
    """Asserts that `x` is an array of integers, naming the argument.

    Raises:
      TypeError: if it is not an array.
      AssertionError: if its dtype is not an integer one.
    """
    _assert_array(name, x)
    chex.assert_type(x, int, custom_message=f"{name} must be integers, got {x.dtype}")


def _assert_array(name: str, x: jax.Array) -> None:
    if not hasattr(x, "shape") or not hasattr(x, "dtype"):
        raise TypeError(f"{name} must be an array, got {type(x).__name__}.")


def assert_shape(name: str, x: jax.Array, axes: str, expected: tuple) -> None:
    """Asserts `x.shape == expected` (None matches any size), naming the argument and its axes.

    Raises:
      AssertionError: naming the argument, the axes, the expected and the given shape.
    """
    chex.assert_shape(
        x,
        expected,
        custom_message=f"{name} must have shape [{axes}], here {expected}, got {tuple(x.shape)}",
    )


def check_inputs(inputs: IPAInputs) -> None:
    """Asserts that every array has the dtype, rank and sizes that the arguments before it call for.

    Raises:
      TypeError: if an argument is not an array.
      AssertionError: naming the first argument that does not fit, its axes and both shapes.
      ValueError: if there are pair weights for no pair representation, or only one of queries and
        keys has segments.
    """
    if (inputs.q_segment_ids is None) != (inputs.k_segment_ids is None):
        raise ValueError("q_segment_ids and k_segment_ids: give both or neither.")
    arrays: list[tuple[str, jax.Array, str]] = []
    for name, x in inputs._asdict().items():
        if isinstance(x, StructuredPair):
            arrays += _parts(x)
        elif inputs.inputs_2d is None and name in ("inputs_2d", "pair_weights", "pair_bias"):
            if x is not None:
                raise ValueError(f"{name} must be None, as inputs_2d is, got {type(x).__name__}.")
        elif x is not None or "segment" not in name:
            arrays.append((name, x, _AXES[name]))
    _check_arrays(arrays, None, {})


def check_pair(pair: StructuredPair, batch: tuple[int, ...], num_query: int, num_key: int) -> None:
    """Asserts that a structured pair fits `batch` dimensions and the numbers of residues.

    Raises:
      TypeError: if a part is not an array.
      AssertionError: naming the part that does not fit, its axes and both shapes.
    """
    _check_arrays(_parts(pair), batch, {"Nq": num_query, "Nk": num_key})


def _parts(pair: StructuredPair) -> list[tuple[str, jax.Array, str]]:
    """Name, array and axes of the parts of `inputs_2d`."""
    return [(f"inputs_2d.{part}", getattr(pair, part), axes) for part, axes in pair.AXES.items()]


def _check_arrays(
    arrays: list[tuple[str, jax.Array, str]], batch: tuple[int, ...] | None, known: dict[str, int]
) -> None:
    """Checks arrays by name and axes; `batch` and `known` sizes, if any, are those of all."""
    sizes = {"3": 3} | known
    for name, x, all_axes in arrays:
        (assert_integer if name.endswith(("_index", "_ids")) else assert_floating)(name, x)
        batched, *axes = all_axes.split() if "..." in all_axes else ("", *all_axes.split())
        if batched and batch is None:
            batch = x.shape[: max(x.ndim - len(axes), 0)]
        expected = (batch or ()) * bool(batched) + tuple(sizes.get(axis) for axis in axes)
        assert_shape(name, x, all_axes, expected)
        if 0 in x.shape:
            raise AssertionError(f"{name} [{all_axes}] must not be empty, got shape {x.shape}.")
        if name.endswith(".table") and x.shape[0] % 2 == 0:
            raise AssertionError(f"{name} must have an odd number of rows, got shape {x.shape}.")
        sizes |= dict(zip(axes, x.shape[x.ndim - len(axes) :]))


def masked_center(points: jax.Array, mask: jax.Array) -> jax.Array:
    """Mean of the unmasked points, to subtract before arithmetic that cancels large coordinates.

    No result depends on it but by rounding, as long as all points move by the very same numbers.

    Args:
      points: [..., N, 3], finite also where masked.
      mask: [..., N].

    Returns:
      [..., 3], without gradient; zero where everything is masked.
    """
    return _mean(points, mask > 0)


def segment_center(
    points: jax.Array, mask: jax.Array, segment_ids: jax.Array, of_segment_ids: jax.Array
) -> jax.Array:
    """`masked_center` of the segment that each of M residues is in.

    Segments may be far from each other; distances between them are never asked for.

    Args:
      points: [..., N, 3], finite also where masked.
      mask: [..., N].
      segment_ids: [..., N] of the points, any integers.
      of_segment_ids: [..., M] segments whose centers to return.

    Returns:
      [..., M, 3], without gradient; zero for a segment without unmasked points.
    """

    def center(segment: jax.Array) -> jax.Array:
        return _mean(points, (segment_ids == segment[..., None]) & (mask > 0))

    # A comparison per pair costs little beside attention and needs neither a sort nor a scatter;
    # some residues at a time, so that it needs no array of M * N numbers either.
    each = jnp.moveaxis(of_segment_ids, -1, 0)
    return jnp.moveaxis(jax.lax.map(center, each, batch_size=128), 0, -2)


def _mean(points: jax.Array, chosen: jax.Array) -> jax.Array:
    """Mean [..., 3] of those of points [..., N, 3] that are chosen [..., N].

    XLA may compute it once for queries and once for keys, adding up in another order. The same
    bits come out, as all sums are of whole numbers: first of 1, then of what is left in 1/1024.
    """
    points = jax.lax.stop_gradient(points)
    count = jnp.maximum(jnp.sum(chosen, axis=-1), 1)[..., None]
    center = jnp.zeros((), points.dtype)
    for unit in (1.0, 2.0**-10):
        whole = jnp.round((points - center) / unit).astype(jnp.int32)
        mean = jnp.sum(jnp.where(chosen[..., None], whole, 0), axis=-2) // count  # [..., 3]
        center += unit * mean[..., None, :].astype(points.dtype)
    return center[..., 0, :]


def centers(inputs: IPAInputs) -> tuple[jax.Array, jax.Array]:
    """What to subtract from points of queries and of keys, [..., Nq or 1, 1, 1, 3] and so on.

    A query and the keys that it sees have the same center: that of their segment.
    """
    # The mean of each key's points, also from whole numbers, here of 1/16.
    points = jax.lax.stop_gradient(inputs.k_point).astype(inputs.logits_dtype)
    whole = jnp.round(16.0 * points).astype(jnp.int32)
    num_point = whole.shape[-3] * whole.shape[-2]
    points = jnp.sum(whole, axis=(-3, -2)).astype(inputs.logits_dtype) / (16.0 * num_point)
    if inputs.q_segment_ids is None or inputs.k_segment_ids is None:
        center = masked_center(points, inputs.k_mask)[..., None, None, None, :]
        return center, center
    q_center, k_center = (
        segment_center(points, inputs.k_mask, inputs.k_segment_ids, segment_ids)
        for segment_ids in (inputs.q_segment_ids, inputs.k_segment_ids)
    )
    return q_center[..., None, None, :], k_center[..., None, None, :]


def at_center(attend: Callable[[IPAInputs], IPAOutput], inputs: IPAInputs) -> IPAOutput:
    """`attend(inputs)` with all points near the origin, where they have the most digits."""
    q_center, k_center = centers(inputs)
    inputs = inputs._replace(
        q_point=inputs.q_point - q_center, k_point=inputs.k_point - k_center,
        v_point=inputs.v_point - k_center,
    )  # fmt: skip
    out = attend(inputs)
    return out._replace(point=out.point + q_center)


def for_each_protein(
    attend: Callable[[IPAInputs], IPAOutput], inputs: IPAInputs, implementation: str
) -> IPAOutput:
    """Runs a fast implementation, written for one protein, over batch dimensions.

    Args:
      attend: from the arguments of one protein to its result.
      inputs: the array arguments, checked; points near the origin.
      implementation: its name.

    Returns:
      The results with all batch dimensions.

    Raises:
      TypeError: under forward-mode differentiation, which only `reference` supports.
    """
    in_axes: Any = jax.tree.map(lambda axes: 0 if "..." in axes else None, axes_of(inputs))
    for _ in range(inputs.q_mask.ndim - 1):
        attend = jax.vmap(attend, in_axes=(in_axes,))
    try:
        return attend(inputs)
    except TypeError as error:
        if "forward-mode" in str(error):
            raise TypeError(
                f"implementation={implementation!r} has a hand-written reverse-mode gradient and "
                "no forward mode (jvp, jacfwd, linearize); use implementation='reference' for that."
            ) from error
        raise


def subtract_segment_penalty(logits: jax.Array, inputs: IPAInputs) -> jax.Array:
    """Takes from logits [..., H, Nq, Nk] what they lose across segments; untouched without any."""
    if inputs.q_segment_ids is None or inputs.k_segment_ids is None:
        return logits
    differ = inputs.q_segment_ids[..., :, None] != inputs.k_segment_ids[..., None, :]
    return logits - SEGMENT_PENALTY * differ[..., None, :, :].astype(logits.dtype)


def widen(inputs: IPAInputs) -> IPAInputs:
    """Every floating-point array in float32, or float64 if any is."""

    def widen_array(x: jax.Array) -> jax.Array:
        return x.astype(inputs.logits_dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return jax.tree.map(widen_array, inputs)


def narrow(out: IPAOutput, inputs: IPAInputs) -> IPAOutput:
    """Outputs in the dtypes that `IPAOutput` promises for such inputs."""
    return out._replace(
        scalar=out.scalar.astype(inputs.v_scalar.dtype),
        pair=None if out.pair is None else out.pair.astype(inputs.inputs_2d.dtype),
    )


def sum_of_squares(q: jax.Array, k: jax.Array) -> jax.Array:
    """Squared differences of coordinates [..., P*3, Nq] and [..., P*3, Nk], summed over them."""
    squares = (jnp.square(q[..., i, :, None] - k[..., i, None, :]) for i in range(q.shape[-2]))
    return sum(squares, start=jnp.zeros((), q.dtype))


def weighted_squares(weights: jax.Array, q: jax.Array, k: jax.Array) -> jax.Array:
    """`weights` [..., Nq, Nk] times `sum_of_squares`; zero where weights are, however far apart."""
    squares = sum_of_squares(q, k)
    # Not the product: its derivative with respect to weights is that of zero ones, too.
    is_nothing = (weights == 0) & ~(squares < jnp.inf)
    return unfused(weights * jnp.where(is_nothing, 0.0, squares))


def unfused(x: jax.Array) -> jax.Array:
    """`x`, which XLA:CPU fuses with no product or reduction that takes it.

    It fuses neither with a rounding, and this one, to the precision that `x` has, changes nothing.
    """
    info = jnp.finfo(x.dtype)
    return jax.lax.reduce_precision(x, info.nexp, info.nmant)
