"""Counting the bytes that compiled programs move, on programs short enough to count by hand."""

import pytest

from benchmarks import cost
from benchmarks.hlo_traffic import traffic_bytes

FUSION = """
HloModule jit_f

%fused (p0: f32[8,4], p1: f32[4]) -> f32[8,4] {
  %p0 = f32[8,4]{1,0} parameter(0)
  %p1 = f32[4]{0} parameter(1)
  %b = f32[8,4]{1,0} broadcast(%p1), dimensions={1}
  ROOT %s = f32[8,4]{1,0} add(%p0, %b)
}

ENTRY %main.3 (x.1: f32[8,4], y.1: f32[4]) -> (f32[8,4], bf16[8]) {
  %x.1 = f32[8,4]{1,0} parameter(0), metadata={op_name="f(x)"}
  %y.1 = f32[4]{0} parameter(1)
  %sum = f32[8,4]{1,0} fusion(%x.1, %y.1), kind=kLoop, calls=%fused
  %flat = f32[32]{0} bitcast(%sum)
  %half = bf16[8]{0} custom-call(%flat, /*index=1*/%y.1), custom_call_target="f(g)"
  ROOT %out = (f32[8,4]{1,0}, bf16[8]{0}) tuple(%sum, %half)
}
"""

SLICED = """
%fused (p0: f32[10,4], p1: f32[10,4]) -> f32[2,8] {
  %p0 = f32[10,4]{1,0} parameter(0)
  %p1 = f32[10,4]{1,0} parameter(1)
  %flat = f32[40]{0} bitcast(%p0)
  %double = f32[40]{0} add(%flat, %flat)
  %a = f32[8]{0} slice(%double), slice={[0:8]}
  %b = f32[8]{0} slice(%double), slice={[8:16]}
  %rows = f32[40]{0} bitcast(%p1)
  %c = f32[8]{0} slice(%rows), slice={[0:8]}
  %all = f32[10]{0} reduce(%p1), dimensions={1}, to_apply=%sum
  ROOT %s = f32[2,8]{1,0} concatenate(%a, %b, %c, %all), dimensions={0}
}

ENTRY %main (x: f32[10,4], y: f32[10,4]) -> f32[2,8] {
  %x = f32[10,4]{1,0} parameter(0)
  %y = f32[10,4]{1,0} parameter(1)
  ROOT %f = f32[2,8]{1,0} fusion(%x, %y), kind=kLoop, calls=%fused
}
"""

REPLACED = """
%fused (p0: f32[10,4], p1: f32[2,4]) -> f32[10,4] {
  %p0 = f32[10,4]{1,0} parameter(0)
  %p1 = f32[2,4]{1,0} parameter(1)
  %zero = s32[] constant(0)
  %negative = f32[2,4]{1,0} negate(%p1)
  ROOT %d = f32[10,4]{1,0} dynamic-update-slice(%p0, %negative, %zero, %zero)
}

ENTRY %main (x: f32[10,4], y: f32[2,4]) -> f32[10,4] {
  %x = f32[10,4]{1,0} parameter(0)
  %y = f32[2,4]{1,0} parameter(1)
  %made = f32[10,4]{1,0} custom-call(), custom_call_target="f"
  ROOT %f = f32[10,4]{1,0} fusion(TARGET, %y), kind=kLoop, calls=%fused
}
"""

LOOP = """
%block (p0: s32[], p1: f32[100,4]) -> f32[10,4] {
  %p0 = s32[] parameter(0)
  %p1 = f32[100,4]{1,0} parameter(1)
  ROOT %d = f32[10,4]{1,0} dynamic-slice(%p1, %p0, %p0), dynamic_slice_sizes={10,4}
}

%body (t: (s32[], f32[100,4])) -> (s32[], f32[100,4]) {
  %t = (s32[], f32[100,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %z = f32[100,4]{1,0} get-tuple-element(%t), index=1
  %slice = f32[10,4]{1,0} fusion(%i, %z), kind=kLoop, calls=%block
  ROOT %r = (s32[], f32[100,4]{1,0}) tuple(%i, %z)
}

%condition (t: (s32[], f32[100,4])) -> pred[] {
  %t = (s32[], f32[100,4]{1,0}) parameter(0)
  ROOT %c = pred[] constant(true)
}

ENTRY %main (a: (s32[], f32[100,4])) -> (s32[], f32[100,4]) {
  %a = (s32[], f32[100,4]{1,0}) parameter(0)
  ROOT %w = (s32[], f32[100,4]{1,0}) while(%a), condition=%condition, body=%body, TRIP
}
"""

