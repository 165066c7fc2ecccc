"""What a GPU and a TPU would do, from programs compiled for them here: no device is needed.

`python -m benchmarks --cost` runs this module as a program, once for each target: what JAX needs to
compile for a target must be in the environment before JAX is imported.
"""

import dataclasses
import importlib.util
import itertools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from benchmarks import problems, roofline
from benchmarks.candidates import JaxCandidate
from benchmarks.cases import Bench
from benchmarks.hlo_traffic import UnknownLoopLength, traffic_bytes
from benchmarks.peers import Checkouts, load

# Device properties in XLA's text format.
_GPU = """
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_block_optin: {shared_per_block}
  shared_memory_per_core: {shared} registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {bandwidth} l2_cache_size: {l2} device_memory_size: {memory}
  cuda_compute_capability {{ major: {capability[0]} minor: {capability[1]} }}
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
device_description_str: "{name}"
"""
_KIB, _MIB = 2**10, 2**20


class Target(NamedTuple):
    """What programs are compiled for."""

    kind: str  # of the device, as JAX names it
    gpu: dict[str, Any] | None = None  # properties

    @property
    def needs(self) -> tuple[tuple[str, ...], str]:
        """Modules, and how to install them, in one line; {0} is JAX's version."""
        if self.gpu is None:
            return ("libtpu",), "pip install 'jax[tpu]=={0}'"
        packages = "jax-cuda13-plugin=={0} jax-cuda13-pjrt=={0} triton"
        return ("jax_cuda13_plugin", "triton"), f"pip install --no-deps {packages}"

    def topology(self) -> Any:
        """The devices, described for JAX."""
        if self.gpu is None:
            return topologies.get_topology_desc("v5e:2x2", platform="tpu")
        # Of a core's memory CUDA keeps 1 KiB.
        per_block = self.gpu["shared"] - _KIB
        config = _GPU.format(name=self.kind, shared_per_block=per_block, **self.gpu)
        return topologies.get_topology_desc(
            "", platform="cuda", target_config=config, topology="1x1x1"
        )


TARGETS = {
    "h200": Target("NVIDIA H200", {  # the chip of an H100, and more memory
        "threads": 2048, "shared": 228 * _KIB, "cores": 132, "fpus": 128, "clock": 1.98,
        "bandwidth": 4_800 * 10**9, "l2": 50 * _MIB, "memory": 144_384 * _MIB,
        "capability": (9, 0),
    }),
    "a100": Target("NVIDIA A100-SXM4-80GB", {
        "threads": 2048, "shared": 164 * _KIB, "cores": 108, "fpus": 64, "clock": 1.41,
        "bandwidth": 2_039 * 10**9, "l2": 40 * _MIB, "memory": 80 * _KIB * _MIB,
        "capability": (8, 0),
    }),
    "rtx4090": Target("NVIDIA GeForce RTX 4090", {
        "threads": 1536, "shared": 100 * _KIB, "cores": 128, "fpus": 128, "clock": 2.52,
        "bandwidth": 1_008 * 10**9, "l2": 72 * _MIB, "memory": 24 * _KIB * _MIB,
        "capability": (8, 9),
    }),
    "v5e": Target("TPU v5 lite"),
}  # fmt: skip

# What `python -m benchmarks --cost` prints.
REPORTED = ("h200", "v5e")


class CostRow(NamedTuple):
    """The cost of one program."""

    n: int  # residues
    mode: str  # of `cases.MODES`
    label: str  # of the implementation
    temp_bytes: int | None = None  # memory for intermediate results
    # Bytes that its kernels read and write, over one read of `inputs_2d`; None for factors.
    traffic: float | None = None
    note: str = ""  # why there are no numbers


def missing(target_name: str) -> str | None:
    """How to install what compiling for a target needs; None if it is there."""
    target = TARGETS[target_name]
    modules, how_to_install = target.needs
    if all(importlib.util.find_spec(module) for module in modules):
        return None
    return f"to compile for {target.kind}: {how_to_install.format(jax.__version__)}"


