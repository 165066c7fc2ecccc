"""A program of its own: the core's gradient by the kernels, compiled for the target it is told.

Prints temporary bytes by case as JSON; what must be in the environment is `cost.environment`'s.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cost
from ipa_haiku import LogitScales, invariant_point_attention

N, H, C, P, C_Z = 256, 12, 16, 4, 128
SCALES = LogitScales(scalar=1.0, pair=1.0)
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "segments in blocks": {"segments": True, "query_block": 96},  # the last block is not full
}


def temporary_bytes(sharding, segments=False, query_block=None):
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    floating = [
        shape(N, H, C), shape(N, H, C), shape(N, H, C),
        shape(N, H, P, 3), shape(N, H, P, 3), shape(N, H, P, 3),
        shape(N, N, C_Z), shape(C_Z, H), shape(H), shape(H), shape(N), shape(N),
    ]  # fmt: skip
    ids = [shape(N, dtype=jnp.int32)] * 2 if segments else [None] * 2

    def gradient(floating, q_segment_ids, k_segment_ids):
        def loss(*floating):
            out = invariant_point_attention(
                *floating, SCALES, implementation="pallas", query_block=query_block,
                q_segment_ids=q_segment_ids, k_segment_ids=k_segment_ids,
            )  # fmt: skip
            return sum(jnp.sum(jnp.sin(x)) for x in out[:3])

        return jax.grad(loss, range(len(floating)))(*floating)

    compiled = jax.jit(gradient).lower(floating, *ids).compile()
    return compiled.memory_analysis().temp_size_in_bytes


def main():
    sharding, context = cost.device(sys.argv[1])
    with context:
        print(json.dumps({name: temporary_bytes(sharding, **CASES[name]) for name in CASES}))


if __name__ == "__main__":
    main()
