"""AF2's own structure module (`folding.generate_affines`) with any attention module in it."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
from alphafold.model import config as af2_config
from alphafold.model import folding, prng

from benchmarks.cases import Model
from benchmarks.problems import GLOBAL_CONFIG

NUM_AMINO_ACIDS = 20


@contextlib.contextmanager
def _attention_in_alphafold(attention: Callable[..., Any]) -> Iterator[None]:
    original = folding.InvariantPointAttention
    folding.InvariantPointAttention = attention
    try:
        yield
    finally:
        folding.InvariantPointAttention = original


@functools.cache
def _config(model: Model) -> Any:
    """AF2's configuration of the structure module, with the sizes of `model`."""
    config = af2_config.model_config("model_1").model.heads.structure_module
    for name, size in vars(model.ipa).items():
        config[name] = size
    config.num_layer = model.num_layer
    config.position_scale = model.position_scale
    return config


def _generate_affines(
    model: Model, representations: dict[str, jax.Array], batch: dict[str, jax.Array]
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


def parameters(model: Model, dtype: jnp.dtype, key: jax.Array) -> hk.Params:
    """Initial parameters of AF2's structure module for activations of type `dtype`."""
    single = jnp.zeros((1, model.single_channel), dtype)
    pair = jnp.zeros((1, 1, model.pair_channel), dtype)
    batch = {"seq_mask": jnp.ones(1), "aatype": jnp.zeros(1, jnp.int32)}
    transformed = hk.transform(functools.partial(_generate_affines, model))
    return transformed.init(key, {"single": single, "pair": pair}, batch)


def forward(
    model: Model,
    attention: Callable[..., Any],
    differentiable: dict[str, Any],
    constant: dict[str, Any],
) -> dict[str, jax.Array]:
    """Runs AF2's structure module with the class `attention` as its attention.

    Returns:
      The final activations "act" [N, num_channel] and the frames of all layers "affine"
      [num_layer, N, 7].
    """
    representations = {name: differentiable[name] for name in ("single", "pair")}
    transformed = hk.transform(functools.partial(_generate_affines, model))
    with _attention_in_alphafold(attention):
        return transformed.apply(differentiable["parameters"], None, representations, constant)
