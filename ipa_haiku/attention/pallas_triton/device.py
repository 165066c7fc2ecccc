"""Where the fused GPU kernels can run."""

from typing import Any

import jax
import jax.numpy as jnp

from ipa_haiku.attention.pallas_triton.config import KernelConfig
from ipa_haiku.jax_versions import abstract_device

MAX_HEAD = 32
MAX_PAIR_CHANNEL = 256

# Ampere: the first with TF32 and bfloat16 products and asynchronous copies.
_LEAST_CAPABILITY = 80

# Of 227 KB of shared memory for a program, where others have 99 (GeForce) or 163 (A100).
_CAPABILITIES_WITH_227_KB = (90, 100, 103, 110)


def unsupported(
    num_head: int,
    pair_channel: int | None,
    dtype: Any,
    config: KernelConfig | None = None,
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


def _backend() -> Any:
    """Pallas's Triton backend; None where JAX has none some day, or one too old, up to 0.7.0."""
    try:
        from jax.experimental.pallas import triton
    except ImportError:
        return None
    return triton if hasattr(triton, "load") else None


def _without_backend() -> str | None:
    if _backend() is not None:
        return None
    version = jax.__version__
    return f"JAX {version} has no jax.experimental.pallas.triton with loads and stores"


def _device(mesh: Any = None) -> tuple[str, int | None]:
    """Platform that programs are traced for, and compute capability times ten if it is NVIDIA's.

    Of the devices of `mesh` if they are real; else of an abstract device, which programs are
    compiled for without having it; else of JAX's default device.
    """
    device = jax.config.jax_default_device or jax.devices()[0]  # type: ignore[attr-defined]
    if isinstance(device, str):
        device = jax.devices(device)[0]
    abstract = abstract_device()
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
