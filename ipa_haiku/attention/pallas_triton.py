"""Fused kernels for NVIDIA GPUs, in Pallas on Triton: tunables, and where they can be used.

`inputs_2d` is most of the memory traffic, so one kernel does all that needs it at once: a program
takes one query row, goes over it in blocks of keys, adds the pair term to the logits of all heads,
keeps a running softmax and sums the pair output (`pallas_triton_forward`). Kernels over tiles of
one head (`pallas_triton_tiles`) make the logits [Nq, H, Nk] before, and attention times values
after. One more is the output projection (`pallas_triton_projection`). The gradient
(`pallas_triton_vjp`) goes over `inputs_2d` once more, and writes its gradient meanwhile. Every sum
has a fixed order: results are the same bits in every run.

A pass over `inputs_2d` that makes the whole logits itself was tried: four query rows of a program,
which share what they read of keys, need 1.35 reads of `inputs_2d` in all instead of some 1.5, but
more registers than there are, and took 67 s to compile for an H200 where this takes 2 s. Rows one
after the other, each with its state in memory, would need no more registers. But the keys of all
heads are 2.6 times the bytes of a row of `inputs_2d`: by estimate, to read them from the L2 cache
once for eight rows takes nearly as long as the logits that it saves, and leaves too few programs
where N < 2000.

Pallas's Triton backend is deprecated in favour of Mosaic GPU, which needs Hopper or newer. Moving
there replaces the files `pallas_triton*.py` and nothing else: `attend`, `project`, `unsupported`
and `Config` are all that is used from outside, and they import Pallas when it is needed, not
before. The sums and their order can stay. What changes is how data moves: blocks of `inputs_2d`
come to shared memory by explicit asynchronous copies (TMA) with barriers in place of masked loads
and Triton's own pipelining; products become wgmma, whose least block is 64 rows where one query has
12 heads, so heads of several queries have to be stacked, or products made block-diagonal; TF32
products in three parts and the cuts of float32 into bfloat16 have to be written out; and there is
shared memory to keep the logits of a few queries in, with which the [Nq, H, Nk] arrays need not be
written at all.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from ipa_haiku.attention.base import (
    IPAInputs,
    IPAOutput,
    LogitScales,
    assert_shape,
    for_each_protein,
)
from ipa_haiku.config import positive_integer

# Rows and columns that a tensor core takes at least.
LEAST_BLOCK = 16

MAX_HEAD = 32
MAX_PAIR_CHANNEL = 256

# Ampere: the first with TF32 and bfloat16 products and asynchronous copies.
_LEAST_CAPABILITY = 80

# Of 227 KB of shared memory for a program, where others have 99 (GeForce) or 163 (A100).
_CAPABILITIES_WITH_227_KB = (90, 100, 103, 110)


@dataclasses.dataclass(frozen=True)
class Config:
    """Tunables of the kernels; results depend on them by rounding only.

    Attributes:
      forward_block: keys at a time in that pass.
      backward_block: the same in the gradient, which holds more at a time.
      tile: queries and keys at a time in kernels that do not touch `inputs_2d`; residues at a time
        in the output projection.
      num_warps: warps of a program.
      num_stages: depth of the pipeline of loads.
      interpret: run in Pallas's interpreter, on any device: for tests, far too slow for use.

    Raises:
      ValueError: naming the field whose value is of no use.
    """

    forward_block: int = 32
    backward_block: int = 32
    tile: int = 32
    num_warps: int = 4
    num_stages: int = 2
    interpret: bool = False

    def __post_init__(self) -> None:
        least = dict.fromkeys(("forward_block", "backward_block", "tile"), LEAST_BLOCK)
        least["num_warps"] = 1
        for name, size in (least | {"num_stages": 1}).items():
            value = positive_integer(name, getattr(self, name), least=size)
            object.__setattr__(self, name, value)
            if name in least and value & (value - 1):
                raise ValueError(f"{name} must be a power of two, got {value}.")


class Static(NamedTuple):
    """What is known when tracing: `scales` of the logits, tunables, query rows at a time."""

    scales: LogitScales
    config: Config
    query_block: int  # Nq for all rows at once


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
        return _without_backend()
    platform, capability = _device(mesh)
    if platform not in ("gpu", "cuda"):
        return f"it needs an NVIDIA GPU, and the device is a {platform}"
    if missing := _without_backend():
        return missing
    if capability is None or capability < _LEAST_CAPABILITY:
        found = "another" if capability is None else f"{capability // 10}.{capability % 10}"
        return f"it needs an NVIDIA GPU of compute capability 8.0 or higher, this one has {found}"
    if num_head > 16 and pair_channel > 128 and capability not in _CAPABILITIES_WITH_227_KB:
        return (
            f"its {num_head} heads and {pair_channel} channels of inputs_2d need more shared "
            f"memory than a GPU of compute capability {capability // 10}.{capability % 10} has"
        )
    return None


def heuristic(num_head: int, pair_channel: int, dtype: Any) -> Config:
    """Tunables by heads, and by channels and dtype of `inputs_2d`.

    They come from registers and shared memory that compilers say the kernels need at AF2's widths
    of scalars and points, on the GPUs that `unsupported` lets pass; none has been timed.
    """
    is_bfloat16 = jnp.dtype(dtype) == jnp.bfloat16
    num_stages = 2 if is_bfloat16 or (num_head <= 16 and pair_channel <= 128) else 1
    if pair_channel > 128:
        return Config(forward_block=16, backward_block=16, num_warps=8, num_stages=num_stages)
    return Config(forward_block=64 if is_bfloat16 else 32, num_stages=num_stages)


def _backend() -> Any:
    """Pallas's Triton backend, which JAX may do without some day; None if it does."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton


