"""Inside of a user's `jax.shard_map`: a process with eight devices runs `in_a_shard_map.py`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parent / "in_a_shard_map.py"
EIGHT_DEVICES = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
}


@pytest.mark.parametrize("mark", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_training_steps_over_eight_devices(mark):
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-m", mark, str(PROGRAM)]
    result = subprocess.run(command, env=EIGHT_DEVICES, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
