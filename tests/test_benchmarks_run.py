"""Measuring: statistics, sweeps, wrong results, memory that runs out, Ctrl-C. No time is tested."""

import dataclasses
import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from benchmarks import candidates, checks, demo, layouts, machine, memory, peers, runner
from benchmarks.__main__ import main
from benchmarks.candidates import JaxCandidate
from benchmarks.cases import Bench, Model
from benchmarks.peers import Checkouts, Missing, load_peer
from benchmarks.problems import Problem, make_problem
from benchmarks.results import read
from benchmarks.runner import Runner
from benchmarks.structure import Backbone, read_shipped
from benchmarks.timing import interleave
from ipa_haiku import InvariantPointAttention

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
# Two samples, without repeating calls: as fast as it gets.
QUICK = {"model": "tiny", "repeats": 2, "min_sample_ms": 0.0, "implementations": ("reference",)}


def _run(**fields):
    run = Runner(Bench(**(QUICK | fields)), MACHINE, Checkouts())
    run.run(on_case=lambda: None)
    return run.results


def test_machine_measures_its_rates(monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
    described = machine.describe("float32")
    assert described["environment"]["GLIBC_TUNABLES"] == "glibc.malloc.hugetlb=1"
    assert "HOME" not in described["environment"]
    assert described.keys() == MACHINE.keys()
    assert described["bandwidth_gb_s"] > 0
    assert described["matmul_gflop_s"] > 0
    assert described["versions"]["jax"] == jax.__version__


def test_problems_hold_no_zeros_and_are_fresh():
    model = Model.from_name("tiny")
    one, two = (make_problem("core", model, 5, "float32", jax.random.key(i)) for i in (0, 1))
    pair, other = one.differentiable["inputs_2d"], two.differentiable["inputs_2d"]
    assert pair.shape == (5, 5, 6)
    assert np.all(pair != 0)
    assert np.all(pair != other)
    assert 0.5 < np.std(pair) < 1.5


def test_multimer_layout_is_the_multimers_tree():
    model = Model.from_name("af2_multimer")
    multimer = jax.eval_shape(
        lambda key: layouts.to_multimer(
            make_problem("module", model, 2, "float32", key).differentiable["parameters"], model
        ),
        jax.random.key(0),
    )
    assert multimer["invariant_point_attention/v_scalar_projection"]["weights"].shape == (
        384, 12, 16,
    )  # fmt: skip
    points = multimer["invariant_point_attention/k_point_projection/point_projection"]
    assert (points["weights"].shape, points["bias"].shape) == ((384, 12, 12), (12, 12))


# Sweeps.


@pytest.mark.parametrize(
    ("what", "modes", "implementations", "peers", "baseline"),
    [
        ("core", ("forward", "grad"), ("reference", "xla"), ("alphafold",), "reference"),
        ("module", ("forward",), ("xla",), ("alphafold", "alphafold_multimer"), "alphafold"),
        ("module", ("grad",), ("xla",), ("alphafold_multimer",), None),
    ],
)
def test_every_candidate_computes_the_reference(what, modes, implementations, peers, baseline):
    found = _run(
        sizes=(5,), what=(what,), modes=modes, implementations=implementations, peers=peers
    )
    names = (*implementations, *(() if what == "core" else peers))
    rows = {(row.mode, row.implementation): row for row in found.rows}
    assert list(rows) == list(itertools.product(modes, names))
    for row in found.rows:
        assert (row.status, row.samples) == ("ok", 2), row
        assert row.compile_s > 0
        # 100 units in the last place: sums of some 10 numbers, twice for gradients.
        assert row.error < 100 * 2**-23, row
        if baseline:
            base = rows[row.mode, baseline].median_ms
            assert row.speedup == pytest.approx(base / row.median_ms)
        else:
            assert row.speedup is None
    assert found.missing == []


@pytest.mark.parametrize(
    ("what", "mode"),
    [
        ("core", "forward"),
        pytest.param("core", "grad", marks=pytest.mark.slow),
        pytest.param("module", "forward", marks=pytest.mark.slow),
        pytest.param("module", "grad", marks=pytest.mark.slow),
    ],
)
def test_factors_are_measured_beside_their_array(what, mode):
    found = _run(
        sizes=(5,), what=(what,), modes=(mode,), pair_rank=2, peers=(), implementations=("xla",)
    )
    rows = {(row.mode, row.implementation): row for row in found.rows}
    assert {name for _, name in rows} == {"xla", "xla_array"}
    for row in rows.values():
        assert row.status == "ok"
        assert row.error < 100 * 2**-23


def test_multimer_model_is_compared_with_the_multimer():
    tiny = Model.from_name("tiny")
    model = dataclasses.replace(tiny, variant="multimer")
    problem = make_problem("module", tiny, 5, "float32", jax.random.key(0))
    expected = checks.float64_result(candidates.reference("module", model), problem, "forward")
    for candidate in (candidates.ours("module", model, None), candidates.alphafold_multimer(model)):
        prepared = candidate.prepare([problem], "forward")
        groups = prepared.groups(prepared.start(0))
        assert checks.largest_error(groups, expected) < 100 * 2**-23


def test_structure_module_runs_with_another_attention_in_it():
    from alphafold.model import folding

    from benchmarks import structure_module

    original, made = folding.InvariantPointAttention, []

    def attention(config, global_config):
        made.append(config.num_head)
        return InvariantPointAttention(config, global_config)

    def forward(key):
        problem = make_problem("structure_module", model, 4, "float32", key)
        return structure_module.forward(
            model, attention, problem.differentiable, problem.constant
        ), problem.cotangent

    model = Model.from_name("tiny")
    result, cotangent = jax.eval_shape(forward, jax.random.key(0))
    assert jax.tree.map(np.shape, result) == jax.tree.map(np.shape, cotangent)
    assert made == [2]  # one set of weights for all layers
    assert folding.InvariantPointAttention is original


@pytest.mark.slow
def test_structure_module_gives_alphafolds_result():
    found = _run(
        sizes=(4,),
        what=("structure_module",),
        modes=("forward",),
        implementations=("xla",),
        peers=("alphafold",),
    )
    assert [row.status for row in found.rows] == ["ok", "ok"]
    # Each of the two layers hands its rounding on to the next.
    assert all(row.error < 200 * 2**-23 for row in found.rows)


class _Peer:
    """Doubles x, as the stand-in for this project does; then something is done to the result."""

    is_exact = True

    def __init__(self, name, tamper):
        self.name, self.label, self._tamper = name, name, tamper

    def prepare(self, copies, mode):
        prepared = DOUBLE.prepare(copies, mode)
        return prepared._replace(start=lambda i: self._tamper(prepared.start(i)))


DOUBLE = JaxCandidate("reference", "reference", lambda inputs, _: 2.0 * inputs["x"])


def _wrong(result):
    return jax.tree.map(lambda x: 1.01 * x, result)


def _not_a_number(result):
    return jax.tree.map(lambda x: x * np.nan, result)


def _raise(error):
    def tamper(result):
        raise error

    return tamper


@pytest.fixture
def peer_that(monkeypatch):
    """Makes peers do things, in a world where all there is to compute is the double of x."""

    def double_of_normal(what, model, n, dtype, key):
        x = jax.random.normal(key, (n,), dtype)
        return Problem({"x": x}, {}, cotangent=x)

    def install(**tampers):
        fakes = {name: _Peer(name, tamper) for name, tamper in tampers.items()}
        monkeypatch.setattr(runner, "load_peer", lambda name, *_: fakes[name])
        monkeypatch.setattr(runner, "make_problem", double_of_normal)
        monkeypatch.setattr(candidates, "ours", lambda *_: DOUBLE)
        return {"what": ("core",), "modes": ("forward",), "peers": tuple(fakes), "sizes": (4,)}

    return install


def test_wrong_results_get_no_time(peer_that):
    rows = _run(**peer_that(lucidrains=_wrong, openfold=_not_a_number)).rows
    assert [row.status for row in rows] == ["ok", "wrong", "wrong"]
    assert rows[1].error == pytest.approx(0.01, rel=1e-3)
    assert "off by 1.0e-02" in rows[1].note
    assert rows[2].error is None  # there is no infinity in JSON
    assert all(row.median_ms is None and row.speedup is None for row in rows[1:])


def test_results_beyond_the_cap_are_checked_against_float32(peer_that):
    rows = _run(**peer_that(lucidrains=_wrong), float64_max_size=3).rows
    assert [(row.status, row.error) for row in rows] == [("ok", None), ("wrong", None)]


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


# Peers.


def test_missing_peers_say_how_to_install_them(monkeypatch):
    model = Model.from_name("tiny")
    monkeypatch.setitem(__import__("sys").modules, "alphafold.model", None)
    missing = load_peer("alphafold", "module", model, Checkouts())
    assert missing == Missing("alphafold", f"needs alphafold.model: {peers._ALPHAFOLD}")
    assert load_peer("alphafold", "core", model, Checkouts()) is None
    for name in ("openfold", "flash_ipa"):
        assert "git clone" in load_peer(name, "module", model, Checkouts()).reason


def test_checkouts_are_checked(tmp_path):
    Checkouts().check()
    with pytest.raises(ValueError, match="is no checkout of OpenFold"):
        Checkouts(openfold=str(tmp_path)).check()
    file = tmp_path / "openfold" / "model" / "structure_module.py"
    file.parent.mkdir(parents=True)
    file.touch()
    Checkouts(openfold=str(tmp_path)).check()


@pytest.mark.torch
@pytest.mark.parametrize("name", ["lucidrains", "esmfold"])
@pytest.mark.parametrize("mode", ["forward", "grad"])
def test_torch_peers_compute_the_reference(name, mode):
    tiny = Model.from_name("tiny")
    model = dataclasses.replace(tiny, ipa=dataclasses.replace(tiny.ipa, num_scalar_v=4))
    peer = load_peer(name, "module", model, Checkouts())
    problem = make_problem("module", model, 5, "float32", jax.random.key(0))
    prepared = peer.prepare([problem], mode)
    reference = candidates.reference("module", model)
    expected = checks.float64_result(reference, problem, mode)
    if mode == "grad":
        expected["parameters"] = peer.layout(expected["parameters"])
    assert checks.largest_error(prepared.groups(prepared.start(0)), expected) < 100 * 2**-23


# The demonstration.


def test_demonstration_on_a_few_residues():
    shipped = read_shipped()
    few = Backbone("few", *(x[:8] for x in shipped[1:]))
    found = demo.run(few, Model.from_name("tiny"), seed=0)
    assert found["residues"] == 8
    assert [x["distance"] for x in found["moved"]] == [0.0, 10.0, 1e3, 1e4]
    for moved in found["moved"]:
        # float32 holds a coordinate to 6e-8 of its distance from the origin; that is 1,000 units
        # of 10 Å at most, and a logit changes by some 10 times as much.
        allowed = 100 * 2**-23 * (1 + moved["distance"] / 10)
        for name in ("attention", "output", "rounding", "alphafold"):
            assert moved[name] <= allowed, (name, moved)
    assert found["moved"][3]["rounding"] > 0
    by_name = {x["implementation"]: x for x in found["agreement"]}
    assert by_name["reference"]["identical"] == 1.0
    assert by_name["default"]["error"] < 100 * 2**-23
