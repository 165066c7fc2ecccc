"""The layout of HelixFold: AF2's names, and weights [inputs, outputs] as Paddle keeps them."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_haiku.layouts.common import to_arrays, to_params
from ipa_haiku.parameter_shapes import ANY_SIZES, check_keys, check_module, shapes_of
from ipa_haiku.state_dict import start_of, take_module
from ipa_haiku.weights import Params, ParamsLike


def from_helixfold(
    state_dict: Mapping[str, Any],
    prefix: str | None = None,
    *,
    name: str = "invariant_point_attention",
) -> Params:
    """Converts the tensors of HelixFold to the monomer's parameters, which change only their names.

    Args:
      state_dict: of the module or of a whole model; arrays of NumPy or JAX, or tensors:
        `trainable_point_weights` [H], and `.weight` [inputs, outputs] and `.bias` of `q_scalar`,
        `kv_scalar`, `q_point_local`, `kv_point_local`, `attention_2d`, `output_projection`.
      prefix: of the module's keys; None means the only place with `trainable_point_weights`.
      name: scope of the module in the result.

    Returns:
      The parameters of the monomer.

    Raises:
      KeyError: if there is no such module, or naming what is missing or superfluous in it.
      TypeError: naming a tensor that NumPy cannot hold.
      ValueError: naming what has a wrong shape or dtype, or if the state dict is nested.
    """
    start, theirs = take_module(state_dict, prefix, "trainable_point_weights")
    names = _names(start)
    check_keys(theirs.keys(), set(names.values()))
    module = {key: theirs[names[key]] for key in names}
    check_module(module, names.__getitem__)
    return to_params(module, name)


def to_helixfold(
    params: ParamsLike, scope: str | None = None, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Converts the monomer's parameters to a state dict: the inverse of `from_helixfold`.

    Args:
      params: Haiku parameters of a model, or of the module alone.
      scope: of the module in `params`; None means the only one there is.
      prefix: of the keys of the result.

    Returns:
      A state dict of NumPy arrays.

    Raises:
      KeyError: as in `weights.extract_module`.
      ValueError: likewise, or of the multimer.
    """
    arrays, _ = to_arrays(params, scope)
    names = _names(start_of(prefix))
    return {theirs: np.array(arrays[key], order="C") for key, theirs in names.items()}


def _names(start: str) -> dict[str, str]:
    """Our keys of all parameters and theirs."""
    names = {}
    for key in shapes_of("monomer", ANY_SIZES):
        child, _, leaf = key.removeprefix("/").partition("//")
        leaf = {"weights": "weight"}.get(leaf, leaf)
        names[key] = start + (f"{child}.{leaf}" if leaf else child.removeprefix("/"))
    return names
