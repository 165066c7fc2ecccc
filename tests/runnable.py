"""Implementations that run on every device; the kernels' own tests are elsewhere."""

from ipa_haiku.attention import api

IMPLEMENTATIONS = [name for name in api.IMPLEMENTATIONS if name != "pallas"]
