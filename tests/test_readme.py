"""Every Python example of the README and the docs runs, in order, as it stands."""

import re
from pathlib import Path

import haiku as hk
import jax
import pytest

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine, weights

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = sorted(ROOT.glob("docs/*.md"))
SCOPE = "alphafold/alphafold_iteration/structure_module/fold_iteration/invariant_point_attention"


@pytest.fixture
def released_layout(make_params):
    """Random parameters of a module in the place it has in AlphaFold's files."""

    def apply(*inputs):
        return InvariantPointAttention(IPAConfig(), zero_init=False)(*inputs)

    inputs_1d, inputs_2d = jax.numpy.ones((2, 384)), jax.numpy.ones((2, 2, 128))
    params = make_params(
        hk.transform(apply), inputs_1d, inputs_2d, inputs_1d[:, :1], QuatAffine.identity(2)
    )
    return weights.rename_scope(params, "invariant_point_attention", SCOPE)


def examples(page):
    return re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL)


def run(page, namespace):
    for example in examples(page):
        exec(compile(example, str(page), "exec"), namespace)
        if "output" in namespace:
            assert namespace["output"].shape == (100, 384)
            assert jax.numpy.any(namespace["output"] != 0)


def test_examples_run(released_layout, tmp_path, monkeypatch):
    weights.write_npz(tmp_path / "params_model_1.npz", released_layout)
    monkeypatch.chdir(tmp_path)
    quickstart = {}
    run(README, quickstart)
    assert "output" in quickstart
    for page in PAGES:
        run(page, dict(quickstart))
    assert sum(len(examples(page)) for page in PAGES) == 6


@pytest.mark.parametrize("page", [README, *PAGES], ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert link.startswith("https://") or (page.parent / link).exists(), link


def test_the_readme_fits_a_few_screens():
    assert len(README.read_text().splitlines()) <= 120
