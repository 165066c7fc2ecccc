"""The implementations of the attention core, and which of them runs."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention import reference, xla
from ipa_haiku.attention.options import Options
from ipa_haiku.attention.pallas_triton import core as pallas_triton
from ipa_haiku.attention.pallas_triton.device import unsupported
from ipa_haiku.attention.types import IPAOutput

# Temporaries where `inputs_2d` is no array: those of blocks that are large enough to be fast.
_STRUCTURED_BUDGET = 64 * 2**20

_AF2_PAIR_CHANNEL = 128


class Selection(NamedTuple):
    """What `invariant_point_attention` runs, and why."""

    implementation: str
    query_block: int | None  # query rows at a time; None: all at once
    reason: str


class _Problem(NamedTuple):
    """What the choice depends on, of one device."""

    batch: tuple[int, ...]
    num_head: int
    num_query: int
    num_key: int
    pair_channel: int | None  # None where `inputs_2d` is no array
    dtype: Any


@dataclasses.dataclass(frozen=True)
class Implementation:
    """A row of the table of implementations.

    Attributes:
      attend: from `IPAInputs`, `LogitScales` and `Options` to `IPAOutput`.
      in_the_way: why it cannot do what is asked, and what else to use; None if it can.
      num_temporary: how many [H, Nq, Nk] arrays of float32 its gradient holds at its peak.
      num_pair_rows: how often its gradient, in blocks of rows, holds a block's rows of `inputs_2d`
        in float32: what products take, and the gradient before it is put in place.
    """

    attend: Callable[..., IPAOutput]
    in_the_way: Callable[[Options, _Problem], str | None]
    num_temporary: int
    num_pair_rows: int


def _no_blocks(options: Options, problem: _Problem) -> str | None:
    del problem
    if options.query_block is None:
        return None
    return "query_block needs implementation='xla' or 'pallas': 'reference' holds all rows at once."


def _no_weights(options: Options, problem: _Problem) -> str | None:
    del problem
    if not options.return_attention:
        return None
    return (
        "return_attention=True needs implementation='reference' without query_block: the others "
        "never hold the attention weights and the logit terms."
    )


def _no_kernels(options: Options, problem: _Problem) -> str | None:
    mesh = None if options.sharding is None else options.sharding.mesh
    reason = unsupported(
        problem.num_head, problem.pair_channel, problem.dtype, options.kernel_config, mesh
    )
    if reason is None:
        return _no_weights(options, problem)
    return (
        f"implementation='pallas' cannot run: {reason}. Use implementation='xla', or "
        "implementation='reference'."
    )


# `xla`: by XLA:CPU's memory analysis of the module's gradient. `pallas`: the logits and their
# gradient; kernels hold no rows of `inputs_2d`.
IMPLEMENTATIONS: dict[str, Implementation] = {
    "reference": Implementation(reference.attend, _no_blocks, num_temporary=0, num_pair_rows=0),
    "xla": Implementation(xla.attend, _no_weights, num_temporary=5, num_pair_rows=3),
    "pallas": Implementation(pallas_triton.attend, _no_kernels, num_temporary=2, num_pair_rows=0),
}


def select_implementation(
    shape: tuple[int, ...],
    *,
    pair_channel: int | None = _AF2_PAIR_CHANNEL,
    dtype: jax.typing.DTypeLike = "float32",
    **options: Any,
) -> Selection:
    """Tells which implementation would run for attention weights of such a shape.

    Args:
      shape: [..., H, Nq, Nk] of the attention weights.
      pair_channel: channels C_z of `inputs_2d`; None if that is no array. 'xla' then always takes
        query rows in blocks, and 'pallas' cannot run.
      dtype: that all arguments promote to.
      **options: keyword arguments of `invariant_point_attention` from `implementation` on, but for
        the segments. With `sharding`, what is chosen suits the rows of one device.

    Returns:
      `Selection` of the implementation, the number of query rows at a time, and the reason.

    Raises:
      ValueError: if there is no such implementation, `shape` has fewer than three sizes,
        `query_block` or `memory_budget` is not a positive integer, `kernel_config` is given to
        another implementation than 'pallas', or `sharding` does not fit the batch dimensions.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    return select(Options(**options), shape, pair_channel, dtype)


def check_name(implementation: str | None) -> None:
    """Asserts that there is such an implementation; asks for no device.

    Raises:
      ValueError: if there is none.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}, "
            f"got {implementation!r}."
        )


def select(
    options: Options, shape: tuple[int, ...], pair_channel: int | None, dtype: Any
) -> Selection:
    """`select_implementation` for `Options`."""
    check_name(options.implementation)
    if len(shape) < 3:
        raise ValueError(f"shape must be [..., H, Nq, Nk], got {shape}.")
    if options.sharding is not None:
        shape = options.sharding.local_shape(shape)
    *batch, num_head, num_query, num_key = shape
    problem = _Problem(tuple(batch), num_head, num_query, num_key, pair_channel, dtype)
    name, reason = _choose(options, problem)
    in_the_way = IMPLEMENTATIONS[name].in_the_way(options, problem)
    if in_the_way is not None:
        raise NotImplementedError(in_the_way)
    if options.query_block is not None or name == "reference":
        return Selection(name, options.query_block, reason)
    query_block, reason_for_blocks = _query_block(name, options, problem)
    return Selection(name, query_block, reason + reason_for_blocks)


def _choose(options: Options, problem: _Problem) -> tuple[str, str]:
    """Name of an implementation, and the reason."""
    if options.implementation is not None:
        return options.implementation, "asked for by name"
    if options.is_reference:
        return "reference", "attention weights are asked for"
    mesh = None if options.sharding is None else options.sharding.mesh
    in_the_way = unsupported(
        problem.num_head, problem.pair_channel, problem.dtype, options.kernel_config, mesh
    )
    if in_the_way is None:
        return "pallas", "fused kernels for this GPU"
    return "xla", f"exact and fast on every device; not 'pallas', as {in_the_way}"


def _query_block(name: str, options: Options, problem: _Problem) -> tuple[int | None, str]:
    """How many rows keep to the memory budget, None for all, and the reason if not all."""
    implementation, is_dense = IMPLEMENTATIONS[name], problem.pair_channel is not None
    budget = options.memory_budget if is_dense else min(options.memory_budget, _STRUCTURED_BUDGET)
    # float32 at least: narrower numbers are widened.
    itemsize = max(jnp.dtype(problem.dtype).itemsize, 4)
    key_bytes = itemsize * problem.num_key * math.prod(problem.batch)
    bytes_per_row = implementation.num_temporary * problem.num_head * key_bytes
    if bytes_per_row * problem.num_query <= budget:
        return None, ""
    bytes_per_row += implementation.num_pair_rows * (problem.pair_channel or 0) * key_bytes
    block = max(budget // bytes_per_row, 1)
    if is_dense:
        return block, f"; in blocks, as temporaries would pass {budget} bytes"
    return block, "; in blocks, as inputs_2d is no array"
