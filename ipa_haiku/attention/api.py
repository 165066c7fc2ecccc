"""The entry to the attention core: check, select, centre, shard, call."""

import dataclasses
import functools

import jax

from ipa_haiku.attention.centering import at_center
from ipa_haiku.attention.options import DEFAULT_MEMORY_BUDGET, Options
from ipa_haiku.attention.pair import StructuredPair, dense_channel
from ipa_haiku.attention.pallas_triton.config import KernelConfig
from ipa_haiku.attention.selection import IMPLEMENTATIONS, select
from ipa_haiku.attention.sharding import RowSharding
from ipa_haiku.attention.types import IPAInputs, IPAOutput, LogitScales, check_inputs


def invariant_point_attention(
    q_scalar: jax.Array,
    k_scalar: jax.Array,
    v_scalar: jax.Array,
    q_point: jax.Array,
    k_point: jax.Array,
    v_point: jax.Array,
    inputs_2d: jax.Array | StructuredPair | None,
    pair_weights: jax.Array | None,
    pair_bias: jax.Array | None,
    point_weights: jax.Array,
    q_mask: jax.Array,
    k_mask: jax.Array,
    logit_scales: LogitScales,
    *,
    implementation: str | None = None,
    precision: jax.lax.PrecisionLike = None,
    query_block: int | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    return_attention: bool = False,
    q_segment_ids: jax.Array | None = None,
    k_segment_ids: jax.Array | None = None,
    sharding: RowSharding | None = None,
    kernel_config: KernelConfig | None = None,
) -> IPAOutput:
    """Invariant point attention over arrays (Suppl. Alg. 22, lines 7 to 10).

    The logits are `total * (scalar * q.k - 1/2 point_weights * sum |Q - K|^2 + pair * (z W + b) -
    1e5 * (1 - mask_i mask_j))` with `LogitScales(scalar, pair, total)`. Shape letters are those of
    `ipa_haiku.attention.types`; every argument but masks, segments and the positions of a
    `RelativePositionPair` is floating-point.

    Args:
      q_scalar: [..., Nq, H, C] scalar queries.
      k_scalar: [..., Nk, H, C] scalar keys.
      v_scalar: [..., Nk, H, Cv] scalar values.
      q_point: [..., Nq, H, P, 3] query points in the global frame, in the unit of the translations.
      k_point: [..., Nk, H, P, 3] key points in the global frame.
      v_point: [..., Nk, H, Pv, 3] value points in the global frame.
      inputs_2d: [..., Nq, Nk, C_z] pair representation z, or a `FactorizedPair` or
        `RelativePositionPair` that stands for one, or None for none.
      pair_weights: [C_z, H] weights W of the pair bias; None without `inputs_2d`.
      pair_bias: [H] bias b of the pair bias; None without `inputs_2d`.
      point_weights: [H] weight of squared distances, after softplus and scaling.
      q_mask: [..., Nq] 1 where a query is real; bool, integers or floating-point.
      k_mask: [..., Nk] 1 where a key is real, likewise.
      logit_scales: static factors of the logit terms, numbers known when tracing.
      implementation: 'reference' (AF2's operations in AF2's order), 'xla' (fast, lean, with a
        hand-written gradient), 'pallas' (fused kernels for NVIDIA GPUs of compute capability 8.0
        or higher, in float32), or None for the best one on JAX's default device (see
        `select_implementation`).
      precision: of matrix products over scalar and pair channels, as in `jax.lax.dot`; 'pallas'
        is about as accurate as float32 regardless. Point distances and softmax statistics are
        float32 (float64 if any argument is) regardless.
      query_block: how many query rows to process at a time, so that temporaries stay small; None
        for as many as `memory_budget` allows. Not 'reference'.
      memory_budget: bytes that temporaries of size [..., H, Nq, Nk] may take before query rows are
        processed in blocks, and that those of a block may take, with its copies of rows of an array
        `inputs_2d` and of their gradient. The one-hot rows of the table of a `RelativePositionPair`
        come on top. Under `jax.vmap` it is that of one example.
      return_attention: also return the attention weights and the three logit terms.
      q_segment_ids: [..., Nq] any integers; None for one segment. A query attends to the keys of
        its own segment as if there were no others. It must have one: the result of a query whose
        segment has no key means nothing.
      k_segment_ids: [..., Nk], given if and only if `q_segment_ids` is.
      sharding: which devices compute which rows; None for no more than JAX itself makes of sharded
        arguments. `memory_budget` is then that of each device.
      kernel_config: tunables of 'pallas', also to run it in Pallas's interpreter; None for the best
        known. Of no effect where the best implementation is another one.

    Returns:
      `IPAOutput`: scalar [..., Nq, H, Cv], point [..., Nq, H, Pv, 3] in the global frame, pair
      [..., Nq, H, C_z] (None without `inputs_2d`), and `attention` (None unless asked for).

    Raises:
      TypeError: if an argument is not an array, or `logit_scales` are not numbers but traced.
      AssertionError: at trace time, naming the argument whose shape or dtype does not fit.
      ValueError: if there is no such implementation, `query_block`, `memory_budget` or
        `kernel_config` is of no use, there are pair weights without `inputs_2d`, only one of
        queries and keys has segments, or `sharding` does not fit the batch dimensions.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    options = Options(
        implementation, precision, query_block, memory_budget, return_attention, sharding,
        kernel_config,
    )  # fmt: skip
    inputs = IPAInputs(
        q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
        inputs_2d, pair_weights, pair_bias, point_weights, q_mask, k_mask,
        q_segment_ids, k_segment_ids,
    )  # fmt: skip
    return attention_core(check_inputs(inputs), _as_numbers(logit_scales), options)


def attention_core(
    inputs: IPAInputs, scales: LogitScales, options: Options, *, is_centered: bool = False
) -> IPAOutput:
    """What `invariant_point_attention` and the modules share.

    Args:
      inputs: the array arguments of `invariant_point_attention`, checked.
      scales: static factors of the logit terms.
      options: its other arguments.
      is_centered: whether the points are near the origin, where modules have moved their frames;
        others are moved there and back, but for 'reference'.
    """
    shape = (*inputs.q_mask.shape[:-1], inputs.num_head, inputs.num_query, inputs.num_key)
    selection = select(options, shape, dense_channel(inputs.inputs_2d), inputs.logits_dtype)
    attend = functools.partial(
        IMPLEMENTATIONS[selection.implementation].attend,
        scales=scales,
        options=dataclasses.replace(options, query_block=selection.query_block),
    )
    if selection.implementation != "reference" and not is_centered:
        attend = functools.partial(at_center, attend)
    return attend(inputs) if options.sharding is None else options.sharding.run(attend, inputs)


def _as_numbers(logit_scales: LogitScales) -> LogitScales:
    try:
        return LogitScales(*map(float, logit_scales))
    except TypeError as error:  # a tracer, or not three factors
        raise TypeError(
            "logit_scales must be `LogitScales` of numbers that are known when tracing, as by "
            f"`functools.partial` before `jax.jit`, got {logit_scales!r}."
        ) from error
