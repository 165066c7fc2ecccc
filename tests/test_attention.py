"""Every implementation of the attention core through the same cases.

Values and gradients are held to the error budget: against `reference` in float64, at most twice the
error of `reference` in float32. To test another implementation, add a line at the end.
"""

import contextlib
import functools
from typing import Any, ClassVar, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import packing
import pytest

from ipa_haiku import KernelConfig, LogitScales, invariant_point_attention
from ipa_haiku.attention.selection import IMPLEMENTATIONS
from ipa_haiku.attention.types import IPAInputs, IPAOutput
from ipa_haiku.jax_versions import enable_x64
from ipa_haiku.testing import assert_gradients_close, assert_within_error_budget

EPS = float(np.finfo(np.float32).eps)
MONOMER = LogitScales(scalar=(1 / 48) ** 0.5, pair=(1 / 3) ** 0.5)
MULTIMER = LogitScales(scalar=(1 / 16) ** 0.5, pair=1.0, total=(1 / 3) ** 0.5)

PARAMETERS = ("pair_weights", "pair_bias", "point_weights")  # have no batch dimensions

# Each case is drawn until there are as many residues: a few would have their errors by chance.
NUM_RESIDUES = 200


class Case(NamedTuple):
    num_query: int
    num_key: int
    size: str = "tiny"
    batch: tuple[int, ...] = ()
    mask: str = "full"
    masked_rows: bool = False  # whether to look at rows of masked queries too
    points: str = "chain"
    dtype: str = "float32"  # of scalars and pairs
    scales: LogitScales = MONOMER


CASES = {
    "one": Case(1, 1),
    "prime": Case(13, 13),
    "more_than_a_block": Case(67, 67),
    "af2_sizes": Case(33, 33, size="af2"),
    "one_query": Case(1, 11),
    "one_key": Case(11, 1, mask="holed"),
    "batches": Case(7, 6, size="odd", batch=(2, 1, 2), mask="holed"),
    "multimer": Case(5, 18, scales=MULTIMER, mask="padded"),
    "padded": Case(13, 13, mask="padded"),
    "holed": Case(13, 13, mask="holed"),
    "masked_rows": Case(13, 13, mask="holed", masked_rows=True),
    "all_masked": Case(13, 13, mask="zero", masked_rows=True),
    "coincident": Case(13, 13, points="coincident"),
    "half_turns": Case(13, 13, points="half_turns"),
    "far": Case(13, 13, points="far"),
    "outlier": Case(13, 13, points="outlier"),
    "domains": Case(13, 13, points="domains"),
    "one_hot": Case(13, 13, points="one_hot"),
    "bfloat16": Case(13, 13, dtype="bfloat16"),
    "float16": Case(13, 13, dtype="float16", mask="padded"),
}


# They compile what others do, but for sizes and another half precision.
SLOW_CASES = ("more_than_a_block", "float16", "batches", "af2_sizes", "one", "one_query")

# What kernels are tested with by default: all that is like "prime" is one compilation.
PALLAS_CASES = [
    case
    for name, case in CASES.items()
    if case._replace(mask="full", masked_rows=False, points="chain") == CASES["prime"]
]


@functools.cache  # cases of the same shapes share a compilation
def value_and_gradients(options: tuple[tuple[str, Any], ...], scales: LogitScales):
    """A function to the outputs and the gradients of all arguments but the masks."""

    @jax.jit
    def run(inputs, rows, cotangents):
        constant = {"q_mask", "k_mask", "q_segment_ids", "k_segment_ids"}
        masks = {name: getattr(inputs, name) for name in constant}

        def fn(arrays):
            result = invariant_point_attention(
                **arrays, **masks, logit_scales=scales, **dict(options)
            )
            return tuple(
                x * jnp.expand_dims(rows, range(rows.ndim, x.ndim)).astype(x.dtype)
                for x in result[:3]
            )

        arrays = {k: v for k, v in inputs._asdict().items() if k not in masks}
        outputs, pull_back = jax.vjp(fn, arrays)
        (gradients,) = pull_back(tuple(c.astype(x.dtype) for c, x in zip(cotangents, outputs)))
        # The softmax does not see the bias, whose exact gradient is zero: measure its error on the
        # scale of the weights' gradient.
        bias = gradients.pop("pair_bias")[None]
        gradients["pair_weights"] = jnp.concatenate([gradients["pair_weights"], bias])
        return IPAOutput(*outputs), gradients

    return run


