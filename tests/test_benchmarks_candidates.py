"""What is measured: problems, this project's and AF2's modules, peers, and the demonstration.

Every program here is compiled once, of the smallest sizes; the harness around them is tested with
stand-ins in `test_benchmarks_run.py`.
"""

import dataclasses
import functools
import itertools
import subprocess
import sys
import types
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import candidates, checks, demo, layouts, peers, results
from benchmarks.cases import Bench, Model
from benchmarks.peers import Checkouts, Missing, load_peer
from benchmarks.problems import make_problem, squared_distance
from benchmarks.runner import Runner
from benchmarks.structure import Backbone, read_shipped

MACHINE = {"platform": "cpu", "bandwidth_gb_s": 20.0, "matmul_gflop_s": 100.0}
TINY = Model.from_name("tiny")
# 100 units in the last place: sums of some 10 numbers, twice for gradients.
ERROR = 100 * 2**-23
BEFORE_RELU = ("transition", "transition_1")  # in AF2's structure module


@pytest.fixture(scope="module", autouse=True)
def quick_to_compile():
    """Once, and with few of XLA's optimisations; times to compile are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(candidates, "_MAX_COMPILE", 1)
        patch.setattr(jax, "clear_caches", lambda: None)
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()  # of what others in this process would otherwise run


def _run(**fields):
    settings = {"sizes": (5,), "model": "tiny", "repeats": 2, "min_sample_ms": 0.0}
    run = Runner(Bench(**(settings | fields)), MACHINE, Checkouts())
    run.run(on_case=lambda: None)
    return run.results


# Problems.


def test_problems_hold_no_zeros_and_are_fresh():
    one, two = (make_problem("core", TINY, 5, "float32", jax.random.key(i)) for i in (0, 1))
    pair, other = one.differentiable["inputs_2d"], two.differentiable["inputs_2d"]
    assert pair.shape == (5, 5, 6)
    assert np.all(pair != 0)
    assert np.all(pair != other)
    assert 0.5 < np.std(pair) < 1.5
    assert all(np.all(x != 0) for x in jax.tree.leaves(one.target))


def test_loss_is_the_squared_distance_in_float32():
    x = 1 + 2**-7  # the last digit of bfloat16
    output = {"a": jnp.array([x, 2.0], jnp.bfloat16), "b": jnp.array([[1e-3]])}
    target = {"a": jnp.array([0.0, 4.0], jnp.bfloat16), "b": jnp.array([[0.0]])}
    loss = squared_distance(output, target)
    assert loss.dtype == np.float32
    assert loss == pytest.approx(x**2 + 4 + 1e-6, rel=1e-7)


def test_gradient_is_that_of_the_loss_and_comes_with_its_value():
    candidate = candidates.JaxCandidate("", "", lambda inputs: 3 * inputs["x"])
    problem = make_problem("core", TINY, 5, "float32", jax.random.key(0))
    x, target = problem.differentiable["q_scalar"], problem.target["scalar"][..., :1]
    problem = problem._replace(differentiable={"x": x}, target=target)
    found = candidate.function("grad")(problem)
    assert found.keys() == {"value", "x"}
    np.testing.assert_allclose(found["value"], np.sum((3 * x - target) ** 2), rtol=1e-5)
    np.testing.assert_allclose(found["x"], 6 * (3 * x - target), rtol=1e-5)


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


# Sweeps over the real candidates. Results are compared with float64 in every one.


def _check_rows(found, modes, names):
    rows = {(row.mode, row.implementation): row for row in found.rows}
    assert list(rows) == list(itertools.product(modes, names))
    for row in found.rows:
        assert (row.status, row.samples) == ("ok", 2), row
        assert row.compile_s > 0
        assert row.error < ERROR, row
    assert found.missing == []
    return rows


def test_gradients_of_the_core():
    found = _run(what=("core",), modes=("grad",), implementations=("xla",), peers=("alphafold",))
    rows = _check_rows(found, ("grad",), ("xla",))  # AF2 has no function for it
    assert rows["grad", "xla"].errors.keys() >= {"value", "q_point", "inputs_2d", "weights"}


def test_results_of_the_module():
    names = ("devices_1", "alphafold_multimer")
    found = _run(modes=("forward",), implementations=(), devices=(1,), peers=names[1:])
    rows = _check_rows(found, ("forward",), names)
    for row in rows.values():
        assert row.errors.keys() == {"output"}
        assert row.speedup is None  # without AF2's monomer


@pytest.mark.slow
def test_gradients_of_the_module(monkeypatch):
    ours = candidates.ours("module", dataclasses.replace(TINY, variant="multimer"), "xla")
    monkeypatch.setattr(candidates, "all_ours", lambda *_: [ours])
    names = ("xla", "alphafold")
    found = _run(modes=("grad",), implementations=names[:1], peers=names[1:])
    rows = _check_rows(found, ("grad",), names)
    assert found.loss == "squared distance"
    for row in rows.values():
        assert row.errors.keys() == {"value", "parameters", "inputs_1d", "inputs_2d", "affine"}
        assert row.error == max(row.errors.values())
        base = rows["grad", "alphafold"].median_ms
        assert row.speedup == pytest.approx(base / row.median_ms)


def test_rows_over_devices_must_be_equally_many(monkeypatch):
    monkeypatch.setattr(jax, "make_mesh", lambda *_, **__: types.SimpleNamespace(size=2))
    monkeypatch.setattr(candidates, "RowSharding", lambda *_: None)
    (two,) = candidates.all_ours("module", TINY, Bench((5,), implementations=(), devices=(2,)))
    assert (two.name, two.label) == ("devices_2", "ipa_haiku, 2 devices")
    with pytest.raises(NotImplementedError, match="N must be a multiple of 2 devices"):
        two.arguments(make_problem("module", TINY, 5, "float32", jax.random.key(0)))


@pytest.mark.slow
def test_program_measures_rows_over_devices(tmp_path):
    options = "--model tiny --what module --sizes 4 --peers none --devices 1,2 --repeats 2 --out"
    command = [sys.executable, "-m", "benchmarks", *options.split(), str(tmp_path / "x.json")]
    root = Path(__file__).parents[1]
    subprocess.run([*command, "--implementations", "none"], check=True, cwd=root)
    found = results.read(tmp_path / "x.json")
    _check_rows(found, ("forward", "grad"), ("devices_1", "devices_2"))


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
    found = _run(what=(what,), modes=(mode,), pair_rank=2, peers=(), implementations=("xla",))
    rows = _check_rows(found, (mode,), ("xla", "xla_array"))
    assert all(row.speedup is None for row in rows.values())  # there is nothing to compare with


# AF2's structure module.


@pytest.fixture(scope="module")
def structure_problem():
    return make_problem("structure_module", TINY, 16, "float32", jax.random.key(0))


def test_structure_module_runs_with_our_attention_in_it(structure_problem, monkeypatch):
    from alphafold.model import folding

    from ipa_haiku import InvariantPointAttention

    original, made, init = folding.InvariantPointAttention, [], InvariantPointAttention.__init__

    @functools.wraps(init)
    def recorded(self, config, *args, **kwargs):
        made.append(config.num_head)
        init(self, config, *args, **kwargs)

    monkeypatch.setattr(InvariantPointAttention, "__init__", recorded)
    function = candidates.ours("structure_module", TINY, "xla").function("grad")
    gradient = jax.eval_shape(function, structure_problem)
    assert gradient.keys() == {"value", "parameters", "single", "pair"}
    assert made == [2]  # one set of weights for all layers
    assert folding.InvariantPointAttention is original


def test_no_relu_of_the_structure_module_is_near_its_kink(structure_problem):
    inputs = []

    def record(method, args, kwargs, context):
        output = method(*args, **kwargs)
        if context.method_name == "__call__" and context.module.name in BEFORE_RELU:
            jax.debug.callback(inputs.append, output)
        return output

    function = jax.jit(candidates.alphafold("structure_module", TINY).function("forward"))
    with hk.intercept_methods(record):
        result = jax.block_until_ready(function(structure_problem))["output"]
    assert jax.tree.map(np.shape, result) == jax.tree.map(np.shape, structure_problem.target)
    jax.effects_barrier()
    assert np.shape(inputs) == (2 * TINY.num_layer, 16, 8)
    assert np.min(np.abs(inputs)) > 0.1
    assert 0.2 < np.mean(np.array(inputs) > 0) < 0.8


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["forward", "grad"])
def test_structure_module_gives_alphafolds_result(mode):
    found = _run(
        sizes=(4,),
        what=("structure_module",),
        modes=(mode,),
        implementations=("xla",),
        peers=("alphafold",),
    )
    assert [row.status for row in found.rows] == ["ok", "ok"]
    # Each of the two layers hands its rounding on to the next.
    assert all(row.error < 2 * ERROR for row in found.rows)


def test_structure_module_is_left_out_where_it_cannot_be(monkeypatch):
    whats = ("core", "structure_module")
    run = functools.partial(Runner, machine=MACHINE, checkouts=Checkouts())
    found = run(Bench(sizes=(4,), what=whats, dtype="bfloat16", peers=())).results
    reason = "AlphaFold 2's structure module takes float32 only"
    assert found.missing == [{"name": "structure_module", "reason": reason}]
    monkeypatch.delattr(benchmarks, "structure_module", raising=False)
    monkeypatch.setitem(sys.modules, "benchmarks.structure_module", None)
    found = run(Bench(sizes=(4,), what=whats, peers=())).results
    assert "pip install 'alphafold-colabfold" in found.missing[0]["reason"]


# Peers.


def test_missing_peers_say_how_to_install_them(monkeypatch):
    monkeypatch.setitem(sys.modules, "alphafold.model", None)
    missing = load_peer("alphafold", "module", TINY, Checkouts())
    assert missing == Missing("alphafold", f"needs alphafold.model: {peers._ALPHAFOLD}")
    assert load_peer("alphafold", "core", TINY, Checkouts()) is None
    for name in ("openfold", "flash_ipa"):
        assert "git clone" in load_peer(name, "module", TINY, Checkouts()).reason


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
    model = dataclasses.replace(TINY, ipa=dataclasses.replace(TINY.ipa, num_scalar_v=4))
    peer = load_peer(name, "module", model, Checkouts())
    problem = make_problem("module", model, 5, "float32", jax.random.key(0))
    prepared = peer.prepare([problem], mode)
    reference = candidates.reference("module", model)
    expected = peer.in_layout(checks.float64_result(reference, problem, mode))
    for _ in range(2):  # no gradient is added to that of the run before
        found = prepared.groups(prepared.start(0))
        assert max(checks.group_errors(found, expected).values()) < ERROR


# The demonstration.


def test_demonstration_on_a_few_residues():
    shipped = read_shipped()
    few = Backbone("few", *(x[:5] for x in shipped[1:]))
    found = demo.run(few, TINY, seed=0)
    assert found["residues"] == 5
    assert [x["distance"] for x in found["moved"]] == [0.0, 10.0, 1e3, 1e4]
    for moved in found["moved"]:
        # float32 holds a coordinate to 6e-8 of its distance from the origin; that is 1,000 units
        # of 10 Å at most, and a logit changes by some 10 times as much.
        allowed = ERROR * (1 + moved["distance"] / 10)
        for name in ("attention", "output", "rounding", "alphafold"):
            assert moved[name] <= allowed, (name, moved)
    assert found["moved"][3]["rounding"] > 0
    by_name = {x["implementation"]: x for x in found["agreement"]}
    assert by_name["reference"]["identical"] == 1.0
    assert by_name["default"]["error"] < ERROR
