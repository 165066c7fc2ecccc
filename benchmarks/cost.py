"""What a GPU and a TPU would do, from programs compiled for them here: no device is needed.

`python -m benchmarks --cost` runs this module as a program, once for each target: what JAX needs to
compile for a target must be in the environment before JAX is imported.
"""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases import Bench, Model

# Device properties in XLA's text format. An H200 has the chip of an H100 and more memory.
_GPUS = {
    "h200": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 4800000000000 l2_cache_size: 52428800 device_memory_size: 151397597184
  cuda_compute_capability { major: 9 minor: 0 }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H200"
""",
    "a100": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 166912
  shared_memory_per_core: 167936 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 108 fpus_per_core: 64 clock_rate_ghz: 1.41
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 2039000000000 l2_cache_size: 41943040 device_memory_size: 85899345920
  cuda_compute_capability { major: 8 minor: 0 }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA A100-SXM4-80GB"
""",
    "rtx4090": """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 1536
  shared_memory_per_block: 49152 shared_memory_per_block_optin: 101376
  shared_memory_per_core: 102400 registers_per_core_limit: 65536 registers_per_block_limit: 65536
  core_count: 128 fpus_per_core: 128 clock_rate_ghz: 2.52
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 1008000000000 l2_cache_size: 75497472 device_memory_size: 25769803776
  cuda_compute_capability { major: 8 minor: 9 }
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA GeForce RTX 4090"
""",
}


class _Target(NamedTuple):
    """What programs are compiled for.

    Attributes:
      label: in tables.
      kind: of the device, as JAX names it.
      modules: that must be installed.
      how_to_install: them, in one line; {version} is JAX's.
    """

    label: str
    kind: str
    modules: tuple[str, ...]
    how_to_install: str


_FOR_GPU = (
    ("jax_cuda13_plugin", "triton"),
    "pip install --no-deps jax-cuda13-plugin=={version} jax-cuda13-pjrt=={version} triton",
)

TARGETS = {
    "h200": _Target("NVIDIA H200", "NVIDIA H200", *_FOR_GPU),
    "a100": _Target("NVIDIA A100", "NVIDIA A100-SXM4-80GB", *_FOR_GPU),
    "rtx4090": _Target("NVIDIA RTX 4090", "NVIDIA GeForce RTX 4090", *_FOR_GPU),
    "v5e": _Target("TPU v5e", "TPU v5 lite", ("libtpu",), "pip install 'jax[tpu]=={version}'"),
}

# What `python -m benchmarks --cost` prints.
REPORTED = ("h200", "v5e")


@dataclasses.dataclass(frozen=True)
class CostRow:
    """The cost of one program.

    Attributes:
      n: residues.
      mode: of `cases.MODES`.
      label: of the implementation.
      temp_bytes: memory for intermediate results.
      traffic: bytes that its kernels read and write, over one read of `inputs_2d`; None for
        factors.
      note: why there are no numbers.
    """

    n: int
    mode: str
    label: str
    temp_bytes: int | None = None
    traffic: float | None = None
    note: str = ""


def missing(target_name: str) -> str | None:
    """How to install what compiling for a target needs; None if it is there."""
    target = TARGETS[target_name]
    if all(importlib.util.find_spec(module) for module in target.modules):
        return None
    import jax

    return f"to compile for {target.label}: " + target.how_to_install.format(
        version=jax.__version__
    )


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
        raise RuntimeError(f"compiling for {TARGETS[target_name].label} failed:\n{end}")
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


def _compile_all(target_name: str, bench: Bench) -> list[CostRow]:
    """In the process of its own: compiles every module in every mode and size."""
    from benchmarks import candidates
    from benchmarks.peers import Checkouts, Missing, load_peer

    model = bench.sized_model()
    field = candidates.all_ours("module", model, bench.implementations)
    for name in ("alphafold", "alphafold_multimer"):
        if name in bench.peers:
            peer = load_peer(name, "module", model, Checkouts())
            if isinstance(peer, candidates.JaxCandidate):
                field.append(peer)
            elif isinstance(peer, Missing):
                print(f"{peer.name}: {peer.reason}", file=sys.stderr)
    return [
        _compile(target_name, bench, model, candidate, n, mode)
        for n in bench.sizes
        for candidate in field
        for mode in bench.modes
    ]


def _compile(
    target_name: str, bench: Bench, model: Model, candidate: Any, n: int, mode: str
) -> CostRow:
    import jax

    from benchmarks import problems, roofline
    from benchmarks.hlo_traffic import UnknownLoopLength, traffic_bytes

    sharding, context = device(target_name)
    shapes = jax.eval_shape(
        lambda key: candidate.arguments(
            problems.make_problem("module", model, n, bench.dtype, key)
        ),
        jax.random.key(bench.seed),
    )
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    try:
        with context:
            compiled = jax.jit(candidate.function(mode)).lower(shapes).compile()
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
        return dataclasses.replace(row, note=f"traffic not known: {error}")
    return dataclasses.replace(row, traffic=traffic)


def device(target_name: str) -> tuple[Any, Any]:
    """The sharding that puts arrays on one device of a target, and the context to lower in."""
    import jax
    import numpy as np
    from jax.experimental import topologies

    kind = TARGETS[target_name].kind
    if target_name in _GPUS:
        platform = "cuda"
        topology = topologies.get_topology_desc(
            "", platform=platform, target_config=_GPUS[target_name], topology="1x1x1"
        )
    else:
        platform = "tpu"
        topology = topologies.get_topology_desc("v5e:2x2", platform=platform)
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # Tells kernels in Pallas what they are lowered for.
    abstract = jax.sharding.AbstractMesh(
        (), (), abstract_device=jax.sharding.AbstractDevice(kind, None, platform)
    )
    return sharding, jax.sharding.use_abstract_mesh(abstract)


def _main() -> None:
    bench = Bench(**json.load(sys.stdin))
    rows = _compile_all(sys.argv[1], bench)
    print(json.dumps([dataclasses.asdict(row) for row in rows]))


if __name__ == "__main__":
    _main()
