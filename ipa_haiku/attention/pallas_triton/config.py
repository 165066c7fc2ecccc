"""Tunables of the fused GPU kernels."""

import dataclasses
from typing import Any

import jax.numpy as jnp

from ipa_haiku.checks import positive_integer

# Rows and columns that a tensor core takes at least.
LEAST_BLOCK = 16


@dataclasses.dataclass(frozen=True)
class KernelConfig:
    """Tunables of the kernels; results depend on them by rounding only.

    Attributes:
      forward_block: keys at a time in that pass.
      backward_block: the same in the gradient, which holds more at a time.
      tile: queries and keys at a time in kernels that do not touch `inputs_2d`.
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


def heuristic(num_head: int, pair_channel: int, dtype: Any) -> KernelConfig:
    """Tunables by heads, and by channels and dtype of `inputs_2d`.

    They come from registers and shared memory that compilers say the kernels need at AF2's widths
    of scalars and points, on the GPUs that `unsupported` lets pass; none has been timed.
    """
    is_bfloat16 = jnp.dtype(dtype) == jnp.bfloat16
    num_stages = 2 if is_bfloat16 or (num_head <= 16 and pair_channel <= 128) else 1
    if pair_channel > 128:
        return KernelConfig(forward_block=16, backward_block=16, num_warps=8, num_stages=num_stages)
    return KernelConfig(forward_block=64 if is_bfloat16 else 32, num_stages=num_stages)
