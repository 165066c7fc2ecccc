"""The module and the core against Suppl. Alg. 22 in float64 NumPy."""

import jax
import numpy as np
import oracle
import pytest
from implementations import ANYWHERE, QUICKLY

from ipa_haiku import LogitScales, invariant_point_attention


@pytest.mark.parametrize("implementation", ANYWHERE)
@pytest.mark.parametrize(
    ("size", "n", "mask"),
    [
        ("af2", 40, "full"),
        ("notebook", 16, "full"),
        ("odd", 1, "full"),
        ("odd", 11, "padded"),
        ("tiny", 12, "holed"),
    ],
)
def test_module(size, n, mask, implementation, sizes_of, make_inputs, make_module, make_params):
    sizes = sizes_of(size)
    inputs = make_inputs(sizes, n, mask=mask)
    module = make_module(sizes, implementation=implementation)
    params = make_params(module, *inputs)
    valid = np.asarray(inputs.mask[:, 0] == 1)  # float32 keeps 8e-3 of a masked row's logits
    actual = np.asarray(jax.jit(module.apply, compiler_options=QUICKLY)(params, *inputs))[valid]
    expected = oracle.monomer(params, sizes.config, *inputs)[valid]
    assert np.max(np.abs(actual - expected)) <= 1e-5 * np.max(np.abs(expected))


def test_core_with_attention(sizes_of, make_core_inputs):
    inputs = make_core_inputs(sizes_of("odd"), 7, 9)
    scales = LogitScales(scalar=0.3, pair=0.7, total=0.4)
    result = invariant_point_attention(
        **inputs._asdict(),
        logit_scales=scales,
        implementation="reference",
        return_attention=True,
    )
    actual = {**result._asdict(), **result.attention._asdict()}
    del actual["attention"]
    expected = oracle.attend(inputs, scales)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(actual[name], value, rtol=0, atol=1e-5 * np.abs(value).max())
