"""`python -m benchmarks`: what Invariant Point Attention costs here, and that it is right.

The way through the files: `cases` (what to measure) -> `problems` (random inputs, the loss) ->
`candidates`, `torch_peers` (what is measured) -> `runner`, `checks`, `timing` (measuring) ->
`results` (JSON) -> `report`, `plot`. Beside it `demo`, the demonstration on a real protein, and
`cost`, which needs no device.

A gradient is what a training step pays for: value and gradient of a squared distance to a target.
Results are compared with float64, group by group; what is off by more than a fixed limit is wrong
unless AlphaFold 2 itself is off by a quarter as much.
"""

import os

# JAX takes most of a GPU's memory when it starts. The PyTorch peers need their share of it, and the
# check for enough free memory needs to see what is free. Too late once JAX has been imported.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
