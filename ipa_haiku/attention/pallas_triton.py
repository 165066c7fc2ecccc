"""Fused kernels for NVIDIA GPUs, in Pallas on Triton: the forward pass and what chooses it.

`inputs_2d` is most of the memory traffic, so one kernel does all that needs it at once: a program
takes the row of one query, goes over it in blocks of keys, adds the pair bias of all heads to the
logits, keeps a running softmax and sums the pair output. Around it are kernels over [Nq, H, Nk],
each of which reads or writes such an array once: the other logits (and what segments take from
them, as one more pass by XLA), and attention times values. The
gradient (`pallas_triton_vjp`) goes over `inputs_2d` once more, and writes its gradient meanwhile.
Every sum has a fixed order: results are the same bits in every run.

Pallas's Triton backend is deprecated in favour of Mosaic GPU, which needs Hopper or newer. Moving
there replaces the three files `pallas_triton*.py` and nothing else: `attend`, `unsupported` and
`Config` are all that is used from outside. The sums and their order can stay. What changes is how
data moves: blocks of `inputs_2d` come to shared memory by explicit asynchronous copies (TMA) with
barriers in place of masked loads and Triton's own pipelining; products become wgmma, whose least
block is 64 rows where one query has 12 heads, so a program has to take 4 or more queries at a time
(block-diagonal, or heads of several queries stacked); TF32 products in three parts and the cuts of
float32 into bfloat16 have to be written out; and there is shared memory to keep the logits of a
few queries in, with which the [Nq, H, Nk] arrays need not be written at all.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from ipa_haiku.attention import pallas_triton_vjp
from ipa_haiku.attention.base import IPAInputs, IPAOutput, LogitScales, for_each_protein
from ipa_haiku.attention.pallas_triton_tiles import (
    Config,
    Side,
    Softmax,
    Static,
    block_starts,
    call,
    dot,
    join_rows,
    key_side,
    load_pair,
    logits_without_pair,
    once_differentiable,
    query_side,
    row_index,
    row_mask,
    row_specs,
    split_rows,
    sum_over_keys,
    transposed_pair_weights,
    values,
)

MAX_HEAD = 32
MAX_PAIR_CHANNEL = 256

# Ampere: the first with TF32 and bfloat16 products and asynchronous copies.
_LEAST_CAPABILITY = 80


def unsupported(
    num_head: int,
    pair_channel: int | None,
    dtype: Any,
    config: Config | None = None,
    mesh: Any = None,
) -> str | None:
    """Why these kernels cannot be used here; None if they can.

    Args:
      num_head: number of heads.
      pair_channel: channels of `inputs_2d`; None if that is no array.
      dtype: that all arguments promote to.
      config: tunables; the interpreter runs on every device.
      mesh: of the devices to run on; None for those of JAX.
    """
    if jnp.dtype(dtype).itemsize > 4:
        return f"it computes in float32, not {jnp.dtype(dtype)}"
    if num_head > MAX_HEAD:
        return f"it takes up to {MAX_HEAD} heads, not {num_head}"
    if pair_channel is None:
        return "it takes inputs_2d as an array only"
    if pair_channel > MAX_PAIR_CHANNEL:
        return f"it takes up to {MAX_PAIR_CHANNEL} channels of inputs_2d, not {pair_channel}"
    if config is not None and config.interpret:
        return None
    platform, capability = _device(mesh)
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and the device is a {platform}"
    if capability is None or capability < _LEAST_CAPABILITY:
        found = "another" if capability is None else f"{capability // 10}.{capability % 10}"
        return f"it needs an NVIDIA GPU of compute capability 8.0 or higher, this one has {found}"
    return None


def heuristic(pair_channel: int, dtype: Any) -> Config:
    """Tunables by channels and dtype of `inputs_2d`.

    They come from estimates of registers and shared memory; none has been measured.
    """
    if pair_channel > 128:
        return Config(forward_block=16, backward_block=16, num_warps=8)
    if jnp.dtype(dtype) == jnp.bfloat16:
        return Config(forward_block=64, backward_block=32)
    return Config(forward_block=32, backward_block=32)


def _device(mesh: Any = None) -> tuple[str, int | None]:
    """Platform that programs are traced for, and compute capability times ten if it is NVIDIA's.

    Of the devices of `mesh` if they are real; else of an abstract device, which programs are
    compiled for without having it; else of JAX's default device.
    """
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if isinstance(mesh, jax.sharding.Mesh):
        device = mesh.devices.flat[0]
    elif abstract is not None and abstract.device_kind != device.device_kind:
        if not hasattr(plgpu, "get_gpu_info"):  # JAX 0.10 lowers for 9.0 where there is no GPU
            return abstract.platform, 90 if abstract.device_kind.startswith("NVIDIA") else None
        try:
            return abstract.platform, plgpu.get_gpu_info().compute_capability or None
        except ValueError:  # not a GPU that Pallas knows
            return abstract.platform, None
    digits = getattr(device, "compute_capability", "").replace(".", "")
    return device.platform, int(digits) if digits.isdigit() else None


def attend(
    inputs: IPAInputs,
    scales: LogitScales,
    *,
    precision: jax.lax.PrecisionLike = None,
    query_block: int | None = None,
    config: Config | None = None,
) -> IPAOutput:
    """Invariant point attention by fused GPU kernels.

    Args:
      inputs: the array arguments, checked and supported.
      scales: static factors of the logit terms.
      precision: of no effect: products are about as accurate as float32's.
      query_block: how many query rows to process at a time, forward and backward; None for all.
      config: tunables; None for those of `heuristic`.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode or second-order differentiation.
    """
    del precision
    config = config or heuristic(inputs.inputs_2d.shape[-1], inputs.inputs_2d.dtype)
    query_block = min(query_block or inputs.num_query, inputs.num_query)
    attend_one = functools.partial(_attend, Static(scales, config, query_block))
    return for_each_protein(attend_one, inputs, "pallas")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(static: Static, inputs: IPAInputs) -> IPAOutput:
    return _attend_fwd(static, inputs)[0]


def _attend_fwd(static: Static, inputs: IPAInputs) -> tuple[IPAOutput, tuple]:
    out, residuals = once_differentiable(functools.partial(_outputs_and_residuals, static))(inputs)
    return _narrow(out, inputs), (inputs, out, *residuals)


_attend.defvjp(_attend_fwd, pallas_triton_vjp.backward)


def _outputs_and_residuals(
    static: Static, inputs: IPAInputs
) -> tuple[IPAOutput, tuple[Softmax, jax.Array | None]]:
    """Outputs in float32 (the gradient takes a difference with them), statistics, and logits.

    The logits [Nq, H, Nk] are not kept when rows are processed in blocks.
    """
    if static.query_block < inputs.num_query:
        rows = (block_starts(static, inputs), split_rows(static, query_side(inputs)))
        out, softmax = jax.lax.map(lambda rows: _forward(static, inputs, *rows)[:2], rows)
        out, softmax = join_rows((out, softmax), inputs.num_query)
        return out, (softmax, None)
    start = jnp.zeros(1, jnp.int32)
    out, softmax, logits = _forward(static, inputs, start, query_side(inputs))
    return out, (softmax, logits)


def _forward(
    static: Static, inputs: IPAInputs, start: jax.Array, query: Side
) -> tuple[IPAOutput, Softmax, jax.Array]:
    """Outputs, softmax statistics and logits [Nq, H, Nk] of the rows from `start` [1] on."""
    logits = logits_without_pair(
        static, query, key_side(inputs), inputs.point_weights.astype(jnp.float32)
    )
    logits, pair, softmax = _pair_pass(static, inputs, start, logits)
    value = sum_over_keys(static.config, logits, values(inputs), softmax)
    scalar, point = jnp.split(value, [inputs.v_scalar.shape[-1]], axis=-1)
    return IPAOutput(scalar, point.reshape(*point.shape[:2], -1, 3), pair), softmax, logits


def _pair_pass(
    static: Static, inputs: IPAInputs, start: jax.Array, logits: jax.Array
) -> tuple[jax.Array, jax.Array, Softmax]:
    """Adds the pair term to logits [Nq, H, Nk], in place; pair outputs and softmax statistics.

    The pair bias shifts all logits of a row alike: the softmax does not see it, and it is left out.
    """
    num_query, num_head, num_key = logits.shape
    config, z = static.config, inputs.inputs_2d
    pair_weights = transposed_pair_weights(inputs)  # [H padded, C_z padded]
    heads, channels = pair_weights.shape
    block = config.forward_block
    specs = row_specs(inputs, heads, channels, block)

    def kernel(
        start: Any, logits: Any, z: Any, pair_weights: Any,
        logits_out: Any, pair_out: Any, maximum_out: Any, scale_out: Any,
    ) -> None:  # fmt: skip
        row = row_index(start, z)

        def add_block(b: jax.Array, state: tuple) -> tuple:
            total, maximum, weight = state
            columns = pl.ds(b * block, block)
            mask = row_mask(b, heads, block, (num_head, num_key))
            z_block = load_pair(z, row, b, block, (num_key, z_channels))
            bias = dot(config, pair_weights[:, :], z_block, trans_b=True)
            scores = plgpu.load(logits.at[:, columns], mask=mask, other=0.0)
            scores = scores + static.scales.total * static.scales.pair * bias
            plgpu.store(logits_out.at[:, columns], scores, mask=mask)
            inside = (b * block + jnp.arange(block) < num_key)[None, :]
            scores = jnp.where(inside, scores, -jnp.inf)
            # The first block has a key, so that the maximum is finite from then on.
            higher = jnp.maximum(maximum, jnp.max(scores, axis=1))
            shrink = jnp.exp(maximum - higher)
            part = jnp.exp(scores - higher[:, None])
            total = total * shrink[:, None] + dot(config, part, z_block)
            return total, higher, weight * shrink + jnp.sum(part, axis=1)

        state = (
            jnp.zeros((heads, channels), jnp.float32),
            jnp.full(heads, -jnp.inf, jnp.float32),
            jnp.zeros(heads, jnp.float32),
        )
        num_block = pl.cdiv(num_key, block)
        total, maximum, weight = jax.lax.fori_loop(0, num_block, add_block, state)
        scale = 1.0 / weight
        is_head = jnp.arange(heads) < num_head
        is_channel = jnp.arange(channels) < z_channels
        plgpu.store(
            pair_out.at[:, :], total * scale[:, None], mask=is_head[:, None] & is_channel[None, :]
        )
        plgpu.store(maximum_out.at[:], maximum, mask=is_head)
        plgpu.store(scale_out.at[:], scale, mask=is_head)

    z_channels = z.shape[-1]
    statistics = jax.ShapeDtypeStruct((num_query, num_head), jnp.float32)
    logits, pair, maximum, scale = call(
        config,
        kernel,
        grid=(num_query,),
        in_specs=[specs.start, specs.row, specs.pair, specs.weights],
        out_specs=[specs.row, specs.head_channels, specs.heads, specs.heads],
        out_shape=[
            jax.ShapeDtypeStruct(logits.shape, jnp.float32),
            jax.ShapeDtypeStruct((num_query, num_head, z_channels), jnp.float32),
            statistics,
            statistics,
        ],
        input_output_aliases={1: 0},
    )(start, logits, z, pair_weights)
    return logits, pair, Softmax(maximum, scale)


def _narrow(out: IPAOutput, inputs: IPAInputs) -> IPAOutput:
    """Outputs in the dtypes that `IPAOutput` promises."""
    return out._replace(
        scalar=out.scalar.astype(inputs.v_scalar.dtype),
        pair=out.pair.astype(inputs.inputs_2d.dtype),
    )
