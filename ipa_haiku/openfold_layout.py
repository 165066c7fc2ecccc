"""Keys and shapes of the module's parameters in OpenFold and what shares its names."""

from collections.abc import Set
from typing import Literal

import numpy as np

from ipa_haiku.parameter_shapes import ANY_SIZES, Variant, shapes_of

Layout = Literal["openfold", "esmfold", "unifold", "ibex"]

# OpenFold's names of our projections.
_LINEAR: dict[str, str] = {
    "/q_scalar": "linear_q",
    "/kv_scalar": "linear_kv",
    "/q_point_local": "linear_q_points",
    "/kv_point_local": "linear_kv_points",
    "/q_scalar_projection": "linear_q",
    "/k_scalar_projection": "linear_k",
    "/v_scalar_projection": "linear_v",
    "/q_point_projection/point_projection": "linear_q_points",
    "/k_point_projection/point_projection": "linear_k_points",
    "/v_point_projection/point_projection": "linear_v_points",
    "/attention_2d": "linear_b",
    "/output_projection": "linear_out",
}
KINDS: tuple[tuple[Variant, Layout], ...] = (
    ("monomer", "openfold"),
    ("monomer", "esmfold"),
    ("multimer", "openfold"),
    ("multimer", "unifold"),
    ("monomer", "ibex"),
)
# What has no bias in Ibex.
_UNBIASED = {"linear_q", "linear_kv", "linear_q_points", "linear_kv_points", "linear_b"}


def kind_of(keys: Set[str], start: str) -> tuple[Variant, Layout]:
    """The kind of module that has most of these keys, and of those the one that lacks fewest."""

    def fit(kind: tuple[Variant, Layout]) -> tuple[int, int]:
        expected = keys_of(*kind, start).values()
        return len(keys & set(expected)), -len(expected)

    return max(KINDS, key=fit)


def keys_of(variant: Variant, layout: Layout, start: str) -> dict[str, str]:
    """Our keys of all parameters that the layout has, and its own."""
    names = {}
    for key in shapes_of(variant, ANY_SIZES):
        child, _, name = key.partition("//")
        linear = _LINEAR.get(child, "")
        if layout == "ibex" and name == "bias" and linear in _UNBIASED:
            continue
        if layout == "openfold" and linear.endswith("_points"):
            linear += ".linear"
        name = {"weights": "weight"}.get(name, name)
        names[key] = start + (f"{linear}.{name}" if child else "head_weights")
    return names


def from_linear(x: np.ndarray, name: str, shape: tuple[int, ...], num_head: int) -> np.ndarray:
    """Our layout of [outputs, inputs] or [outputs]: transposed, outputs by head if `shape` is."""
    rank = 2 if name.endswith(".weight") else 1
    if x.ndim != rank:
        raise ValueError(f"{name} must have {rank} dimensions, got shape {x.shape}.")
    *inputs, outputs = x.T.shape
    if len(shape) == rank:
        return np.array(x.T, order="C")
    if outputs % num_head:
        raise ValueError(f"{name} must have outputs for {num_head} heads, got shape {x.shape}.")
    return np.array(x.T.reshape(*inputs, num_head, -1), order="C")


def to_linear(x: np.ndarray, key: str) -> np.ndarray:
    """The inverse of `from_linear`."""
    inputs = x.shape[: key.endswith("//weights")]
    return np.array(x.reshape(*inputs, -1).T, order="C")
