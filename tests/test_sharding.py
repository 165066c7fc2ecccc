"""Attention over device meshes: the rows of each device, several processes, wrong meshes."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from ipa_haiku import LogitScales, RowSharding, invariant_point_attention, select_implementation

TESTS = Path(__file__).parent
MESH = AbstractMesh((2, 4), ("data", "rows"))


def environment(num_device):
    flags = f"--xla_force_host_platform_device_count={num_device}"
    return os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@pytest.mark.parametrize("mark", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_over_eight_devices(mark):
    program = str(TESTS / "on_eight_devices.py")
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-m", mark, program]
    result = subprocess.run(command, env=environment(8), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# What follows the docs' example: other numbers, through the same program, and on one device.
COMPARISON = """
from jax.experimental.multihost_utils import process_allgather
from ipa_haiku.testing import random_frames
assert jax.process_count() == 2 and jax.device_count() == 4
assert output.sharding.shard_shape(output.shape) == (n // 4, 384)
assert gradients[1].sharding.shard_shape(pair.shape) == (n // 4, n, 128)

def draw(x):
    return np.random.default_rng(x.size).normal(size=x.shape, scale=0.05).astype(np.float32)

frames = np.asarray(random_frames(jax.random.key(1), n).to_tensor())
others = 20 * draw(others[0]), (np.arange(n)[:, None] % 5 != 2).astype(np.float32), frames
params = jax.tree.map(draw, params)
gradient = jax.grad(lambda *args: ((model.apply(*args) * args[3]) ** 2).sum(), argnums=(0, 2))

def both(*args):
    return model.apply(*args) * args[3], gradient(*args)

inputs_1d, mask, frames = jax.device_put(others, everywhere)
sharded = jax.jit(both)(jax.device_put(params, everywhere), inputs_1d, inputs_2d, mask, frames)
sharded = process_allgather(sharded, tiled=True)

RowSharding = lambda *_: None  # `layer` looks it up when it is traced, now anew
local = jax.jit(lambda *args: both(*args))(params, others[0], pair, *others[1:])
for actual, x in zip(jax.tree.leaves(sharded), jax.tree.leaves(local)):
    scale = max(np.max(np.abs(x)), 1)
    assert np.max(np.abs(actual - x)) <= 2e-6 * scale, np.max(np.abs(actual - x)) / scale
print("equal", np.max(np.abs(local[0])))
"""


@pytest.mark.slow
def test_the_readmes_example_in_two_processes():
    readme = (TESTS.parent / "docs" / "devices.md").read_text()
    (example,) = re.findall(r"```py\n(.*?)```", readme, flags=re.DOTALL)
    address = f"127.0.0.1:{free_port()}"
    processes = []
    for i in range(2):
        here = f"jax.distributed.initialize({address!r}, 2, {i})"
        code = example.replace("jax.distributed.initialize()", here)
        assert code != example
        processes.append(
            subprocess.Popen(
                [sys.executable, "-c", code + COMPARISON],
                env=environment(2),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    for process in processes:
        output, _ = process.communicate(timeout=120)
        assert process.returncode == 0, output
        assert "equal" in output


def test_memory_budget_is_that_of_a_device():
    shape, budget = (2, 12, 400, 400), 5 * 4 * 12 * 400 * 100
    block = budget // (2 * 4 * 400 * (5 * 12 + 3 * 128))  # for both proteins
    assert select_implementation(shape, memory_budget=budget).query_block == block
    sharding = RowSharding(MESH, "rows", "data")
    assert select_implementation(shape, memory_budget=budget, sharding=sharding).query_block is None
    half = select_implementation(shape, memory_budget=budget // 2, sharding=sharding)
    assert half.query_block == block
    wide = select_implementation(shape, memory_budget=2 * budget, dtype="float64")
    assert wide.query_block == block


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (("row",), r"row_axis must be an axis of the mesh \('data', 'rows'\), got 'row'"),
        (("rows", "batch"), r"batch_axis must be an axis of the mesh .*, got 'batch'"),
        (("rows", "rows"), "row_axis and batch_axis must differ, got 'rows' twice"),
        ((None,), "row_axis must be an axis of the mesh .*, got None"),
    ],
)
def test_wrong_axes_are_named(axes, message):
    with pytest.raises(ValueError, match=message):
        RowSharding(MESH, *axes)


@pytest.mark.parametrize("batch", [(), (3,), (3, 2)])
def test_a_batch_that_the_devices_do_not_divide_is_named(batch, sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("tiny"), 4, batch=batch)
    message = rf"batch_axis 'data' has 2 devices.*batch dimensions \({', '.join(map(str, batch))}"
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(
            lambda: invariant_point_attention(
                **inputs._asdict(),
                logit_scales=LogitScales(1.0, 1.0),
                sharding=RowSharding(MESH, "rows", "data"),
            )
        )


def test_one_device_is_a_mesh(sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("tiny"), 5)
    sharding = RowSharding(jax.make_mesh((1,), ("rows",)), "rows")

    def run(**options):
        return jax.jit(
            lambda x: invariant_point_attention(
                **x._asdict(), logit_scales=LogitScales(1.0, 1.0), **options
            )
        )(inputs)

    assert all(
        jnp.max(jnp.abs(x - y)) < 1e-6
        for x, y in zip(jax.tree.leaves(run(sharding=sharding)), jax.tree.leaves(run()))
    )
