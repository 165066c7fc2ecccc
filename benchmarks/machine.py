"""The machine: what it is, and the rates that bound every implementation on it."""

import contextlib
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import memory

_PACKAGES = (
    "ipa_haiku", "jax", "jaxlib", "dm-haiku", "numpy", "alphafold-colabfold", "colabfold-kernels",
    "torch", "invariant-point-attention", "transformers",
)  # fmt: skip

# Settings outside of the program that change how fast it is.
_ENVIRONMENT = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "GLIBC_TUNABLES", "LD_PRELOAD")

# Elements of an array larger than any cache, and rows of a matrix.
_CPU_SIZES, _OTHER_SIZES = (2**26, 2048), (2**29, 8192)
_REPEATS = 7  # of which the fastest counts: it is a bound that is looked for


def describe(dtype: str) -> dict[str, Any]:
    """The "machine" of the results: what it is and runs, and its rates in GB/s and GFLOP/s.

    Args:
      dtype: in which products of matrices are measured.
    """
    device = jax.devices()[0]
    total = memory.total_bytes()
    versions = {}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    size, num_rows = _CPU_SIZES if device.platform == "cpu" else _OTHER_SIZES
    return {
        "platform": device.platform,
        "device": _cpu_name() if device.platform == "cpu" else device.device_kind,
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": None if total is None else round(total / 1e9, 1),
        "system": platform.platform(terse=True),
        "bandwidth_gb_s": _bandwidth(size) / 1e9,
        "matmul_gflop_s": _matmul_rate(num_rows, dtype) / 1e9,
        "versions": {"python": platform.python_version(), **versions},
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if os.environ.get(name)},
    }


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
    except OSError:  # not Linux
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _bandwidth(size: int) -> float:
    """Bytes per second: the better of reading an array and of updating one in place.

    In place, as the first touch of new memory costs more than the copying.
    """
    x = jnp.ones(size, jnp.float32)
    num_bytes = x.nbytes
    read = _fastest(jnp.sum, x)
    update = _fastest(lambda x: x + 1, x, in_place=True)
    return max(num_bytes / read, 2 * num_bytes / update)


def _matmul_rate(n: int, dtype: str) -> float:
    """Operations per second of a square product of matrices at JAX's default precision."""
    x = jax.random.normal(jax.random.key(0), (n, n), jnp.dtype(dtype))
    return 2 * n**3 / _fastest(jnp.matmul, x, x)


def _fastest(function: Callable[..., Any], *args: jax.Array, in_place: bool = False) -> float:
    """Seconds of the fastest of several calls, which take the place of their argument or do not."""
    compiled = jax.jit(function, donate_argnums=(0,) if in_place else ()).lower(*args).compile()
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = jax.block_until_ready(compiled(*args))
        seconds.append(time.perf_counter() - start)
        if in_place:
            args = (result,)
    return min(seconds)
