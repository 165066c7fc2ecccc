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
from benchmarks.problems import GLOBAL_CONFIG, redrawn

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
    def call(
        representations: dict[str, jax.Array], batch: dict[str, jax.Array]
    ) -> dict[str, jax.Array]:
        output = folding.generate_affines(
            representations=representations,
            batch=batch,
            config=_config(model),
            global_config=GLOBAL_CONFIG,
            is_training=False,
            safe_key=prng.SafeKey(jax.random.key(0)),  # for dropout, which is off
        )
        return {"act": output["act"], "affine": output["affine"]}

    return hk.transform(call)


def parameters(model: Model, dtype: jnp.dtype, key: jax.Array) -> hk.Params:
    """Random parameters of AF2's structure module for activations of type `dtype`.

    Its ReLUs get inputs of about +1 or -1, by channel. Those of a fresh module come as near to 0 as
    1e-7 in a chain of 256 residues: float32 and float64 then see different sides of a ReLU, where
    the gradient jumps by up to 5e-2 of its largest element, and its error says nothing.
    """
    single = jnp.zeros((1, model.single_channel), dtype)
    pair = jnp.zeros((1, 1, model.pair_channel), dtype)
    batch = {"seq_mask": jnp.ones(1), "aatype": jnp.zeros(1, jnp.int32)}
    initial = _transformed(model).init(key, {"single": single, "pair": pair}, batch)
    drawn = redrawn(initial, key)
    for name in [name for name in drawn if name.endswith(("/transition", "/transition_1"))]:
        bias = jnp.where(jnp.arange(len(drawn[name]["bias"])) % 2, 1, -1).astype(dtype)
        drawn[name] = {"weights": 0.1 * drawn[name]["weights"], "bias": bias}
    return drawn


def forward(
    model: Model,
    attention: Callable[[], contextlib.AbstractContextManager[Any]],
    differentiable: dict[str, Any],
    constant: dict[str, Any],
) -> dict[str, jax.Array]:
    """Runs AF2's structure module in the context `attention`, which may put another module in it.

    Returns:
      The final activations "act" [N, num_channel] and the frames of all layers "affine"
      [num_layer, N, 7].
    """
    representations = {name: differentiable[name] for name in ("single", "pair")}
    with attention():
        return _transformed(model).apply(
            differentiable["parameters"], None, representations, constant
        )
