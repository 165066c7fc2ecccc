"""Arguments of the attention core that do not fit: refused by name, when tracing."""

import jax
import numpy as np
import pytest

from ipa_haiku import LogitScales, invariant_point_attention, select_implementation
from ipa_haiku.attention.selection import IMPLEMENTATIONS
from ipa_haiku.attention.types import IPAInputs, check_inputs

MONOMER = LogitScales(scalar=(1 / 48) ** 0.5, pair=(1 / 3) ** 0.5)


BATCHED = IPAInputs._fields[:12]  # the last two are the segments
MASKS = ("q_mask", "k_mask")
FLOATING = [name for name in BATCHED if name not in MASKS]


def assert_refused(inputs, message, error=AssertionError, **options):
    with pytest.raises(error, match=message):
        jax.eval_shape(
            lambda: invariant_point_attention(**inputs._asdict(), logit_scales=MONOMER, **options)
        )


@pytest.fixture
def good(sizes_of, make_core_inputs):
    return jax.tree.map(np.asarray, make_core_inputs(sizes_of("tiny"), 6, 7))


@pytest.mark.parametrize("name", FLOATING)
def test_integers_are_refused(name, good):
    bad = good._replace(**{name: getattr(good, name).astype(np.int32)})
    assert_refused(bad, f"{name} must be floating-point, got int32")


@pytest.mark.parametrize("name", MASKS)
def test_complex_masks_are_refused(name, good):
    bad = good._replace(**{name: getattr(good, name).astype(np.complex64)})
    assert_refused(bad, f"{name} must be floating-point, got complex64")


@pytest.mark.parametrize("name", BATCHED)
def test_what_is_no_array_is_refused(name, good):
    bad = good._replace(**{name: getattr(good, name).tolist()})
    assert_refused(bad, f"{name} must be an array, got list", TypeError)


@pytest.mark.parametrize("name", BATCHED)
def test_a_wrong_rank_is_refused(name, good):
    # A missing dimension; for all but the first argument, which sets the batch, also one more.
    array = getattr(good, name)
    assert_refused(good._replace(**{name: array[0]}), rf"{name} must have shape \[.*got \(")
    if name != "q_scalar":
        assert_refused(good._replace(**{name: array[None]}), rf"{name} must have shape \[.*got \(")


AXES = [
    (name, axis)
    for name, rank in zip(BATCHED, [3, 3, 3, 4, 4, 4, 3, 2, 1, 1, 1, 1])
    for axis in range(rank)
]
# Sizes that an argument is the first to have: the next one that has it is named.
NAMED_INSTEAD = {
    ("q_scalar", 0): "q_point",
    ("q_scalar", 1): "k_scalar",
    ("q_scalar", 2): "k_scalar",
    ("k_scalar", 0): "v_scalar",
    ("q_point", 2): "k_point",
    ("inputs_2d", 2): "pair_weights",
}
FREE = {("v_scalar", 2), ("v_point", 2)}


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_a_wrong_size_is_refused(name, axis, good):
    longer = good._replace(**{name: np.repeat(getattr(good, name), 2, axis)})
    if (name, axis) in FREE:
        jax.eval_shape(lambda: invariant_point_attention(**longer._asdict(), logit_scales=MONOMER))
    else:
        named = NAMED_INSTEAD.get((name, axis), name)
        assert_refused(longer, rf"{named} must have shape \[.*got \(")


@pytest.mark.parametrize(("name", "axis"), AXES)
def test_an_empty_argument_is_refused(name, axis, good):
    empty = good._replace(**{name: np.take(getattr(good, name), [], axis)})
    assert_refused(empty, f"{name} .*(must not be empty|must have shape)")


@pytest.mark.parametrize("dtype", [bool, np.int32, np.uint8])
def test_masks_of_any_real_dtype_are_float32(dtype, good):
    mask = {name: np.arange(getattr(good, name).size) % 2 for name in MASKS}
    given = good._replace(**{name: x.astype(dtype) for name, x in mask.items()})
    jax.eval_shape(lambda: invariant_point_attention(**given._asdict(), logit_scales=MONOMER))
    checked = check_inputs(given)
    for name, x in mask.items():
        assert getattr(checked, name).dtype == np.float32
        np.testing.assert_array_equal(getattr(checked, name), x)


def test_mismatched_batches_are_refused(sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("tiny"), 3, batch=(2,))
    assert_refused(inputs._replace(k_point=inputs.k_point[:1]), "k_point must have shape")


SEGMENTS = {"q_segment_ids": np.zeros(6, np.int32), "k_segment_ids": np.zeros(7, np.int32)}


@pytest.mark.parametrize("name", SEGMENTS)
def test_wrong_segments_are_refused(name, good):
    with_segments = good._replace(**SEGMENTS)
    ids = SEGMENTS[name]
    for bad in (ids[:-1], ids[None]):
        assert_refused(with_segments._replace(**{name: bad}), rf"{name} must have shape \[.*got \(")
    bad = with_segments._replace(**{name: ids.astype(np.float32)})
    assert_refused(bad, f"{name} must be integers, got float32")
    assert_refused(
        with_segments._replace(**{name: None}), f"{name}.*give both or neither", ValueError
    )


def test_an_unknown_implementation_is_refused(good):
    assert_refused(good, ".*".join(sorted(IMPLEMENTATIONS)), ValueError, implementation="cuda")


@pytest.mark.parametrize("name", ["query_block", "memory_budget"])
def test_sizes_are_positive_integers(name, good):
    for bad in (0, True, 1.5) + (None,) * (name == "memory_budget"):
        assert_refused(good, f"{name} must be a positive integer", ValueError, **{name: bad})
    jax.eval_shape(
        lambda: invariant_point_attention(
            **good._asdict(), logit_scales=MONOMER, **{name: np.int64(4)}
        )
    )


def test_a_shape_without_heads_or_rows_is_refused():
    for bad in ((12,), (64, 64)):
        with pytest.raises(ValueError, match=r"shape must be \[\.\.\., H, Nq, Nk\], got \("):
            select_implementation(bad)


def test_traced_logit_scales_are_refused(good):
    def attend(logit_scales):
        return invariant_point_attention(**good._asdict(), logit_scales=logit_scales)

    with pytest.raises(TypeError, match="logit_scales must be `LogitScales` of numbers"):
        jax.jit(attend)(MONOMER)
