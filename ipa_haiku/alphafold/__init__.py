"""Puts the modules of this package into an installed AlphaFold, ColabFold or ColabDesign.

In a program of one's own by `use_in_alphafold`; in a command-line program, and in the processes
that it starts, by

    python -m ipa_haiku.alphafold [--package PACKAGE] [--implementation NAME] PROGRAM ARGUMENTS...
"""

import contextlib
import importlib
import inspect
import types
from typing import Any

from ipa_haiku import folding, folding_multimer
from ipa_haiku.attention.selection import check_name

_CLASS = "InvariantPointAttention"
_TWINS = {"folding": folding, "folding_multimer": folding_multimer}


class Swap(contextlib.ExitStack):
    """What `use_in_alphafold` did; leaving it, or its `close()`, undoes that.

    Attributes:
      swapped: the variant, "monomer" or "multimer", by the path of the module it was put into.
    """

    swapped: dict[str, str]


def use_in_alphafold(implementation: str | None = None, package: str = "alphafold") -> Swap:
    """Makes AF2's structure modules use the `InvariantPointAttention` of this package.

    Call it once, or use it in a `with` statement to have AF2's own classes back after it:

        with use_in_alphafold():
            result = model_runner.predict(features, random_seed=0)

    AF2 looks its class up while JAX traces it, so a function that is already compiled keeps what it
    was compiled with: call this before the first prediction. Parameters are AF2's own, unchanged.

    Args:
      implementation: of the attention core, as in `invariant_point_attention`.
      package: with a copy of AF2's modules: `<package>.model.folding` and, unless the copy is older
        than AlphaFold-Multimer, `<package>.model.folding_multimer`.

    Returns:
      `Swap`, a context manager; leaving it, or its `close()`, restores what was there before. Undo
      several calls in reverse order.

    Raises:
      ModuleNotFoundError: if there is no such package.
      ImportError: if it has no copy of AF2's modules.
      TypeError: if a class there takes other arguments than AF2's.
      ValueError: if there is no such implementation.
    """
    check_name(implementation)
    modules = _structure_modules(package)
    for name, module in modules.items():
        _check_arguments(module, name)
    restore = Swap()
    restore.swapped = {}
    for module in modules.values():
        restore.callback(setattr, module, _CLASS, getattr(module, _CLASS))
        restore.swapped[module.__name__] = swap(module, implementation)
    return restore


def swap(module: types.ModuleType, implementation: str | None) -> str:
    """Replaces the class in one of AF2's modules, and returns its variant.

    Raises:
      TypeError: if the class there takes other arguments than AF2's.
    """
    name = module.__name__.rpartition(".")[2]
    _check_arguments(module, name)
    setattr(module, _CLASS, _with_implementation(getattr(_TWINS[name], _CLASS), implementation))
    return "multimer" if name == "folding_multimer" else "monomer"


def _check_arguments(module: types.ModuleType, name: str) -> None:
    """Asserts that there is a class in AF2's module, and that ours takes its arguments."""
    if not hasattr(module, _CLASS):
        raise ImportError(f"{module.__name__} has no {_CLASS}.", name=module.__name__)
    theirs, ours = getattr(module, _CLASS), getattr(_TWINS[name], _CLASS)
    for method in ("__init__", "__call__"):
        known, taken = (_arguments(x, method) for x in (ours, theirs))
        # A class that names none, as one that hands all on, tells nothing.
        if taken != known[: len(taken)]:
            raise TypeError(
                f"{module.__name__}.{_CLASS}.{method} takes {', '.join(taken)}, where AlphaFold "
                f"2's takes {', '.join(known)}: this copy's layer is another one."
            )


def _arguments(module_class: type, method: str) -> list[str]:
    """Names of what a method takes by position."""
    parameters = inspect.signature(getattr(module_class, method)).parameters.values()
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _with_implementation(module_class: type, implementation: str | None) -> type:
    """The class, with another default: no partial, as AF2's class can be derived from."""
    if implementation is None:
        return module_class

    class InvariantPointAttention(module_class):
        __doc__ = module_class.__doc__

        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{"implementation": implementation} | kwargs)

    return InvariantPointAttention


def _structure_modules(package: str) -> dict[str, types.ModuleType]:
    modules = {}
    for name in _TWINS:
        path = f"{package}.model.{name}"
        try:
            modules[name] = importlib.import_module(path)
        except ModuleNotFoundError as error:
            if modules and error.name == path:
                continue  # a copy of AF2 from before the multimer
            if error.name is None or not f"{path}.".startswith(f"{error.name}."):
                raise  # the package lacks something else
            raise ModuleNotFoundError(
                f"{path} cannot be found: the package {package!r} is not installed or carries no "
                "copy of AlphaFold 2's modules (package='alphafold' is the default).",
                name=error.name,
            ) from error
    return modules
