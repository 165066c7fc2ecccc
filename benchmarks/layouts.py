"""One set of weights in the layouts of all implementations, so that their outputs can be compared.

Every layout here is a permutation of the monomer's parameters [F = features of the output
projection], transposed for PyTorch. Some parametrisations have no bias where the monomer has one:
those biases are dropped, which changes nothing because they are zero initially. As all maps are
permutations, they turn gradients into gradients, too.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Model

_SCOPE = "invariant_point_attention"


def _split_points(weights: Any, num_head: int) -> Any:
    """[C_s, 3*H*P], all x before all y before all z, to [C_s, H, P, 3]."""
    by_axis = weights.reshape(weights.shape[0], 3, num_head, -1)
    return by_axis.transpose(0, 2, 3, 1)


def to_multimer(parameters: Any, model: Model) -> dict[str, dict[str, Any]]:
    """The monomer's Haiku parameters as those of the multimer."""
    ipa, scope = model.ipa, _SCOPE
    q = parameters[f"{scope}/q_scalar"]["weights"].reshape(-1, ipa.num_head, ipa.num_scalar_qk)
    kv = parameters[f"{scope}/kv_scalar"]["weights"].reshape(q.shape[0], ipa.num_head, -1)
    scalars = {
        "q": q,
        "k": kv[..., : ipa.num_scalar_qk],
        "v": kv[..., ipa.num_scalar_qk :],
    }
    multimer = {
        f"{scope}/{name}_scalar_projection": {"weights": weights}
        for name, weights in scalars.items()
    }

    def points(name: str) -> dict[str, Any]:
        """[C_s, H, P, 3] and [H, P, 3]."""
        linear = parameters[f"{scope}/{name}"]
        bias = _split_points(linear["bias"][None], ipa.num_head)[0]
        return {"weights": _split_points(linear["weights"], ipa.num_head), "bias": bias}

    q_point, kv_point = points("q_point_local"), points("kv_point_local")
    per_query_or_key = {
        "q": q_point,
        "k": {leaf: x[..., : ipa.num_point_qk, :] for leaf, x in kv_point.items()},
        "v": {leaf: x[..., ipa.num_point_qk :, :] for leaf, x in kv_point.items()},
    }
    for name, linear in per_query_or_key.items():
        # Inside each head all x come before all y before all z.
        multimer[f"{scope}/{name}_point_projection/point_projection"] = {
            leaf: jnp.moveaxis(x, -1, -2).reshape(*x.shape[:-2], -1) for leaf, x in linear.items()
        }
    for name in (scope, f"{scope}/attention_2d", f"{scope}/output_projection"):
        multimer[name] = parameters[name]
    return multimer


def to_openfold(parameters: Any, points_suffix: str = "") -> dict[str, np.ndarray]:
    """The monomer's Haiku parameters as the state of OpenFold's module and its descendants.

    Args:
      parameters: of the monomer.
      points_suffix: what newer versions put after the names of the point projections.
    """
    names = {
        "linear_q": "q_scalar",
        "linear_kv": "kv_scalar",
        f"linear_q_points{points_suffix}": "q_point_local",
        f"linear_kv_points{points_suffix}": "kv_point_local",
        "linear_b": "attention_2d",
        "linear_out": "output_projection",
    }
    state = {"head_weights": np.asarray(parameters[_SCOPE]["trainable_point_weights"])}
    for name, haiku_name in names.items():
        linear = parameters[f"{_SCOPE}/{haiku_name}"]
        state[f"{name}.weight"] = np.asarray(linear["weights"]).T
        state[f"{name}.bias"] = np.asarray(linear["bias"])
    return state


def to_lucidrains(parameters: Any, model: Model) -> dict[str, np.ndarray]:
    """The monomer's Haiku parameters as the state of lucidrains' module."""
    ipa, h = model.ipa, model.ipa.num_head
    weights = {
        name: np.asarray(parameters[f"{_SCOPE}/{name}"]["weights"])
        for name in ("q_scalar", "kv_scalar", "q_point_local", "kv_point_local", "attention_2d")
    }
    kv = weights["kv_scalar"].reshape(model.single_channel, h, -1)
    kv_points = _split_points(weights["kv_point_local"], h)
    projections = {
        "to_scalar_q": weights["q_scalar"],
        "to_scalar_k": kv[..., : ipa.num_scalar_qk],
        "to_scalar_v": kv[..., ipa.num_scalar_qk :],
        "to_point_q": _split_points(weights["q_point_local"], h),
        "to_point_k": kv_points[:, :, : ipa.num_point_qk],
        "to_point_v": kv_points[:, :, ipa.num_point_qk :],
        "to_pairwise_attn_bias.0": weights["attention_2d"],
        "to_out": _interleave_points(parameters[f"{_SCOPE}/output_projection"]["weights"], model),
    }
    state = {f"{name}.weight": w.reshape(w.shape[0], -1).T for name, w in projections.items()}
    for name, haiku_name in (
        ("to_pairwise_attn_bias.0", "attention_2d"),
        ("to_out", "output_projection"),
    ):
        state[f"{name}.bias"] = np.asarray(parameters[f"{_SCOPE}/{haiku_name}"]["bias"])
    state["point_weights"] = np.asarray(parameters[_SCOPE]["trainable_point_weights"])
    return state


def _interleave_points(weights: Any, model: Model) -> np.ndarray:
    """Reorders the rows [F, C_out] of the points from [3, H, Pv] to [H, Pv, 3]."""
    ipa = model.ipa
    num_scalar, num_point = ipa.num_head * ipa.num_scalar_v, 3 * ipa.num_head * ipa.num_point_v
    scalar, points, rest = np.split(np.asarray(weights), [num_scalar, num_scalar + num_point])
    by_axis = points.reshape(3, ipa.num_head, ipa.num_point_v, -1)
    return np.concatenate([scalar, by_axis.transpose(1, 2, 0, 3).reshape(points.shape), rest])
