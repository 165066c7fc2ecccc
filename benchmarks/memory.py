"""Memory: how much is free, and what running out of it looks like."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax

# The kernel's out-of-memory killer strikes before the last byte, and estimates are estimates.
_USABLE = 0.9


def free_bytes() -> int | None:
    """Free memory of the device that JAX uses; None where the system does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    if jax.default_backend() != "cpu":
        return None
    try:
        with open("/proc/meminfo") as file:
            fields = dict(line.split(":") for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux
        return None


def total_bytes() -> int | None:
    """Memory of the device that JAX uses; None where the system does not say."""
    stats = jax.devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"]
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None


def check_fits(required_bytes: int, what: str) -> None:
    """Checks an estimate against the free memory.

    Raises:
      MemoryError: saying how much `what` needs and how much is free.
    """
    free = free_bytes()
    if free is not None and required_bytes > _USABLE * free:
        raise MemoryError(
            f"{what} needs {required_bytes / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        )


class OutOfMemory(NamedTuple):
    """Stands for the result of what ran out of memory; `note` says how."""

    note: str


T = TypeVar("T")


def attempt(function: Callable[..., T], *args: Any) -> T | OutOfMemory:
    """The result of `function(*args)`, or `OutOfMemory`; other errors are raised."""
    try:
        return function(*args)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return OutOfMemory(str(error).partition("\n")[0])


def _is_out_of_memory(error: Exception) -> bool:
    """Whether an exception of Python, JAX or PyTorch says that memory ran out."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's
        return True
    signs = ("resource_exhausted", "out of memory", "can't allocate memory")
    return any(sign in str(error).lower() for sign in signs)
