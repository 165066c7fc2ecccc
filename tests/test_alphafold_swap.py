"""What `use_in_alphafold` and `python -m ipa_haiku.alphafold` put where."""

import importlib
import os
import subprocess
import sys

import haiku as hk
import pytest
from variants import AF2_CLASSES, classes_in_use

import ipa_haiku
import ipa_haiku.folding_multimer
from ipa_haiku.alphafold import use_in_alphafold
from ipa_haiku.alphafold.__main__ import main

pytestmark = pytest.mark.usefixtures("af2_is_left_as_it_was")


def assert_ours(implementation):
    for cls, ours in zip(classes_in_use(), (ipa_haiku.folding, ipa_haiku.folding_multimer)):

        class Derived(cls):
            def __init__(self, config):
                super().__init__(config, implementation="reference")

        assert issubclass(cls, ours.InvariantPointAttention)
        for made, expected in ((cls, implementation), (Derived, "reference")):
            module = hk.testing.transform_and_run(made)(ipa_haiku.IPAConfig())
            assert module._options.implementation == expected


def test_as_a_context_manager():
    with use_in_alphafold():
        assert_ours(None)
    assert classes_in_use() == AF2_CLASSES


def test_called_once():
    restore = use_in_alphafold("xla")
    assert_ours("xla")
    restore.close()
    assert classes_in_use() == AF2_CLASSES


def test_nested():
    with use_in_alphafold():
        with use_in_alphafold("xla"):
            assert_ours("xla")
        assert_ours(None)


def test_exceptions_restore():
    with pytest.raises(KeyError, match="from inside"), use_in_alphafold():
        raise KeyError("from inside")
    assert classes_in_use() == AF2_CLASSES


def test_an_unknown_implementation_changes_nothing():
    with pytest.raises(ValueError, match="implementation must be None or one of"):
        use_in_alphafold("cuda")
    assert classes_in_use() == AF2_CLASSES


CLASS = "class InvariantPointAttention:\n    pass\n"


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Writes a package: its name and the text of modules in its folder `model`."""
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make_package(name, **modules):
        folder = tmp_path.joinpath(*name.split("."))
        for package in [folder / "model", *(folder / "model").relative_to(tmp_path).parents]:
            package = tmp_path / package
            if package != tmp_path:
                package.mkdir(parents=True, exist_ok=True)
                (package / "__init__.py").touch()
        for module, text in modules.items():
            (folder / "model" / f"{module}.py").write_text(text)
        importlib.invalidate_caches()

    yield make_package
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("name", ["fakefold", "fakedesign.af.alphafold"])
def test_a_copy_of_alphafold(name, make_package):
    make_package(name, folding=CLASS, folding_multimer=CLASS)
    modules = [
        importlib.import_module(f"{name}.model.{x}") for x in ("folding", "folding_multimer")
    ]
    theirs = [module.InvariantPointAttention for module in modules]
    with use_in_alphafold(package=name):
        assert classes_in_use() == AF2_CLASSES
        for module, ours in zip(modules, (ipa_haiku.folding, ipa_haiku.folding_multimer)):
            assert issubclass(module.InvariantPointAttention, ours.InvariantPointAttention)
    assert [module.InvariantPointAttention for module in modules] == theirs


def test_a_copy_without_the_multimer(make_package):
    make_package("oldfold", folding=CLASS)
    module = importlib.import_module("oldfold.model.folding")
    theirs = module.InvariantPointAttention
    with use_in_alphafold(package="oldfold"):
        ours = ipa_haiku.folding.InvariantPointAttention
        assert issubclass(module.InvariantPointAttention, ours)
    assert module.InvariantPointAttention is theirs


@pytest.mark.parametrize("package", ["nofold", "nofold.af.alphafold", "json", "alphafold.common"])
def test_a_missing_package_is_named(package):
    with pytest.raises(ModuleNotFoundError, match=f"'{package}' is not installed or carries no"):
        use_in_alphafold(package=package)


def test_the_multimer_alone_is_no_copy(make_package):
    make_package("halffold", folding_multimer=CLASS)
    with pytest.raises(ModuleNotFoundError, match=r"halffold\.model\.folding cannot be found"):
        use_in_alphafold(package="halffold")


@pytest.mark.parametrize("broken", ["folding", "folding_multimer"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import not_installed\n", "No module named 'not_installed'"),
        ("", "has no InvariantPointAttention"),
    ],
)
def test_a_package_that_lacks_something_is_left_alone(broken, text, message, make_package):
    name = f"broken_{broken}_{len(text)}"
    make_package(name, **{"folding": CLASS, "folding_multimer": CLASS, broken: text})
    with pytest.raises(ImportError, match=message):
        use_in_alphafold(package=name)
    if broken == "folding_multimer":
        module = importlib.import_module(f"{name}.model.folding")
        assert isinstance(module.InvariantPointAttention, type)


OTHER_CLASS = """
class InvariantPointAttention:
    def __init__(self, config, global_config, dropout): ...
    def __call__(self, inputs_1d, inputs_2d, mask, affine): ...
