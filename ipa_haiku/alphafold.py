"""Puts the modules of this package into an installed AlphaFold, ColabFold or ColabDesign."""

import contextlib
import importlib
import types
from typing import Any

from ipa_haiku import folding, folding_multimer
from ipa_haiku.attention.selection import select_implementation

_CLASS = "InvariantPointAttention"
_TWINS = {"folding": folding, "folding_multimer": folding_multimer}


def use_in_alphafold(
    implementation: str | None = None, package: str = "alphafold"
) -> contextlib.ExitStack:
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
      A context manager; leaving it, or its `close()`, restores what was there before. Undo several
      calls in reverse order.

    Raises:
      ModuleNotFoundError: if there is no such package.
      ImportError: if it has no copy of AF2's modules.
      ValueError: if there is no such implementation.
    """
    select_implementation((1, 1, 1), implementation=implementation)  # is there such a one?
    modules = _structure_modules(package)
    restore = contextlib.ExitStack()
    for name, module in modules.items():
        restore.callback(setattr, module, _CLASS, getattr(module, _CLASS))
        setattr(module, _CLASS, _with_implementation(getattr(_TWINS[name], _CLASS), implementation))
    return restore


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
        if not hasattr(modules[name], _CLASS):
            raise ImportError(f"{path} has no {_CLASS}.", name=path)
    return modules
