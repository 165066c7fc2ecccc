"""The least time that a machine can take: one read of `inputs_2d`, and the arithmetic."""

from typing import Any

import jax.numpy as jnp

from benchmarks.cases import Model

# A gradient reads inputs_2d in the forward and in the backward pass, and writes its gradient. Each
# product of matrices in the forward pass has two in the backward pass.
_TIMES = {"forward": 1, "grad": 3}


def pair_bytes(model: Model, n: int, dtype: str) -> int:
    """Bytes of `inputs_2d`: [N, N, C_z], or two factors [N, R, C_z]."""
    rows = 2 * model.pair_rank or n
    return rows * n * model.pair_channel * jnp.dtype(dtype).itemsize


def least_seconds(
    machine: dict[str, Any], what: str, model: Model, n: int, dtype: str, mode: str
) -> float:
    """The larger of the time to move the bytes and the time to do the arithmetic.

    Of the structure module, the attention alone counts.
    """
    times = _TIMES[mode] * (model.num_layer if what == "structure_module" else 1)
    operations = forward_operations(model, n, with_projections=what != "core")
    return max(
        times * pair_bytes(model, n, dtype) / (1e9 * machine["bandwidth_gb_s"]),
        times * operations / (1e9 * machine["matmul_gflop_s"]),
    )


def forward_operations(model: Model, n: int, *, with_projections: bool) -> int:
    """Additions and multiplications of a forward pass (Suppl. Alg. 22)."""
    ipa, c_s, c_z = model.ipa, model.single_channel, model.pair_channel
    pair_products = max(model.pair_rank, 1) * c_z
    per_pair_and_head = (
        ipa.num_scalar_qk  # q.k
        + 3 * ipa.num_point_qk  # distances
        + pair_products  # pair bias
        + ipa.num_scalar_v
        + 3 * ipa.num_point_v
        + pair_products  # the three results
    )
    pairs = 2 * n * n * ipa.num_head * per_pair_and_head
    if not with_projections:
        return pairs
    projected = (
        2 * ipa.num_scalar_qk + ipa.num_scalar_v + 3 * (2 * ipa.num_point_qk + ipa.num_point_v)
    )
    features = ipa.num_scalar_v + 4 * ipa.num_point_v + c_z
    return pairs + 2 * n * ipa.num_head * (c_s * projected + features * ipa.num_channel)
