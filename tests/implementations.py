"""What the tests of all implementations share."""

import jax

from ipa_haiku.attention.api import IMPLEMENTATIONS

# The kernels need a GPU, or seconds to compile for the interpreter: they have tests of their own.
ANYWHERE = [name for name in IMPLEMENTATIONS if name != "pallas"]

# Where `reference` was seen to agree with AF2 in every bit. Another version of XLA may fuse the two
# programs differently.
BIT_IDENTICAL = jax.default_backend() == "cpu" and jax.__version__ in ("0.10.2", "0.11.2")
