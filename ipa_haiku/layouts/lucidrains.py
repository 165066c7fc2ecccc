"""The layout of lucidrains' invariant-point-attention, which IgFold has too."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_haiku.layouts.separate import SeparateLayout, read, write
from ipa_haiku.weights import Params, ParamsLike

_LUCIDRAINS = SeparateLayout(
    code="lucidrains",
    point_weights="point_weights",
    q_scalar="to_scalar_q",
    k_scalar="to_scalar_k",
    v_scalar="to_scalar_v",
    q_point="to_point_q",
    k_point="to_point_k",
    v_point="to_point_v",
    attention_2d="to_pairwise_attn_bias.0",
    output_projection="to_out",
    unbiased=tuple(f"to_{kind}_{x}" for kind in ("scalar", "point") for x in "qkv"),
)


def from_lucidrains(
    state_dict: Mapping[str, Any],
    prefix: str | None = None,
    *,
    name: str = "invariant_point_attention",
) -> Params:
    """Converts the tensors of invariant-point-attention, or of IgFold, to the monomer's parameters.

    The monomer with these parameters gives the outputs of that module, from frames with its
    rotations transposed, as it multiplies row vectors (p @ R) and AF2 column vectors (R @ p):
    `(rotations.swapaxes(-1, -2), translations)`. Residues that its mask leaves out get another
    output: the mean over all residues there, what the logits say here. The scales of the logits
    and 1e-8 in the norm are the same.

    Args:
      state_dict: of the module or of a whole model; arrays of NumPy, JAX or torch:
        `point_weights` [H], `to_scalar_{q,k}.weight` [H*C, C_s], `to_scalar_v.weight` [H*Cv, C_s],
        `to_point_{q,k}.weight` [H*P*3, C_s], `to_point_v.weight` [H*Pv*3, C_s],
        `to_pairwise_attn_bias.0.weight` [H, C_z] and `.bias`, `to_out.weight`
        [C_s, H*(Cv+4*Pv+C_z)] and `.bias`. A module without pairs divides its logits by 2 where AF2
        divides by 3 and is refused, as its `to_pairwise_attn_bias` is missing.
      prefix: of the module's keys, such as `structure_ipa.layers.0.0.attn`; None means the only
        place with `point_weights`.
      name: scope of the module in the result.

    Returns:
      The parameters of the monomer; what has no bias there has one of zeros.

    Raises:
      KeyError: if there is no such module, or naming what is missing or superfluous in it.
      TypeError: naming a tensor that NumPy cannot hold, such as one of torch's bfloat16.
      ValueError: naming what has a wrong shape or dtype, or if the state dict is nested.
    """
    return read(_LUCIDRAINS, state_dict, prefix, name)


def to_lucidrains(
    params: ParamsLike, scope: str | None = None, *, prefix: str = ""
) -> dict[str, np.ndarray]:
    """Converts the monomer's parameters to a state dict: the inverse of `from_lucidrains`.

    Args:
      params: Haiku parameters of a model, or of the module alone.
      scope: of the module in `params`; None means the only one there is.
      prefix: of the keys of the result.

    Returns:
      A state dict of NumPy arrays.

    Raises:
      KeyError: as in `weights.extract_module`.
      ValueError: likewise, of the multimer, if there are not as many outputs as channels of
        inputs_1d, or naming a bias that is not zero where the layout has none.
    """
    return write(_LUCIDRAINS, params, scope, prefix)
