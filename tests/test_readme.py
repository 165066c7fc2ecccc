"""Every Python example of the README runs, in order, as it stands."""

import re
from pathlib import Path
from types import SimpleNamespace

import haiku as hk
import jax
import pytest

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine, weights

README = Path(__file__).parents[1] / "README.md"
SCOPE = "alphafold/alphafold_iteration/structure_module/fold_iteration/invariant_point_attention"


@pytest.fixture
def released_layout(make_params):
    """Random parameters of a module in the place it has in AlphaFold's files."""

    def apply(*inputs):
        return InvariantPointAttention(IPAConfig(), SimpleNamespace(zero_init=False))(*inputs)

    inputs_1d, inputs_2d = jax.numpy.ones((2, 384)), jax.numpy.ones((2, 2, 128))
    params = make_params(
        hk.transform(apply), inputs_1d, inputs_2d, inputs_1d[:, :1], QuatAffine.identity(2)
    )
    return weights.rename_scope(params, "invariant_point_attention", SCOPE)


def test_examples_run(released_layout, tmp_path, monkeypatch):
    examples = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    assert len(examples) == 7
    weights.write_npz(tmp_path / "params_model_1.npz", released_layout)
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for example in examples:
        exec(compile(example, str(README), "exec"), namespace)
        if "output" in namespace:
            assert namespace["output"].shape == (100, 384)
            assert jax.numpy.any(namespace["output"] != 0)
