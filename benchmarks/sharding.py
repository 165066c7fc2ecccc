"""`python -m benchmarks.sharding`: the Haiku module over one device and over several.

On a CPU the devices are parts of one processor, which XLA gives all of its cores to one device as
well: what is measured is whether rows sharded by hand beat XLA's own threads.
"""

import argparse
from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from benchmarks.candidates import our_module
from benchmarks.cases import MODES, Model
from benchmarks.problems import Problem, make_problem
from benchmarks.timing import Stopwatch, interleave, summarize
from ipa_haiku import RowSharding

_NUM_COPIES = 2  # of the inputs, in turns, so that none stays in a cache from call to call


def main() -> None:
    """Prints a table of times and of memory per device, one row per size, mode and device count."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sharding", description=__doc__)
    parser.add_argument("--sizes", default="512", help="numbers of residues (512)")
    parser.add_argument("--devices", default="1,2", help="numbers of devices (1,2)")
    parser.add_argument("--repeats", type=int, default=15, help="samples of each row (15)")
    parser.add_argument("--model", default="af2_monomer", help="name in configs/ (af2_monomer)")
    options = parser.parse_args()
    sizes, devices = (
        [int(x) for x in text.split(",")] for text in (options.sizes, options.devices)
    )
    # Of no effect on other platforms.
    jax.config.update("jax_num_cpu_devices", max(devices))
    model = Model.from_name(options.model)

    print(f"{jax.devices()[0].device_kind}, {jax.device_count()} devices, jax {jax.__version__}")
    print(
        "| N | module | devices | median (ms) | quartiles (ms) | temp + arguments (MB / device) |"
    )
    print("| ---: | --- | ---: | ---: | ---: | ---: |")
    for n in sizes:
        copies = [
            make_problem("module", model, n, "float32", jax.random.key(i))
            for i in range(_NUM_COPIES)
        ]
        for mode in MODES:
            rows = {count: _prepare(model, copies, mode, count) for count in devices}
            watches = [watch for watch, _ in rows.values()]
            interleave([w.sample for w in watches], options.repeats, on_round=lambda: None)
            for count, (watch, memory) in rows.items():
                time = summarize([1e3 * x for x in watch.samples])
                print(
                    f"| {n} | {mode} | {count} | {time.median:.1f} | {time.q1:.1f} - {time.q3:.1f} "
                    f"| {memory / 1e6:.0f} |"
                )


def _prepare(
    model: Model, copies: list[Problem], mode: str, num_device: int
) -> tuple[Stopwatch, int]:
    """A warm stopwatch, and the bytes of temporary arrays and arguments on each device."""
    mesh = jax.make_mesh((num_device,), ("rows",), axis_types=(AxisType.Auto,))
    sharding = RowSharding(mesh, "rows") if num_device > 1 else None
    placed = [jax.device_put(copy, _shardings(copy, mesh)) for copy in copies]
    prepared = our_module(model, None, sharding).prepare(placed, mode)
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    watch = Stopwatch(prepared, len(placed), min_sample_seconds=0.0, is_cpu=is_cpu)
    shards = [x.addressable_shards[0].data for x in jax.tree.leaves(placed[0])]
    return watch, (prepared.temp_bytes or 0) + sum(x.nbytes for x in shards)


def _shardings(problem: Problem, mesh: jax.sharding.Mesh) -> Any:
    """Rows of `inputs_2d` and of the target on their devices, the rest on each."""
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(axis)) for axis in ("rows", None))
    shardings = jax.tree.map(lambda _: everywhere, problem)
    shardings.differentiable["inputs_2d"] = rows
    return shardings._replace(target=rows)


if __name__ == "__main__":
    main()
