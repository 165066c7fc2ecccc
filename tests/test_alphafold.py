"""Our modules inside the real AlphaFold, and inside packages that carry a copy of it."""

import contextlib
import functools
import types

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.common import confidence
from alphafold.data import parsers, pipeline
from alphafold.model import all_atom_multimer, folding, folding_multimer, prng
from alphafold.model import config as af2_config
from alphafold.model import quat_affine as af2_quat_affine
from alphafold.model.geometry import Rigid3Array, Rot3Array, Vec3Array
from alphafold.model.model import RunModel
from draws import assert_draws_within_error_budget
from implementations import ANYWHERE

import ipa_haiku
import ipa_haiku.folding_multimer
from ipa_haiku.alphafold import use_in_alphafold
from ipa_haiku.jax_versions import enable_x64

FAST = [name for name in ANYWHERE if name != "reference"]
pytestmark = pytest.mark.usefixtures("af2_is_left_as_it_was")


# --- the structure module ------------------------------------------------------------------------

NUM_RESIDUES = 24
# Our error over AF2's varies between 0.6 and 3 from draw to draw.
NUM_DRAWS = 12
VARIANTS = {"monomer": "model_1", "multimer": "model_1_multimer_v3"}


def make_structure_module(variant):
    """AF2's own, with AF2's own configuration, to be called with `make_batch`."""
    model = af2_config.model_config(VARIANTS[variant]).model
    model.global_config.zero_init = False  # otherwise the residues never leave the origin
    configs = model.heads.structure_module, model.global_config

    @hk.transform
    def call(representations, batch):
        options = {"is_training": False, "safe_key": prng.SafeKey(jax.random.key(0))}
        if variant == "monomer":
            return folding.StructureModule(*configs)(representations, batch, **options)
        options["compute_loss"] = True
        return folding_multimer.StructureModule(*configs)(representations, batch, **options)

    return hk.without_apply_rng(call)


def make_batch(rng):
    aatype = np.arange(NUM_RESIDUES, dtype=np.int32) % 20  # with side chains of every kind
    mask = (np.arange(NUM_RESIDUES) < NUM_RESIDUES - 3).astype(np.float32)
    representations = {
        "single": rng.normal(size=(NUM_RESIDUES, 384)),
        "pair": rng.normal(size=(NUM_RESIDUES, NUM_RESIDUES, 128)),
    }
    return {name: x.astype(np.float32) for name, x in representations.items()}, {
        "aatype": aatype,
        "seq_mask": mask,
        "atom14_atom_exists": all_atom_multimer.RESTYPE_ATOM14_MASK[aatype] * mask[:, None],
        "atom37_atom_exists": all_atom_multimer.RESTYPE_ATOM37_MASK[aatype] * mask[:, None],
        "residx_atom37_to_atom14": all_atom_multimer.RESTYPE_ATOM37_TO_ATOM14[aatype],
    }


def make_params(rng, shapes):
    """Random parameters that fold into something of the size of a protein."""

    def draw(path, x):
        scope, name = path[-2].key, path[-1].key
        values = rng.normal(size=x.shape)
        if name == "scale":
            values = 1 + 0.1 * values
        elif name == "weights":
            values /= x.shape[0] ** 0.5
            # Frames move by a few A in each of the 8 iterations.
            values *= 0.3 if "affine_update" in scope or "quat_rigid" in scope else 1
        else:
            values *= 0.1
        return values.astype(x.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def as_float64(tree):
    return jax.tree.map(lambda x: x.astype(np.float64) if x.dtype == np.float32 else x, tree)


def draw(variant, seed):
    """Parameters and representations, a batch, and where the atoms should be [N, 37, 3]."""
    rng = np.random.default_rng(seed)
    representations, batch = make_batch(rng)
    init = make_structure_module(variant).init
    shapes = jax.eval_shape(init, jax.random.key(0), representations, batch)
    target = 20 * rng.normal(size=(NUM_RESIDUES, 37, 3)).astype(np.float32)
    return (make_params(rng, shapes), representations), batch, target


@pytest.fixture(scope="module", params=VARIANTS)
def fold(request):
    """From an implementation, or None for AF2 alone, to final positions and gradients.

    Both are stacked over several draws: the error of one alone can be small by chance.
    """
    draws = [draw(request.param, seed) for seed in range(NUM_DRAWS)]

    def positions_and_gradients(arrays, batch, target):
        def loss(arrays):
            params, representations = arrays
            result = make_structure_module(request.param).apply(params, representations, batch)
            positions = result["final_atom_positions"]
            # As in FAPE: linear in the distance, without a kink.
            distance = jnp.sqrt(1e-4 + jnp.sum((positions - target) ** 2, axis=-1))
            return jnp.mean(batch["atom37_atom_exists"] * distance), positions

        gradients, positions = jax.grad(loss, has_aux=True)(arrays)
        of_params, of_representations = gradients
        # Weights and bias have one scale: the softmax does not see the bias of `attention_2d`.
        groups = {
            scope: jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(group)])
            for scope, group in of_params.items()
        }
        return positions, groups | of_representations

    def run(draws):
        # A new function, so that JAX does not find one that it has compiled.
        compiled = jax.jit(lambda *args: positions_and_gradients(*args))
        results = [jax.device_get(compiled(*arguments)) for arguments in draws]
        return jax.tree.map(lambda *x: np.stack(x), *results)

    @functools.cache
    def fold(implementation, float64=False):
        if float64:
            # What JAX keeps of float32 runs does not fit AF2's tables of integers, and vice versa.
            jax.clear_caches()
            with enable_x64(True), af2_geometry_in_float64():
                result = run(as_float64(draws))
            jax.clear_caches()
            return result
        if implementation is None:
            return run(draws)
        with use_in_alphafold(implementation):
            return run(draws)

    return fold


