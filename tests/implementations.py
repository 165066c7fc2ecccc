"""What the tests of all implementations share."""

import jax
import pytest

from ipa_haiku.attention.selection import IMPLEMENTATIONS

# The kernels need a GPU, or seconds to compile for the interpreter: they have tests of their own.
ANYWHERE = [name for name in IMPLEMENTATIONS if name != "pallas"]

# For what takes long to compile: `reference` does what AF2's module does, operation by operation,
# and tests of its bits say so by default.
REFERENCE_IF_SLOW = [
    pytest.param(name, marks=pytest.mark.slow if name == "reference" else ()) for name in ANYWHERE
]

# Where `reference` was seen to agree with AF2 in every bit. Another version of XLA may fuse the two
# programs differently.
BIT_IDENTICAL = jax.default_backend() == "cpu" and jax.__version__ in ("0.10.2", "0.11.2")
