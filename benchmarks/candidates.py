"""What is measured: this project's implementations and AF2's, as functions of a `Problem`."""

import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks import layouts
from benchmarks.cases import Bench, Model
from benchmarks.problems import GLOBAL_CONFIG, Problem, core_scales, squared_distance
from ipa_haiku import (
    InvariantPointAttention,
    QuatAffine,
    RowSharding,
    folding_multimer,
    invariant_point_attention,
    rigid,
)
from ipa_haiku.alphafold import use_in_alphafold

_ENOUGH_COMPILE_SECONDS = 2.0
_MAX_COMPILE = 3

# Pytrees of arrays by name: {"output": ...} of a forward pass; of a gradient "value", the loss, and
# the names of `Problem.differentiable`.
Groups = dict[str, Any]

# From the arrays of a problem by name, differentiable and constant, to its result.
Forward = Callable[[dict[str, Any]], Any]


class Prepared(NamedTuple):
    """A computation that is compiled and has its inputs on the device."""

    start: Callable[[int], Any]  # from the number of a copy of the inputs to a result
    wait: Callable[[Any], Any]  # returns when a result is ready
    groups: Callable[[Any], Groups]  # of a result, on the host
    compile_seconds: float | None  # the median of up to three times
    temp_bytes: int | None  # memory of intermediate results
    required_bytes: int  # estimate of what a run takes beside its inputs


def _identity(parameters: Any) -> Any:
    return parameters


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Something that computes the result of a `Problem`."""

    name: str  # on the command line
    label: str  # in tables
    _: dataclasses.KW_ONLY
    # Turns the monomer's parameters, or their gradient, into the candidate's.
    layout: Callable[[Any], Any] = _identity
    is_exact: bool = True  # whether it computes the same function, so that results can be compared

    def in_layout(self, groups: Groups) -> Groups:
        """`groups` with the monomer's "parameters", if there are any, in the candidate's layout."""
        if "parameters" not in groups:
            return groups
        return groups | {"parameters": self.layout(groups["parameters"])}

    def prepare(self, copies: Sequence[Problem], mode: str) -> Prepared:
        """Compiles the computation for problems of one shape.

        Raises:
          NotImplementedError: if the candidate cannot do this problem here, saying why.
        """
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class JaxCandidate(Candidate):
    """A function in JAX of the arrays of a problem, by name."""

    forward: Forward

    def arguments(self, problem: Problem) -> Problem:
        """`problem` with the parameters in the candidate's layout."""
        return problem._replace(differentiable=self.in_layout(problem.differentiable))

    def function(self, mode: str) -> Callable[[Problem], Groups]:
        """What is compiled: a function of `arguments` that returns the groups."""

        def forward(problem: Problem) -> Groups:
            return {"output": self.forward(problem.differentiable | problem.constant)}

        def loss(differentiable: dict[str, Any], problem: Problem) -> jax.Array:
            output = self.forward(differentiable | problem.constant)
            return squared_distance(output, problem.target)

        def gradient(problem: Problem) -> Groups:
            value, gradients = jax.value_and_grad(loss)(problem.differentiable, problem)
            return {"value": value, **gradients}

        return {"forward": forward, "grad": gradient}[mode]

    def compile(self, arguments: Problem, mode: str) -> jax.stages.Compiled:
        """The compiled function."""
        return jax.jit(self.function(mode)).lower(arguments).compile()

    def prepare(self, copies: Sequence[Problem], mode: str) -> Prepared:
        """Compiles up to three times, as quick compilations vary; see `Candidate.prepare`."""
        arguments = [self.arguments(problem) for problem in copies]
        seconds: list[float] = []
        while sum(seconds) < _ENOUGH_COMPILE_SECONDS and len(seconds) < _MAX_COMPILE:
            jax.clear_caches()  # of parts that one traced before; what is compiled stays
            start = time.perf_counter()
            compiled = self.compile(arguments[0], mode)
            seconds.append(time.perf_counter() - start)
        memory = compiled.memory_analysis()
        return Prepared(
            start=lambda i: compiled(arguments[i]),
            wait=jax.block_until_ready,
            groups=lambda result: jax.tree.map(np.asarray, result),
            compile_seconds=statistics.median(seconds),
            temp_bytes=memory.temp_size_in_bytes if memory else None,
            required_bytes=memory.temp_size_in_bytes + memory.output_size_in_bytes if memory else 0,
        )


def ours(what: str, model: Model, implementation: str | None) -> JaxCandidate:
    """This project's `implementation`, None being its default, as a candidate for `what`."""
    if what == "module":
        return our_module(model, implementation)
    forward: Forward = functools.partial(_our_core, model, implementation)
    if what == "structure_module":
        forward = _in_structure_module(model, functools.partial(use_in_alphafold, implementation))
    return JaxCandidate(*_name_and_label(implementation), forward)