def compute(target_name: str, bench: Bench) -> list[CostRow]:
    """Compiles the modules of `bench` for a target, in a process of its own.

    Raises:
      RuntimeError: if that fails, with the end of what it said.
    """
    with tempfile.TemporaryDirectory() as directory:
        process = subprocess.run(
            [sys.executable, "-m", "benchmarks.cost", target_name],
            input=json.dumps(dataclasses.asdict(bench)),
            env=os.environ | environment(target_name, Path(directory)),
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=False,
        )
    if process.returncode != 0:
        end = "\n".join(process.stderr.splitlines()[-5:])
        raise RuntimeError(f"compiling for {TARGETS[target_name].kind} failed:\n{end}")
    return [CostRow(**row) for row in json.loads(process.stdout.splitlines()[-1])]


def environment(target_name: str, directory: Path) -> dict[str, str]:
    """What must be set before JAX starts; links CUDA's tools, of Triton's package, in a folder."""
    common = {"JAX_PLATFORMS": "cpu"}
    if target_name == "v5e":
        return common | {"TPU_SKIP_MDS_QUERY": "1"}
    spec = importlib.util.find_spec("triton")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    triton = Path(spec.submodule_search_locations[0]) / "backends" / "nvidia"
    for link, tool in {
        "bin/ptxas": "bin/ptxas",
        "nvvm/libdevice/libdevice.10.bc": "lib/libdevice.10.bc",
    }.items():
        (directory / link).parent.mkdir(parents=True, exist_ok=True)
        (directory / link).symlink_to(triton / tool)
    # Without a device there is nothing to tune on.
    flags = f"--xla_gpu_autotune_level=0 --xla_gpu_cuda_data_dir={directory}"
    return common | {"JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1", "XLA_FLAGS": flags}


def device(target_name: str) -> tuple[Any, Any]:
    """The sharding that puts arrays on one device of a target, and the context to lower in."""
    target = TARGETS[target_name]
    mesh = jax.sharding.Mesh(np.array(target.topology().devices[:1]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # Tells kernels in Pallas what they are lowered for.
    kind = jax.sharding.AbstractDevice(target.kind, None, "cuda" if target.gpu else "tpu")
    abstract = jax.sharding.AbstractMesh((), (), abstract_device=kind)
    return sharding, jax.sharding.use_abstract_mesh(abstract)


def _cost(target_name: str, bench: Bench, candidate: JaxCandidate, n: int, mode: str) -> CostRow:
    """In the process of its own: compiles one module in one mode and size."""
    model = bench.sized_model()
    sharding, context = device(target_name)

    def arguments(key: jax.Array) -> problems.Problem:
        return candidate.arguments(problems.make_problem("module", model, n, bench.dtype, key))

    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(arguments, jax.random.key(bench.seed)),
    )
    try:
        with context:
            compiled = candidate.compile(shapes, mode)
    except NotImplementedError as error:
        return CostRow(n, mode, candidate.label, note=str(error).partition("\n")[0])
    memory, hlo = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert hlo is not None
    row = CostRow(n, mode, candidate.label, memory.temp_size_in_bytes)
    if model.pair_rank:  # factors are small, and not what the traffic is about
        return row
    try:
        traffic = traffic_bytes(hlo) / roofline.pair_bytes(model, n, bench.dtype)
    except UnknownLoopLength as error:  # as libtpu's compiler does
        return row._replace(note=f"traffic not known: {error}")
    return row._replace(traffic=traffic)


def _main(target_name: str, bench: Bench) -> None:
    """Prints the costs of this project's modules and of AF2's, as JSON."""
    in_jax = tuple(name for name in bench.peers if name.startswith("alphafold"))
    bench = dataclasses.replace(bench, peers=in_jax)
    field = [x for x in load("module", bench, Checkouts()) if isinstance(x, JaxCandidate)]
    cases = itertools.product(bench.sizes, field, bench.modes)
    rows = [_cost(target_name, bench, candidate, n, mode) for n, candidate, mode in cases]
    print(json.dumps([row._asdict() for row in rows]))


if __name__ == "__main__":
    _main(sys.argv[1], Bench(**json.load(sys.stdin)))
