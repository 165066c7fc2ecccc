"""The layout of OmegaFold."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_haiku.layouts.separate import SeparateLayout, read, write
from ipa_haiku.weights import Params, ParamsLike

_OMEGAFOLD = SeparateLayout(
    code="OmegaFold",
    point_weights="trainable_point_weights",
    q_scalar="q_scalar",
    k_scalar="k_scalar",
    v_scalar="v_scalar",
    q_point="q_point",
    k_point="k_point",
    v_point="v_point",
    attention_2d="bias_2d",
    output_projection="output_projection",
)


def from_omegafold(
    state_dict: Mapping[str, Any],
    prefix: str | None = None,
    *,
    name: str = "invariant_point_attention",
) -> Params:
    """Converts the tensors of OmegaFold to the monomer's parameters.

    The monomer with these parameters and `dist_epsilon=0` gives OmegaFold's outputs for all
    residues that are not masked. OmegaFold masks keys only, so those of masked residues, too, are
    such as from a mask of ones for queries: `q_mask` of `ipa_haiku.invariant_point_attention`.
    Its norm has no epsilon: the gradient is not finite where a point is at the origin of a frame.
    The default, 1e-8, adds at most 5e-9 / norm to a norm. Translations are in nm, which are AF2's
    units of 10 A.

    Args:
      state_dict: of the module or of a whole model; arrays of NumPy, JAX or torch:
        `trainable_point_weights` [H], and `.weight` and `.bias` of `q_scalar`, `k_scalar`
        [H*C, C_s], `v_scalar` [H*Cv, C_s], `q_point`, `k_point` [H*P*3, C_s], `v_point`
        [H*Pv*3, C_s], `bias_2d` [H, C_z], `output_projection` [C_s, H*(Cv+4*Pv+C_z)].
      prefix: of the module's keys, such as `omega_fold_cycle.structure_module.cycles.0.ipa`; None
        means the only place with `trainable_point_weights`.
      name: scope of the module in the result.

    Returns:
      The parameters of the monomer.

    Raises:
      KeyError: if there is no such module, or naming what is missing or superfluous in it.
      TypeError: naming a tensor that NumPy cannot hold, such as one of torch's bfloat16.
      ValueError: naming what has a wrong shape or dtype, or if the state dict is nested.
    """
    return read(_OMEGAFOLD, state_dict, prefix, name)


def to_omegafold(
    params: ParamsLike, scope: str | None = None, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Converts the monomer's parameters to a state dict: the inverse of `from_omegafold`.

    Args:
      params: Haiku parameters of a model, or of the module alone.
      scope: of the module in `params`; None means the only one there is.
      prefix: of the keys of the result.

    Returns:
      A state dict of NumPy arrays.

    Raises:
      KeyError: as in `weights.extract_module`.
      ValueError: likewise, of the multimer, or if there are not as many outputs as channels of
        inputs_1d.
    """
    return write(_OMEGAFOLD, params, scope, prefix)
