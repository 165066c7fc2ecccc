"""The layout of FrameDiff, FrameFlow, FoldFlow and MultiFlow."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ipa_haiku.openfold_layout import keys_of
from ipa_haiku.parameter_shapes import check_keys, check_ranks, check_shapes
from ipa_haiku.state_dict import take_module
from ipa_haiku.weights import Params, from_openfold

# A projection that FrameDiff and FoldFlow keep and do not use.
_UNUSED = ("linear_rbf.weight", "linear_rbf.bias")
_PAIR = ("down_z.weight", "down_z.bias", "linear_b.weight")


def from_framediff(
    state_dict: Mapping[str, Any],
    prefix: str | None = None,
    *,
    name: str = "invariant_point_attention",
) -> Params:
    """Converts the tensors of FrameDiff, FrameFlow, FoldFlow or MultiFlow to the monomer's.

    There the pair values are D z + d (`down_z`, a quarter of the channels), where AF2's are z. As
    the attention weights of a row sum to 1, masked rows too, sum_j a_ij (D z_ij + d) is
    D sum_j a_ij z_ij + d: D and d go into the output projection, each head's pair rows becoming
    W @ D and its bias gaining the sum over heads of W @ d. The outputs are those of that module,
    with 2.6 times fewer multiplications per pair at its sizes. The fold has no inverse, so there is
    no `to_framediff`, and `down_z` is not to be trained apart from it. It is computed in float64,
    and rounded once to the dtype of `linear_out`.

    FrameDiff's translations are multiplied by 0.1, which makes AF2's units of 10 A of A. What
    MultiFlow may do in training (dropout of attention weights) or after the softmax (its
    `attention_mask`) is not in the parameters.

    Args:
      state_dict: of the module or of a whole model; arrays of NumPy, JAX or torch, under the keys
        of OpenFold 1 and `down_z.weight` [C_z/4, C_z], `down_z.bias` [C_z/4]. An unused
        `linear_rbf` is left out.
      prefix: of the module's keys, such as `score_model.trunk.ipa_0`; None means the only place
        with `head_weights`.
      name: scope of the module in the result.

    Returns:
      The parameters of the monomer.

    Raises:
      KeyError: if there is no such module, or naming what is missing or superfluous in it.
      TypeError: naming a tensor that NumPy cannot hold, such as one of torch's bfloat16.
      ValueError: naming what has a wrong shape or dtype, or if the state dict is nested.
    """
    start, theirs = take_module(state_dict, prefix, "head_weights")
    theirs = {key: x for key, x in theirs.items() if key.removeprefix(start) not in _UNUSED}
    weight_key, bias_key, pair_key = (f"{start}{key}" for key in _PAIR)
    check_keys(
        theirs.keys(), {*keys_of("monomer", "esmfold", start).values(), weight_key, bias_key}
    )
    ranks = {weight_key: (1, 1), bias_key: (1,), pair_key: (1, 1)}
    check_ranks({key: theirs[key] for key in ranks}, ranks, str)
    num_head, num_pair = theirs[f"{start}head_weights"].size, theirs[pair_key].shape[1]
    shapes = {weight_key: (len(theirs[bias_key]), num_pair), pair_key: (num_head, num_pair)}
    check_shapes({key: theirs[key] for key in shapes}, shapes, str)
    weight, bias, pair = (theirs.pop(key) for key in ranks)

    # As if D z + d were the pair activations, AF2's module has all but the pair bias.
    stand_in = np.zeros((num_head, len(bias)), pair.dtype)
    params = from_openfold(theirs | {pair_key: stand_in}, start, name=name)
    params[f"{name}/attention_2d"]["weights"] = np.array(pair.T, order="C")
    params[f"{name}/output_projection"] = _fold(
        params[f"{name}/output_projection"], weight, bias, num_head
    )
    return params


def _fold(
    output: Mapping[str, np.ndarray], weight: np.ndarray, bias: np.ndarray, num_head: int
) -> dict[str, np.ndarray]:
    """The output projection of z from that of D z + d, D [c, C_z] the weight and d [c] the bias."""
    weights, output_bias = output["weights"], output["bias"]
    rest, pair = np.split(weights, [len(weights) - num_head * len(bias)])
    pair, weight, bias = (x.astype(np.float64) for x in (pair, weight, bias))
    pair = pair.reshape(num_head, len(bias), -1)
    folded = np.einsum("dz,hdc->hzc", weight, pair).reshape(-1, weights.shape[1])
    return {
        "weights": np.concatenate([rest, folded.astype(weights.dtype)]),
        "bias": (output_bias + np.einsum("d,hdc->c", bias, pair)).astype(output_bias.dtype),
    }
