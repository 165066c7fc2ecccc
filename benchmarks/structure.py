"""Backbone atoms of a real protein: the one shipped with the project, or a PDB or mmCIF file."""

import csv
import os
from pathlib import Path
from typing import NamedTuple

import gemmi
import numpy as np

# PDB entry 2GTL (hemoglobin of the earthworm, 3.5 Å X-ray), chain A, 147 residues. Data of the PDB
# archive are in the public domain (CC0).
SHIPPED = Path(__file__).parent / "data" / "2gtl_chain_A_backbone.csv"

_ATOMS = ("N", "CA", "C")


class Backbone(NamedTuple):
    """Backbone atoms of one chain, each [N, 3] in Å."""

    name: str
    n: np.ndarray
    ca: np.ndarray
    c: np.ndarray


def read_shipped() -> Backbone:
    """The backbone shipped with the project."""
    with open(SHIPPED, newline="") as file:
        rows = list(csv.DictReader(file))
    atoms = (
        np.array([[row[f"{atom}_{axis}"] for axis in "xyz"] for row in rows], np.float32)
        for atom in ("n", "ca", "c")
    )
    return Backbone("PDB 2GTL, chain A", *atoms)


def read_structure(path: str | os.PathLike[str], chain_name: str) -> Backbone:
    """Reads the protein residues of one chain of the first model of a PDB or mmCIF file.

    Where a residue or an atom has alternatives, the first is taken.

    Args:
      path: the file, also gzipped.
      chain_name: of the chain; in mmCIF, the author's (`auth_asym_id`).

    Raises:
      OSError: if the file cannot be read.
      ValueError: if it is no structure file, has no such chain, or a residue of the chain is no
        amino acid or lacks a backbone atom; naming it.
    """
    if not os.path.exists(path):
        raise FileNotFoundError(f"no such file: {os.fspath(path)}")
    try:
        structure = gemmi.read_structure(os.fspath(path))
    except (RuntimeError, ValueError) as error:  # gemmi's errors of parsing
        raise ValueError(f"{os.fspath(path)} is no PDB or mmCIF file: {error}") from error
    if len(structure) == 0:
        raise ValueError(f"{os.fspath(path)} has no atoms.")
    structure.setup_entities()
    names = list(dict.fromkeys(chain.name for chain in structure[0]))
    if chain_name not in names:
        raise ValueError(f"{os.fspath(path)} has no chain {chain_name!r}, but {', '.join(names)}.")
    residues = list(structure[0][chain_name].get_polymer().first_conformer())
    if not residues:
        raise ValueError(f"chain {chain_name} of {os.fspath(path)} has no protein residues.")
    positions = np.array([_backbone_atoms(residue, chain_name) for residue in residues], np.float32)
    return Backbone(f"{Path(path).name}, chain {chain_name}", *np.moveaxis(positions, 1, 0))


def _backbone_atoms(residue: gemmi.Residue, chain_name: str) -> list[list[float]]:
    """Positions [3, 3] of N, CA and C."""
    where = f"residue {residue.name} {residue.seqid} of chain {chain_name}"
    if not gemmi.find_tabulated_residue(residue.name).is_amino_acid():
        raise ValueError(f"{where} is no amino acid.")
    atoms = {name: residue.find_atom(name, "*") for name in _ATOMS}
    missing = [name for name, atom in atoms.items() if atom is None]
    if missing:
        raise ValueError(f"{where} lacks the backbone atom {' and '.join(missing)}.")
    return [atoms[name].pos.tolist() for name in _ATOMS]
