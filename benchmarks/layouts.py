"""One set of weights in the layouts of all implementations, so that their outputs can be compared.

Every layout is a permutation of the monomer's parameters [F = features of the output projection],
transposed for PyTorch; OpenFold's is `ipa_haiku.weights.to_openfold`. Some have no bias where the
monomer has one: it is dropped, which changes nothing because it is zero initially. As all maps are
permutations, they turn gradients into gradients, too.
"""

from typing import Any

import numpy as np

from benchmarks.cases import Model

_SCOPE = "invariant_point_attention"


def to_multimer(parameters: Any, model: Model) -> dict[str, dict[str, Any]]:
    """The monomer's Haiku parameters as those of the multimer."""
    ipa = model.ipa

    def by_head(name: str, leaf: str, *axes: int) -> Any:
        """Weights or biases of a projection, [..., *axes, H, channels]."""
        x = parameters[f"{_SCOPE}/{name}"][leaf]
        return x.reshape(*x.shape[:-1], *axes, ipa.num_head, -1)

    def of_q_k_v(q: Any, kv: Any, num_qk: int) -> dict[str, Any]:
        return {"q": q, "k": kv[..., :num_qk], "v": kv[..., num_qk:]}

    q, kv = (by_head(name, "weights") for name in ("q_scalar", "kv_scalar"))
    multimer = {
        f"{_SCOPE}/{x}_scalar_projection": {"weights": weights}
        for x, weights in of_q_k_v(q, kv, ipa.num_scalar_qk).items()
    }
    for leaf in ("weights", "bias"):
        q, kv = (by_head(name, leaf, 3) for name in ("q_point_local", "kv_point_local"))
        for x, array in of_q_k_v(q, kv, ipa.num_point_qk).items():
            # Inside each head all x come before all y before all z.
            heads_first = array.swapaxes(-3, -2)  # [..., H, 3, P]
            linear = multimer.setdefault(f"{_SCOPE}/{x}_point_projection/point_projection", {})
            linear[leaf] = heads_first.reshape(*heads_first.shape[:-2], -1)
    unchanged = (_SCOPE, f"{_SCOPE}/attention_2d", f"{_SCOPE}/output_projection")
    return multimer | {name: parameters[name] for name in unchanged}


def to_lucidrains(parameters: Any, model: Model) -> dict[str, np.ndarray]:
    """The monomer's Haiku parameters as the state of lucidrains' module."""
    multimer = to_multimer(parameters, model)

    def array(name: str, leaf: str = "weights") -> np.ndarray:
        return np.asarray(multimer[f"{_SCOPE}/{name}"][leaf])

    outputs = {"to_pairwise_attn_bias.0": "attention_2d", "to_out": "output_projection"}
    weights = {name: array(haiku_name) for name, haiku_name in outputs.items()}
    weights["to_out"] = _interleave_points(weights["to_out"], model)
    for x in "qkv":
        weights[f"to_scalar_{x}"] = array(f"{x}_scalar_projection")
        points = array(f"{x}_point_projection/point_projection")  # [C_s, H, 3*P]
        by_axis = points.reshape(*points.shape[:2], 3, -1)
        weights[f"to_point_{x}"] = by_axis.swapaxes(-1, -2)  # [C_s, H, P, 3]
    return {
        "point_weights": np.asarray(multimer[_SCOPE]["trainable_point_weights"]),
        **{f"{name}.weight": w.reshape(len(w), -1).T for name, w in weights.items()},
        **{f"{name}.bias": array(haiku_name, "bias") for name, haiku_name in outputs.items()},
    }


def _interleave_points(weights: np.ndarray, model: Model) -> np.ndarray:
    """Reorders the rows [F, C_out] of the points from [3, H, Pv] to [H, Pv, 3]."""
    ipa = model.ipa
    num_scalar, num_point = ipa.num_head * ipa.num_scalar_v, 3 * ipa.num_head * ipa.num_point_v
    scalar, points, rest = np.split(weights, [num_scalar, num_scalar + num_point])
    by_axis = points.reshape(3, ipa.num_head, ipa.num_point_v, -1)
    return np.concatenate([scalar, by_axis.transpose(1, 2, 0, 3).reshape(points.shape), rest])
