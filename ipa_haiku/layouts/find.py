"""Which modules a state dict holds."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ipa_haiku import weights
from ipa_haiku.config import IPAConfig
from ipa_haiku.layouts.framediff import from_framediff
from ipa_haiku.layouts.helixfold import from_helixfold
from ipa_haiku.layouts.lucidrains import from_lucidrains
from ipa_haiku.layouts.omegafold import from_omegafold
from ipa_haiku.state_dict import HALLMARKS, refuse_nested, starts_of

# Those that read modules with the hallmark, by the name of the layout.
_READERS: dict[str, dict[str, Callable[..., weights.Params]]] = {
    "head_weights": {"openfold": weights.from_openfold, "framediff": from_framediff},
    "point_weights": {"lucidrains": from_lucidrains},
    "trainable_point_weights": {"omegafold": from_omegafold, "helixfold": from_helixfold},
}


class FoundModule(NamedTuple):
    """A module in a state dict, which `from_<layout>(state_dict, prefix)` reads."""

    layout: str
    prefix: str
    config: IPAConfig


def find_modules(state_dict: Mapping[str, Any]) -> list[FoundModule]:
    """Every Invariant Point Attention in a state dict.

    Args:
      state_dict: of a module or of a whole model; arrays of NumPy, JAX or torch.

    Returns:
      Layout, prefix and sizes of each module of which some layout has all keys and no others, in
      the order of the state dict. Why another one is left out, its reader tells.

    Raises:
      TypeError: naming a tensor of a module that NumPy cannot hold.
      ValueError: naming what has a wrong shape or dtype in a module, or if the state dict is nested
        in what is given.
    """
    modules = []
    for start, hallmark in starts_of(state_dict):
        prefix = start.removesuffix(".")
        for layout, reader in _READERS[hallmark].items():
            try:
                params = reader(state_dict, prefix)
            except KeyError:  # of another layout
                continue
            modules.append(FoundModule(layout, prefix, weights.config_of(params)))
    if not modules:
        refuse_nested(state_dict, *HALLMARKS)
    return modules
