"""The public names are those that docs/limits.md lists, documented and importable as it says."""

import ast
import inspect
import re
from pathlib import Path

import pytest

import ipa_haiku

ROOT = Path(__file__).parents[1]


def documented_names():
    """Names between backticks in the docs' section "Public names"."""
    section = re.search(
        r"^#+ Public names\n(.*?)(?=^#|\Z)", (ROOT / "docs" / "limits.md").read_text(), re.M | re.S
    )
    assert section, "docs/limits.md has no section 'Public names'"
    return set(re.findall(r"`(\w+)`", section[1])) - {"ipa_haiku"}


def test_all_is_the_docs_list():
    assert sorted(ipa_haiku.__all__) == sorted(documented_names())


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


# --- the house ------------------------------------------------------------------------------------

PACKAGE = ROOT / "ipa_haiku"
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
CORE = [name for name in MODULES if f"{name}.".startswith("ipa_haiku.attention.")]


def imports(name, *, at_import_time=False):
    """Dotted names of what a module imports: modules, and objects in them.

    Args:
      name: of the module.
      at_import_time: leave out what functions import, and what is imported for types only.
    """
    imported = set()

    def visit(node):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "absolute imports only"
            imported.update(f"{node.module}.{alias.name}" for alias in node.names)
        is_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        )
        if not (at_import_time and is_later):
            for child in ast.iter_child_nodes(node):
                visit(child)

    visit(ast.parse(MODULES[name].read_text()))
    return imported


def is_in(name, *packages):
    return any(f"{name}.".startswith(f"{package}.") for package in packages)


def test_the_core_is_there():
    assert {"ipa_haiku.attention.api", "ipa_haiku.attention.xla.forward"} <= set(CORE)


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_neither_haiku_nor_frames(name):
    imported = imports(name)
    ours = {x for x in imported if is_in(x, "ipa_haiku")}
    assert all(
        is_in(x, "ipa_haiku.attention", "ipa_haiku.checks", "ipa_haiku.jax_versions") for x in ours
    )
    assert not any(is_in(x, "haiku", "flax", "alphafold") for x in imported)


@pytest.mark.parametrize("name", MODULES)
def test_only_kernels_know_pallas(name):
    if not is_in(name, "ipa_haiku.attention.pallas_triton"):
        assert not any(is_in(x, "jax.experimental.pallas") for x in imports(name))


def test_no_cycle_of_imports():
    def module_of(name):
        """The module that a dotted name is, or is in."""
        while name not in MODULES:
            name = name.rpartition(".")[0]
        return name

    graph = {
        name: {module_of(x) for x in imports(name, at_import_time=True) if is_in(x, "ipa_haiku")}
        for name in MODULES
    }
    assert graph["ipa_haiku.attention.api"]
    # Whatever needs nothing that is left goes, until there is nothing left.
    while graph:
        free = {name for name, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a cycle among {sorted(graph)}"
        graph = {name: needs for name, needs in graph.items() if name not in free}


@pytest.mark.parametrize("name", MODULES)
def test_files_are_short(name):
    assert len(MODULES[name].read_text().splitlines()) <= 350
