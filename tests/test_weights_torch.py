"""Layouts against the PyTorch packages they come from, and IgFold's trained modules.

`pytest -m torch`, with torch, invariant-point-attention and, for its weights, igfold installed
(`pip install --no-deps igfold`: its licence is academic, its files are read where they are).
"""

import importlib.metadata
import json
import struct

import jax
import numpy as np
import pytest
from variants import OUR_MODULES, transform

from benchmarks.structure import read_shipped
from ipa_haiku import IPAConfig, QuatAffine, layouts

pytestmark = pytest.mark.torch


def read_safetensors(path):
    """Tensors of a file of float32: eight bytes of length, a JSON header, the numbers."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, numbers = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__", None)
    assert {entry["dtype"] for entry in header.values()} <= {"F32", "I64"}
    return {
        name: np.frombuffer(numbers[slice(*entry["data_offsets"])], np.float32).reshape(
            entry["shape"]
        )
        for name, entry in header.items()
        if entry["dtype"] == "F32"
    }


def torch_module(config, pair_channel):
    from invariant_point_attention import InvariantPointAttention

    return InvariantPointAttention(
        dim=config.num_channel,
        heads=config.num_head,
        scalar_key_dim=config.num_scalar_qk,
        scalar_value_dim=config.num_scalar_v,
        point_key_dim=config.num_point_qk,
        point_value_dim=config.num_point_v,
        pairwise_repr_dim=pair_channel,
    )


def difference(state_dict, prefix, config, frames, seed):
    """The largest of the outputs' differences over the largest element, all residues real."""
    import torch

    below = f"{prefix}." if prefix else ""
    tensors = {k.removeprefix(below): x for k, x in state_dict.items() if k.startswith(below)}
    pair_channel = tensors["to_pairwise_attn_bias.0.weight"].shape[1]
    module = torch_module(config, pair_channel)
    module.load_state_dict({k: torch.as_tensor(x) for k, x in tensors.items()})
    rotation, translation = frames
    rng, n = np.random.default_rng(seed), len(translation)
    single = rng.normal(size=(n, config.num_channel)).astype(np.float32)
    pair = rng.normal(size=(n, n, pair_channel)).astype(np.float32)
    with torch.no_grad():
        arrays = (torch.tensor(x[None]) for x in (single, pair, rotation, translation))
        x, z, rotations, translations = arrays
        expected = module(x, z, rotations=rotations, translations=translations)[0].numpy()
    params = layouts.from_lucidrains(state_dict, prefix)
    ours = transform(*OUR_MODULES["monomer"], config)
    transposed = np.swapaxes(rotation, -1, -2)  # it multiplies row vectors
    mask = np.ones((n, 1), np.float32)
    actual = jax.jit(ours.apply)(params, single, pair, mask, transposed, translation)
    return np.abs(actual - expected).max() / np.abs(expected).max()


@pytest.fixture(scope="module")
def frames():
    """Rotations and translations, in Å about their mean, of the protein that is shipped."""
    backbone = read_shipped()
    affine = QuatAffine.from_backbone(
        *(np.float32(x) for x in (backbone.n, backbone.ca, backbone.c))
    )
    rotation = np.stack([np.stack(row, axis=-1) for row in affine.rotation], axis=-2)
    translation = np.stack(affine.translation, axis=-1)
    return rotation, translation - translation.mean(axis=0)


@pytest.mark.parametrize("config", [IPAConfig(8, 16, 16, 4, 4, 64), IPAConfig(3, 5, 7, 2, 6, 11)])
def test_lucidrains_itself(config, frames):
    module = torch_module(config, pair_channel=13)
    assert difference(module.state_dict(), "", config, frames, seed=0) <= 1e-5


def test_igfolds_trained_modules(frames):
    files = importlib.metadata.files("igfold")
    paths = [path.locate() for path in files if path.suffix == ".safetensors"]
    worst = {}
    for path in paths:
        state_dict = read_safetensors(path)
        for i, (layout, prefix, config) in enumerate(layouts.find_modules(state_dict)):
            assert layout == "lucidrains"
            worst[path.name, prefix] = difference(state_dict, prefix, config, frames, seed=i)
    print(f"{len(worst)} modules, largest difference {max(worst.values()):.1e}")
    assert len(worst) == 28
    assert max(worst.values()) <= 1e-5