@contextlib.contextmanager
def af2_geometry_in_float64():
    """AF2's classes insist on float32."""
    with pytest.MonkeyPatch.context() as patch:
        for cls in (Rigid3Array, Rot3Array, Vec3Array):
            patch.setattr(cls, "__post_init__", lambda self: None)
        identity = functools.partial(Rigid3Array.identity, dtype=jnp.float64)
        patch.setattr(Rigid3Array, "identity", identity)
        yield


@pytest.mark.slow
@pytest.mark.parametrize("implementation", FAST)
def test_structure_module(implementation, fold):
    """8 layers with side chains: the same atoms, and gradients within twice AF2's own error."""
    ours, theirs, exact = fold(implementation), fold(None), fold(None, float64=True)
    assert exact[0].dtype == np.float64
    assert np.ptp(exact[0]) > 20  # the residues are not all in one place
    assert np.max(np.abs(ours[0] - theirs[0])) <= 1e-3
    assert_draws_within_error_budget(ours, theirs, exact)


SEQUENCE = "MKTAYIAKQRQISFVKSHFS"
NUM_MSA = 2  # and four more in the extra MSA


def make_model(variant):
    """AF2's whole model with one block in each stack, and features of six sequences."""
    n = len(SEQUENCE)
    config = af2_config.model_config({"monomer": "model_3"}.get(variant, VARIANTS[variant]))
    config.model.global_config.update(
        {"zero_init": False, "bfloat16": False, "use_remat": False}, allow_val_change=True
    )
    embeddings = config.model.embeddings_and_evoformer
    embeddings.evoformer_num_block = embeddings.extra_msa_stack_num_block = 1
    embeddings.template.enabled = False
    sequences = [SEQUENCE[3 * i :] + SEQUENCE[: 3 * i] for i in range(6)]
    msa = parsers.Msa(
        sequences,
        deletion_matrix=[[0] * n for _ in sequences],
        descriptions=[str(i) for i in range(6)],
    )
    features = pipeline.make_sequence_features(SEQUENCE, "query", n)
    features |= pipeline.make_msa_features([msa])
    if variant == "monomer":
        config.data.common.num_recycle = 0
        config.data.common.max_extra_msa = len(sequences) - NUM_MSA
        config.data.eval.max_msa_clusters = NUM_MSA
        runner = RunModel(config)
        features = runner.process_features(features, random_seed=0)
    else:
        embeddings.num_msa, embeddings.num_extra_msa = NUM_MSA, len(sequences) - NUM_MSA
        runner = RunModel(config)
        chain = (np.arange(n) >= n // 2).astype(np.int32)  # two chains
        features = {
            "aatype": np.argmax(features["aatype"], axis=-1).astype(np.int32),
            "residue_index": np.arange(n, dtype=np.int32),
            "msa": features["msa"].astype(np.int32),
            "deletion_matrix": np.zeros((len(sequences), n), np.float32),
            "msa_mask": np.ones((len(sequences), n), np.float32),
            "bert_mask": np.ones((len(sequences), n), np.float32),
            "cluster_bias_mask": np.eye(1, len(sequences), dtype=np.float32)[0],
            "seq_mask": np.ones(n, np.float32),
            "asym_id": chain,
            "entity_id": chain,
            "sym_id": np.ones(n, np.int32),
            # Not read in inference, but AF2 folds nothing without.
            "all_atom_positions": np.zeros((n, 37, 3), np.float32),
            "all_atom_mask": np.ones((n, 37), np.float32),
        }
    features["prev"] = {
        "prev_msa_first_row": np.zeros((n, 256), np.float32),
        "prev_pair": np.zeros((n, n, 128), np.float32),
        "prev_pos": np.zeros((n, 37, 3), np.float32),
    }
    return runner, features


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_whole_model(variant):
    """Evoformer, structure module and confidence, through AF2's own `RunModel`."""
    key = jax.random.PRNGKey(0)  # AF2 takes the words of a key apart
    runner, features = make_model(variant)
    params = make_params(np.random.default_rng(0), jax.eval_shape(runner.init, key, features))

    def predict():
        runner, features = make_model(variant)  # a new one, as the other is compiled
        result = jax.device_get(runner.apply(params, key, features))
        plddt = confidence.compute_plddt(result["predicted_lddt"]["logits"])  # 0 to 100
        return result["structure_module"]["final_atom_positions"], plddt

    positions, plddt = predict()
    assert np.ptp(positions) > 20  # the residues are not all in one place
    assert np.ptp(plddt) > 1
    for implementation in ANYWHERE:
        with use_in_alphafold(implementation):
            our_positions, our_plddt = predict()
        np.testing.assert_allclose(our_positions, positions, rtol=0, atol=1e-3)
        np.testing.assert_allclose(our_plddt, plddt, rtol=0, atol=1e-2)


def test_af2s_module_takes_our_frames(sizes_of, make_inputs, make_params):
    sizes = sizes_of("tiny")
    inputs = make_inputs(sizes, 5)

    def module(quat_affine):
        def call(inputs_1d, inputs_2d, mask, affine):
            module = folding.InvariantPointAttention(
                sizes.config, types.SimpleNamespace(zero_init=False)
            )
            return module(inputs_1d, inputs_2d, mask, quat_affine.from_tensor(affine))

        return hk.without_apply_rng(hk.transform(call))

    modules = module(ipa_haiku.QuatAffine), module(af2_quat_affine.QuatAffine)
    params = make_params(modules[1], *inputs)
    with_ours, with_theirs = jax.jit(lambda: [m.apply(params, *inputs) for m in modules])()
    np.testing.assert_array_equal(with_ours, with_theirs)
