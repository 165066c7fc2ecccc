"""Invariant Point Attention for JAX and Haiku: AlphaFold 2's module, exact, faster and leaner."""

from ipa_haiku.attention.api import invariant_point_attention
from ipa_haiku.attention.pair import FactorizedPair, RelativePositionPair
from ipa_haiku.attention.pallas_triton.config import KernelConfig
from ipa_haiku.attention.selection import Selection, select_implementation
from ipa_haiku.attention.sharding import RowSharding
from ipa_haiku.attention.types import AttentionTerms, IPAOutput, LogitScales
from ipa_haiku.config import IPAConfig
from ipa_haiku.folding import InvariantPointAttention
from ipa_haiku.quat_affine import QuatAffine

__all__ = [
    "AttentionTerms",
    "FactorizedPair",
    "IPAConfig",
    "IPAOutput",
    "InvariantPointAttention",
    "KernelConfig",
    "LogitScales",
    "QuatAffine",
    "RelativePositionPair",
    "RowSharding",
    "Selection",
    "invariant_point_attention",
    "select_implementation",
]
