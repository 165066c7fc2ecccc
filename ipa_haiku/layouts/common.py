"""The monomer's parameters under keys such as `/q_scalar//weights`, and back."""

from collections.abc import Mapping

import numpy as np

from ipa_haiku import weights
from ipa_haiku.parameter_shapes import Sizes

_SCOPE = "module"


def to_arrays(params: weights.ParamsLike, scope: str | None) -> tuple[dict[str, np.ndarray], Sizes]:
    """The arrays of the monomer's module at a scope, by key, and its sizes.

    Raises:
      KeyError: as in `weights.extract_module`.
      ValueError: likewise, or of the multimer.
    """
    module = weights.extract_module(params, scope, name=_SCOPE, variant="monomer")
    arrays = {
        f"{child.removeprefix(_SCOPE)}//{leaf}": x
        for child, leaves in module.items()
        for leaf, x in leaves.items()
    }
    num_single, num_pair = (len(arrays[f"/{x}//weights"]) for x in ("q_scalar", "attention_2d"))
    return arrays, Sizes(num_single, num_pair, weights.config_of(module))


def to_params(arrays: Mapping[str, np.ndarray], name: str) -> weights.Params:
    """Haiku parameters of the module of that name, copies of the arrays."""
    params: weights.Params = {}
    for key, x in arrays.items():
        child, _, leaf = key.partition("//")
        params.setdefault(name + child, {})[leaf] = np.array(x, order="C")
    return params
