"""The multimer module against the real AlphaFold-Multimer, and its own promises.

`python tests/test_folding_multimer.py` rewrites `tests/data/parameters_multimer.json`.
"""

import dataclasses
import functools
import inspect
import json
import types
from pathlib import Path

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import folding_multimer as af2
from alphafold.model.geometry import Rigid3Array, Rot3Array, Vec3Array
from alphafold.model.quat_affine import QuatAffine as AF2QuatAffine
from implementations import QUICKLY, REFERENCE_IF_SLOW

from ipa_haiku import IPAConfig, QuatAffine
from ipa_haiku.folding_multimer import InvariantPointAttention
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.quat_affine import quat_to_rot, rot_list_to_tensor
from ipa_haiku.testing import assert_se3_invariant, assert_within_error_budget, random_frames

GOLDEN = Path(__file__).parent / "data" / "parameters_multimer.json"
MASKS = ["full", "padded", "holed", "zero"]
SCOPE = "invariant_point_attention"


def rigid3array(rotation, translation):
    return Rigid3Array(Rot3Array.from_array(rotation), Vec3Array.from_array(translation))


def transform(cls, sizes, make_frames, zero_init=False, **options):
    """`cls` called with `arguments`."""

    def call(inputs_1d, inputs_2d, mask, rotation, translation):
        module = cls(sizes.config, types.SimpleNamespace(zero_init=zero_init), **options)
        return module(inputs_1d, inputs_2d, mask, rigid=make_frames(rotation, translation))

    return hk.without_apply_rng(hk.transform(call))


def af2_module(sizes, **options):
    return transform(af2.InvariantPointAttention, sizes, rigid3array, **options)


def our_module(sizes, make_frames=lambda *pair: pair, **options):
    return transform(InvariantPointAttention, sizes, make_frames, **options)


@pytest.fixture(scope="session")
def make_arguments(make_inputs):
    """As `make_inputs`, with rotation [..., N, 3, 3] and translation [..., N, 3] as frames."""

    def make_arguments(sizes, n, **options):
        inputs_1d, inputs_2d, mask, affine = make_inputs(sizes, n, **options)
        rotation = rot_list_to_tensor(quat_to_rot(affine[..., :4]))
        return inputs_1d, inputs_2d, mask, rotation, affine[..., 4:]

    return make_arguments


# --- against AF2 ---------------------------------------------------------------------------------


def largest(x):
    return float(np.max(np.abs(x)))


def difference(actual, expected):
    return largest(np.asarray(actual, np.float64) - np.asarray(expected, np.float64))


def test_the_signature_is_af2s():
    for name in ("__init__", "__call__"):
        ours = inspect.signature(getattr(InvariantPointAttention, name)).parameters
        theirs = inspect.signature(getattr(af2.InvariantPointAttention, name)).parameters
        assert list(ours)[: len(theirs)] == list(theirs)
        extra = list(ours.values())[len(theirs) :]
        assert all(p.kind in (p.KEYWORD_ONLY, p.VAR_KEYWORD) for p in extra)
    assert ours["rigid"].default is inspect.Parameter.empty


@pytest.mark.parametrize(
    "size", ["af2", *(pytest.param(size, marks=pytest.mark.slow) for size in ("tiny", "odd"))]
)
def test_initial_parameters_have_af2s_bits(size, sizes_of, make_arguments, count_bits):
    sizes, modules = sizes_of(size), (our_module, af2_module)
    arguments = make_arguments(sizes, 3)

    # All four at once: XLA compiles a draw that they share only once.
    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def initial(key):
        return {
            zero_init: [
                module(sizes, zero_init=zero_init).init(key, *arguments) for module in modules
            ]
            for zero_init in (True, False)
        }

    for zero_init, (ours, theirs) in initial(jax.random.key(7)).items():
        assert jax.tree.map(jnp.shape, ours) == jax.tree.map(jnp.shape, theirs)
        assert count_bits("sets of initial parameters of the multimer", ours, theirs)
        assert np.any(ours[f"{SCOPE}/output_projection"]["weights"]) != zero_init


def test_no_global_config_means_zero_init(sizes_of, make_arguments):
    sizes = sizes_of("tiny")

    @hk.transform
    def call(inputs_1d, inputs_2d, mask, rotation, translation):
        module = InvariantPointAttention(sizes.config)
        return module(inputs_1d, inputs_2d, mask, (rotation, translation))

    @jax.jit
    def weights(*arguments):
        params = call.init(jax.random.key(0), *arguments)
        return params[f"{SCOPE}/output_projection"]["weights"]

    assert not np.any(weights(*make_arguments(sizes, 2)))


