"""Programs compiled in full for GPUs and a TPU that are not here, if the compilers are installed.

What to install is printed as the reason for skipping; `.ci/run` does so in an environment of its
own. Bytes are those that kernels read and write, over one read of `inputs_2d`.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import cost
from benchmarks.cases import Bench

MIB = 2**20


@functools.cache
def compiled(target, **options):
    """Costs by (implementation, mode)."""
    bench = Bench(peers=(), **options)
    rows = cost.compute(target, bench)
    names = [name for name in bench.implementations for _ in bench.modes]
    return {(name, row.mode): row for name, row in zip(names, rows)}


def needs(target):
    try:
        reason = cost.missing(target)
    except ImportError as error:
        reason = str(error)
    return pytest.mark.skipif(reason is not None, reason=str(reason))


@needs("h200")
def test_traffic_on_an_h200():
    rows = compiled("h200", sizes=(1024,), implementations=("pallas", "xla"))
    traffic = {key: row.traffic for key, row in rows.items()}
    assert traffic["xla", "forward"] <= 3.0
    assert traffic["xla", "grad"] <= 8.2
    assert traffic["pallas", "forward"] <= 1.55
    assert traffic["pallas", "grad"] <= 4.7


@needs("h200")
def test_memory_of_the_gradient_on_an_h200():
    rows = compiled("h200", sizes=(2048,), implementations=("pallas",), modes=("grad",))
    # A quarter of what AlphaFold 2's module takes there.
    assert rows["pallas", "grad"].temp_bytes <= 2240 * MIB / 4


@needs("a100")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_compile_for_an_a100(dtype):
    rows = compiled("a100", sizes=(256,), implementations=("pallas",), modes=("grad",), dtype=dtype)
    assert rows["pallas", "grad"].temp_bytes


@needs("h200")
def test_kernels_on_bfloat16_compile_for_an_h200():
    rows = compiled(
        "h200", sizes=(256,), implementations=("pallas",), modes=("grad",), dtype="bfloat16"
    )
    assert rows["pallas", "grad"].temp_bytes


@pytest.mark.parametrize(
    "target", [pytest.param(name, marks=needs(name)) for name in ("h200", "a100", "rtx4090")]
)
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_compile_with_all_they_take(target, dtype, tmp_path):
    program = Path(__file__).parent / "on_a_target.py"
    root = program.parents[1]
    process = subprocess.run(
        [sys.executable, program, target, dtype],
        env=os.environ | {"PYTHONPATH": str(root)} | cost.environment(target, tmp_path),
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-2000:]
    temporary = json.loads(process.stdout.splitlines()[-1])
    # Blocks need less memory than the whole, and segments no array of their own.
    assert temporary["segments in blocks"] < temporary["whole"]
    assert [name for name, size in temporary.items() if size is None] == (
        [] if target == "h200" else ["most heads and channels"]
    )


@needs("v5e")
def test_compiles_for_a_tpu():
    rows = compiled("v5e", sizes=(256,), implementations=("xla", "pallas"), modes=("grad",))
    assert rows["xla", "grad"].temp_bytes
    assert "the device is a tpu" in rows["pallas", "grad"].note
