"""What is measured: this project's implementations and AF2's, as functions of a `Problem`."""

import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import layouts
from benchmarks.cases import Model
from benchmarks.problems import GLOBAL_CONFIG, Problem, core_scales
from ipa_haiku import (
    InvariantPointAttention,
    QuatAffine,
    RowSharding,
    folding_multimer,
    invariant_point_attention,
    rigid,
)

# Quick compilations vary most, so they are repeated.
_ENOUGH_COMPILE_SECONDS = 2.0
_MAX_COMPILE = 3

# Pytrees of arrays by name: {"output": ...} of a forward pass, the names of
# `Problem.differentiable` of a gradient.
Groups = dict[str, Any]


class Prepared(NamedTuple):
    """A computation that is compiled and has its inputs on the device.

    Attributes:
      start: starts a run on the given copy of the inputs (a number) and returns its result.
      wait: returns when a result is ready.
      groups: of a result, on the host.
      compile_seconds: the median of up to three times, None where nothing is compiled.
      temp_bytes: memory of intermediate results, None where it is not known.
      required_bytes: estimate of what a run takes beside its inputs.
    """

    start: Callable[[int], Any]
    wait: Callable[[Any], Any]
    groups: Callable[[Any], Groups]
    compile_seconds: float | None
    temp_bytes: int | None
    required_bytes: int


class Candidate(Protocol):
    """Something that computes the result of a `Problem`.

    Attributes:
      name: on the command line.
      label: in tables.
      is_exact: whether it computes the same function, so that results can be compared.
    """

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def label(self) -> str: ...  # noqa: D102
    @property
    def is_exact(self) -> bool: ...  # noqa: D102

    def layout(self, parameters: Any, /) -> Any:
        """Turns the monomer's parameters, or their gradient, into the candidate's."""

    def prepare(self, copies: Sequence[Problem], mode: str) -> Prepared:
        """Compiles the computation for problems of one shape.

        Raises:
          NotImplementedError: if the candidate cannot do this problem here, saying why.
        """


def _identity(parameters: Any) -> Any:
    return parameters


@dataclasses.dataclass(frozen=True)
class JaxCandidate:
    """A function of (`differentiable`, `constant`) in JAX; the attributes are `Candidate`'s."""

    name: str
    label: str
    forward: Callable[[dict[str, Any], dict[str, Any]], Any]
    layout: Callable[[Any], Any] = _identity
    is_exact: bool = True

    def arguments(self, problem: Problem) -> Problem:
        """`problem` with the parameters in the candidate's layout."""
        differentiable = dict(problem.differentiable)
        if "parameters" in differentiable:
            differentiable["parameters"] = self.layout(differentiable["parameters"])
        return problem._replace(differentiable=differentiable)

    def function(self, mode: str) -> Callable[[Problem], Groups]:
        """What is compiled: a function of `arguments` that returns the groups."""
        if mode == "forward":
            return lambda problem: {
                "output": self.forward(problem.differentiable, problem.constant)
            }

        def loss(differentiable: dict[str, Any], problem: Problem) -> jax.Array:
            output = self.forward(differentiable, problem.constant)
            products = jax.tree.map(_inner_product, output, problem.cotangent)
            return sum(jax.tree.leaves(products), start=jnp.zeros(()))

        return lambda problem: jax.grad(loss)(problem.differentiable, problem)

    def prepare(self, copies: Sequence[Problem], mode: str) -> Prepared:
        """Compiles the computation for problems of one shape; see `Candidate.prepare`."""
        arguments = [self.arguments(problem) for problem in copies]
        compiled, compile_seconds = self._compile(arguments[0], mode)
        memory = compiled.memory_analysis()
        return Prepared(
            start=lambda i: compiled(arguments[i]),
            wait=jax.block_until_ready,
            groups=lambda result: jax.tree.map(np.asarray, result),
            compile_seconds=compile_seconds,
            temp_bytes=memory.temp_size_in_bytes if memory else None,
            required_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0,
        )

    def _compile(self, problem: Problem, mode: str) -> tuple[jax.stages.Compiled, float]:
        """The compiled computation, and in how many seconds: the median of up to three times."""
        seconds: list[float] = []
        while True:
            jax.clear_caches()  # of parts that one traced before; what is compiled stays
            start = time.perf_counter()
            compiled = jax.jit(self.function(mode)).lower(problem).compile()
            seconds.append(time.perf_counter() - start)
            if sum(seconds) > _ENOUGH_COMPILE_SECONDS or len(seconds) == _MAX_COMPILE:
                return compiled, statistics.median(seconds)


