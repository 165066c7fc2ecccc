"""The public names are those that the README lists, documented and importable as it says."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ipa_haiku

ROOT = Path(__file__).parents[1]


def readme_names():
    """Names between backticks in the README's section "Public names"."""
    section = re.search(
        r"^#+ Public names\n(.*?)(?=^#|\Z)", (ROOT / "README.md").read_text(), re.M | re.S
    )
    assert section, "README.md has no section 'Public names'"
    return set(re.findall(r"`(\w+)`", section[1])) - {"ipa_haiku"}


def test_all_is_the_readmes_list():
    assert sorted(ipa_haiku.__all__) == sorted(readme_names())


def test_nothing_else_is_public():
    public = {
        name
        for name, value in vars(ipa_haiku).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert public == set(ipa_haiku.__all__)


@pytest.mark.parametrize("name", ipa_haiku.__all__)
def test_every_public_name_is_documented_and_typed(name):
    value = getattr(ipa_haiku, name)
    assert inspect.getdoc(value)
    if inspect.isfunction(value):
        assert "Returns:" in value.__doc__
        parameters = inspect.signature(value).parameters.values()
        assert all(p.annotation is not p.empty for p in parameters)


@pytest.mark.parametrize(
    "path",
    [*sorted((ROOT / "ipa_haiku/attention").glob("*.py")), ROOT / "ipa_haiku/pair.py"],
    ids=lambda p: p.name,
)
def test_the_core_knows_neither_haiku_nor_frames(path):
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name for name in imported if name.startswith("ipa_haiku")}
    allowed = ("ipa_haiku.attention", "ipa_haiku.pair", "ipa_haiku.config.positive_integer")
    assert all(name.startswith(allowed) for name in ours)
    assert not any(name.split(".")[0] in ("haiku", "flax", "alphafold") for name in imported)
