"""Names of implementations, for tests that run on every device."""

from ipa_haiku.attention.api import IMPLEMENTATIONS

# The kernels need a GPU, or seconds to compile for the interpreter: they have tests of their own.
ANYWHERE = [name for name in IMPLEMENTATIONS if name != "pallas"]
