"""Reading backbones: the protein shipped, PDB and mmCIF files, and files of no use."""

import gemmi
import numpy as np
import pytest

from benchmarks.structure import read_shipped, read_structure


def _write(path, residues, *, chain_name="A", drop=(), altloc=False):
    """Writes residues (name, [3, 3] positions of N, CA, C) as the format that `path` names."""
    structure = gemmi.Structure()
    structure.name = "TEST"
    model, chain = gemmi.Model(1), gemmi.Chain(chain_name)
    for i, (name, positions) in enumerate(residues):
        residue = gemmi.Residue()
        residue.name, residue.seqid = name, gemmi.SeqId(i + 5, " ")
        residue.entity_type = gemmi.EntityType.Polymer
        for atom_name, position in zip(("N", "CA", "C"), positions):
            if (i, atom_name) in drop:
                continue
            for label, shift in (("A", 0.0), ("B", 1.0)) if altloc else (("\0", 0.0),):
                atom = gemmi.Atom()
                atom.name, atom.element = atom_name, gemmi.Element(atom_name[0])
                atom.pos = gemmi.Position(*(float(x) + shift for x in position))
                atom.altloc, atom.occ = label, 0.5
                residue.add_atom(atom)
        chain.add_residue(residue)
    model.add_chain(chain)
    structure.add_model(model)
    structure.setup_entities()
    if path.suffix == ".cif":
        structure.make_mmcif_document().write_file(str(path))
    else:
        structure.write_pdb(str(path))
    return path


@pytest.fixture
def residues():
    shipped = read_shipped()
    positions = np.stack([shipped.n, shipped.ca, shipped.c], axis=1)[:4]
    return list(zip(["ASP", "CYS", "MSE", "SER"], positions))


def test_shipped_backbone_is_a_protein():
    shipped = read_shipped()
    assert shipped.n.shape == shipped.ca.shape == shipped.c.shape == (147, 3)
    # Bond lengths of Engh and Huber, N-CA 1.46 Å and CA-C 1.53 Å, as well as 3.5 Å X-rays see them.
    np.testing.assert_allclose(np.linalg.norm(shipped.ca - shipped.n, axis=-1), 1.46, atol=0.1)
    np.testing.assert_allclose(np.linalg.norm(shipped.c - shipped.ca, axis=-1), 1.53, atol=0.1)


@pytest.mark.parametrize("suffix", [".pdb", ".cif"])
@pytest.mark.parametrize("altloc", [False, True])
def test_reads_what_was_written(tmp_path, residues, suffix, altloc):
    backbone = read_structure(_write(tmp_path / f"x{suffix}", residues, altloc=altloc), "A")
    assert backbone.name == f"x{suffix}, chain A"
    read = np.stack([backbone.n, backbone.ca, backbone.c], axis=1)
    # A PDB file has three decimals.
    np.testing.assert_allclose(read, np.stack([x for _, x in residues]), atol=1e-3)


def test_missing_atom_is_named(tmp_path, residues):
    path = _write(tmp_path / "x.pdb", residues, drop={(2, "CA"), (2, "C")})
    with pytest.raises(
        ValueError, match="residue MSE 7 of chain A lacks the backbone atom CA and C"
    ):
        read_structure(path, "A")


def test_missing_chain_is_named_with_those_there_are(tmp_path, residues):
    path = _write(tmp_path / "x.pdb", residues, chain_name="B")
    with pytest.raises(ValueError, match=r"x\.pdb has no chain 'A', but B"):
        read_structure(path, "A")


def test_nucleotide_is_named(tmp_path, residues):
    path = _write(tmp_path / "x.pdb", [("DA", residues[0][1]), ("DT", residues[1][1])])
    with pytest.raises(ValueError, match="residue DA 5 of chain A is no amino acid"):
        read_structure(path, "A")


def test_chain_of_water_has_no_protein(tmp_path):
    atom = "HETATM    1  O   HOH A   1       1.000   1.000   1.000  1.00 10.00           O\n"
    (tmp_path / "x.pdb").write_text(atom + "END\n")
    with pytest.raises(ValueError, match="has no protein residues"):
        read_structure(tmp_path / "x.pdb", "A")


@pytest.mark.parametrize(("name", "text"), [("x.cif", "no structure\n"), ("x.txt", "no\n")])
def test_files_that_are_no_structures(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name} (is no PDB or mmCIF file|has no atoms)"):
        read_structure(tmp_path / name, "A")


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such file"):
        read_structure(tmp_path / "x.pdb", "A")
