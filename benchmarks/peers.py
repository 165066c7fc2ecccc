"""Other people's implementations: which there are, which are installed, how to get the others."""

from pathlib import Path
from typing import NamedTuple

from benchmarks import candidates
from benchmarks.candidates import Candidate
from benchmarks.cases import Bench, Model


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
    """A peer, or a part of the sweep, that is not measured, and why."""

    name: str
    reason: str


class _Peer(NamedTuple):
    """How to get one peer."""

    how_to_install: str  # in one line
    whats: tuple[str, ...] = ("module",)  # of `cases.WHATS`, what it can be measured in
    how_to_clone: str = ""  # in one line, if it is no package


_ALPHAFOLD = "pip install 'alphafold-colabfold>=2.3.27' 'colabfold-kernels>=0.9'"
_PEERS = {
    "alphafold": _Peer(_ALPHAFOLD, ("module", "structure_module")),
    "alphafold_multimer": _Peer(_ALPHAFOLD),
    "lucidrains": _Peer("pip install torch invariant-point-attention"),
    "openfold": _Peer(
        "pip install torch scipy modelcif",
        how_to_clone="git clone https://github.com/aqlaboratory/openfold and give --openfold PATH",
    ),
    "esmfold": _Peer("pip install torch transformers"),
    "flash_ipa": _Peer(
        "pip install torch",
        how_to_clone="on a machine with a GPU, pip install flash-attn einops beartype jaxtyping "
        "scipy, git clone https://github.com/flagshippioneering/flash_ipa and give "
        "--flash-ipa PATH",
    ),
}


def load(what: str, bench: Bench, checkouts: Checkouts) -> list[Candidate | Missing]:
    """This project's implementations and the peers in `what`, or why there are none.

    The paths in `checkouts` have been checked.
    """
    if obstacle := bench.obstacle(what):
        return [Missing(what, obstacle)]
    model = bench.sized_model()
    try:
        ours = candidates.all_ours(what, model, bench)
    except ModuleNotFoundError as error:  # the structure module is AF2's
        return [Missing(what, f"needs {error.name}: {_ALPHAFOLD}")]
    peers = [load_peer(name, what, model, checkouts) for name in bench.peers]
    return [*ours, *(peer for peer in peers if peer is not None)]


def load_peer(
    name: str, what: str, model: Model, checkouts: Checkouts
) -> Candidate | Missing | None:
    """The peer as a candidate, or why there is none; None if it has nothing to set beside `what`.

    The paths in `checkouts` have been checked.
    """
    peer = _PEERS[name]
    if what not in peer.whats:
        return None
    checkout = getattr(checkouts, name, None)
    if peer.how_to_clone and checkout is None:
        return Missing(name, peer.how_to_clone)
    try:
        if name == "alphafold":
            return candidates.alphafold(what, model)
        if name == "alphafold_multimer":
            return candidates.alphafold_multimer(model)
        from benchmarks import torch_peers  # imports torch

        make = getattr(torch_peers, name)
        return make(model) if checkout is None else make(model, checkout)
    except ModuleNotFoundError as error:
        return Missing(name, f"needs {error.name}: {peer.how_to_install}")
    except NotImplementedError as error:
        return Missing(name, str(error))
