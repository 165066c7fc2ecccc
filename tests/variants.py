"""Both variants of the module, ours and AF2's, called alike; and their parameters as flat dicts."""

import contextlib
import types
from pathlib import Path

import haiku as hk
from alphafold.model import folding as af2_folding
from alphafold.model import folding_multimer as af2_folding_multimer
from alphafold.model.geometry import Rigid3Array, Rot3Array, Vec3Array
from alphafold.model.quat_affine import QuatAffine as AF2QuatAffine

from ipa_haiku import folding, folding_multimer

DATA = Path(__file__).parent / "data"
VARIANTS = ["monomer", "multimer"]
NAME = "invariant_point_attention"
SCOPE = f"alphafold/alphafold_iteration/structure_module/fold_iteration/{NAME}"


def classes_in_use():
    """Those of AF2's two modules, ours while they are swapped."""
    return af2_folding.InvariantPointAttention, af2_folding_multimer.InvariantPointAttention


AF2_CLASSES = classes_in_use()
AF2_MODULES = {
    "monomer": (
        af2_folding.InvariantPointAttention,
        lambda r, t: AF2QuatAffine(None, t, rotation=r, unstack_inputs=True),
    ),
    "multimer": (
        af2_folding_multimer.InvariantPointAttention,
        lambda r, t: Rigid3Array(Rot3Array.from_array(r), Vec3Array.from_array(t)),
    ),
}
OUR_MODULES = {
    "monomer": (folding.InvariantPointAttention, lambda *pair: pair),
    "multimer": (folding_multimer.InvariantPointAttention, lambda *pair: pair),
}


def transform(cls, make_frames, config, scope=NAME, **options):
    """The module at `scope`, inside of as many others as that takes."""
    *parents, name = scope.split("/")

    def call(inputs_1d, inputs_2d, mask, rotation, translation):
        with contextlib.ExitStack() as stack:
            for parent in parents:
                stack.enter_context(hk.name_scope(parent))
            module = cls(config, types.SimpleNamespace(zero_init=False), name=name, **options)
            return module(inputs_1d, inputs_2d, mask, make_frames(rotation, translation))

    return hk.without_apply_rng(hk.transform(call))


def assert_same_bytes(actual, expected):
    """Two flat dicts have the same keys in the same order, and the same arrays."""
    assert list(actual) == list(expected)
    for key, x in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (x.dtype, x.shape), key
        assert actual[key].tobytes() == x.tobytes(), key


def flat(params):
    return {f"{s}//{name}": x for s, arrays in params.items() for name, x in arrays.items()}
