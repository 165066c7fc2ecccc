"""Python runs this file first where `python -m ipa_haiku.alphafold` put its folder on PYTHONPATH.

That is so in the program it starts and in all Python processes which that one starts. Nothing is
imported here but Python's own modules: most processes never import AlphaFold.
"""

import atexit
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from typing import Any

_HERE = os.path.dirname(os.path.abspath(__file__))


class _SwapAfter(importlib.abc.Loader):
    """A loader of one of AlphaFold's modules that replaces the class in it afterwards."""

    def __init__(self, loader: Any, implementation: str | None):
        self._loader, self._implementation = loader, implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self._loader.exec_module(module)
        from ipa_haiku.alphafold import swap

        swap(module, self._implementation)
        print(f"ipa_haiku runs in {module.__name__} of process {os.getpid()}", file=sys.stderr)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds AlphaFold's modules as the other finders do."""

    def __init__(self, package: str, implementation: str | None):
        self.found = False
        self._names = [f"{package}.model.{name}" for name in ("folding", "folding_multimer")]
        self._implementation = implementation

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in self._names:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find and find(name, path, target)
            if spec:
                self.found = True
                spec.loader = _SwapAfter(spec.loader, self._implementation)
                return spec
        return None


def _run_the_next_sitecustomize() -> None:
    """The one that Python would have run without this."""
    path = [entry for entry in sys.path if os.path.abspath(entry) != _HERE]
    spec = importlib.machinery.PathFinder.find_spec("sitecustomize", path)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _put_into(package: str) -> None:
    finder = _Finder(package, os.environ.get("IPA_HAIKU_IMPLEMENTATION"))
    sys.meta_path.insert(0, finder)

    def tell() -> None:
        if not finder.found:
            print(
                f"ipa_haiku: this program's own process imported no {package}.model.folding; "
                "processes that did said so.",
                file=sys.stderr,
            )

    if os.environ.get("IPA_HAIKU_STARTER") == str(os.getpid()):
        atexit.register(tell)


if "IPA_HAIKU_PACKAGE" in os.environ:
    _put_into(os.environ["IPA_HAIKU_PACKAGE"])
_run_the_next_sitecustomize()
