"""Other people's implementations: which there are, which are installed, how to get the others."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from benchmarks import candidates
from benchmarks.candidates import Candidate
from benchmarks.cases import Model


class Checkouts(NamedTuple):
    """Where the repositories of peers that are no packages lie; None if they were not given."""

    openfold: str | None = None
    flash_ipa: str | None = None

    def check(self) -> None:
        """Checks that the paths lead to what they should.

        Raises:
          ValueError: naming the path that does not.
        """
        files = {
            "OpenFold": (self.openfold, "openfold/model/structure_module.py"),
            "FlashIPA": (self.flash_ipa, "src/flash_ipa/ipa.py"),
        }
        for name, (path, file) in files.items():
            if path is not None and not (Path(path) / file).is_file():
                raise ValueError(f"{path} is no checkout of {name}: it has no {file}.")


class Missing(NamedTuple):
    """A peer that is not measured, and why."""

    name: str
    reason: str


class _Peer(NamedTuple):
    """How to get one peer.

    Attributes:
      how_to_install: in one line.
      whats: of `cases.WHATS`, what it can be measured in.
      load: makes the candidate.
    """

    how_to_install: str
    whats: tuple[str, ...]
    load: Callable[[str, Model, Checkouts], Candidate]


def _alphafold(what: str, model: Model, checkouts: Checkouts) -> Candidate:
    return candidates.alphafold(what, model)


def _alphafold_multimer(what: str, model: Model, checkouts: Checkouts) -> Candidate:
    return candidates.alphafold_multimer(model)


def _lucidrains(what: str, model: Model, checkouts: Checkouts) -> Candidate:
    from benchmarks import torch_peers  # imports torch

    return torch_peers.lucidrains(model)


def _esmfold(what: str, model: Model, checkouts: Checkouts) -> Candidate:
    from benchmarks import torch_peers

    return torch_peers.esmfold(model)


def _openfold(what: str, model: Model, checkouts: Checkouts) -> Candidate:
    if checkouts.openfold is None:
        raise NotImplementedError(
            "git clone https://github.com/aqlaboratory/openfold and give --openfold PATH"
        )
    from benchmarks import torch_peers

    return torch_peers.openfold(model, checkouts.openfold)


def _flash_ipa(what: str, model: Model, checkouts: Checkouts) -> Candidate:
    if checkouts.flash_ipa is None:
        raise NotImplementedError(
            "on a machine with a GPU, pip install flash-attn einops beartype jaxtyping scipy, "
            "git clone https://github.com/flagshippioneering/flash_ipa and give --flash-ipa PATH"
        )
    from benchmarks import torch_peers

    return torch_peers.flash_ipa(model, checkouts.flash_ipa)


_ALPHAFOLD = "pip install 'alphafold-colabfold>=2.3.27' 'colabfold-kernels>=0.9'"
_PEERS = {
    "alphafold": _Peer(_ALPHAFOLD, ("module", "structure_module"), _alphafold),
    "alphafold_multimer": _Peer(_ALPHAFOLD, ("module",), _alphafold_multimer),
    "lucidrains": _Peer("pip install torch invariant-point-attention", ("module",), _lucidrains),
    "openfold": _Peer("pip install torch scipy modelcif", ("module",), _openfold),
    "esmfold": _Peer("pip install torch transformers", ("module",), _esmfold),
    "flash_ipa": _Peer("pip install torch", ("module",), _flash_ipa),
}


def load_peer(
    name: str, what: str, model: Model, checkouts: Checkouts
) -> Candidate | Missing | None:
    """The peer as a candidate, or why there is none; None if it has nothing to set beside `what`.

    The paths in `checkouts` have been checked.
    """
    peer = _PEERS[name]
    if what not in peer.whats:
        return None
    try:
        return peer.load(what, model, checkouts)
    except ModuleNotFoundError as error:
        return Missing(name, f"needs {error.name}: {peer.how_to_install}")
    except NotImplementedError as error:
        return Missing(name, str(error))