def all_ours(what: str, model: Model, bench: Bench) -> list[JaxCandidate]:
    """`ours` by name; of factors also on the array they stand for; of the module also sharded."""
    found = [ours(what, model, name) for name in bench.implementations]
    found += [_on_the_array(candidate) for candidate in found if model.pair_rank]
    devices = bench.devices if what == "module" else ()
    return [*found, *(_over_devices(model, count) for count in devices)]


def _on_the_array(candidate: JaxCandidate) -> JaxCandidate:
    def forward(x: dict[str, Any]) -> Any:
        return candidate.forward(x | {"inputs_2d": x["inputs_2d"].to_dense()})

    name, label = f"{candidate.name}_array", f"{candidate.label}, array"
    return dataclasses.replace(candidate, name=name, label=label, forward=forward)


@dataclasses.dataclass(frozen=True)
class _Sharded(JaxCandidate):
    """The module with rows of `inputs_2d` and of the target on the devices of `mesh`."""

    mesh: jax.sharding.Mesh

    def arguments(self, problem: Problem) -> Problem:
        if len(problem.target) % self.mesh.size:
            raise NotImplementedError(f"N must be a multiple of {self.mesh.size} devices")
        rows, everywhere = (NamedSharding(self.mesh, PartitionSpec(x)) for x in ("rows", None))
        problem = super().arguments(problem)
        shardings = jax.tree.map(lambda _: everywhere, problem)
        shardings.differentiable["inputs_2d"] = rows
        return jax.device_put(problem, shardings._replace(target=rows))


def _over_devices(model: Model, count: int) -> JaxCandidate:
    """The default implementation over devices; those of a CPU are parts of one processor.

    There XLA gives all cores to one device as well: what is measured is whether rows sharded by
    hand beat XLA's own threads.
    """
    mesh = jax.make_mesh((count,), ("rows",), axis_types=(AxisType.Auto,))
    module = our_module(model, None, RowSharding(mesh, "rows") if count > 1 else None)
    name, label = f"devices_{count}", f"ipa_haiku, {count} device{'s' * (count > 1)}"
    return _Sharded(name, label, module.forward, mesh, layout=module.layout)


def our_module(
    model: Model,
    implementation: str | None,
    sharding: RowSharding | None = None,
    **call_options: Any,
) -> JaxCandidate:
    """This project's Haiku module, called with `call_options`."""
    is_multimer = model.variant == "multimer"
    kind = folding_multimer.InvariantPointAttention if is_multimer else InvariantPointAttention
    module = functools.partial(kind, implementation=implementation, sharding=sharding)
    forward = _module_forward(model, module, QuatAffine.from_tensor, **call_options)
    layout = functools.partial(layouts.to_multimer, model=model) if is_multimer else _identity
    return JaxCandidate(*_name_and_label(implementation), forward, layout=layout)


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
        frames = quat_affine.QuatAffine.from_tensor
        forward = _module_forward(model, folding.InvariantPointAttention, frames)
    else:
        forward = _in_structure_module(model, contextlib.nullcontext)
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

    def forward(x: dict[str, Any]) -> Any:
        if x["inputs_1d"].dtype == jnp.bfloat16:
            raise NotImplementedError("its points are float32 only, and so are its inputs")
        return module_forward(x)

    layout = functools.partial(layouts.to_multimer, model=model)
    return JaxCandidate("alphafold_multimer", "AlphaFold 2 multimer", forward, layout=layout)


def _our_core(model: Model, implementation: str | None, x: dict[str, Any]) -> dict[str, jax.Array]:
    arrays = {**x, **x["weights"]}
    del arrays["weights"]
    result = invariant_point_attention(
        **arrays, logit_scales=core_scales(model), implementation=implementation
    )
    return {"scalar": result.scalar, "point": result.point, "pair": result.pair}


def _module_forward(
    model: Model,
    module: Callable[..., Any],
    frames: Callable[[jax.Array], Any],
    **call_options: Any,
) -> Forward:
    def call(x: dict[str, Any]) -> Any:
        attention = module(model.ipa, GLOBAL_CONFIG)
        inputs = x["inputs_1d"], x["inputs_2d"], x["mask"], frames(x["affine"])
        return attention(*inputs, **call_options)

    return lambda x: hk.transform(call).apply(x["parameters"], None, x)


def _in_structure_module(
    model: Model, attention: Callable[[], contextlib.AbstractContextManager[Any]]
) -> Forward:
    from benchmarks import structure_module  # imports alphafold

    return functools.partial(structure_module.forward, model, attention)
