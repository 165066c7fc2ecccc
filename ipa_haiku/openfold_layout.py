"""Keys and shapes of the module's parameters in OpenFold and ESMFold."""

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ipa_haiku.parameter_shapes import ANY_SIZES, Variant, shapes_of

Layout = Literal["openfold", "esmfold"]

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
)


def find_prefix(tensors: Mapping[str, Any]) -> str:
    """What comes before `head_weights`, of which there is to be one.

    Raises:
      KeyError: if there is none, or more than one.
    """
    keys = [key for key in tensors if key.rpartition(".")[2] == "head_weights"]
    if len(keys) != 1:
        raise KeyError(f"one key head_weights expected, found {keys}")
    return keys[0].removesuffix("head_weights")


def start_of(prefix: str) -> str:
    """What keys begin with, for a `prefix` with or without a dot at its end."""
    return f"{prefix.removesuffix('.')}." if prefix else ""


def keys_of(variant: Variant, layout: Layout, start: str) -> dict[str, str]:
    """Our keys of all parameters and OpenFold's."""
    names = {}
    for key in shapes_of(variant, ANY_SIZES):
        child, _, name = key.partition("//")
        linear = _LINEAR.get(child, "")
        if layout == "openfold" and linear.endswith("_points"):
            linear += ".linear"
        name = {"weights": "weight"}.get(name, name)
        names[key] = start + (f"{linear}.{name}" if child else "head_weights")
    return names


def to_numpy(key: str, tensor: Any) -> np.ndarray:
    """An array of NumPy, JAX or torch as NumPy's.

    Raises:
      TypeError: naming the key, if NumPy cannot hold it.
    """
    try:
        if hasattr(tensor, "detach"):  # torch's, on any device
            tensor = tensor.detach().cpu().numpy()
        return np.asarray(tensor)
    except TypeError as error:
        raise TypeError(f"{key}: {error}") from error


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
    """The inverse of `_from_linear`."""
    inputs = x.shape[: key.endswith("//weights")]
    return np.array(x.reshape(*inputs, -1).T, order="C")
