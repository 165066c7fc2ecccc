"""Random inputs and weights of what is measured: fresh normal numbers, never zeros."""

import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Model
from ipa_haiku import FactorizedPair, InvariantPointAttention, QuatAffine
from ipa_haiku.attention.base import LogitScales
from ipa_haiku.testing import random_frames

# Weights of the output are drawn, too: AF2's initial zeros would let XLA and the error do nothing.
GLOBAL_CONFIG = types.SimpleNamespace(zero_init=False, deterministic=True)


class Problem(NamedTuple):
    """Arguments of a computation, a pytree.

    Attributes:
      differentiable: pytrees by name; the gradient has the same names.
      constant: pytrees by name that have no gradient.
      cotangent: of the result, random: the gradient is that of <cotangent, result>.
    """

    differentiable: dict[str, Any]
    constant: dict[str, Any]
    cotangent: Any


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def make_problem(what: str, model: Model, n: int, dtype: str, key: jax.Array) -> Problem:
    """Draws the inputs of `what` (of `cases.WHATS`) for N = `n` residues.

    Activations and weights are of type `dtype`, frames, masks and point weights float32. Weights
    are in the layout of AF2's monomer whatever the model.
    """
    makers: dict[str, Callable[..., Problem]] = {
        "core": _core,
        "module": _module,
        "structure_module": _structure_module,
    }
    return makers[what](model, n, jnp.dtype(dtype), key)


def _core(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> Problem:
    ipa, keys = model.ipa, jax.random.split(key, 3)

    def array(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    def points(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, ipa.num_head, count, 3), jnp.float32)

    head_and_qk = (n, ipa.num_head, ipa.num_scalar_qk)
    differentiable, cotangent = _normals(
        (
            {
                "q_scalar": array(*head_and_qk),
                "k_scalar": array(*head_and_qk),
                "v_scalar": array(n, ipa.num_head, ipa.num_scalar_v),
                "q_point": points(ipa.num_point_qk),
                "k_point": points(ipa.num_point_qk),
                "v_point": points(ipa.num_point_v),
                # Together, as the bias's gradient is zero but for rounding: softmax cancels it.
                "weights": {
                    "pair_weights": array(model.pair_channel, ipa.num_head),
                    "pair_bias": array(ipa.num_head),
                },
            },
            {
                "scalar": array(n, ipa.num_head, ipa.num_scalar_v),
                "point": points(ipa.num_point_v),
                "pair": array(n, ipa.num_head, model.pair_channel),
            },
        ),
        keys[0],
    )
    frames = random_frames(keys[1], n, position_scale=model.position_scale)
    for name in ("q_point", "k_point", "v_point"):
        components = [differentiable[name][..., i] for i in range(3)]
        moved = frames.apply_to_point(components, extra_dims=2)
        differentiable[name] = jnp.stack(moved, axis=-1)
    differentiable["inputs_2d"] = _pair(model, n, dtype, keys[2])
    weights = differentiable["weights"]
    weights["pair_weights"] /= model.pair_channel**0.5
    # The monomer's scale of squared distances (Suppl. Alg. 22, line 7) at softplus(w) = 1.
    weights["point_weights"] = jnp.full(ipa.num_head, (3 * ipa.num_point_qk * 4.5) ** -0.5)
    return Problem(differentiable, {"mask": jnp.ones(n)}, cotangent)


def _normals(shapes: Any, key: jax.Array) -> Any:
    """Normal numbers for a pytree of shapes and dtypes, all from one draw.

    XLA compiles each draw anew: 16 of them take seven times as long to compile as this.
    """
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([x.size for x in leaves])
    parts = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    arrays = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, leaves)]
    return jax.tree.unflatten(structure, arrays)


def _pair(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> jax.Array | FactorizedPair:
    """The pair representation of `model.pair_rank`; its elements have variance 1."""
    if not model.pair_rank:
        return jax.random.normal(key, (n, n, model.pair_channel), dtype)
    shape = (2, n, model.pair_rank, model.pair_channel)
    left, right = jax.random.normal(key, shape, dtype)
    return FactorizedPair(left / model.pair_rank**0.5, right)


def core_scales(model: Model) -> LogitScales:
    """The monomer's factors of the logit terms (Suppl. Alg. 22, line 7)."""
    return LogitScales(scalar=(3 * model.ipa.num_scalar_qk) ** -0.5, pair=3**-0.5)


def _module(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> Problem:
    keys = jax.random.split(key, 4)
    inputs_1d, cotangent = _normals(
        (
            jax.ShapeDtypeStruct((n, model.single_channel), dtype),
            jax.ShapeDtypeStruct((n, model.ipa.num_channel), dtype),
        ),
        keys[0],
    )
    frames = random_frames(keys[1], n, position_scale=model.position_scale)
    differentiable = {
        "parameters": module_parameters(model, dtype, keys[2]),
        "inputs_1d": inputs_1d,
        "inputs_2d": _pair(model, n, dtype, keys[3]),
        "affine": frames.to_tensor(),
    }
    return Problem(differentiable, {"mask": jnp.ones((n, 1))}, cotangent)


def module_parameters(model: Model, dtype: jnp.dtype, key: jax.Array) -> hk.Params:
    """Parameters of the monomer module for activations of type `dtype`.

    As AF2 initialises them, but that normal numbers are not cut off: all weights are one draw.
    """

    def call(inputs_1d: jax.Array, inputs_2d: jax.Array) -> Any:
        module = InvariantPointAttention(model.ipa, GLOBAL_CONFIG, implementation="reference")
        return module(inputs_1d, inputs_2d, jnp.ones((1, 1)), QuatAffine.identity(1))

    # One residue is enough: no parameter depends on N.
    inputs_1d = jnp.zeros((1, model.single_channel), dtype)
    inputs_2d = jnp.zeros((1, 1, model.pair_channel), dtype)
    initial = hk.transform(call).init(key, inputs_1d, inputs_2d)
    return jax.tree.map(
        lambda x, normal: normal / len(x) ** 0.5 if x.ndim > 1 else x,
        initial,
        _normals(initial, key),
    )


def _structure_module(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> Problem:
    from benchmarks import structure_module  # imports alphafold

    keys = jax.random.split(key, 6)
    differentiable = {
        "parameters": structure_module.parameters(model, dtype, keys[0]),
        "single": jax.random.normal(keys[1], (n, model.single_channel), dtype),
        "pair": jax.random.normal(keys[2], (n, n, model.pair_channel), dtype),
    }
    constant = {
        "seq_mask": jnp.ones(n),
        "aatype": jax.random.randint(keys[3], (n,), 0, structure_module.NUM_AMINO_ACIDS),
    }
    cotangent = {
        "act": jax.random.normal(keys[4], (n, model.ipa.num_channel), dtype),
        "affine": jax.random.normal(keys[5], (model.num_layer, n, 7)),
    }
    return Problem(differentiable, constant, cotangent)
