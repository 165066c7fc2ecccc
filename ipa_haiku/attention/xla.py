"""Exact attention in plain XLA, shaped for matrix products, with a hand-written gradient.

Same result as `reference`, in another order of operations:

- point distances are sums of squared differences, never expanded: exact at any coordinates;
- the softmax stays unnormalised until the outputs are small;
- the gradient keeps one [H, Nq, Nk] array from the forward pass (none with `query_block`);
- on CPUs, what reads or writes `inputs_2d` does so in blocks of rows that a cache holds (`rows`);
- coordinates are expected near the origin (`base.at_center`, or the module, moves them there), so
  that the gradient's matrix products do not cancel large numbers.
"""

import functools

import jax

from ipa_haiku.attention.base import (
    IPAInputs,
    IPAOutput,
    LogitScales,
    for_each_protein,
    narrow,
    widen,
)
from ipa_haiku.attention.xla_forward import Attention, Static, forward, keys_of
from ipa_haiku.attention.xla_vjp import backward, backward_in_blocks, without_segments


def attend(
    inputs: IPAInputs,
    scales: LogitScales,
    *,
    precision: jax.lax.PrecisionLike = None,
    query_block: int | None = None,
) -> IPAOutput:
    """Invariant point attention by matrix products, with a hand-written gradient.

    Args:
      inputs: the array arguments, checked; points near the origin.
      scales: static factors of the logit terms.
      precision: of the matrix products over scalar and pair channels.
      query_block: how many query rows to process at a time, forward and backward; None for all.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode differentiation, which only `reference` supports.
    """
    query_block = min(query_block or inputs.num_query, inputs.num_query)
    attend_one = functools.partial(_attend, Static(scales, precision, query_block))
    return for_each_protein(attend_one, inputs, "xla")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, inputs: IPAInputs) -> IPAOutput:
    return narrow(forward(static, inputs, in_gradient=False)[0], inputs)


def _attend_fwd(static: Static, inputs: IPAInputs) -> tuple[IPAOutput, tuple]:
    out, softmax = forward(static, inputs, in_gradient=True)
    # The wide outputs are kept: the gradient takes a difference with them.
    return narrow(out, inputs), (inputs, out, softmax)


def _attend_bwd(static: Static, residuals: tuple, cotangent: IPAOutput) -> tuple[IPAInputs]:
    inputs, out, softmax = residuals
    if softmax is None:
        grads = backward_in_blocks(static, inputs, out, cotangent)
    else:
        cotangent = jax.tree.map(lambda a: a.astype(inputs.logits_dtype), cotangent)
        attention = Attention(keys_of(widen(inputs)), softmax, out)
        grads = backward(static, inputs, attention, cotangent)
    inputs = without_segments(inputs)
    return (jax.tree.map(lambda g, a: g.astype(a.dtype), grads, inputs),)


_attend.defvjp(_attend_fwd, _attend_bwd)
