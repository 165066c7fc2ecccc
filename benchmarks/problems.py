"""Random inputs and weights of what is measured, fresh normal numbers, and the loss."""

import functools
import operator
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Model
from ipa_haiku import FactorizedPair, InvariantPointAttention, QuatAffine
from ipa_haiku.attention.types import LogitScales
from ipa_haiku.testing import random_frames

# Weights of the output are drawn, too: AF2's initial zeros would let XLA and the error do nothing.
GLOBAL_CONFIG = types.SimpleNamespace(zero_init=False, deterministic=True)

LOSS = "squared distance"  # what results call `squared_distance`


class Problem(NamedTuple):
    """Arguments of a computation, a pytree."""

    differentiable: dict[str, Any]  # pytrees by name; the gradient has the same names
    constant: dict[str, Any]  # pytrees by name that have no gradient
    target: Any  # of the result, random: the loss is the squared distance to it


def squared_distance(output: Any, target: Any) -> jax.Array:
    """The loss: sum of (output - target)² over all arrays, in float32 at least.

    Its gradient waits for the output, as that of a model's loss does; that of a loss linear in the
    output would not, and leaves out of the forward pass what only the output needs.
    """

    def of_array(x: jax.Array, y: jax.Array) -> jax.Array:
        dtype = jnp.result_type(jnp.float32, x)
        return jnp.sum(jnp.square(x.astype(dtype) - y.astype(dtype)))

    return jax.tree.reduce(operator.add, jax.tree.map(of_array, output, target))


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


def core_scales(model: Model) -> LogitScales:
    """The monomer's factors of the logit terms (Suppl. Alg. 22, line 7)."""
    return LogitScales(scalar=(3 * model.ipa.num_scalar_qk) ** -0.5, pair=3**-0.5)


def _core(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> Problem:
    ipa, keys = model.ipa, jax.random.split(key, 3)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)

    def points(count: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, ipa.num_head, count, 3), jnp.float32)

    scalar_qk, scalar_v = ((n, ipa.num_head, c) for c in (ipa.num_scalar_qk, ipa.num_scalar_v))
    differentiable, target = _normals(
        (
            {
                "q_scalar": array(scalar_qk),
                "k_scalar": array(scalar_qk),
                "v_scalar": array(scalar_v),
                "q_point": points(ipa.num_point_qk),
                "k_point": points(ipa.num_point_qk),
                "v_point": points(ipa.num_point_v),
                # Together, as the bias's gradient is zero but for rounding: softmax cancels it.
                "weights": {
                    "pair_weights": array((model.pair_channel, ipa.num_head)),
                    "pair_bias": array((ipa.num_head,)),
                },
            },
            {
                "scalar": array(scalar_v),
                "point": points(ipa.num_point_v),
                "pair": array((n, ipa.num_head, model.pair_channel)),
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
    return Problem(differentiable, {"q_mask": jnp.ones(n), "k_mask": jnp.ones(n)}, target)


def _normals(shapes: Any, key: jax.Array) -> Any:
    """Normal numbers for a pytree of shapes and dtypes, all from one draw.

    XLA compiles each draw anew: 16 of them take seven times as long to compile as this.
    """
    leaves, structure = jax.tree.flatten(shapes)
    ends = np.cumsum([x.size for x in leaves])
    parts = jnp.split(jax.random.normal(key, (ends[-1],)), ends[:-1])
    arrays = [part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, leaves)]
    return jax.tree.unflatten(structure, arrays)


def _weights(initial: hk.Params, normals: hk.Params) -> hk.Params:
    """AF2's initial weights, but from normal numbers that are not cut off: those given."""

    def leaf(x: jax.Array, normal: jax.Array) -> jax.Array:
        return normal / len(x) ** 0.5 if x.ndim > 1 else x

    return jax.tree.map(leaf, initial, normals)


def _pair(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> jax.Array | FactorizedPair:
    """The pair representation of `model.pair_rank`; its elements have variance 1."""
    if not model.pair_rank:
        return jax.random.normal(key, (n, n, model.pair_channel), dtype)
    shape = (2, n, model.pair_rank, model.pair_channel)
    left, right = jax.random.normal(key, shape, dtype)
    return FactorizedPair(left / model.pair_rank**0.5, right)


def _module(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> Problem:
    def call(inputs_1d: jax.Array, inputs_2d: jax.Array) -> Any:
        module = InvariantPointAttention(model.ipa, GLOBAL_CONFIG, implementation="reference")
        return module(inputs_1d, inputs_2d, jnp.ones((1, 1)), QuatAffine.identity(1))

    keys = jax.random.split(key, 3)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    initial = hk.transform(call).init(key, *_one_residue(model, dtype).values())
    shapes = (initial, array((n, model.single_channel)), array((n, model.ipa.num_channel)))
    normals, inputs_1d, target = _normals(shapes, keys[0])
    differentiable = {
        "parameters": _weights(initial, normals),
        "inputs_1d": inputs_1d,
        "inputs_2d": _pair(model, n, dtype, keys[1]),
        "affine": random_frames(keys[2], n, position_scale=model.position_scale).to_tensor(),
    }
    return Problem(differentiable, {"mask": jnp.ones((n, 1))}, target)


def _one_residue(model: Model, dtype: jnp.dtype) -> dict[str, jax.Array]:
    """Inputs to initialise parameters with: none depends on N."""
    single = jnp.zeros((1, model.single_channel), dtype)
    return {"single": single, "pair": jnp.zeros((1, 1, model.pair_channel), dtype)}


def _structure_module(model: Model, n: int, dtype: jnp.dtype, key: jax.Array) -> Problem:
    from benchmarks import structure_module  # imports alphafold

    keys = jax.random.split(key)
    array = functools.partial(jax.ShapeDtypeStruct, dtype=dtype)
    initial = structure_module.initial_parameters(model, _one_residue(model, dtype))
    representations = {
        "single": array((n, model.single_channel)),
        "pair": array((n, n, model.pair_channel)),
    }
    target = {
        "act": array((n, model.ipa.num_channel)),
        "affine": jax.ShapeDtypeStruct((model.num_layer, n, 7), jnp.float32),
    }
    normals, representations, target = _normals((initial, representations, target), keys[0])
    parameters = structure_module.away_from_kinks(_weights(initial, normals))
    aatype = jax.random.randint(keys[1], (n,), 0, structure_module.NUM_AMINO_ACIDS)
    constant = {"seq_mask": jnp.ones(n), "aatype": aatype}
    return Problem({"parameters": parameters, **representations}, constant, target)