FAST_MEMORY = """
ENTRY %main (x: f32[8,4]) -> f32[8,4] {
  %x = f32[8,4]{1,0:T(8,128)} parameter(0)
  %s = (f32[8,4]{1,0:T(8,128)S(1)}, f32[8,4]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[8,4]{1,0:T(8,128)S(1)} copy-done(%s)
  %n = f32[8,4]{1,0:T(8,128)S(1)} negate(%d)
  ROOT %m = f32[8,4]{1,0:T(8,128)} negate(%n)
}
"""


def test_kernels_read_operands_and_write_results():
    fusion = 4 * (32 + 4 + 32)
    custom_call = 4 * (32 + 4) + 2 * 8
    assert traffic_bytes(FUSION) == fusion + custom_call


def test_of_what_a_fusion_slices_the_slices_are_read():
    # Both slices of x, which reach it through operations element by element; and all of y.
    assert traffic_bytes(SLICED) == 4 * (16 + 40 + 16)


def test_slices_replaced_in_place_are_written_and_the_rest_is_not():
    made, slice_ = 4 * 40, 4 * 8
    assert traffic_bytes(REPLACED.replace("TARGET", "%made")) == made + 2 * slice_
    # An argument must stay as it is.
    whole = 2 * 4 * 40 + slice_
    assert traffic_bytes(REPLACED.replace("TARGET", "%x")) == made + whole


def test_slices_are_replaced_in_place_under_another_type():
    made, slice_ = 4 * 40, 4 * 8
    text = REPLACED.replace("TARGET", "%made").replace("  ROOT %d = f32[10,4]", "  %d = f32[10,4]")
    text = text.replace(
        "%d = f32[10,4]{1,0} dynamic-update-slice(%p0,",
        "%same = f32[10,4]{1,0} bitcast(%p0)\n  %d = f32[10,4]{1,0} dynamic-update-slice(%same,",
    )
    text = text.replace("%zero)\n}", "%zero)\n  ROOT %r = f32[40]{0} bitcast(%d)\n}")
    assert text.count("bitcast") == 2
    assert traffic_bytes(text) == made + 2 * slice_


def test_an_argument_under_another_type_is_not_replaced():
    text = REPLACED.replace("TARGET", "%y10").replace(
        "  %made", "  %y10 = f32[10,4]{1,0} bitcast(%x)\n  %made"
    )
    assert traffic_bytes(text) == traffic_bytes(REPLACED.replace("TARGET", "%x"))


def test_what_follows_the_result_is_not_the_result():
    unused = "  %unused = f32[1]{0} slice(%p1), slice={[0:1]}\n}\n\nENTRY"
    assert traffic_bytes(FUSION.replace("}\n\nENTRY", unused)) == traffic_bytes(FUSION)


def test_loops_count_as_often_as_they_run_and_slices_as_what_they_read():
    text = LOOP.replace("TRIP", 'backend_config={"known_trip_count":{"n":"10"}}')
    per_iteration = 4 * (1 + 40 + 40)  # the index, the slice read, the slice written
    condition = 0
    assert traffic_bytes(text) == 10 * (per_iteration + condition)


def test_loops_of_unknown_length_are_refused():
    with pytest.raises(ValueError, match="the length of the loop w is not known"):
        traffic_bytes(LOOP.replace(", TRIP", ""))


def test_fast_memory_is_free():
    assert traffic_bytes(FAST_MEMORY) == 4 * 32 + 4 * 32  # the copy's reading, the last writing


def test_text_without_a_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        traffic_bytes("HloModule empty")


def test_missing_compilers_say_how_to_install_them(monkeypatch):
    monkeypatch.setattr(cost.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'jax[tpu]==" in cost.missing("v5e")
    assert "jax-cuda13-plugin==" in cost.missing("h200")