@pytest.fixture
def af2_in_float64(monkeypatch):
    """Lets AF2's geometry, which insists on float32, hold float64."""
    for cls in (Rot3Array, Vec3Array):
        for field in dataclasses.fields(cls):
            monkeypatch.setattr(field, "metadata", types.MappingProxyType({}))


def outputs_and_gradients(module, **options):
    """Compiles (params, arguments, cotangent) -> outputs and gradients.

    Gradients are grouped: the weights and the bias of a projection have one scale, and so have
    rotations and translations. Parts of such a group can be zero but for rounding: the softmax does
    not see the bias of `attention_2d`, and one residue alone does not see its translation.
    """

    @functools.partial(jax.jit, **options)
    def compute(params, arguments, cotangent):
        inputs_1d, inputs_2d, mask, *frames = arguments

        def apply(params, inputs_1d, inputs_2d, frames):
            return module.apply(params, inputs_1d, inputs_2d, mask, *frames)

        output, pull_back = jax.vjp(apply, params, inputs_1d, inputs_2d, frames)
        of_params, of_1d, of_2d, of_frames = pull_back(cotangent)
        groups = of_params | {"inputs_1d": of_1d, "inputs_2d": of_2d, "frames": of_frames}
        return output, {
            name: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(group)])
            for name, group in groups.items()
        }

    return compute


def as_float64(tree):
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float64), jax.device_get(tree))


@pytest.fixture(scope="module")
def case(sizes_of, make_arguments, make_params):
    """From a size, N and a mask to params, arguments and a cotangent."""

    @functools.cache
    def case(size, n, mask, seed=0):
        sizes = sizes_of(size)
        arguments = make_arguments(sizes, n, mask=mask, seed=seed)
        params = make_params(af2_module(sizes), *arguments, seed=seed)
        cotangent = np.random.default_rng(seed).normal(size=(n, sizes.config.num_channel))
        return params, arguments, cotangent.astype(np.float32)

    return case


@pytest.fixture(scope="module")
def compiled(sizes_of):
    """From a size, and an implementation or None for AF2, to `outputs_and_gradients`."""

    @functools.cache
    def compiled(size, implementation, quickly=False):
        sizes = sizes_of(size)
        options = {"compiler_options": QUICKLY} if quickly else {}
        if implementation is None:
            return outputs_and_gradients(af2_module(sizes), **options)
        return outputs_and_gradients(our_module(sizes, implementation=implementation), **options)

    return compiled


CASES = [
    *(pytest.param("af2", n, marks=pytest.mark.slow) for n in (1, 2, 17, 64)),
    ("odd", 17),
]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("size", "n"), CASES)
def test_reference_is_af2(size, n, mask, case, compiled, count_bits):
    ours = compiled(size, "reference")(*case(size, n, mask))
    theirs = compiled(size, None)(*case(size, n, mask))
    count_bits(f"outputs of the multimer (N and masks), {size} sizes", ours[0], theirs[0])
    assert difference(ours[0], theirs[0]) <= 1e-6 * largest(theirs[0])
    assert ours[1].keys() == theirs[1].keys()
    for name, expected in theirs[1].items():
        assert difference(ours[1][name], expected) <= 1e-6 * largest(expected), name


@pytest.mark.slow
@pytest.mark.usefixtures("af2_in_float64")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("size", ["af2", "odd"])
def test_reference_is_af2_in_float64(size, mask, case, compiled):
    with enable_x64(True):
        arguments = as_float64(case(size, 17, mask))
        ours, theirs = compiled(size, "reference")(*arguments), compiled(size, None)(*arguments)
    # The mask term of 1e5 costs 5 of 16 digits, sums of 64 terms one more.
    eps = float(np.finfo(np.float64).eps) * 1e6
    assert difference(ours[0], theirs[0]) <= eps * largest(theirs[0])
    for name, expected in theirs[1].items():
        assert difference(ours[1][name], expected) <= eps * largest(expected), name


