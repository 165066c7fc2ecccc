"""A program of its own: the core's gradient by the kernels, for a target and a dtype of inputs_2d.

Prints temporary bytes by case as JSON, null where shared memory is too little; what must be in the
environment is `cost.environment`'s.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import cost
from ipa_haiku import LogitScales, invariant_point_attention

N, C, P, PV = 256, 16, 4, 8  # the last two: points of queries and keys, of values
SCALES = LogitScales(scalar=1.0, pair=1.0)
CASES: dict[str, dict[str, Any]] = {
    "whole": {},
    "segments in blocks": {"segments": True, "query_block": 96},  # the last block is not full
    "most heads": {"num_head": 32, "query_block": 96},
    "most channels": {"num_head": 16, "pair_channel": 256, "query_block": 96},
    "most heads and channels": {"num_head": 32, "pair_channel": 256, "query_block": 96},
}


def temporary_bytes(
    sharding, dtype, segments=False, query_block=None, num_head=12, pair_channel=128
):
    def shape(*sizes, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(sizes, dtype, sharding=sharding)

    floating = [shape(N, num_head, C)] * 3
    floating += [shape(N, num_head, num_point, 3) for num_point in (P, P, PV)]
    floating += [shape(N, N, pair_channel, dtype=dtype), shape(pair_channel, num_head)]
    floating += [shape(num_head)] * 2 + [shape(N)] * 2
    ids = [shape(N, dtype=jnp.int32)] * 2 if segments else [None] * 2

    def gradient(floating, q_segment_ids, k_segment_ids):
        def loss(*floating):
            out = invariant_point_attention(
                *floating, SCALES, implementation="pallas", query_block=query_block,
                q_segment_ids=q_segment_ids, k_segment_ids=k_segment_ids,
            )  # fmt: skip
            return sum(jnp.sum(jnp.sin(x.astype(jnp.float32))) for x in out[:3])

        return jax.grad(loss, range(len(floating)))(*floating)

    try:
        compiled = jax.jit(gradient).lower(floating, *ids).compile()
    except NotImplementedError as error:
        if "shared memory" in str(error):
            return None
        raise
    return compiled.memory_analysis().temp_size_in_bytes


def main():
    sharding, context = cost.device(sys.argv[1])
    with context:
        result = {k: temporary_bytes(sharding, sys.argv[2], **v) for k, v in CASES.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
