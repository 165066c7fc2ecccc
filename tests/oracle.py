"""Suppl. Alg. 22 once more, in NumPy and float64, sharing nothing with the package.

Index letters: i queries, j keys, h heads, c channels, p points, x components of a vector.
"""

import numpy as np


def rotation_matrix(quaternion):
    """Rotations [..., 3, 3] of unit quaternions [..., 4], real part first."""
    w, x, y, z = np.moveaxis(np.asarray(quaternion, np.float64), -1, 0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.stack([np.stack(row, axis=-1) for row in rows], axis=-2)


def softmax(logits):
    """Along the last axis."""
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


def attend(inputs, scales):
    """The core without batch dimensions: `IPAInputs` and `LogitScales` to a dict of arrays."""
    x = type(inputs)(*(np.asarray(a, np.float64) for a in inputs if a is not None))
    difference = x.q_point[:, None] - x.k_point[None]  # [i, j, h, p, x]
    terms = {
        "scalar_logits": scales.scalar * np.einsum("ihc,jhc->hij", x.q_scalar, x.k_scalar),
        "point_logits": -0.5 * np.einsum("h,ijhpx->hij", x.point_weights, difference**2),
        "pair_logits": scales.pair * np.moveaxis(x.inputs_2d @ x.pair_weights + x.pair_bias, -1, 0),
    }
    terms = {name: scales.total * term for name, term in terms.items()}
    masked = 1 - np.outer(x.q_mask, x.k_mask)
    weights = softmax(sum(terms.values()) - scales.total * 1e5 * masked)  # [h, i, j]
    return {
        "scalar": np.einsum("hij,jhc->ihc", weights, x.v_scalar),
        "point": np.einsum("hij,jhpx->ihpx", weights, x.v_point),
        "pair": np.einsum("hij,ijc->ihc", weights, x.inputs_2d),
        "weights": weights,
        **terms,
    }


def monomer(params, config, inputs_1d, inputs_2d, mask, affine):
    """The whole monomer module, from its Haiku parameters and `affine` [N, 7], to [N, channels]."""
    params = {
        scope.removeprefix("invariant_point_attention").removeprefix("/"): {
            name: np.asarray(x, np.float64) for name, x in arrays.items()
        }
        for scope, arrays in params.items()
    }
    single, pair, mask, affine = (
        np.asarray(x, np.float64) for x in (inputs_1d, inputs_2d, mask, affine)
    )
    c, n = config, len(single)
    rotation, translation = rotation_matrix(affine[:, :4]), affine[:, 4:]

    def linear(scope, x):
        return x @ params[scope]["weights"] + params[scope]["bias"]

    def global_points(scope):  # channels are x, y, z, each with heads and points inside
        local = linear(scope, single).reshape(n, 3, c.num_head, -1)
        return np.einsum("iyx,ixhp->ihpy", rotation, local) + translation[:, None, None]

    # Lines 1 to 3.
    q = linear("q_scalar", single).reshape(n, c.num_head, -1)
    kv = linear("kv_scalar", single).reshape(n, c.num_head, -1)
    k, v = np.split(kv, [c.num_scalar_qk], axis=-1)
    q_point, kv_point = global_points("q_point_local"), global_points("kv_point_local")
    k_point, v_point = np.split(kv_point, [c.num_point_qk], axis=2)

    # Line 7. Softplus; w_L w_C = sqrt(1/3) sqrt(2 / 9P).
    gamma = np.log1p(np.exp(params[""]["trainable_point_weights"]))
    point_weights = gamma * np.sqrt(1 / 3) * np.sqrt(2 / (9 * c.num_point_qk))
    difference = q_point[:, None] - k_point[None]
    logits = (
        np.sqrt(1 / 3) / np.sqrt(c.num_scalar_qk) * np.einsum("ihc,jhc->hij", q, k)
        + np.sqrt(1 / 3) * np.moveaxis(linear("attention_2d", pair), -1, 0)
        - 0.5 * np.einsum("h,ijhpx->hij", point_weights, difference**2)
        - 1e5 * (1 - mask * mask.T)
    )
    weights = softmax(logits)

    # Lines 8 to 11.
    point = np.einsum("hij,jhpx->ihpx", weights, v_point) - translation[:, None, None]
    point = np.einsum("iyx,ihpy->xihp", rotation, point)
    features = [
        np.einsum("hij,jhc->ihc", weights, v),
        *point,
        np.sqrt(1e-8 + np.sum(point**2, axis=0)),
        np.einsum("hij,ijc->ihc", weights, pair),
    ]
    return linear("output_projection", np.concatenate([x.reshape(n, -1) for x in features], -1))