@pytest.mark.usefixtures("af2_in_float64")
@pytest.mark.parametrize("mask", ["full", "padded", "holed"])
@pytest.mark.parametrize(
    ("size", "n"),
    [("odd", 17), *(pytest.param("af2", n, marks=pytest.mark.slow) for n in (17, 64))],
)
@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_error_budget(implementation, size, n, mask, case, compiled):
    """At most twice AF2's own error, in outputs and gradients of the rows that count."""
    results = []
    # With three draws the gradient of three point weights was off by 2.8 times AF2's error in one
    # case; over 240 draws of that case by 1.1 times.
    for seed in range(12):
        params, arguments, cotangent = case(size, n, mask, seed)
        rows = np.asarray(arguments[2])
        arguments = params, arguments, cotangent * rows
        fast, af2_result = (
            compiled(size, implementation)(*arguments),
            compiled(size, None)(*arguments),
        )
        with enable_x64(True):
            exact = compiled(size, None, quickly=True)(*as_float64(arguments))
        draws = jax.device_get((fast, af2_result, exact))
        results.append([(output * rows, gradients) for output, gradients in draws])
    fast, af2_result, exact = (
        jax.tree.map(lambda *x: np.stack(x), *draws) for draws in zip(*results)
    )
    assert_within_error_budget(fast, af2_result, exact)


# --- frames, and what the module promises --------------------------------------------------------

FRAMES = {
    "rigid3array": rigid3array,
    "af2_quat_affine": lambda r, t: AF2QuatAffine(None, t, rotation=r, unstack_inputs=True),
    "quat_affine": lambda r, t: QuatAffine(None, t, rotation=r, unstack_inputs=True),
    "pair": lambda r, t: (r, t),
}


@pytest.mark.parametrize("kind", FRAMES)
def test_frames_of_every_kind(kind, case, sizes_of):
    params, arguments, _ = case("tiny", 5, "padded")
    expected = jax.jit(our_module(sizes_of("tiny")).apply)(params, *arguments)
    module = our_module(sizes_of("tiny"), make_frames=FRAMES[kind])
    np.testing.assert_array_equal(jax.jit(module.apply)(params, *arguments), expected)


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_motion_of_all_residues_changes_nothing(implementation, case, sizes_of):
    params, (inputs_1d, inputs_2d, mask, *_), _ = case("tiny", 11, "padded")
    module = our_module(sizes_of("tiny"), FRAMES["pair"], implementation=implementation)

    def call(frames):
        rotation = rot_list_to_tensor(frames.rotation)
        translation = jnp.stack(frames.translation, axis=-1)
        return module.apply(params, inputs_1d, inputs_2d, mask, rotation, translation)

    # float32 keeps coordinates of 10 units to 6e-7, and the features of a small model are few.
    frames = random_frames(jax.random.key(0), 11)
    assert_se3_invariant(jax.jit(call), frames, key=jax.random.key(1), tolerance=2e-5)


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
@pytest.mark.parametrize("dist_epsilon", [pytest.param(1e-8, marks=pytest.mark.slow), 0.5])
def test_the_norm_is_clamped_as_in_af2(dist_epsilon, implementation, case, sizes_of):
    """Value points in the origins of the frames, all in one place: norms of zero."""
    sizes = sizes_of("tiny")
    params, (inputs_1d, inputs_2d, mask, rotation, _), cotangent = case("tiny", 5, "full")
    scope = f"{SCOPE}/v_point_projection/point_projection"
    params = params | {scope: jax.tree.map(jnp.zeros_like, params[scope])}
    arguments = inputs_1d, inputs_2d, mask, rotation, jnp.ones((5, 3))
    options = {"dist_epsilon": dist_epsilon}
    module = our_module(sizes, implementation=implementation, **options)
    ours, theirs = (
        outputs_and_gradients(x, compiler_options=QUICKLY)(params, arguments, cotangent)
        for x in (module, af2_module(sizes, **options))
    )
    assert difference(ours[0], theirs[0]) <= 1e-6 * largest(theirs[0])
    for name, expected in theirs[1].items():
        assert np.all(np.isfinite(ours[1][name])), name
        # The gradient jumps at the clamp: 1e-8 is less than what float32 leaves of zero.
        if implementation == "reference" or dist_epsilon > 1e-6:
            assert difference(ours[1][name], expected) <= 1e-5 * largest(expected), name


@pytest.mark.parametrize("implementation", REFERENCE_IF_SLOW)
def test_batches_are_loops(implementation, sizes_of, make_arguments, make_params):
    sizes = sizes_of("tiny")
    arguments = make_arguments(sizes, 6, mask="padded", batch=(2, 3))
    module = our_module(sizes, implementation=implementation)
    apply = jax.jit(module.apply, compiler_options=QUICKLY)
    params = make_params(module, *arguments)
    output = apply(params, *arguments)
    assert output.shape == (2, 3, 6, 8)
    for index in np.ndindex(2, 3):
        expected = apply(params, *(x[index] for x in arguments))
        assert difference(output[index], expected) <= 1e-6 * largest(expected)


