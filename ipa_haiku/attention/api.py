"""The one entry to the attention core: checks, chooses an implementation, calls it."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from ipa_haiku.attention import pallas_triton, reference, xla
from ipa_haiku.attention.base import IPAInputs, IPAOutput, LogitScales, check_inputs

IMPLEMENTATIONS: dict[str, Callable[..., IPAOutput]] = {
    "reference": reference.attend,
    "xla": xla.attend,
    "pallas": pallas_triton.attend,
}

# How many [H, Nq, Nk] arrays of float32 the gradient holds at its peak: `xla`'s by XLA:CPU's
# memory analysis of the module at N = 512 (63 MB), `pallas`'s are the logits and their gradient.
_NUM_TEMPORARY = {"xla": 5, "pallas": 2}

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
    inputs_2d: jax.Array | jax.ShapeDtypeStruct | None = None,
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
      inputs_2d: [..., Nq, Nk, C_z], of which the shape counts; None for AlphaFold's 128 channels.
      dtype: that all arguments promote to.
      config: as in `invariant_point_attention`.

    Returns:
      `Selection` of the implementation, the number of query rows at a time, and the reason.

    Raises:
      ValueError: if there is no such implementation, or `query_block` or `memory_budget` is not a
        positive integer.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    if implementation not in (None, *IMPLEMENTATIONS):
        raise ValueError(
            f"implementation must be None or one of {sorted(IMPLEMENTATIONS)}, "
            f"got {implementation!r}."
        )
    for name, value in (("query_block", query_block), ("memory_budget", memory_budget)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be a positive integer, got {value!r}.")

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
        pair_channel = _AF2_PAIR_CHANNEL if inputs_2d is None else inputs_2d.shape[-1]
        in_the_way = pallas_triton.unsupported(num_head, pair_channel, dtype, config)
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
    if query_block is None:
        bytes_per_row = _NUM_TEMPORARY[implementation] * 4 * num_head * num_key * math.prod(batch)
        if bytes_per_row * num_query > memory_budget:
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
    inputs_2d: jax.Array,
    pair_weights: jax.Array,
    pair_bias: jax.Array,
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
    config: pallas_triton.Config | None = None,
) -> IPAOutput:
    """Invariant point attention over arrays (Suppl. Alg. 22, lines 7 to 10).

    The logits are `total * (scalar * q.k - 1/2 point_weights * sum |Q - K|^2 + pair * (z W + b) -
    1e5 * (1 - mask_i mask_j))` with `LogitScales(scalar, pair, total)`. Shape letters are those of
    `ipa_haiku.attention.base`; every argument is floating-point.

    Args:
      q_scalar: [..., Nq, H, C] scalar queries.
      k_scalar: [..., Nk, H, C] scalar keys.
      v_scalar: [..., Nk, H, Cv] scalar values.
      q_point: [..., Nq, H, P, 3] query points in the global frame, in the unit of the translations.
      k_point: [..., Nk, H, P, 3] key points in the global frame.
      v_point: [..., Nk, H, Pv, 3] value points in the global frame.
      inputs_2d: [..., Nq, Nk, C_z] pair representation z.
      pair_weights: [C_z, H] weights W of the pair bias.
      pair_bias: [H] bias b of the pair bias.
      point_weights: [H] weight of squared distances, after softplus and scaling.
      q_mask: [..., Nq] 1 where a query is real.
      k_mask: [..., Nk] 1 where a key is real.
      logit_scales: static factors of the logit terms.
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
        processed in blocks.
      return_attention: also return the attention weights and the three logit terms.
      config: tunables of 'pallas', also to run it in Pallas's interpreter; None for the best known.

    Returns:
      `IPAOutput`: scalar [..., Nq, H, Cv], point [..., Nq, H, Pv, 3] in the global frame, pair
      [..., Nq, H, C_z], and `attention` (None unless asked for).

    Raises:
      TypeError: if an argument is not an array.
      AssertionError: at trace time, naming the argument whose shape or dtype does not fit.
      ValueError: if there is no such implementation.
      NotImplementedError: if the named implementation cannot do what is asked.
    """
    inputs = IPAInputs(
        q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
        inputs_2d, pair_weights, pair_bias, point_weights, q_mask, k_mask,
    )  # fmt: skip
    check_inputs(inputs)
    selection = select_implementation(
        (*q_mask.shape[:-1], inputs.num_head, inputs.num_query, inputs.num_key),
        implementation=implementation,
        query_block=query_block,
        memory_budget=memory_budget,
        return_attention=return_attention,
        inputs_2d=inputs_2d,
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
    attend = IMPLEMENTATIONS[selection.implementation]
    return attend(inputs, logit_scales, precision=precision, **options)
