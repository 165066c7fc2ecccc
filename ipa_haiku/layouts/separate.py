"""Layouts with a projection each for queries, keys and values, and with points of [H, P, 3].

AF2's monomer projects keys and values at once, head by head, and its points are [3, H, P], both in
the projections and in the features of the output. All else is equal but names and a transposition.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ipa_haiku.config import IPAConfig
from ipa_haiku.layouts.common import to_arrays, to_params
from ipa_haiku.parameter_shapes import (
    ANY_SIZES,
    POINT_WEIGHTS,
    Sizes,
    check_keys,
    check_ranks,
    check_shapes,
    check_zero,
)
from ipa_haiku.state_dict import start_of, take_module
from ipa_haiku.weights import Params, ParamsLike

_OURS = (
    "q_scalar", "kv_scalar", "q_point_local", "kv_point_local", "attention_2d", "output_projection",
)  # fmt: skip
_LEAVES = {"weights": "weight", "bias": "bias"}  # our names and theirs


class SeparateLayout(NamedTuple):
    """Names of the projections and which of them have no bias."""

    code: str  # whose it is
    point_weights: str
    q_scalar: str
    k_scalar: str
    v_scalar: str
    q_point: str
    k_point: str
    v_point: str
    attention_2d: str
    output_projection: str
    unbiased: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Names of all projections."""
        return (
            self.q_scalar, self.k_scalar, self.v_scalar, self.q_point, self.k_point, self.v_point,
            self.attention_2d, self.output_projection,
        )  # fmt: skip


def read(
    layout: SeparateLayout, tensors: Mapping[str, Any], prefix: str | None, name: str
) -> Params:
    """The monomer's parameters from a state dict; arguments and errors as in `from_lucidrains`."""
    start, theirs = take_module(tensors, prefix, layout.point_weights)
    names = _shapes(layout, ANY_SIZES, start)
    check_keys(theirs.keys(), names.keys())
    check_ranks(theirs, names, str)
    sizes = _sizes(layout, theirs, start)
    check_shapes(theirs, _shapes(layout, sizes, start), str)

    num_head = sizes.config.num_head
    ours = {POINT_WEIGHTS: theirs[start + layout.point_weights]}
    for linear in layout.unbiased:
        weight = theirs[f"{start}{linear}.weight"]
        theirs[f"{start}{linear}.bias"] = np.zeros(len(weight), weight.dtype)
    for leaf, suffix in _LEAVES.items():
        split = {linear: theirs[f"{start}{linear}.{suffix}"].T for linear in layout.linears}
        joined = _join(layout, split, num_head)
        if leaf == "weights":
            joined["output_projection"] = _output_to_ours(joined["output_projection"], sizes)
        ours |= {f"/{child}//{leaf}": x for child, x in joined.items()}
    return to_params(ours, name)


def write(
    layout: SeparateLayout, params: ParamsLike, scope: str | None, prefix: str
) -> dict[str, np.ndarray]:
    """The inverse of `read`; arguments and errors as in `to_lucidrains`."""
    arrays, sizes = to_arrays(params, scope)
    config = sizes.config
    if config.num_channel != sizes.num_single:
        raise ValueError(
            f"{layout.code}'s outputs have as many channels as inputs_1d, got {config.num_channel} "
            f"and {sizes.num_single}."
        )
    theirs = {layout.point_weights: arrays[POINT_WEIGHTS]}
    for leaf, suffix in _LEAVES.items():
        joined = {child: arrays[f"/{child}//{leaf}"] for child in _OURS}
        split = _split(layout, joined, config)
        if leaf == "weights":
            output = layout.output_projection
            split[output] = _output_to_theirs(split[output], sizes)
        theirs |= {f"{linear}.{suffix}": x.T for linear, x in split.items()}
    absent = {f"{linear}.bias" for linear in layout.unbiased}
    check_zero(theirs, absent, lambda key: f"{layout.code}'s {key}")
    start = start_of(prefix)
    return {
        key: np.array(theirs[key.removeprefix(start)], order="C")
        for key in _shapes(layout, sizes, start)
    }


