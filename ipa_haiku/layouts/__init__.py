"""Parameters from and to the layouts in which other code bases keep the same module.

Each has a reader `from_<layout>` and, where there is an inverse, `to_<layout>`; `find_modules`
tells which a state dict holds. A reader takes all tensors of a module or none: what is missing,
superfluous or of a wrong shape is named. Results are copies, NumPy arrays. `from_openfold` and
`to_openfold`, for OpenFold and what shares its names, are those of `ipa_haiku.weights`.
"""

from ipa_haiku.layouts.find import FoundModule, find_modules
from ipa_haiku.layouts.framediff import from_framediff
from ipa_haiku.layouts.helixfold import from_helixfold, to_helixfold
from ipa_haiku.layouts.lucidrains import from_lucidrains, to_lucidrains
from ipa_haiku.layouts.omegafold import from_omegafold, to_omegafold
from ipa_haiku.weights import from_openfold, to_openfold

__all__ = [
    "FoundModule",
    "find_modules",
    "from_framediff",
    "from_helixfold",
    "from_lucidrains",
    "from_omegafold",
    "from_openfold",
    "to_helixfold",
    "to_lucidrains",
    "to_omegafold",
    "to_openfold",
]