def _without_backend() -> str | None:
    if _backend() is not None:
        return None
    version = jax.__version__
    return f"JAX {version} has no Triton backend of Pallas (jax.experimental.pallas.triton)"


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
        triton = _backend()
        if triton is None:
            return abstract.platform, None
        if not hasattr(triton, "get_gpu_info"):  # JAX 0.10 lowers for 9.0 where there is no GPU
            return abstract.platform, 90 if abstract.device_kind.startswith("NVIDIA") else None
        try:
            return abstract.platform, triton.get_gpu_info().compute_capability or None
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
      inputs: the array arguments, checked and supported; points near the origin.
      scales: static factors of the logit terms.
      precision: of no effect: products are about as accurate as float32's.
      query_block: how many query rows to process at a time, forward and backward; None for all.
      config: tunables; None for those of `heuristic`.

    Returns:
      `IPAOutput` without attention weights.

    Raises:
      TypeError: under forward-mode or second-order differentiation.
    """
    # Here, so that importing the library imports no backend that may be gone.
    from ipa_haiku.attention import pallas_triton_forward as forward

    del precision
    z = inputs.inputs_2d
    config = config or heuristic(inputs.num_head, z.shape[-1], z.dtype)
    query_block = min(query_block or inputs.num_query, inputs.num_query)
    attend_one = functools.partial(forward.attend_one, Static(scales, config, query_block))
    return for_each_protein(attend_one, inputs, "pallas")


def project(
    features: Sequence[jax.Array],
    weights: jax.Array,
    bias: jax.Array,
    *,
    config: Config | None = None,
) -> jax.Array:
    """The affine map of features that are not concatenated (Suppl. Alg. 22, line 11).

    Products are as accurate as JAX's default on GPUs, which is TF32 for float32.

    Args:
      features: [..., K_i] each, of one dtype and the same leading axes.
      weights: [sum of K_i, num_channel].
      bias: [num_channel].
      config: tunables; None for `Config()`.

    Returns:
      [..., num_channel] in the dtype that all arguments have.

    Raises:
      AssertionError: naming the argument whose shape or dtype does not fit.
      TypeError: under forward-mode differentiation.
    """
    from ipa_haiku.attention import pallas_triton_projection as projection

    *batch, _ = features[0].shape
    named = {f"features[{i}]": x for i, x in enumerate(features)}
    for name, x in named.items():
        assert_shape(name, x, "... K_i", (*batch, None))
    num_feature = sum(x.shape[-1] for x in features)
    assert_shape("weights", weights, "K num_channel", (num_feature, None))
    assert_shape("bias", bias, "num_channel", weights.shape[1:])
    dtype = features[0].dtype
    for name, x in (named | {"weights": weights, "bias": bias}).items():
        message = f"{name} must be {dtype}, as features[0] is, got {x.dtype}"
        chex.assert_type(x, dtype, custom_message=message)
    parts = [x.reshape(-1, x.shape[-1]) for x in features]
    output = projection.project(config or Config(), parts, weights, bias)
    return output.reshape(*batch, -1)