def _inner_product(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    dtype = jnp.result_type(jnp.float32, x)
    return jnp.sum(x.astype(dtype) * cotangent.astype(dtype))


def ours(what: str, model: Model, implementation: str | None) -> JaxCandidate:
    """This project's `implementation`, None being its default, as a candidate for `what`."""
    if what == "module":
        return our_module(model, implementation)
    if what == "core":
        forward = functools.partial(_our_core, model, implementation)
    else:
        from benchmarks import structure_module  # imports alphafold

        attention = functools.partial(InvariantPointAttention, implementation=implementation)
        forward = functools.partial(structure_module.forward, model, attention)
    return JaxCandidate(*_name_and_label(implementation), forward)


def all_ours(what: str, model: Model, implementations: Sequence[str]) -> list[JaxCandidate]:
    """`ours` by name; if `inputs_2d` comes as factors, each also on the array they stand for."""
    found = [ours(what, model, name) for name in implementations]
    return found + [_on_the_array(candidate) for candidate in found if model.pair_rank]


def _on_the_array(candidate: JaxCandidate) -> JaxCandidate:
    def forward(differentiable: dict[str, Any], constant: dict[str, Any]) -> Any:
        dense = {"inputs_2d": differentiable["inputs_2d"].to_dense()}
        return candidate.forward(differentiable | dense, constant)

    return dataclasses.replace(
        candidate,
        name=f"{candidate.name}_array",
        label=f"{candidate.label}, array",
        forward=forward,
    )


def our_module(
    model: Model,
    implementation: str | None,
    sharding: RowSharding | None = None,
    **call_options: Any,
) -> JaxCandidate:
    """This project's Haiku module, called with `call_options`."""
    is_multimer = model.variant == "multimer"
    module = folding_multimer.InvariantPointAttention if is_multimer else InvariantPointAttention
    forward = _module_forward(
        model,
        functools.partial(module, implementation=implementation, sharding=sharding),
        QuatAffine.from_tensor,
        **call_options,
    )
    layout = functools.partial(layouts.to_multimer, model=model) if is_multimer else _identity
    return JaxCandidate(*_name_and_label(implementation), forward, layout)


def reference(what: str, model: Model) -> JaxCandidate:
    """The reference that results are compared with: the monomer's, whatever the model.

    It has every parameter that any candidate has. The multimer is the same function but for how it
    keeps norms away from zero, which in float64 shows below 1e-8 of the largest element.
    """
    return ours(what, dataclasses.replace(model, variant="monomer"), "reference")


def _name_and_label(implementation: str | None) -> tuple[str, str]:
    name = implementation or "default"
    return name, f"ipa_haiku {name}"


def alphafold(what: str, model: Model) -> JaxCandidate:
    """AF2's monomer as a candidate for `what`, "module" or "structure_module"."""
    from alphafold.model import folding, quat_affine

    if what == "module":
        forward = _module_forward(
            model, folding.InvariantPointAttention, quat_affine.QuatAffine.from_tensor
        )
    else:
        from benchmarks import structure_module

        forward = functools.partial(
            structure_module.forward, model, folding.InvariantPointAttention
        )
    return JaxCandidate("alphafold", "AlphaFold 2", forward)


def alphafold_multimer(model: Model) -> JaxCandidate:
    """AF2's multimer module, with the monomer's weights in its layout."""
    from alphafold.model import folding_multimer as af2_multimer
    from alphafold.model import geometry

    def frames(affine: jax.Array) -> Any:
        rotation, translation = rigid.to_rotation_translation(QuatAffine.from_tensor(affine))
        return geometry.Rigid3Array(
            geometry.Rot3Array.from_array(rotation), geometry.Vec3Array.from_array(translation)
        )

    module_forward = _module_forward(model, af2_multimer.InvariantPointAttention, frames)

    def forward(differentiable: dict[str, Any], constant: dict[str, Any]) -> Any:
        if differentiable["inputs_1d"].dtype == jnp.bfloat16:
            raise NotImplementedError("its points are float32 only, and so are its inputs")
        return module_forward(differentiable, constant)

    return JaxCandidate(
        "alphafold_multimer",
        "AlphaFold 2 multimer",
        forward,
        functools.partial(layouts.to_multimer, model=model),
    )


def _our_core(
    model: Model,
    implementation: str | None,
    differentiable: dict[str, Any],
    constant: dict[str, Any],
) -> dict[str, jax.Array]:
    arrays = {name: x for name, x in differentiable.items() if name != "weights"}
    result = invariant_point_attention(
        **arrays,
        **differentiable["weights"],
        q_mask=constant["mask"],
        k_mask=constant["mask"],
        logit_scales=core_scales(model),
        implementation=implementation,
    )
    return {"scalar": result.scalar, "point": result.point, "pair": result.pair}


def _module_forward(
    model: Model,
    module: Callable[..., Any],
    frames: Callable[[jax.Array], Any],
    **call_options: Any,
) -> Callable[[dict[str, Any], dict[str, Any]], Any]:
    def call(inputs_1d: jax.Array, inputs_2d: jax.Array, mask: jax.Array, affine: jax.Array) -> Any:
        attention = module(model.ipa, GLOBAL_CONFIG)
        return attention(inputs_1d, inputs_2d, mask, frames(affine), **call_options)

    transformed = hk.transform(call)

    def forward(differentiable: dict[str, Any], constant: dict[str, Any]) -> Any:
        d = differentiable
        return transformed.apply(
            d["parameters"], None, d["inputs_1d"], d["inputs_2d"], constant["mask"], d["affine"]
        )

    return forward
