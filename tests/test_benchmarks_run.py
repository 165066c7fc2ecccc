"""Measuring: sweeps, wrong results, memory that runs out, Ctrl-C. No time is tested."""

import dataclasses
import itertools
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import candidates, demo, machine, memory, peers, runner, timing
from benchmarks.__main__ import main
from benchmarks.candidates import Candidate, JaxCandidate
from benchmarks.cases import Bench
from benchmarks.peers import Checkouts
from benchmarks.problems import Problem
from benchmarks.results import read
from benchmarks.runner import Runner
from benchmarks.timing import interleave

MACHINE = {
    "platform": "cpu",
    "device": "Some CPU",
    "cores": 2,
    "memory_gb": None,
    "system": "Linux",
    "bandwidth_gb_s": 20.0,
    "matmul_gflop_s": 100.0,
    "versions": {"jax": "0.10.2"},
    "environment": {},
}


def test_machine_measures_its_rates(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    monkeypatch.setattr(machine, "_CPU_SIZES", (2**10, 16))
    described = machine.describe("float32")
    assert described["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "HOME" not in described["environment"]
    assert described.keys() == MACHINE.keys()
    assert described["bandwidth_gb_s"] > 0
    assert described["matmul_gflop_s"] > 0
    assert described["versions"]["jax"] == jax.__version__


# A world where all there is to compute is the double of x.


DOUBLE = JaxCandidate("reference", "reference", lambda inputs: 2.0 * inputs["x"])


@dataclasses.dataclass(frozen=True)
class _Peer(Candidate):
    """Doubles x, as the stand-in for this project does; then something is done to the result."""

    tamper: Callable[[Any], Any]

    def prepare(self, copies, mode):
        prepared = DOUBLE.prepare(copies, mode)
        return prepared._replace(start=lambda i: self.tamper(prepared.start(i)))


def _run(**fields):
    """Takes two samples, without repeating calls: as fast as it gets."""
    settings = {"model": "tiny", "repeats": 2, "min_sample_ms": 0.0}
    run = Runner(Bench(**(settings | fields)), MACHINE, Checkouts())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_MAX_COMPILE", 1)
        patch.setattr(timing, "_PAUSE_SECONDS", 0.0)
        run.run(on_case=lambda: None)
    return run.results


def _times(factor):
    return lambda result: jax.tree.map(lambda x: factor * x, result)


_wrong, _not_a_number = _times(1.01), _times(np.nan)


def _raise(error):
    def tamper(result):
        raise error

    return tamper


@pytest.fixture
def peer_that(monkeypatch):
    """Makes peers do things, in a world where all there is to compute is the double of x."""

    def normal(what, model, n, dtype, key):
        x = jnp.asarray(np.random.default_rng(0).normal(size=n).astype(dtype))
        return Problem({"x": x}, {}, target=x)

    def install(**tampers):
        fakes = {name: _Peer(name, name, tamper) for name, tamper in tampers.items()}
        monkeypatch.setattr(peers, "load_peer", lambda name, *_: fakes[name])
        monkeypatch.setattr(runner, "make_problem", normal)
        monkeypatch.setattr(candidates, "ours", lambda *_: DOUBLE)
        fields = {"what": ("core",), "modes": ("forward",), "peers": tuple(fakes), "sizes": (4,)}
        return fields | {"implementations": ("reference",)}

    return install


def test_wrong_results_get_no_time(peer_that):
    rows = _run(**peer_that(lucidrains=_wrong, openfold=_not_a_number)).rows
    assert [row.status for row in rows] == ["ok", "wrong", "wrong"]
    assert rows[1].error == pytest.approx(0.01, rel=1e-3)
    assert rows[1].note == "output off by 1.0e-02 of the largest element, allowed 1.0e-04"
    assert rows[2].error is None  # there is no infinity in JSON
    assert rows[2].errors == {"output": None}
    assert all(row.median_ms is None and row.speedup is None for row in rows[1:])


def test_wrong_gradients_are_told_from_right_values(peer_that):
    def off_in_x(result):
        return result | {"x": 1.01 * result["x"]} if "x" in result else result

    fields = peer_that(lucidrains=off_in_x) | {"modes": ("forward", "grad")}
    rows = _run(**fields).rows
    assert [row.status for row in rows] == ["ok", "ok", "ok", "wrong"]
    assert rows[3].errors["value"] < 1e-6
    assert rows[3].note.startswith("x off by 1.0e-02")


def test_what_is_off_as_much_as_alphafold_is_timed(peer_that):
    fields = peer_that(alphafold=_wrong, lucidrains=_times(1.03), openfold=_times(1.05))
    rows = _run(**fields | {"what": ("module",)}).rows
    assert [row.status for row in rows] == ["ok", "ok", "ok", "wrong"]
    assert rows[2].median_ms is not None
    assert rows[1].speedup == 1.0
    assert rows[2].note == (
        "ill-conditioned: output off by 3.0e-02 of the largest element, AlphaFold 2 by 1.0e-02"
    )
    assert "allowed 4.0e-02" in rows[3].note
    # Of the core AF2 has no function: the reference's error counts.
    rows = _run(**fields).rows
    assert [row.status for row in rows] == ["ok", "wrong", "wrong", "wrong"]
    assert rows[0].speedup == 1.0


def test_nothing_excuses_what_is_not_a_number(peer_that):
    fields = peer_that(alphafold=_not_a_number, lucidrains=_wrong, openfold=_not_a_number)
    statuses = [row.status for row in _run(**fields | {"what": ("module",)}).rows]
    assert statuses == ["ok", "wrong", "wrong", "wrong"]


def test_without_alphafold_the_reference_is_computed_for_its_error(peer_that, monkeypatch):
    def rounded(inputs):
        x = inputs["x"]
        return x if x.dtype == np.float64 else jax.lax.reduce_precision(x, 8, 3)

    fields = peer_that(lucidrains=_times(0.51), openfold=_times(0.6))
    monkeypatch.setattr(
        candidates, "ours", lambda *_: JaxCandidate("reference", "reference", rounded)
    )
    rows = _run(**fields | {"implementations": ()}).rows
    assert [row.status for row in rows] == ["ok", "wrong"]


def test_results_beyond_the_cap_are_checked_against_float32(peer_that):
    rows = _run(**peer_that(lucidrains=_wrong), float64_max_size=3).rows
    assert [(row.status, row.error) for row in rows] == [("ok", None), ("wrong", None)]


def test_compilations_are_repeated_from_nothing(monkeypatch):
    cleared, seconds = [], iter([0.0, 3.0, 10.0, 11.0, 20.0, 22.0])
    monkeypatch.setattr(jax, "clear_caches", lambda: cleared.append(1))
    monkeypatch.setattr(candidates.time, "perf_counter", lambda: next(seconds))
    monkeypatch.setattr(candidates, "_ENOUGH_COMPILE_SECONDS", 10.0)
    problem = Problem({"x": jnp.ones(3)}, {}, target=jnp.ones(3))
    assert DOUBLE.prepare([problem], "forward").compile_seconds == 2.0  # the median
    assert len(cleared) == 3


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 8 bytes.\nmore"),
        MemoryError("no memory"),
        type("OutOfMemoryError", (RuntimeError,), {})("CUDA is full"),  # as PyTorch's is called
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_running_out_of_memory_puts_out_one_candidate(peer_that, error):
    rows = _run(**peer_that(lucidrains=_raise(error), openfold=lambda x: x)).rows
    assert [row.status for row in rows] == ["ok", "out of memory", "ok"]
    assert rows[1].note == str(error).splitlines()[0]


def test_running_out_of_memory_while_timed(peer_that):
    calls = itertools.count()

    def tamper(result):
        if next(calls) == 4:  # a check, two warm-ups and a sample went well
            raise MemoryError("no memory")
        return result

    rows = _run(**peer_that(lucidrains=tamper, openfold=lambda x: x)).rows
    assert [row.status for row in rows] == ["ok", "out of memory", "ok"]
    assert [row.samples for row in rows] == [2, 0, 2]


def test_what_a_candidate_cannot_do_is_said(peer_that):
    rows = _run(**peer_that(lucidrains=_raise(NotImplementedError("only on Mars")))).rows
    assert (rows[1].status, rows[1].note) == ("unsupported", "only on Mars")


def test_other_errors_are_raised(peer_that):
    with pytest.raises(RuntimeError, match="a bug"):
        _run(**peer_that(lucidrains=_raise(RuntimeError("a bug"))))


def test_one_size_that_does_not_fit_leaves_the_others(peer_that, monkeypatch):
    # inputs_2d of 4 residues takes 384 bytes, that of 100 takes 240 kB.
    monkeypatch.setattr(memory, "free_bytes", lambda: 100_000)
    rows = _run(**peer_that() | {"sizes": (4, 100)}).rows
    assert [(row.n, row.status) for row in rows] == [(4, "ok"), (100, "out of memory")]
    assert rows[1].note == "inputs_2d needs 0.0 GB, 0.0 GB are free"


def test_a_candidate_that_needs_too_much_is_not_started(peer_that, monkeypatch):
    fields = peer_that(lucidrains=lambda x: x)
    real = _Peer.prepare
    monkeypatch.setattr(
        _Peer,
        "prepare",
        lambda self, *args: real(self, *args)._replace(
            start=_raise(AssertionError("it was started")), required_bytes=10**18
        ),
    )
    rows = _run(**fields).rows
    assert [row.status for row in rows] == ["ok", "out of memory"]
    assert rows[1].note.startswith("it needs 1000000000.0 GB, ")


@pytest.fixture
def no_demonstration(monkeypatch):
    monkeypatch.setattr(machine, "describe", lambda dtype: MACHINE)
    monkeypatch.setattr(
        demo, "run", lambda *_: {"protein": "", "residues": 1, "moved": [], "agreement": []}
    )


def test_program_measures_and_writes(no_demonstration, peer_that, tmp_path, capsys):
    peer_that()
    options = "--model tiny --sizes 4 --what core --peers none --repeats 2 --out"
    path = tmp_path / "x.json"
    assert main([*options.split(), str(path)]) == 0
    found = read(path)
    assert found.is_complete
    assert found.demonstration["residues"] == 1
    assert found.settings["sizes"] == [4]
    assert {row.status for row in found.rows} == {"ok"}
    assert "attention core, N = 4, float32" in capsys.readouterr().out


def test_interrupted_program_keeps_what_was_measured(
    no_demonstration, peer_that, tmp_path, capsys, monkeypatch
):
    peer_that()
    calls = itertools.count()

    def interrupted(*args, **kwargs):
        if next(calls) == 1:
            raise KeyboardInterrupt
        interleave(*args, **kwargs)

    monkeypatch.setattr(runner, "interleave", interrupted)
    path = tmp_path / "x.json"
    options = "--model tiny --sizes 4,5 --modes forward --what core --peers none --repeats 2 --out"
    assert main([*options.split(), str(path)]) == 130
    found = read(path)
    assert not found.is_complete
    assert {row.n for row in found.rows} == {4}
    output = capsys.readouterr()
    assert "Interrupted." in output.err
    assert "attention core, N = 4, float32" in output.out


@pytest.mark.slow
def test_ctrl_c_leaves_a_valid_file(tmp_path):
    path = tmp_path / "x.json"
    options = "--model tiny --sizes 4,2000 --modes grad --what core --peers none --repeats 2 --out"
    program = subprocess.Popen(
        [sys.executable, "-m", "benchmarks", *options.split(), str(path)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        cwd=Path(__file__).parents[1], start_new_session=True,
        # A background job of a shell ignores Ctrl-C, and so would the program that it starts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while not path.exists():  # written after the first size
        time.sleep(0.1)
        assert program.poll() is None
    time.sleep(1)
    program.send_signal(signal.SIGINT)
    output, _ = program.communicate(timeout=120)
    assert program.returncode == 130, output
    assert {row.n for row in read(path).rows} == {4}
    assert "The run was interrupted" in output