@functools.cache
def _mask_gradient(options):
    def loss(q_mask, k_mask, inputs):
        arrays = inputs._replace(q_mask=q_mask, k_mask=k_mask)._asdict()
        result = invariant_point_attention(**arrays, logit_scales=MULTIMER, **dict(options))
        return sum(jnp.sum(jnp.sin(x)) for x in result[:3])

    return jax.jit(lambda inputs, *masks: jax.grad(loss, (0, 1))(*masks, inputs))


@pytest.fixture(scope="session")
def compute(sizes_of, make_core_inputs):
    """From a case and an implementation to `value_and_gradients` of all draws, stacked."""

    def draw(case, seed):
        config = sizes_of(case.size).config
        inputs = make_core_inputs(
            sizes_of(case.size), case.num_query, case.num_key, seed=seed,
            batch=case.batch, mask=case.mask, points=case.points, dtype=case.dtype,
        )  # fmt: skip
        rows = np.ones_like(inputs.q_mask) if case.masked_rows else inputs.q_mask
        rng = np.random.default_rng(seed)
        leading = (*case.batch, case.num_query, config.num_head)
        channels = [(config.num_scalar_v,), (config.num_point_v, 3), inputs.inputs_2d.shape[-1:]]
        # Rounded once, so that float16 and float64 runs pull back the same numbers.
        cotangents = [rng.normal(size=leading + c).astype(inputs.q_scalar.dtype) for c in channels]
        return inputs, rows, tuple(cotangents)

    @functools.cache
    def compute(case: Case, options: tuple[tuple[str, Any], ...], float64: bool = False):
        draws = [draw(case, seed) for seed in range(-(-NUM_RESIDUES // case.num_query))]
        fn = value_and_gradients(options, case.scales)
        with enable_x64(float64):
            if float64:
                draws = jax.tree.map(lambda x: np.asarray(x, np.float64), draws)
            results = [jax.device_get(fn(*args)) for args in draws]
        return jax.tree.map(lambda *x: np.stack(x), *results)

    return compute


REFERENCE = (("implementation", "reference"),)


@contextlib.contextmanager
def refused_or():
    """Yields a list that stays empty if what follows is refused, naming what to use instead."""
    supported = []
    try:
        yield supported
        supported.append(True)
    except (NotImplementedError, TypeError) as error:
        if "implementation='reference'" not in str(error):
            raise


def without_zeros(exact, *trees):
    """The leaves of trees, by name, where those of `exact` are not zero everywhere."""
    is_kept = {jax.tree_util.keystr(k): np.any(x) for k, x in jax.tree.leaves_with_path(exact)}
    leaves = (zip(is_kept.items(), jax.tree.leaves(tree), strict=True) for tree in trees)
    return [{name: x for (name, keep), x in pairs if keep} for pairs in leaves]


def _rms(x):
    return float(np.sqrt(np.mean(np.square(x, dtype=np.float64))))


@pytest.mark.usefixtures("debug_nans")
class ImplementationTests:
    """What every implementation promises; `options` go to `invariant_point_attention`."""

    options: ClassVar[dict[str, Any]]
    # Error that is allowed where the reference happens to have none, over the largest of the
    # outputs, or of the gradients: a rounding and a half of float32.
    floor: ClassVar[float] = 2e-7
    # Of gradients that are exactly zero, error allowed over the largest gradient.
    zero: ClassVar[float] = 0.0

    def attend(self, *inputs, scales=MONOMER, **options):
        return invariant_point_attention(
            **IPAInputs(*inputs)._asdict(), logit_scales=scales, **self.options, **options
        )

    def outputs(self, *inputs):
        return self.attend(*inputs)[:3]

    @pytest.fixture
    def inputs(self, sizes_of, make_core_inputs):
        return make_core_inputs(sizes_of("tiny"), 6, 7, mask="holed")

    @pytest.mark.parametrize(
        "name",
        [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW_CASES)) for name in CASES],
    )
    def test_error_budget(self, name, compute):
        fast = compute(CASES[name], tuple(self.options.items()))
        reference = compute(CASES[name], REFERENCE)
        exact = compute(CASES[name], REFERENCE, float64=True)
        self.assert_zeros(fast, exact)
        for group in (0, 1):  # outputs, and gradients
            results = [x[group] for x in (exact, fast, reference, exact)]
            assert_within_error_budget(*without_zeros(*results), floor=self.floor)

    def assert_zeros(self, fast, exact):
        """Gradients that are exactly zero, such as the queries' with a single key, are so."""
        largest = max(_rms(x) for x in jax.tree.leaves(exact[1]))
        for (path, x), y in zip(jax.tree.leaves_with_path(fast), jax.tree.leaves(exact)):
            assert np.any(y) or _rms(x) <= self.zero * largest, jax.tree_util.keystr(path)

    @pytest.mark.parametrize("name", ["prime", "masked_rows", "all_masked", "coincident", "far"])
    def test_float64(self, name, compute):
        fast = compute(CASES[name], tuple(self.options.items()), float64=True)
        exact = compute(CASES[name], REFERENCE, float64=True)
        self.assert_zeros(fast, exact)
        # Coordinates of 1000 units cost three digits, the mask's 1e5 five of 16.
        digits = {"far": 1e3, "masked_rows": 1e5, "all_masked": 1e5}.get(name, 1)
        eps = float(np.finfo(np.float64).eps)
        for group in (0, 1):
            fast_group, exact_group = without_zeros(exact[group], fast[group], exact[group])
            assert_within_error_budget(
                fast_group, exact_group, exact_group, floor=100 * digits * eps
            )

    @pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
    def test_dtypes(self, dtype, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 3, 4, dtype=dtype)
        result = jax.eval_shape(self.attend, *inputs)
        chex.assert_type([result.scalar, result.pair, result.point], [dtype, dtype, "float32"])

    def test_numerical_gradients(self, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 3, 4, mask="holed")
        with enable_x64(True):
            inputs = [jnp.asarray(x, jnp.float64) for x in inputs if x is not None]
            fn = jax.jit(lambda *arrays: self.outputs(*arrays, *inputs[-2:]))
            chex.assert_numerical_grads(
                fn, inputs[:-2], order=1, modes=["rev"], atol=1e-6, rtol=1e-6
            )

    def test_jit_equals_eager(self, inputs):
        # The compiler may fuse and reorder: a few float32 roundings.
        chex.assert_trees_all_close(
            jax.jit(self.outputs)(*inputs), self.outputs(*inputs), rtol=20 * EPS, atol=20 * EPS
        )

    @pytest.mark.parametrize("shared", [True, False])
    def test_vmap_equals_loop(self, shared, sizes_of, make_core_inputs):
        draws = [make_core_inputs(sizes_of("tiny"), 6, 7, seed=seed) for seed in range(3)]
        parameters = PARAMETERS if shared else ()
        draws = [x._replace(**{k: getattr(draws[0], k) for k in parameters}) for x in draws]
        axes = tuple(None if name in parameters else 0 for name in IPAInputs._fields)
        stacked = [
            x[0] if axis is None else jax.tree.map(lambda *a: jnp.stack(a), *x)
            for axis, *x in zip(axes, *draws, strict=True)
        ]
        one_by_one = jax.jit(self.outputs)
        loop = jax.tree.map(lambda *x: np.stack(x), *(one_by_one(*x) for x in draws))
        mapped = jax.jit(jax.vmap(self.outputs, axes))(*stacked)
        chex.assert_trees_all_close(mapped, loop, rtol=20 * EPS, atol=20 * EPS)

    def test_batch_equals_loop(self, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 6, 7, batch=(2, 3))
        batched, one_by_one = jax.jit(self.outputs)(*inputs), jax.jit(self.outputs)
        for index in np.ndindex(2, 3):
            one = one_by_one(
                *(
                    x if name in PARAMETERS else jax.tree.map(lambda a, i=index: a[i], x)
                    for name, x in inputs._asdict().items()
                )
            )
            chex.assert_trees_all_close(
                one, tuple(x[index] for x in batched), rtol=20 * EPS, atol=20 * EPS
            )

    def test_checkpoint(self, inputs):
        arrays, masks = inputs[:-4], inputs[-4:]
        assert_gradients_close(
            jax.jit(jax.checkpoint(lambda *x: self.outputs(*x, *masks))),
            jax.jit(lambda *x: self.outputs(*x, *masks)),
            *arrays,
            key=jax.random.key(0),
            tolerance=20 * EPS,
        )

    def test_scan(self, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 6)

        @jax.jit
        def step(v_scalar):
            return jnp.tanh(self.attend(*inputs._replace(v_scalar=v_scalar)).scalar)

        def scanned(v_scalar):
            return jax.lax.scan(lambda v, _: (step(v), None), v_scalar, length=4)[0]

        def unrolled(v_scalar):
            return step(step(step(step(v_scalar))))

        v_scalar = inputs.v_scalar
        chex.assert_trees_all_close(scanned(v_scalar), unrolled(v_scalar), atol=20 * EPS)
        assert_gradients_close(
            jax.jit(scanned), unrolled, v_scalar, key=jax.random.key(0), tolerance=1e-5
        )

    @pytest.mark.parametrize("transform", ["jvp", "hessian"])
    def test_other_derivatives_are_right_or_refused(self, transform, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 6)

        def run(**options):
            def loss(q_point):
                arrays = inputs._replace(q_point=q_point)._asdict()
                result = invariant_point_attention(**arrays, logit_scales=MONOMER, **options)
                return jnp.sum(jnp.square(result.scalar))

            if transform == "jvp":
                # Not jitted: there the error is JAX's own, raised after tracing.
                return jax.jvp(loss, (inputs.q_point,), (inputs.q_point,))[1]
            return jax.jit(jax.jacrev(jax.grad(loss)))(inputs.q_point)

        with refused_or() as supported:
            result = run(**self.options)
        if supported:
            expected = run(implementation="reference")
            chex.assert_trees_all_close(result, expected, atol=1e-5 * jnp.max(jnp.abs(expected)))

    def test_gradient_is_linear_in_a_cotangent_of_zero(self, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 6)

        def point_weights_gradient(cotangent, **options):
            def loss(point_weights):
                arrays = inputs._replace(point_weights=point_weights)._asdict()
                result = invariant_point_attention(**arrays, logit_scales=MONOMER, **options)
                return jnp.vdot(cotangent, result.scalar)

            return jax.grad(loss)(inputs.point_weights)

        zero = jnp.zeros_like(inputs.v_scalar)
        with refused_or() as supported:
            ours = functools.partial(point_weights_gradient, **self.options)
            result = jax.jit(jax.jacrev(ours))(zero)
        if supported:
            reference = functools.partial(point_weights_gradient, implementation="reference")
            expected = jax.jacrev(reference)(zero)
            assert jnp.any(expected != 0)
            np.testing.assert_allclose(result, expected, atol=1e-5 * jnp.max(jnp.abs(expected)))

    def test_return_attention(self, inputs):
        with refused_or() as supported:
            attend = jax.jit(functools.partial(self.attend, scales=MULTIMER, return_attention=True))
            result = attend(*inputs)
        if not supported:
            return
        plain = jax.jit(functools.partial(self.attend, scales=MULTIMER))(*inputs)
        chex.assert_trees_all_close(result[:3], plain[:3], atol=1e-5)
        weights, *terms = result.attention
        chex.assert_shape([weights, *terms], (2, 6, 7))
        np.testing.assert_allclose(jnp.sum(weights, axis=-1), 1, atol=7 * EPS)
        mask_2d = inputs.q_mask[:, None] * inputs.k_mask
        valid = inputs.q_mask == 1  # float32 keeps 8e-3 of a masked row's logits
        logits = sum(terms) - MULTIMER.total * 1e5 * (1 - mask_2d)
        expected = jax.nn.softmax(logits, axis=-1)
        np.testing.assert_allclose(weights[:, valid], expected[:, valid], atol=1e-6)

    def test_not_asked_for_attention(self, inputs):
        assert jax.eval_shape(self.attend, *inputs).attention is None

    def test_masked_keys_are_not_seen(self, inputs):
        masked = np.asarray(inputs.k_mask == 0)
        arrays = jax.tree.map(np.array, inputs)._asdict()
        garbage = {"k_scalar": 1e2, "v_scalar": 1e4, "k_point": -1e4, "v_point": 1e4}
        for name, value in garbage.items():
            arrays[name][masked] = value
        arrays["inputs_2d"][:, masked] = -1e3
        outputs, valid = jax.jit(self.outputs), np.asarray(inputs.q_mask == 1)
        for actual, expected in zip(outputs(*arrays.values()), outputs(*inputs)):
            np.testing.assert_array_equal(actual[valid], expected[valid])

    @pytest.mark.parametrize("first", [0, 16])
    def test_outputs_are_finite_where_a_whole_block_of_keys_is_far(
        self, first, sizes_of, make_core_inputs
    ):
        # 16 keys are a block of the kernels.
        inputs = make_core_inputs(sizes_of("tiny"), 5, 35)
        is_far = (np.arange(35) >= first) & (np.arange(35) < first + 16)
        k_point = np.where(is_far[:, None, None, None], np.float32(1e20), inputs.k_point)
        k_mask = np.where(is_far, np.float32(0), 1)
        chex.assert_tree_all_finite(
            jax.jit(self.outputs)(*inputs._replace(k_point=k_point, k_mask=k_mask))
        )

    def test_soft_masks_have_af2s_gradient(self, sizes_of, make_core_inputs):
        def gradient(options, wide, seed):
            inputs = make_core_inputs(sizes_of("tiny"), 20, 21, seed=seed)
            rng = np.random.default_rng(seed)
            masks = [np.float32(1 - 2e-5 * rng.uniform(size=n)) for n in (20, 21)]
            with enable_x64(wide):
                if wide:
                    inputs, masks = jax.tree.map(np.float64, (inputs, masks))
                return jax.device_get(_mask_gradient(options)(inputs, *masks))

        options = tuple(self.options.items())
        runs = ((options, False), (REFERENCE, False), (REFERENCE, True))
        draws = [[gradient(*run, seed) for seed in range(10)] for run in runs]
        assert_within_error_budget(*(jax.tree.map(lambda *x: np.stack(x), *run) for run in draws))

    @pytest.mark.parametrize("dtype", [bool, np.int32])
    def test_masks_of_other_dtypes(self, dtype, inputs):
        masks = {name: np.asarray(getattr(inputs, name), dtype) for name in ("q_mask", "k_mask")}
        outputs = jax.jit(self.outputs)
        chex.assert_trees_all_equal(outputs(*inputs._replace(**masks)), outputs(*inputs))

    def test_gradients_are_finite_however_far_masked_keys_are(self, inputs):
        k_point = jnp.where(inputs.k_mask[:, None, None, None] == 0, 1e20, inputs.k_point)

        @jax.jit
        @jax.grad
        def gradients(inputs):
            outputs = self.outputs(*inputs)
            rows = inputs.q_mask == 1
            return sum(
                jnp.sum(jnp.where(jnp.expand_dims(rows, range(1, x.ndim)), jnp.square(x), 0))
                for x in outputs
            )

        chex.assert_tree_all_finite(gradients(inputs._replace(k_point=k_point)))

    def test_segments_equal_each_alone(self, draw_proteins):
        def run(options, inputs, cotangents):
            rows = np.ones_like(inputs.q_mask)  # masked ones, too
            outputs, gradients = value_and_gradients(options, MULTIMER)(inputs, rows, cotangents)
            return jax.device_get((list(outputs[:3]), gradients))

        options, results = tuple(self.options.items()), []
        for seed in range(NUM_RESIDUES // 17):
            rng = np.random.default_rng(seed)
            proteins = draw_proteins(seed)
            inputs, packed = packing.pack(proteins, rng)
            shapes = jax.eval_shape(self.outputs, *inputs)
            cotangents = [rng.normal(size=x.shape).astype(np.float32) for x in shapes]
            of_each = list(zip(*map(packed.rows, cotangents)))
            outputs, gradients = run(options, inputs, cotangents)
            actual = [packed.rows(x) for x in outputs], packed.gradients(gradients)
            between = inputs.q_segment_ids[:, None] != inputs.k_segment_ids
            assert not np.any(gradients["inputs_2d"][between])

            alone = packing.merge(run(REFERENCE, x, c) for x, c in zip(proteins, of_each))
            with enable_x64(True):
                wide = jax.tree.map(lambda x: np.asarray(x, np.float64), (proteins, of_each))
                exact = packing.merge(run(REFERENCE, x, c) for x, c in zip(*wide))
            results.append((actual, alone, exact))
        stacked = (jax.tree.map(lambda *x: np.stack(x), *trees) for trees in zip(*results))
        assert_within_error_budget(*stacked)

    @pytest.fixture
    def draw_proteins(self, sizes_of, make_core_inputs):
        """Three proteins: one with holes, one 10,000 A away, one whose keys are all masked."""

        def draw(seed):
            proteins = [
                make_core_inputs(sizes_of("tiny"), 17, 16, seed=3 * seed + i, **options)
                for i, options in enumerate(
                    ({"mask": "holed"}, {"mask": "padded", "points": "far"}, {"mask": "zero"})
                )
            ]
            first = proteins[0]
            proteins[2] = proteins[2]._replace(q_mask=jnp.ones(17))
            return [x._replace(**{k: getattr(first, k) for k in PARAMETERS}) for x in proteins]

        return draw

    def test_batch_of_segments_equals_loop(self, sizes_of, make_core_inputs):
        inputs = make_core_inputs(sizes_of("tiny"), 6, 7, batch=(2,), mask="padded")
        inputs = inputs._replace(
            q_segment_ids=jnp.array([[0, 0, 1, 1, 2, 2], [5] * 6]),
            k_segment_ids=jnp.array([[0, 0, 1, 1, 2, 2, 2], [5] * 7]),
        )
        batched = jax.jit(self.outputs)(*inputs)
        for i in range(2):
            arrays = inputs._asdict().items()
            one = jax.jit(self.outputs)(*(x if k in PARAMETERS else x[i] for k, x in arrays))
            chex.assert_trees_all_close(
                one, tuple(x[i] for x in batched), rtol=20 * EPS, atol=20 * EPS
            )


def slow(test):
    """The same test, slow in one class only: the marker itself would mark it in all."""
    return pytest.mark.slow(functools.wraps(test)(lambda *args, **options: test(*args, **options)))


class TestReference(ImplementationTests):
    options: ClassVar = {"implementation": "reference"}

    test_jit_equals_eager = slow(ImplementationTests.test_jit_equals_eager)
    # AF2's gradient is NaN then: infinity times zero.
    test_gradients_are_finite_however_far_masked_keys_are = None


class TestXla(ImplementationTests):
    options: ClassVar = {"implementation": "xla"}


class TestXlaInBlocks(ImplementationTests):
    options: ClassVar = {"implementation": "xla", "query_block": 4}

    test_jit_equals_eager = slow(ImplementationTests.test_jit_equals_eager)
    test_checkpoint = slow(ImplementationTests.test_checkpoint)
    test_scan = slow(ImplementationTests.test_scan)


class TestPallas(ImplementationTests):
    """In Pallas's interpreter, which takes seconds to compile: most of it is slow."""

    options: ClassVar = {
        "implementation": "pallas",
        "kernel_config": KernelConfig(forward_block=16, backward_block=16, tile=16, interpret=True),
    }
    zero: ClassVar = 1e-7

    @pytest.mark.parametrize(
        "name",
        [
            pytest.param(name, marks=[pytest.mark.slow] * (CASES[name] not in PALLAS_CASES))
            for name in CASES
        ],
    )
    def test_error_budget(self, name, compute):
        super().test_error_budget(name, compute)

    def test_float64(self, sizes_of, make_core_inputs):
        with enable_x64(True):
            inputs = make_core_inputs(sizes_of("tiny"), 6, 7, dtype="float64")
            with pytest.raises(NotImplementedError, match="it computes in float32, not float64"):
                jax.eval_shape(
                    lambda: invariant_point_attention(
                        **inputs._asdict(), logit_scales=MONOMER, **self.options
                    )
                )

    test_numerical_gradients = None  # needs float64

    test_soft_masks_have_af2s_gradient = slow(
        ImplementationTests.test_soft_masks_have_af2s_gradient
    )
    test_masks_of_other_dtypes = slow(ImplementationTests.test_masks_of_other_dtypes)
    test_segments_equal_each_alone = slow(ImplementationTests.test_segments_equal_each_alone)
    test_jit_equals_eager = slow(ImplementationTests.test_jit_equals_eager)
    test_vmap_equals_loop = slow(ImplementationTests.test_vmap_equals_loop)
    test_batch_equals_loop = slow(ImplementationTests.test_batch_equals_loop)
    test_batch_of_segments_equals_loop = slow(
        ImplementationTests.test_batch_of_segments_equals_loop
    )
    test_checkpoint = slow(ImplementationTests.test_checkpoint)
    test_scan = slow(ImplementationTests.test_scan)


@pytest.mark.slow
class TestPallasInBlocks(TestPallas):
    options: ClassVar = TestPallas.options | {"query_block": 4}


def test_every_implementation_is_tested():
    tested = {cls.options["implementation"] for cls in ImplementationTests.__subclasses__()}
    assert tested == set(IMPLEMENTATIONS)