def test_return_attention(case, sizes_of):
    params, arguments, _ = case("tiny", 5, "padded")

    @hk.transform
    def call(inputs_1d, inputs_2d, mask, *pair):
        module = InvariantPointAttention(sizes_of("tiny").config, implementation="reference")
        return module(inputs_1d, inputs_2d, mask, pair, return_attention=True)

    output, attention = call.apply(params, None, *arguments)
    expected = our_module(sizes_of("tiny"), implementation="reference").apply(params, *arguments)
    np.testing.assert_array_equal(output, expected)
    _, *terms = attention
    valid = np.flatnonzero(arguments[2][:, 0])
    weights = jax.nn.softmax(sum(terms)[:, valid][:, :, valid])
    np.testing.assert_allclose(attention.weights[:, valid][:, :, valid], weights, atol=1e-6)


# --- parameters ----------------------------------------------------------------------------------


def parameter_shapes():
    """Names and shapes at AF2's sizes."""

    def call():
        module = InvariantPointAttention(IPAConfig())
        frames = QuatAffine.identity(2)
        return module(jnp.zeros((2, 384)), jnp.zeros((2, 2, 128)), jnp.ones((2, 1)), frames)

    params = jax.eval_shape(hk.transform(call).init, jax.random.key(0))
    return {
        scope: {name: list(x.shape) for name, x in arrays.items()}
        for scope, arrays in params.items()
    }


def test_parameter_names_and_shapes():
    assert parameter_shapes() == json.loads(GOLDEN.read_text())


# --- bad input -----------------------------------------------------------------------------------

NAMES = ("inputs_1d", "inputs_2d", "mask", "rigid")


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("inputs_1d", jnp.zeros((5,)), AssertionError, "inputs_1d must have shape"),
        ("inputs_1d", jnp.zeros((0, 8)), AssertionError, "inputs_1d must have shape"),
        ("inputs_1d", jnp.zeros((5, 8), int), AssertionError, "inputs_1d must be floating-point"),
        ("inputs_1d", [[1.0]], TypeError, "inputs_1d must be an array"),
        ("inputs_2d", jnp.zeros((5, 4, 6)), AssertionError, "inputs_2d must have shape"),
        ("inputs_2d", jnp.zeros((5, 5)), AssertionError, "inputs_2d must have shape"),
        ("inputs_2d", "ARNDC", TypeError, "inputs_2d must be an array"),
        ("mask", jnp.ones((5,)), AssertionError, "mask must have shape"),
        ("mask", jnp.ones((4, 1)), AssertionError, "mask must have shape"),
        ("mask", jnp.ones((5, 1), complex), AssertionError, "mask must be floating-point"),
        ("rigid", jnp.zeros((5, 7)), TypeError, "rigid must be a QuatAffine"),
        ("rigid", rigid3array(jnp.zeros((4, 3, 3)), jnp.zeros((4, 3))), AssertionError, "rigid's"),
        ("rigid", (jnp.zeros((5, 3, 3)), jnp.zeros((5, 2))), AssertionError, "rigid's trans"),
    ],
)
def test_bad_arguments_are_named(name, value, error, message, sizes_of, make_arguments):
    inputs_1d, inputs_2d, mask, *pair = make_arguments(sizes_of("tiny"), 5)
    arguments = dict(zip(NAMES, (inputs_1d, inputs_2d, mask, tuple(pair)))) | {name: value}
    module = hk.transform(lambda: InvariantPointAttention(sizes_of("tiny").config)(**arguments))
    with pytest.raises(error, match=message):
        jax.eval_shape(module.init, jax.random.key(0))


@pytest.mark.parametrize("value", [None, 0, -1, 2.0, True])
@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(IPAConfig)])
def test_bad_sizes_are_named(field, value):
    config = types.SimpleNamespace(**dataclasses.asdict(IPAConfig()) | {field: value})
    module = hk.transform(lambda: InvariantPointAttention(config))
    with pytest.raises(ValueError, match=rf"config\.{field} must be a positive integer"):
        module.init(jax.random.key(0))


def test_an_unknown_implementation_is_refused(case, sizes_of):
    params, arguments, _ = case("tiny", 5, "full")
    with pytest.raises(ValueError, match="implementation must be"):
        our_module(sizes_of("tiny"), implementation="cuda").apply(params, *arguments)


if __name__ == "__main__":
    GOLDEN.write_text(json.dumps(parameter_shapes(), indent=2) + "\n")
