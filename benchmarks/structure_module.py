"""AF2's own structure module (`folding.generate_affines`) with any attention module in it."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from alphafold.model import config as af2_config
from alphafold.model import folding, prng

from benchmarks.cases import Model
from benchmarks.problems import GLOBAL_CONFIG

NUM_AMINO_ACIDS = 20


@functools.cache
def _config(model: Model) -> Any:
    """AF2's configuration of the structure module, with the sizes of `model`."""
    config = af2_config.model_config("model_1").model.heads.structure_module
    for name, size in vars(model.ipa).items():
        config[name] = size
    config.num_layer = model.num_layer
    config.position_scale = model.position_scale
    return config


def _transformed(model: Model) -> hk.Transformed:
    def call(x: dict[str, Any]) -> dict[str, jax.Array]:
        output = folding.generate_affines(
            representations={name: x[name] for name in ("single", "pair")},
            batch={name: x[name] for name in ("seq_mask", "aatype")},
            config=_config(model),
            global_config=GLOBAL_CONFIG,
            is_training=False,
            safe_key=prng.SafeKey(jax.random.key(0)),  # for dropout, which is off
        )
        return {"act": output["act"], "affine": output["affine"]}

    return hk.transform(call)


def initial_parameters(model: Model, representations: dict[str, jax.Array]) -> hk.Params:
    """Parameters as AF2 initialises them, for the representations of one residue."""
    batch = {"seq_mask": jnp.ones(1), "aatype": jnp.zeros(1, jnp.int32)}
    return _transformed(model).init(jax.random.key(0), representations | batch)


def away_from_kinks(parameters: hk.Params) -> hk.Params:
    """Parameters with which the transition's ReLUs get inputs of about +1 or -1, by channel.

    With random ones some inputs are within 1e-7 of 0 in a chain of 256 residues: float32 and
    float64 then see different sides of a ReLU, where the gradient jumps by up to 5e-2 of its
    largest element, and its error says nothing.
    """
    result = dict(parameters)
    for name in parameters:
        if name.endswith(("/transition", "/transition_1")):
            weights, bias = (parameters[name][leaf] for leaf in ("weights", "bias"))
            signs = jnp.where(jnp.arange(len(bias)) % 2, 1, -1).astype(bias.dtype)
            result[name] = {"weights": 0.1 * weights, "bias": signs}
    return result


def forward(
    model: Model,
    attention: Callable[[], contextlib.AbstractContextManager[Any]],
    x: dict[str, Any],
) -> dict[str, jax.Array]:
    """Runs AF2's structure module in the context `attention`, which may put another module in it.

    Returns:
      The final activations "act" [N, num_channel] and the frames of all layers "affine"
      [num_layer, N, 7].
    """
    with attention():
        return _transformed(model).apply(x["parameters"], None, x)
