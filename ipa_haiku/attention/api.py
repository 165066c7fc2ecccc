"""The entries to the attention core: check, choose an implementation, call it."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ipa_haiku.attention import pallas_triton, reference, streaming, xla
from ipa_haiku.attention.base import IPAInputs, IPAOutput, LogitScales, at_center, check_inputs
from ipa_haiku.attention.sharding import RowSharding
from ipa_haiku.config import positive_integer
from ipa_haiku.pair import StructuredPair, is_dense, num_channel

IMPLEMENTATIONS: dict[str, Callable[..., IPAOutput]] = {
    "reference": reference.attend,
    "xla": xla.attend,
    "pallas": pallas_triton.attend,
}

# How many [H, Nq, Nk] arrays of float32 the gradient holds at its peak. `xla`: by XLA:CPU's memory
# analysis of the module at N = 512, 63 MB.
# `pallas`: the logits and their gradient.
_NUM_TEMPORARY = {"xla": 5, "pallas": 2}

# How often, in blocks of rows, the gradient holds a block's rows of `inputs_2d`, in float32: what
# products take, and the rows of the gradient before they are put in place. Kernels do neither.
_NUM_PAIR_ROWS = {"xla": 2, "pallas": 0}

DEFAULT_MEMORY_BUDGET = 2 * 2**30

_AF2_PAIR_CHANNEL = 128


class Selection(NamedTuple):
    """What `invariant_point_attention` runs, and why."""

    implementation: str
    query_block: int | None  # query rows at a time; None: all at once
    reason: str


def select_implementation(
    shape: tuple[int, ...],
    *,
    implementation: str | None = None,
    query_block: int | None = None,
    memory_budget: int = DEFAULT_MEMORY_BUDGET,
    return_attention: bool = False,
    sharding: RowSharding | None = None,
    pair_channel: int | None = _AF2_PAIR_CHANNEL,
    dtype: jax.typing.DTypeLike = "float32",
    config: pallas_triton.Config | None = None,
) -> Selection:
    """Tells which implementation would run for attention weights of such a shape.

    Args:
      shape: [..., H, Nq, Nk] of the attention weights.
      implementation: as in `invariant_point_attention`.
      query_block: as in `invariant_point_attention`.
      memory_budget: as in `invariant_point_attention`.
      return_attention: as in `invariant_point_attention`.
      sharding: as in `invariant_point_attention`; what is chosen suits the rows of one device.
      pair_channel: channels C_z of `inputs_2d`; None if that is no array. 'xla' then always goes
        through blocks of queries and keys, and 'pallas' cannot run.
      dtype: that all arguments promote to.
      config: as in `invariant_point_attention`.

    Returns:
      `Selection` of the implementation, the number of query rows at a time, and the reason.

    Raises:
      ValueError: if there is no such implementation, `shape` has fewer than three sizes,
        `query_block` or `memory_budget` is not a positive integer, `config` is given to another
        implementation than 'pallas', or `sharding` does not fit the batch dimensions.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}, "
            f"got {implementation!r}."
        )
    memory_budget = positive_integer("memory_budget", memory_budget)
    if query_block is not None:
        query_block = positive_integer("query_block", query_block)
    if len(shape) < 3:
        raise ValueError(f"shape must be [..., H, Nq, Nk], got {shape}.")

    if config is not None and implementation not in (None, "pallas"):
        raise ValueError(f"config is for implementation='pallas', got {implementation!r}.")

    if sharding is not None:
        shape = sharding.local_shape(shape)

    if return_attention and implementation is None and query_block is None:
        return Selection("reference", None, "attention weights are asked for")
    if return_attention and implementation != "reference":
        raise NotImplementedError(
            "return_attention=True needs implementation='reference' without query_block: the "
            "others never hold the attention weights and the logit terms."
        )
    if implementation == "reference":
        if query_block is not None:
            raise NotImplementedError(
                "query_block needs implementation='xla' or 'pallas': 'reference' holds all rows at "
                "once."
            )
        return Selection("reference", None, "asked for by name")

    *batch, num_head, num_query, num_key = shape
    reason = "asked for by name"
    if implementation in (None, "pallas"):
        in_the_way = pallas_triton.unsupported(
            num_head, pair_channel, dtype, config, None if sharding is None else sharding.mesh
        )
        if implementation == "pallas" and in_the_way:
            raise NotImplementedError(
                f"implementation='pallas' cannot run: {in_the_way}. Use implementation='xla', or "
                "implementation='reference'."
            )
        if implementation is None:
            implementation, reason = (
                ("xla", f"exact and fast on every device; not 'pallas', as {in_the_way}")
                if in_the_way
                else ("pallas", "fused kernels for this GPU")
            )
    block = None  # all rows
    if pair_channel is None:
        reason += "; in blocks of queries and keys, as inputs_2d is no array"
        num_key = min(num_key, streaming.KEY_BLOCK)
        num_query = block = min(num_query, streaming.QUERY_BLOCK)
    if query_block is None:
        query_block = block
        # float32 at least: narrower numbers are widened.
        key_bytes = max(jnp.dtype(dtype).itemsize, 4) * num_key * math.prod(batch)
        bytes_per_row = _NUM_TEMPORARY[implementation] * num_head * key_bytes
        if bytes_per_row * num_query > memory_budget:
            bytes_per_row += _NUM_PAIR_ROWS[implementation] * (pair_channel or 0) * key_bytes
            query_block = max(memory_budget // bytes_per_row, 1)
            reason += f"; in blocks, as temporaries would pass {memory_budget} bytes"
    return Selection(implementation, query_block, reason)


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
    config: pallas_triton.Config | None = None,
) -> IPAOutput:
    """Invariant point attention over arrays (Suppl. Alg. 22, lines 7 to 10).

    The logits are `total * (scalar * q.k - 1/2 point_weights * sum |Q - K|^2 + pair * (z W + b) -
    1e5 * (1 - mask_i mask_j) - 2e5 * (segment_i != segment_j))` with `LogitScales(scalar, pair,
    total)`. Shape letters are those of `ipa_haiku.attention.base`; every argument but segments and
    the positions of a `RelativePositionPair` is floating-point.

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
      q_mask: [..., Nq] 1 where a query is real. The gradient with respect to masks is zero, but for
        'reference'.
      k_mask: [..., Nk] 1 where a key is real.
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
      config: tunables of 'pallas', also to run it in Pallas's interpreter; None for the best known.
        Of no effect where the best implementation is another one.

    Returns:
      `IPAOutput`: scalar [..., Nq, H, Cv], point [..., Nq, H, Pv, 3] in the global frame, pair
      [..., Nq, H, C_z] (None without `inputs_2d`), and `attention` (None unless asked for).

    Raises:
      TypeError: if an argument is not an array, or `logit_scales` are not numbers but traced.
      AssertionError: at trace time, naming the argument whose shape or dtype does not fit.
      ValueError: if there is no such implementation, `query_block`, `memory_budget` or `config` is
        of no use, there are pair weights without `inputs_2d`, only one of queries and keys has
        segments, or `sharding` does not fit the batch dimensions.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    inputs = IPAInputs(
        q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
        inputs_2d, pair_weights, pair_bias, point_weights, q_mask, k_mask,
        q_segment_ids, k_segment_ids,
    )  # fmt: skip
    return attention_core(
        inputs,
        logit_scales,
        implementation=implementation,
        precision=precision,
        query_block=query_block,
        memory_budget=memory_budget,
        return_attention=return_attention,
        sharding=sharding,
        config=config,
        is_centered=False,
    )


def attention_core(
    inputs: IPAInputs,
    logit_scales: LogitScales,
    *,
    implementation: str | None,
    precision: jax.lax.PrecisionLike,
    query_block: int | None,
    memory_budget: int,
    return_attention: bool,
    sharding: RowSharding | None,
    config: pallas_triton.Config | None,
    is_centered: bool,
) -> IPAOutput:
    """What `invariant_point_attention` and the modules share.

    Args:
      inputs: the array arguments of `invariant_point_attention`.
      logit_scales: as there, and so all others but the last.
      implementation: as there.
      precision: as there.
      query_block: as there.
      memory_budget: as there.
      return_attention: as there.
      sharding: as there.
      config: as there.
      is_centered: whether the points are near the origin, where modules have moved their frames;
        others are moved there and back, except for 'reference'.

    Returns:
      `IPAOutput`, as there; its errors, too.
    """
    check_inputs(inputs)
    logit_scales = _as_numbers(logit_scales)
    selection = select_implementation(
        (*inputs.q_mask.shape[:-1], inputs.num_head, inputs.num_query, inputs.num_key),
        implementation=implementation,
        query_block=query_block,
        memory_budget=memory_budget,
        return_attention=return_attention,
        sharding=sharding,
        pair_channel=num_channel(inputs.inputs_2d),
        dtype=inputs.logits_dtype,
        config=config,
    )
    options: dict[str, Any] = (
        {"return_attention": return_attention}
        if selection.implementation == "reference"
        else {"query_block": selection.query_block}
    )
    if selection.implementation == "pallas":
        options["config"] = config
    core = IMPLEMENTATIONS[selection.implementation]
    if selection.implementation == "xla" and not is_dense(inputs.inputs_2d):
        core = streaming.attend
    core = functools.partial(core, scales=logit_scales, precision=precision, **options)
    if selection.implementation != "reference" and not is_centered:
        core = functools.partial(at_center, core)
    return core(inputs) if sharding is None else sharding.run(core, inputs)


def _as_numbers(logit_scales: LogitScales) -> LogitScales:
    try:
        return LogitScales(*map(float, logit_scales))
    except TypeError as error:  # a tracer, or not three factors
        raise TypeError(
            "logit_scales must be `LogitScales` of numbers that are known when tracing, as by "
            f"`functools.partial` before `jax.jit`, got {logit_scales!r}."
        ) from error
