"""Arguments and results of the attention core, and the checks of the former.

Shape letters, here and in the implementations:

    ...  any leading batch dimensions, the same for every batched argument
    Nq   queries (rows of `inputs_2d`)        Nk  keys (columns of `inputs_2d`)
    H    heads                                C   scalar channels of queries and keys
    Cv   scalar channels of values            P   points of queries and keys
    Pv   points of values                     C_z channels of `inputs_2d`

`inputs_2d` is an array, a `FactorizedPair` or `RelativePositionPair` that stands for one, or None
(then `pair_weights` and `pair_bias` are None, too).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention.pair import StructuredPair
from ipa_haiku.checks import assert_array, assert_floating, assert_integer, assert_shape


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
        return wide_dtype(*jax.tree.leaves(self))


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


# The axes of every array; those of a `StructuredPair` are in its `AXES`.
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
_PAIR_ARGUMENTS = ("inputs_2d", "pair_weights", "pair_bias")

# Arrays of other dtypes than floating-point.
_INTEGERS = ("q_segment_ids", "k_segment_ids", "inputs_2d.q_index", "inputs_2d.k_index")


def axes_of(inputs: IPAInputs) -> IPAInputs:
    """The names of the axes of every array, such as "... Nq H C", in place of the array."""

    def axes(name: str, x: Any) -> Any:
        parts: Any = x.AXES if isinstance(x, StructuredPair) else {}
        return type(x)(**parts) if parts else _AXES[name]

    fields: Any = {k: None if x is None else axes(k, x) for k, x in inputs._asdict().items()}
    return IPAInputs(**fields)


def check_inputs(inputs: IPAInputs) -> IPAInputs:
    """Asserts that every array has the dtype, rank and sizes that the arguments before it call for.

    Returns:
      The arguments, masks of bool or integers as floating-point numbers.

    Raises:
      TypeError: if an argument is not an array.
      AssertionError: naming the first argument that does not fit, its axes and both shapes.
      ValueError: if there are pair weights for no pair representation, or only one of queries and
        keys has segments.
    """
    if (inputs.q_segment_ids is None) != (inputs.k_segment_ids is None):
        raise ValueError("q_segment_ids and k_segment_ids: give both or neither.")
    masks = {name: as_mask(name, getattr(inputs, name)) for name in ("q_mask", "k_mask")}
    inputs = inputs._replace(**masks)
    arrays: list[tuple[str, jax.Array, str]] = []
    for name, x in inputs._asdict().items():
        if isinstance(x, StructuredPair):
            arrays += _parts(x)
        elif inputs.inputs_2d is None and name in _PAIR_ARGUMENTS:
            if x is not None:
                raise ValueError(f"{name} must be None, as inputs_2d is, got {type(x).__name__}.")
        elif x is not None or "segment" not in name:
            arrays.append((name, x, _AXES[name]))
    _check_arrays(arrays, None, {})
    return inputs


def as_mask(name: str, mask: jax.Array) -> jax.Array:
    """A mask of bool or integers as float32; others as they are.

    Raises:
      TypeError: if it is not an array.
    """
    assert_array(name, mask)
    is_whole = jnp.issubdtype(mask.dtype, jnp.integer) or mask.dtype == bool
    return mask.astype(jnp.float32) if is_whole else mask


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
        (assert_integer if name in _INTEGERS else assert_floating)(name, x)
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


def wide_dtype(*arrays: jax.Array) -> jnp.dtype:
    """float64 if any array is, else float32."""
    return jnp.dtype(jnp.float64 if any(x.dtype == jnp.float64 for x in arrays) else jnp.float32)


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
