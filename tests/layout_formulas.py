"""Invariant Point Attention as other code bases write it, in NumPy and float64, and their tensors.

Each formula is made of that code base's own tensors `t` under its own names and shares nothing with
the package. Index letters: i queries, j keys, h heads, c channels, p points, x and y components.
Arguments: single [N, C_s], pair [N, N, C_z], mask [N], rotation [N, 3, 3], translation [N, 3].
"""

from typing import NamedTuple

import numpy as np
from oracle import rotation_matrix, softmax


class Sizes(NamedTuple):
    single: int
    pair: int
    head: int
    scalar_qk: int
    scalar_v: int
    point_qk: int
    point_v: int


AF2_SIZES = Sizes(384, 128, 12, 16, 16, 4, 8)
FRAMEDIFF_SIZES = Sizes(256, 128, 8, 256, 256, 8, 12)
IGFOLD_SIZES = Sizes(64, 64, 8, 16, 16, 4, 4)
# No two numbers are alike, nor like 3, 7 residues or a quarter of the pair channels.
ODD_SIZES = Sizes(single=9, pair=34, head=5, scalar_qk=4, scalar_v=10, point_qk=2, point_v=6)


def make_inputs(s, mask):
    """Random single, pair, rotation and translation, with this mask [N]."""
    rng, n = np.random.default_rng(1), len(mask)
    quaternion = rng.normal(size=(n, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    single, pair = rng.normal(size=(n, s.single)), rng.normal(size=(n, n, s.pair))
    return single, pair, mask, rotation_matrix(quaternion), rng.normal(size=(n, 3))


def linear(t, name, x):
    y = x @ t[f"{name}.weight"].T
    return y + t[f"{name}.bias"] if f"{name}.bias" in t else y


def squared_distances(q, k):  # [i, h, p, x] and [j, h, p, x] to [h, i, j]
    return np.sum((q[:, None] - k[None]) ** 2, axis=(-1, -2)).transpose(2, 0, 1)


def softplus(x):
    return np.log1p(np.exp(x))


# --- OpenFold, ESMFold, Genie, Ibex; Uni-Fold; FrameDiff, FrameFlow, FoldFlow, MultiFlow ----------


def openfold(t, s, single, pair, mask, rotation, translation, *, multimer=False, eps=1e-8):
    n = len(single)

    def scalar(name):
        return linear(t, name, single).reshape(n, s.head, -1)

    def point(name):
        x = linear(t, name, single)
        if multimer:
            x = x.reshape(n, s.head, -1)
        x = np.stack(np.split(x, 3, axis=-1), axis=-1).reshape(n, -1, 3)
        x = np.einsum("nyx,nkx->nky", rotation, x) + translation[:, None]
        return x.reshape(n, s.head, -1, 3)

    if multimer:
        k, v, k_point, v_point = (*map(scalar, ("linear_k", "linear_v")),
                                  *map(point, ("linear_k_points", "linear_v_points")))  # fmt: skip
    else:
        k, v = np.split(scalar("linear_kv"), 2, axis=-1)
        k_point, v_point = np.split(point("linear_kv_points"), [s.point_qk], axis=2)
    head_weights = softplus(t["head_weights"]) * np.sqrt(1 / (3 * (s.point_qk * 9 / 2)))
    a = np.sqrt(1 / (3 * s.scalar_qk)) * np.einsum("ihc,jhc->hij", scalar("linear_q"), k)
    a += np.sqrt(1 / 3) * linear(t, "linear_b", pair).transpose(2, 0, 1)
    a -= 0.5 * head_weights[:, None, None] * squared_distances(point("linear_q_points"), k_point)
    a = softmax(a + 1e5 * (mask[:, None] * mask[None] - 1))

    o_point = np.einsum("hij,jhpx->ihpx", a, v_point) - translation[:, None, None]
    o_point = np.einsum("iyx,ihpy->ihpx", rotation, o_point)
    values = linear(t, "down_z", pair) if "down_z.weight" in t else pair
    features = [
        np.einsum("hij,jhc->ihc", a, v),
        *np.moveaxis(o_point, -1, 0),
        np.sqrt(np.sum(o_point**2, axis=-1) + eps),
        np.einsum("hij,ijc->ihc", a, values),
    ]
    return linear(t, "linear_out", np.concatenate([x.reshape(n, -1) for x in features], axis=-1))


def unifold_multimer(*arguments):
    return openfold(*arguments, multimer=True, eps=1e-12)


def openfold_shapes(s, *, down=None, biases="all"):
    h, c, p, pv = s.head, s.scalar_qk, s.point_qk, s.point_v
    linears = {
        "linear_q": (h * c, s.single),
        "linear_kv": (2 * h * c, s.single),
        "linear_q_points": (3 * h * p, s.single),
        "linear_kv_points": (3 * h * (p + pv), s.single),
        "linear_b": (h, s.pair),
    }
    if down:
        linears["down_z"] = (down, s.pair)
    linears["linear_out"] = (s.single, h * (c + 4 * pv + (down or s.pair)))
    absent = set() if biases == "all" else linears.keys() - {"linear_out"}
    return _shapes(linears, {"head_weights": (h,)}, absent)


def ibex_shapes(s):
    return openfold_shapes(s, biases="out")


def framediff_shapes(s):
    rbf = {"linear_rbf.weight": (1, 20), "linear_rbf.bias": (1,)}
    return openfold_shapes(s, down=s.pair // 4) | rbf


def frameflow_shapes(s):
    return openfold_shapes(s, down=s.pair // 4)


def unifold_multimer_shapes(s):
    h, c, p, pv = s.head, s.scalar_qk, s.point_qk, s.point_v
    linears = {f"linear_{x}": (h * c, s.single) for x in "qkv"}
    linears |= {f"linear_{x}_points": (3 * h * p, s.single) for x in "qk"}
    linears["linear_v_points"] = (3 * h * pv, s.single)
    linears["linear_b"] = (h, s.pair)
    linears["linear_out"] = (s.single, h * (c + 4 * pv + s.pair))
    return _shapes(linears, {"head_weights": (h,)}, {"linear_q", "linear_k", "linear_v"})


# --- lucidrains' invariant-point-attention and IgFold ---------------------------------------------


def lucidrains(t, s, single, pair, mask, rotation, translation):
    """The rotations are such as act on row vectors."""
    n = len(single)

    def scalar(x):
        return (single @ t[f"to_scalar_{x}.weight"].T).reshape(n, s.head, -1)

    def point(x):
        local = (single @ t[f"to_point_{x}.weight"].T).reshape(n, s.head, -1, 3)
        return local @ rotation[:, None] + translation[:, None, None]

    scale = (3 * s.point_qk * (9 / 2)) ** -0.5 * softplus(t["point_weights"])
    logits = (3 * s.scalar_qk) ** -0.5 * np.einsum("ihc,jhc->hij", scalar("q"), scalar("k"))
    logits += 3**-0.5 * linear(t, "to_pairwise_attn_bias.0", pair).transpose(2, 0, 1)
    logits -= 0.5 * scale[:, None, None] * squared_distances(point("q"), point("k"))
    attended = np.logical_and.outer(mask > 0, mask > 0)
    attention = softmax(np.where(attended, logits, -np.finfo(np.float64).max))

    points = np.einsum("hij,jhpx->ihpx", attention, point("v")) - translation[:, None, None]
    points = points @ rotation.transpose(0, 2, 1)[:, None]
    results = [
        np.einsum("hij,jhc->ihc", attention, scalar("v")),
        points,
        np.sqrt(np.sum(points**2, axis=-1) + 1e-8),
        np.einsum("hij,ijc->ihc", attention, pair),
    ]
    return linear(t, "to_out", np.concatenate([x.reshape(n, -1) for x in results], axis=-1))


def lucidrains_shapes(s):
    h = s.head
    linears = {
        "to_scalar_q": (h * s.scalar_qk, s.single),
        "to_scalar_k": (h * s.scalar_qk, s.single),
        "to_scalar_v": (h * s.scalar_v, s.single),
        "to_point_q": (h * s.point_qk * 3, s.single),
        "to_point_k": (h * s.point_qk * 3, s.single),
        "to_point_v": (h * s.point_v * 3, s.single),
    }
    absent = set(linears)
    linears["to_pairwise_attn_bias.0"] = (h, s.pair)
    linears["to_out"] = (s.single, h * (s.scalar_v + s.pair + 4 * s.point_v))
    return _shapes(linears, {"point_weights": (h,)}, absent)


# --- OmegaFold ------------------------------------------------------------------------------------


def omegafold(t, s, single, pair, mask, rotation, translation):
    n = len(single)

    def scalar(name):
        return linear(t, name, single).reshape(n, s.head, -1)

    def point(name):
        local = linear(t, name, single).reshape(n, s.head, -1, 3)
        return np.einsum("nyx,nhpx->nhpy", rotation, local) + translation[:, None, None]

    logits = np.einsum("ihc,jhc->ijh", scalar("q_scalar"), scalar("k_scalar"))
    logits *= np.sqrt(1 / (3 * s.scalar_qk))
    logits += linear(t, "bias_2d", pair) * np.sqrt(1 / 3)
    distances = squared_distances(point("q_point"), point("k_point")).transpose(1, 2, 0)
    weights = softplus(t["trainable_point_weights"]) / 2
    logits -= np.sqrt(1 / (3 * s.point_qk * 9 / 2)) * weights * distances
    logits += 1e9 * (mask[None, :, None] - 1)  # keys only
    attention = np.moveaxis(softmax(np.moveaxis(logits, 1, -1)), -1, 1)  # [i, j, h]

    points = np.einsum("ijh,jhpx->ihpx", attention, point("v_point")) - translation[:, None, None]
    points = np.einsum("iyx,ihpy->ihpx", rotation, points)
    features = [
        np.einsum("ijh,jhc->ihc", attention, scalar("v_scalar")),
        points,
        np.linalg.norm(points, axis=-1),
        np.einsum("ijh,ijc->ihc", attention, pair),
    ]
    features = np.concatenate([x.reshape(n, -1) for x in features], axis=-1)
    return linear(t, "output_projection", features)


def omegafold_shapes(s):
    h = s.head
    linears = {
        "q_scalar": (h * s.scalar_qk, s.single),
        "k_scalar": (h * s.scalar_qk, s.single),
        "v_scalar": (h * s.scalar_v, s.single),
        "q_point": (h * 3 * s.point_qk, s.single),
        "k_point": (h * 3 * s.point_qk, s.single),
        "v_point": (h * 3 * s.point_v, s.single),
        "bias_2d": (h, s.pair),
        "output_projection": (s.single, h * (s.pair + s.scalar_v + 4 * s.point_v)),
    }
    return _shapes(linears, {"trainable_point_weights": (h,)})


# --- HelixFold ------------------------------------------------------------------------------------


def helixfold(t, s, single, pair, mask, rotation, translation):
    n = len(single)

    def paddle_linear(name, x):  # weights are [inputs, outputs]
        return x @ t[f"{name}.weight"] + t[f"{name}.bias"]

    def point(name):  # three of [N, H, P]
        x, y, z = np.split(paddle_linear(name, single), 3, axis=-1)
        rows = [r[:, 0, None] * x + r[:, 1, None] * y + r[:, 2, None] * z
                for r in np.moveaxis(rotation, 1, 0)]  # fmt: skip
        return [(a + translation[:, d, None]).reshape(n, s.head, -1) for d, a in enumerate(rows)]

    q = paddle_linear("q_scalar", single).reshape(n, s.head, -1)
    kv = paddle_linear("kv_scalar", single).reshape(n, s.head, -1)
    k, v = kv[..., : s.scalar_qk], kv[..., s.scalar_qk :]
    q_point, kv_point = point("q_point_local"), point("kv_point_local")
    squares = sum((a[:, None] - b[None, ..., : s.point_qk]) ** 2 for a, b in zip(q_point, kv_point))
    weights = np.sqrt(1 / (3 * s.point_qk * 9 / 2)) * softplus(t["trainable_point_weights"])
    logits = np.einsum("ihc,jhc->hij", np.sqrt(1 / (3 * s.scalar_qk)) * q, k)
    logits -= 0.5 * np.einsum("h,ijhp->hij", weights, squares)
    logits += np.sqrt(1 / 3) * np.moveaxis(paddle_linear("attention_2d", pair), -1, 0)
    attention = softmax(logits - 1e5 * (1 - mask[:, None] * mask[None]))

    moved = [
        np.einsum("hij,jhp->ihp", attention, a[..., s.point_qk :]) - translation[:, d, None, None]
        for d, a in enumerate(kv_point)
    ]
    local = [sum(rotation[:, y, x, None, None] * moved[y] for y in range(3)) for x in range(3)]
    features = [
        np.einsum("hij,jhc->ihc", attention, v),
        *local,
        np.sqrt(1e-8 + sum(a**2 for a in local)),
        np.einsum("hij,ijc->ihc", attention, pair),
    ]
    features = np.concatenate([x.reshape(n, -1) for x in features], axis=-1)
    return paddle_linear("output_projection", features)


def helixfold_shapes(s):
    h = s.head
    linears = {
        "q_scalar": (s.single, h * s.scalar_qk),
        "kv_scalar": (s.single, h * (s.scalar_qk + s.scalar_v)),
        "q_point_local": (s.single, h * 3 * s.point_qk),
        "kv_point_local": (s.single, h * 3 * (s.point_qk + s.point_v)),
        "attention_2d": (s.pair, h),
        "output_projection": (h * (s.scalar_v + 4 * s.point_v + s.pair), s.single),
    }
    biases = {f"{name}.bias": shape[1:] for name, shape in linears.items()}
    weights = {f"{name}.weight": shape for name, shape in linears.items()}
    return {"trainable_point_weights": (h,), **weights, **biases}


def _shapes(linears, others, without_bias=()):
    biased = [name for name in linears if name not in without_bias]
    return {
        **others,
        **{f"{name}.weight": shape for name, shape in linears.items()},
        **{f"{name}.bias": linears[name][:1] for name in biased},
    }


def draw(shapes, seed, dtype="float64"):
    """Random tensors of these shapes; weights have fan-in scaling, as if [outputs, inputs]."""
    rng = np.random.default_rng(seed)

    def normal(shape):
        return rng.normal(size=shape) / (shape[-1] ** 0.5 if len(shape) > 1 else 1)

    return {key: normal(shape).astype(dtype) for key, shape in shapes.items()}