"""


def test_what_was_swapped_is_told():
    with use_in_alphafold() as swap:
        assert swap.swapped == {
            "alphafold.model.folding": "monomer",
            "alphafold.model.folding_multimer": "multimer",
        }


def test_a_class_with_other_arguments_is_refused(make_package):
    make_package("otherfold", folding=CLASS, folding_multimer=OTHER_CLASS)
    with pytest.raises(
        TypeError,
        match="__init__ takes self, config, global_config, dropout, where",
    ):
        use_in_alphafold(package="otherfold")
    module = importlib.import_module("otherfold.model.folding")
    assert not issubclass(module.InvariantPointAttention, hk.Module)


PROGRAM = """
import multiprocessing, subprocess, sys

TELL = "from workfold.model import folding as f; print(f.InvariantPointAttention.__module__)"

def tell():
    exec(TELL)

if __name__ == "__main__":
    exec(TELL)
    sys.stdout.flush()
    subprocess.run([sys.executable, "-c", TELL], check=True)
    worker = multiprocessing.get_context("spawn").Process(target=tell)
    worker.start()
    worker.join()
    print(sys.argv[1:])
    sys.exit(3)
"""


def test_programs_and_their_workers(make_package, tmp_path):
    make_package("workfold", folding=CLASS, folding_multimer=CLASS)
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "sitecustomize.py").write_text("print('the one there was')")
    options = ["--package", "workfold", str(tmp_path / "program.py"), "--fast", "--", "x"]
    result = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", "-m", "ipa_haiku.alphafold", *options],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.stdout.count("ipa_haiku.folding") == 3, result
    # The program, its two workers and the process that only starts it.
    assert result.stdout.count("the one there was") >= 4
    assert "['--fast', '--', 'x']" in result.stdout
    assert result.stderr.count("ipa_haiku runs in workfold.model.folding of process") == 3
    assert result.returncode == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["no_such_command"], "there is no command 'no_such_command'"),
        (["--implementation", "cuda", "x.py"], "implementation must be None or one of"),
        ([], "a program is needed"),
    ],
)
def test_a_program_that_cannot_run_is_named(options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["alphafold", *options])
    with pytest.raises(SystemExit):
        main()
    assert message in capsys.readouterr().err


def test_a_program_without_alphafold_is_told(tmp_path):
    (tmp_path / "program.py").write_text("import sys; print(sys.argv[1:])")
    command = [sys.executable, "-m", "ipa_haiku.alphafold", str(tmp_path / "program.py"), "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout == "['x']\n"
    assert "imported no alphafold.model.folding" in result.stderr


def test_no_device_is_asked_for():
    program = """if True:
        import jax
        from ipa_haiku.alphafold import use_in_alphafold
        use_in_alphafold("pallas")
        assert not jax._src.xla_bridge.backends_are_initialized()
    """
    subprocess.run([sys.executable, "-c", program], check=True)
