"""How to compute, one record for the core, the modules and the implementations."""

import dataclasses

import jax

from ipa_haiku.attention.pallas_triton.config import KernelConfig
from ipa_haiku.attention.sharding import RowSharding
from ipa_haiku.checks import positive_integer

DEFAULT_MEMORY_BUDGET = 2 * 2**30


@dataclasses.dataclass(frozen=True)
class Options:
    """How to compute: the keyword arguments of `invariant_point_attention`, described there.

    Raises:
      ValueError: if `query_block` or `memory_budget` is not a positive integer, or `kernel_config`
        is given to another implementation than 'pallas'.
    """

    implementation: str | None = None
    precision: jax.lax.PrecisionLike = None
    query_block: int | None = None
    memory_budget: int = DEFAULT_MEMORY_BUDGET
    return_attention: bool = False
    sharding: RowSharding | None = None
    kernel_config: KernelConfig | None = None

    def __post_init__(self) -> None:
        for name in ("memory_budget", "query_block"):
            value = getattr(self, name)
            if name == "memory_budget" or value is not None:
                object.__setattr__(self, name, positive_integer(name, value))
        if self.kernel_config is not None and self.implementation not in (None, "pallas"):
            raise ValueError(
                "kernel_config is for implementation='pallas', got "
                f"implementation={self.implementation!r}."
            )

    @property
    def is_reference(self) -> bool:
        """Whether AF2's operations run, whatever the shapes and the device."""
        wants_weights = self.return_attention and self.query_block is None
        return self.implementation == "reference" or (self.implementation is None and wants_weights)
