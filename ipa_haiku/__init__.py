"""Invariant Point Attention for JAX and Haiku: AlphaFold 2's module, exact, faster and leaner."""

from ipa_haiku.attention.api import (
    Selection,
    invariant_point_attention,
    select_implementation,
)
from ipa_haiku.attention.base import AttentionTerms, IPAOutput, LogitScales
from ipa_haiku.attention.sharding import RowSharding
from ipa_haiku.config import IPAConfig
from ipa_haiku.folding import InvariantPointAttention
from ipa_haiku.pair import FactorizedPair, RelativePositionPair
from ipa_haiku.quat_affine import QuatAffine

__all__ = [
    "AttentionTerms",
    "FactorizedPair",
    "IPAConfig",
    "IPAOutput",
    "InvariantPointAttention",
    "LogitScales",
    "QuatAffine",
    "RelativePositionPair",
    "RowSharding",
    "Selection",
    "invariant_point_attention",
    "select_implementation",
]
