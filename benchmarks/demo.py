"""The demonstration: a real protein may be moved anywhere, and the result is AlphaFold 2's."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import candidates, checks
from benchmarks.candidates import JaxCandidate
from benchmarks.cases import Model
from benchmarks.peers import Checkouts, load_peer
from benchmarks.problems import Problem, make_problem
from benchmarks.structure import Backbone
from ipa_haiku import QuatAffine
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.testing import random_motion

DISTANCES = (0.0, 10.0, 1_000.0, 10_000.0)  # Å


def run(backbone: Backbone, model: Model, seed: int) -> dict[str, Any]:
    """Moves the whole protein and compares; weights and activations are random.

    Args:
      backbone: of the protein.
      model: whose module is run.
      seed: of weights, activations and motions.

    Returns:
      "protein" and "residues"; "moved": for each of `DISTANCES` the changes of the attention
      weights, of the output, of AF2's output (only where AF2 is installed), and of the output in
      float64, which changes only because float32 cannot hold the coordinates exactly; and
      "agreement": for the default implementation and the reference, the "error" against AF2's
      output and the fraction of numbers that are "identical" to it (empty without AF2). Changes and
      errors are relative to the largest element.
    """
    n = len(backbone.ca)
    problem = make_problem("module", model, n, "float32", jax.random.key(seed))
    with enable_x64(True):
        still, *moved = (np.asarray(x) for x in _frames(backbone, model, seed))

    results = _results(model, problem)
    before, *after = (results(affine) for affine in (still, *moved))
    names = [name for name in before if name != "reference"]
    changes = [
        {"distance": distance} | {name: _change(found[name], before[name]) for name in names}
        for distance, found in zip(DISTANCES, after)
    ]
    agreement = [
        {
            "implementation": implementation,
            "error": _change(before[name], before["alphafold"]),
            "identical": float(jnp.mean(before[name] == before["alphafold"])),
        }
        for implementation, name in (("default", "output"), ("reference", "reference"))
        if "alphafold" in before
    ]
    return {"protein": backbone.name, "residues": n, "moved": changes, "agreement": agreement}


def _frames(backbone: Backbone, model: Model, seed: int) -> list[jax.Array]:
    """Frames [N, 7] in float32: where the protein is, and moved by each of `DISTANCES`.

    Under `jax.enable_x64` all but the rounding at the end is exact.
    """

    @jax.jit
    def move(atoms: list[jax.Array], key: jax.Array) -> list[jax.Array]:
        frames = QuatAffine.from_backbone(*atoms).scale_translation(1.0 / model.position_scale)
        moved = [
            random_motion(key, distance / model.position_scale).compose(frames)
            for distance, key in zip(DISTANCES, jax.random.split(key, len(DISTANCES)))
        ]
        return [x.to_tensor().astype(jnp.float32) for x in (frames, *moved)]

    return move([jnp.asarray(x, jnp.float64) for x in backbone[1:]], jax.random.key(seed))


def _results(model: Model, problem: Problem) -> Callable[[np.ndarray], dict[str, Any]]:
    """A function of the frames [N, 7]: what must not change when the protein moves."""
    in_float64 = jax.jit(candidates.reference("module", model).function("forward"))
    default = _compile(candidates.our_module(model, None), problem)
    # No other implementation returns attention weights.
    reference = _compile(candidates.our_module(model, "reference", return_attention=True), problem)
    peer = load_peer(model.alphafold, "module", model, Checkouts())
    alphafold = _compile(peer, problem) if isinstance(peer, JaxCandidate) else None

    def results(affine: np.ndarray) -> dict[str, Any]:
        with enable_x64(True):
            exact = in_float64(checks.to_float64(_moved(problem, affine)))["output"]
        output, attention = reference(affine)
        found = {"attention": attention.weights, "output": default(affine), "rounding": exact}
        if alphafold is not None:
            found["alphafold"] = alphafold(affine)
        return found | {"reference": output}

    return results


def _compile(candidate: JaxCandidate, problem: Problem) -> Callable[[np.ndarray], Any]:
    """The candidate's result as a function of the frames [N, 7]."""
    function, arguments = jax.jit(candidate.function("forward")), candidate.arguments(problem)
    return lambda affine: function(_moved(arguments, affine))["output"]


def _moved(problem: Problem, affine: np.ndarray) -> Problem:
    return problem._replace(differentiable=problem.differentiable | {"affine": affine})


def _change(after: Any, before: Any) -> float:
    return checks.group_errors({"": after}, {"": before})[""]
