"""Exact attention in plain XLA, shaped for matrix products, with a hand-written gradient.

Same result as `reference`, in another order of operations:

- the softmax stays unnormalised until the outputs are small;
- the gradient keeps one [H, Nq, Nk] array from the forward pass, or with `query_block` none;
- coordinates are expected near the origin (`centering.at_center`, or the module, moves them
  there), so that the gradient's matrix products do not cancel large numbers;
- a pair representation that is no array becomes features of keys, times weights of queries
  (`pair_term`), and a block of rows is all of it that ever exists.

`forward` and `vjp` are the algorithm, `rows` takes it a block of query rows at a time, and `cpu`
holds what XLA's compiler for CPUs wants otherwise.
"""

import jax.numpy as jnp

from ipa_haiku.attention.batching import for_each_protein
from ipa_haiku.attention.logits import key_side, query_side
from ipa_haiku.attention.options import Options
from ipa_haiku.attention.types import IPAInputs, IPAOutput, LogitScales, narrow, widen
from ipa_haiku.attention.xla import pair_term
from ipa_haiku.attention.xla.forward import Keys, Queries, Static, Weights, values_of
from ipa_haiku.attention.xla.vjp import attention_sums


def attend(inputs: IPAInputs, scales: LogitScales, options: Options) -> IPAOutput:
    """Invariant point attention by matrix products, with a hand-written gradient.

    Args:
      inputs: the array arguments, checked; points near the origin.
      scales: static factors of the logit terms.
      options: `precision` of the matrix products over scalar and pair channels, and `query_block`,
        how many query rows to process at a time, forward and backward (None for all), count.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode differentiation, which only `reference` supports.
    """
    query_block = min(options.query_block or inputs.num_query, inputs.num_query)
    static = Static(scales, options.precision, query_block)
    return for_each_protein(lambda x: _attend_one(static, x), inputs, "xla")


def _attend_one(static: Static, inputs: IPAInputs) -> IPAOutput:
    # Of `inputs_2d` only the rows at hand are ever widened.
    x = widen(inputs._replace(inputs_2d=None))
    term = pair_term.of(inputs.inputs_2d, x.pair_weights, static.scales.pair, static.precision)
    sums = attention_sums(
        static,
        Queries(query_side(x), term.query_weights, term.rows),
        Keys(key_side(x), values_of(x), term.keys),
        Weights(x.point_weights, term.weights),
    )
    scalar, point = jnp.split(sums.value, [x.v_scalar.shape[-1]], axis=-1)
    return narrow(
        IPAOutput(
            scalar,
            point.reshape(*point.shape[:-1], -1, 3),
            pair_term.output(inputs.inputs_2d, sums.pair, static.precision),
        ),
        inputs,
    )
