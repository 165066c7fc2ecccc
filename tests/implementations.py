"""What the tests of all implementations share."""

import pytest

from ipa_haiku.attention.selection import IMPLEMENTATIONS

# The kernels need a GPU, or seconds to compile for the interpreter: they have tests of their own.
ANYWHERE = [name for name in IMPLEMENTATIONS if name != "pallas"]

# For what takes long to compile: `reference` does what AF2's module does, operation by operation,
# and tests of its bits say so by default.
REFERENCE_IF_SLOW = [
    pytest.param(name, marks=pytest.mark.slow if name == "reference" else ()) for name in ANYWHERE
]

# Of `jax.jit`, for what takes longer to compile than to run: half the time. Not where bits are
# compared, or errors with what a program as users compile it makes.
QUICKLY = {"xla_backend_optimization_level": 0}
