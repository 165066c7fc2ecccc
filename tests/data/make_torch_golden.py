"""Writes `esmfold_ipa.npz` and, given a checkout of OpenFold, `openfold_*_ipa.npz` beside itself.

    pip install torch transformers dm-tree scipy
    git clone https://github.com/aqlaboratory/openfold
    python tests/data/make_torch_golden.py --openfold openfold

Each file holds the tensors of one small torch module under their own keys, its inputs, and its
output: `single` [N, C_s], `pair` [N, N, C_z], `mask` [N], `rotation` [N, 3, 3], `translation`
[N, 3], `output` [N, C_s]. Made with transformers 5.23.0, torch 2.13.0 and OpenFold ce0029e.
"""

import argparse
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import torch

SIZES = SimpleNamespace(
    sequence_dim=10, pairwise_dim=6, num_heads_ipa=3, ipa_dim=4, num_qk_points=2, num_v_points=5,
    inf=1e5, epsilon=1e-8,
)  # fmt: skip
NUM_RESIDUES = 7


def make_inputs(rng):
    q, r = np.linalg.qr(rng.normal(size=(NUM_RESIDUES, 3, 3)))
    q *= np.sign(np.diagonal(r, axis1=-2, axis2=-1))[:, None]
    arrays = {
        "single": rng.normal(size=(NUM_RESIDUES, SIZES.sequence_dim)),
        "pair": rng.normal(size=(NUM_RESIDUES, NUM_RESIDUES, SIZES.pairwise_dim)),
        "mask": np.arange(NUM_RESIDUES) % 3 != 1,
        "rotation": q * np.linalg.det(q)[:, None, None],
        "translation": 2 * rng.normal(size=(NUM_RESIDUES, 3)),
    }
    return {name: torch.tensor(x.astype(np.float32)) for name, x in arrays.items()}


def randomize(module, rng):
    """All parameters normal, weights with fan-in scaling."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter.shape[1] if parameter.ndim == 2 else 1
            values = rng.normal(size=parameter.shape) / fan_in**0.5
            parameter.copy_(torch.tensor(values.astype(np.float32)))
    return module


def esmfold_module():
    from transformers.models.esm.modeling_esmfold import EsmFoldInvariantPointAttention
    from transformers.models.esm.openfold_utils import Rigid, Rotation

    module = EsmFoldInvariantPointAttention(SIZES)
    return module, lambda rotation, translation: Rigid(Rotation(rotation), translation)


def openfold_module(checkout, is_multimer):
    sys.path.insert(0, str(checkout))
    # What the attention does not need: a compiled kernel, and tables with their dependencies.
    sys.modules["attn_core_inplace_cuda"] = ModuleType("attn_core_inplace_cuda")
    for name in ("openfold.np", "openfold.np.residue_constants", "openfold.utils.feats"):
        sys.modules[name] = MagicMock()
    from openfold.model import structure_module
    from openfold.utils.geometry import rigid_matrix_vector, rotation_matrix, vector
    from openfold.utils.rigid_utils import Rigid, Rotation

    s = SIZES
    sizes = (s.sequence_dim, s.pairwise_dim, s.ipa_dim, s.num_heads_ipa)
    points = (s.num_qk_points, s.num_v_points)
    if not is_multimer:
        module = structure_module.InvariantPointAttention(*sizes, *points, s.inf, s.epsilon)
        return module, lambda rotation, translation: Rigid(Rotation(rotation), translation)

    def frames(rotation, translation):
        return rigid_matrix_vector.Rigid3Array(
            rotation_matrix.Rot3Array.from_array(rotation),
            vector.Vec3Array.from_array(translation),
        )

    cls = structure_module.InvariantPointAttentionMultimer
    return cls(*sizes, *points, s.inf, s.epsilon), frames


def write(path, module, make_frames, seed):
    rng = np.random.default_rng(seed)
    module, x = randomize(module, rng), make_inputs(rng)
    with torch.no_grad():
        frames = make_frames(x["rotation"], x["translation"])
        x["output"] = module(x["single"], x["pair"], frames, x["mask"])
    arrays = {**x, **module.state_dict()}
    np.savez(path, **{name: tensor.numpy() for name, tensor in arrays.items()})


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--openfold", type=Path, help="a checkout of OpenFold")
    checkout = parser.parse_args().openfold
    folder = Path(__file__).parent
    write(folder / "esmfold_ipa.npz", *esmfold_module(), seed=0)
    if checkout is not None:
        for seed, variant in enumerate(("monomer", "multimer"), start=1):
            module = openfold_module(checkout, variant == "multimer")
            write(folder / f"openfold_{variant}_ipa.npz", *module, seed=seed)


if __name__ == "__main__":
    main()
