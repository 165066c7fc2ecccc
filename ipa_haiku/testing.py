"""Assertions for users' own modules: SE(3) invariance, gradients, float32 error budgets.

Errors are those of whole arrays, relative to the whole array compared with: single elements near
zero have no relative accuracy to promise.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku.quat_affine import QuatAffine, quat_to_rot, rot_list_to_tensor

# Å between the alpha carbons of neighbouring residues, set by the planar trans peptide bond.
CA_DISTANCE = 3.8

FLOAT32_EPS = float(np.finfo(np.float32).eps)


def random_rotation(key: jax.Array, shape: Sequence[int] = ()) -> jax.Array:
    """Draws rotation matrices uniformly from all rotations.

    Args:
      key: a JAX random key.
      shape: how many to draw.

    Returns:
      Rotations [*shape, 3, 3] in JAX's default floating-point type.
    """
    quaternion = jax.random.normal(key, (*shape, 4))  # isotropic, so its direction is uniform
    quaternion /= jnp.linalg.norm(quaternion, axis=-1, keepdims=True)
    return rot_list_to_tensor(quat_to_rot(quaternion))


def random_frames(
    key: jax.Array,
    num_residues: int,
    batch_shape: Sequence[int] = (),
    *,
    position_scale: float = 10.0,
) -> QuatAffine:
    """Draws frames spread like those of a protein: a chain of 3.8 Å steps around the origin.

    Directions of steps and orientations of residues are uniform and independent.

    Args:
      key: a JAX random key.
      num_residues: length of the chain, N.
      batch_shape: how many chains to draw.
      position_scale: Å in one unit of translation; AF2 has 10 in the monomer, 20 in the multimer.

    Returns:
      Frames of shape [*batch_shape, N] in JAX's default floating-point type.
    """
    key_step, key_quaternion = jax.random.split(key)
    step = jax.random.normal(key_step, (*batch_shape, num_residues, 3))
    step *= CA_DISTANCE / position_scale / jnp.linalg.norm(step, axis=-1, keepdims=True)
    position = jnp.cumsum(step, axis=-2)
    position -= jnp.mean(position, axis=-2, keepdims=True)
    quaternion = jax.random.normal(key_quaternion, (*batch_shape, num_residues, 4))
    return QuatAffine(quaternion, position, unstack_inputs=True)


def random_motion(key: jax.Array, distance: float) -> QuatAffine:
    """Draws one rotation and one translation of length `distance`, as frames of shape []."""
    key_rotation, key_direction = jax.random.split(key)
    direction = jax.random.normal(key_direction, (3,))
    direction *= distance / jnp.linalg.norm(direction)
    return QuatAffine.from_rotation_translation(random_rotation(key_rotation), direction)


def assert_se3_invariant(
    fn: Callable[[QuatAffine], Any],
    frames: QuatAffine,
    *,
    key: jax.Array,
    translation: float = 10.0,
    tolerance: float = 1e-4,
) -> None:
    """Asserts that one rotation and translation of all frames leaves what `fn` returns unchanged.

    `fn` is called twice and must use the same weights both times. An array that is zero everywhere
    fails, because it would pass whatever `fn` did: give zero-initialised outputs other weights.

    float32 stores a coordinate to 6e-8 of its distance from the origin: moving by `translation`
    units displaces every atom by about that part of `translation`, and no implementation can undo
    this. Choose `tolerance` accordingly.

    Args:
      fn: from frames [..., N] to a pytree of arrays.
      frames: where to start, such as `random_frames`.
      key: a JAX random key, for the motion.
      translation: length of the translation, in the unit of `frames`.
      tolerance: allowed change of each array, relative to its largest element.

    Raises:
      AssertionError: naming every array that changed and by how much, or that is zero.
    """
    before, after = fn(frames), fn(random_motion(key, translation).compose(frames))
    failures = []
    for name, error, scale in _compare(after, before):
        if scale == 0.0:
            failures.append(f"{name} is zero everywhere, which shows nothing")
        elif not error <= tolerance:  # also where it is NaN
            failures.append(f"{name} changed by {error:.1e} of its largest element")
    _report(
        f"not invariant under a rotation and a translation by {translation:g} units, "
        f"tolerance {tolerance:.1e}",
        failures,
    )


def assert_gradients_close(
    fn: Callable[..., Any],
    reference_fn: Callable[..., Any],
    *args: Any,
    key: jax.Array,
    tolerance: float = 1e-5,
) -> None:
    """Asserts that two functions have the same gradients, for random cotangents of every output.

    Args:
      fn: from `args` to a pytree of floating-point arrays.
      reference_fn: a function with the same arguments and results.
      *args: pytrees of floating-point arrays; the gradient is taken with respect to all of them.
      key: a JAX random key, for the cotangents.
      tolerance: allowed error of each gradient, relative to its largest element.

    Raises:
      AssertionError: naming every gradient that is off and by how much.
    """
    gradients = random_vjp(fn, *args, key=key)
    reference_gradients = random_vjp(reference_fn, *args, key=key)
    failures = [
        f"gradient of args{name} is off by {error:.1e} of its largest element"
        for name, error, _ in _compare(gradients, reference_gradients)
        if not error <= tolerance
    ]
    _report(f"gradients differ, tolerance {tolerance:.1e}", failures)


def random_vjp(fn: Callable[..., Any], *args: Any, key: jax.Array) -> tuple[Any, ...]:
    """Returns the gradients of `args` for unit normal cotangents of all that `fn` returns."""
    outputs, pull_back = jax.vjp(fn, *args)
    rng = np.random.default_rng(np.asarray(jax.random.key_data(key)))
    cotangents = jax.tree_util.tree_map(
        lambda x: jnp.asarray(rng.normal(size=x.shape).astype(x.dtype)), outputs
    )
    return pull_back(cotangents)


def assert_within_error_budget(
    fast: Any,
    reference: Any,
    exact: Any,
    *,
    factor: float = 2.0,
    floor: float = FLOAT32_EPS,
) -> None:
    """Asserts that a fast computation is about as accurate as the one it stands in for.

    The error of an array is the root mean square of the differences. The largest difference would
    tell less: between two computations of one accuracy it varies by a factor of 3. For the same
    reason stack results for several random inputs into each array.

    Args:
      fast: pytree of arrays, results of the fast computation.
      reference: the same from the computation it stands in for, in the same dtypes.
      exact: the same in float64, from the same inputs. Where an array is exactly zero, so must be
        that of `fast`.
      factor: how many times the error of `reference` the error of `fast` may be.
      floor: error that `fast` may always have, over the root mean square of the largest array of
        the pytree: `reference` can hit small arrays by chance.

    Raises:
      AssertionError: naming every array over the budget, or for which `reference` is not finite,
        and both errors over the array's root mean square.
    """
    chex.assert_trees_all_equal_shapes(fast, reference, exact)
    scale = max((_rms(x) for _, x in _leaves(exact)), default=0.0)
    failures = []
    for name, x, y, z in _leaves(fast, reference, exact):
        error, allowed, size = _rms(x - z), _rms(y - z), _rms(z)
        is_within = error <= max(factor * allowed, floor * scale) if size else error == 0.0
        if not (is_within and np.all(np.isfinite(y))):
            ours, theirs = (x / (size or 1.0) for x in (error, allowed))
            failures.append(f"{name} is off by {ours:.1e}, the reference by {theirs:.1e}")
    _report(f"error over {factor:g} times the reference's", failures)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(np.square(x))))


def _compare(actual: Any, expected: Any) -> Iterator[tuple[str, float, float]]:
    """Yields name, largest error over largest expected element, and the latter, of each array.

    Raises:
      AssertionError: if the pytrees have different structures or shapes.
    """
    chex.assert_trees_all_equal_shapes(actual, expected)
    for name, x, y in _leaves(actual, expected):
        difference, scale = float(np.max(np.abs(x - y))), float(np.max(np.abs(y)))
        if scale == 0.0:
            yield name, 0.0 if difference == 0.0 else np.inf, scale
        else:
            yield name, difference / scale, scale


def _leaves(*trees: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the name of each leaf and the arrays there, in float64.

    Raises:
      AssertionError: if there are none.
    """
    names = [
        jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])
    ]
    if not names:
        raise AssertionError("there are no arrays to compare")
    for name, *leaves in zip(names, *(jax.tree_util.tree_leaves(tree) for tree in trees)):
        yield name or "the result", *(np.asarray(x, np.float64) for x in leaves)


def _report(what: str, failures: Sequence[str]) -> None:
    if failures:
        raise AssertionError("\n  ".join((f"{what}:", *failures)))