def _shapes(layout: SeparateLayout, sizes: Sizes, start: str) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a module; its outputs have as many channels as its inputs."""
    c, c_s, c_z = sizes.config, sizes.num_single, sizes.num_pair
    h = c.num_head
    linears = {
        layout.q_scalar: (h * c.num_scalar_qk, c_s),
        layout.k_scalar: (h * c.num_scalar_qk, c_s),
        layout.v_scalar: (h * c.num_scalar_v, c_s),
        layout.q_point: (h * c.num_point_qk * 3, c_s),
        layout.k_point: (h * c.num_point_qk * 3, c_s),
        layout.v_point: (h * c.num_point_v * 3, c_s),
        layout.attention_2d: (h, c_z),
        layout.output_projection: (c_s, h * (c.num_scalar_v + 4 * c.num_point_v + c_z)),
    }
    shapes: dict[str, tuple[int, ...]] = {start + layout.point_weights: (h,)}
    for linear, shape in linears.items():
        shapes[f"{start}{linear}.weight"] = shape
        if linear not in layout.unbiased:
            shapes[f"{start}{linear}.bias"] = shape[:1]
    return shapes


def _sizes(layout: SeparateLayout, theirs: Mapping[str, np.ndarray], start: str) -> Sizes:
    """The sizes of a module of which the shapes fit together, and something for any other."""

    def shape(linear: str) -> tuple[int, ...]:
        return theirs[f"{start}{linear}.weight"].shape

    # None at all is refused for its shape.
    h = max(len(theirs[start + layout.point_weights]), 1)
    scalars, num_single = shape(layout.q_scalar)
    config = IPAConfig(
        num_head=h,
        num_scalar_qk=max(scalars // h, 1),
        num_scalar_v=max(shape(layout.v_scalar)[0] // h, 1),
        num_point_qk=max(shape(layout.q_point)[0] // (3 * h), 1),
        num_point_v=max(shape(layout.v_point)[0] // (3 * h), 1),
        num_channel=max(num_single, 1),
    )
    return Sizes(max(num_single, 1), max(shape(layout.attention_2d)[1], 1), config)


# --- from their arrays to ours and back: weights [inputs, outputs] or biases [outputs] ------------


def _join(
    layout: SeparateLayout, split: Mapping[str, np.ndarray], num_head: int
) -> dict[str, np.ndarray]:
    """Our projections by name, from theirs."""

    def scalar(linear: str) -> np.ndarray:  # [..., H, C]
        x = split[linear]
        return x.reshape(*x.shape[:-1], num_head, -1)

    def point(linear: str) -> np.ndarray:  # [..., 3, H, P]
        x = split[linear]
        return np.moveaxis(x.reshape(*x.shape[:-1], num_head, -1, 3), -1, -3)

    k_v = np.concatenate([scalar(layout.k_scalar), scalar(layout.v_scalar)], axis=-1)
    k_v_point = np.concatenate([point(layout.k_point), point(layout.v_point)], axis=-1)
    return {
        "q_scalar": split[layout.q_scalar],
        "kv_scalar": _flat(k_v, 2),
        "q_point_local": _flat(point(layout.q_point), 3),
        "kv_point_local": _flat(k_v_point, 3),
        "attention_2d": split[layout.attention_2d],
        "output_projection": split[layout.output_projection],
    }


def _split(
    layout: SeparateLayout, joined: Mapping[str, np.ndarray], config: IPAConfig
) -> dict[str, np.ndarray]:
    """Their projections by name, from ours: the inverse of `_join`."""

    def by_head(child: str, *axes: int) -> np.ndarray:
        x = joined[child]
        return x.reshape(*x.shape[:-1], *axes, config.num_head, -1)

    def interleaved(x: np.ndarray) -> np.ndarray:  # [..., 3, H, P] to [..., H*P*3]
        return _flat(np.moveaxis(x, -3, -1), 3)

    k, v = np.split(by_head("kv_scalar"), [config.num_scalar_qk], axis=-1)
    k_point, v_point = np.split(by_head("kv_point_local", 3), [config.num_point_qk], axis=-1)
    return {
        layout.q_scalar: joined["q_scalar"],
        layout.k_scalar: _flat(k, 2),
        layout.v_scalar: _flat(v, 2),
        layout.q_point: interleaved(by_head("q_point_local", 3)),
        layout.k_point: interleaved(k_point),
        layout.v_point: interleaved(v_point),
        layout.attention_2d: joined["attention_2d"],
        layout.output_projection: joined["output_projection"],
    }


def _flat(x: np.ndarray, num_axes: int) -> np.ndarray:
    """The last axes as one."""
    return x.reshape(*x.shape[:-num_axes], -1)


def _output_to_ours(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Rows of the output projection: those of points from [H, Pv, 3] to [3, H, Pv]."""
    scalar, point, rest = _by_feature(x, sizes)
    h, pv = sizes.config.num_head, sizes.config.num_point_v
    point = point.reshape(h, pv, 3, -1).transpose(2, 0, 1, 3).reshape(point.shape)
    return np.concatenate([scalar, point, rest])


def _output_to_theirs(x: np.ndarray, sizes: Sizes) -> np.ndarray:
    """The inverse of `_output_to_ours`."""
    scalar, point, rest = _by_feature(x, sizes)
    h, pv = sizes.config.num_head, sizes.config.num_point_v
    point = point.reshape(3, h, pv, -1).transpose(1, 2, 0, 3).reshape(point.shape)
    return np.concatenate([scalar, point, rest])


def _by_feature(x: np.ndarray, sizes: Sizes) -> list[np.ndarray]:
    """Rows of scalars, of points, and of norms and pairs."""
    c = sizes.config
    num_scalar = c.num_head * c.num_scalar_v
    return np.split(x, [num_scalar, num_scalar + 3 * c.num_head * c.num_point_v])
