"""Sizes, random inputs and modules shared by the tests, and the count of bits that equal AF2's.

`jax_numpy_dtype_promotion` stays "standard": AF2's own code, which runs beside ours, needs it.
"""

import types
from pathlib import Path
from typing import NamedTuple

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from alphafold.model import folding as af2_folding
from alphafold.model import folding_multimer as af2_folding_multimer
from variants import AF2_CLASSES, classes_in_use

from ipa_haiku import InvariantPointAttention, IPAConfig, QuatAffine
from ipa_haiku.attention.types import IPAInputs
from ipa_haiku.config import read_toml

CONFIGS = Path(__file__).parents[1] / "configs"


class Sizes(NamedTuple):
    config: IPAConfig
    single_channel: int
    pair_channel: int


class ModuleInputs(NamedTuple):
    inputs_1d: jax.Array  # [..., N, C_s]
    inputs_2d: jax.Array  # [..., N, N, C_z]
    mask: jax.Array  # [..., N, 1]
    affine: jax.Array  # [..., N, 7], as `QuatAffine.to_tensor` gives it


def _read_sizes(name):
    path = CONFIGS / f"{name}.toml"
    model = read_toml(path)["model"]
    return Sizes(IPAConfig.from_toml(path), model["single_channel"], model["pair_channel"])


SIZES = {
    "af2": _read_sizes("af2_monomer"),
    "tiny": _read_sizes("tiny"),
    # No two numbers are alike, so that no swapped axis goes unnoticed.
    "odd": Sizes(IPAConfig(3, 5, 2, 1, 7, 11), single_channel=9, pair_channel=13),
    "notebook": Sizes(IPAConfig(num_head=8, num_channel=64), single_channel=64, pair_channel=32),
}


def _mask(kind, n):
    """[N] of 1 and 0; never empty but for "zero"."""
    return {
        "full": np.ones(n),
        "padded": np.arange(n) < (2 * n + 2) // 3,
        "holed": np.arange(n) % 3 != 1,
        "zero": np.zeros(n),
    }[kind].astype(np.float32)


def _random_affine(rng, *shape):
    """Quaternion and translation [..., N, 7], float64: a chain of 3.8 A steps in units of 10 A."""
    quaternion = rng.normal(size=(*shape, 4))
    quaternion /= np.linalg.norm(quaternion, axis=-1, keepdims=True)
    step = rng.normal(size=(*shape, 3))
    position = np.cumsum(0.38 * step / np.linalg.norm(step, axis=-1, keepdims=True), axis=-2)
    return np.concatenate([quaternion, position - position.mean(-2, keepdims=True)], axis=-1)


def _module_inputs(sizes, n, *, mask="full", batch=(), seed=0):
    rng = np.random.default_rng(seed)
    arrays = ModuleInputs(
        inputs_1d=rng.normal(size=(*batch, n, sizes.single_channel)),
        inputs_2d=rng.normal(size=(*batch, n, n, sizes.pair_channel)),
        mask=np.broadcast_to(_mask(mask, n)[:, None], (*batch, n, 1)),
        affine=_random_affine(rng, *batch, n),
    )
    return ModuleInputs(*(jnp.asarray(x.astype(np.float32)) for x in arrays))


def _core_inputs(
    sizes,
    num_query,
    num_key=None,
    *,
    batch=(),
    mask="full",
    points="chain",
    dtype="float32",
    seed=0,
):
    config, num_key = sizes.config, num_key or num_query
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape)

    # Queries and keys are the first residues of one chain.
    affine = _random_affine(rng, *batch, max(num_query, num_key))
    if points == "half_turns":
        affine[..., 0] = 0
        affine[..., :4] /= np.linalg.norm(affine[..., :4], axis=-1, keepdims=True)
    if points == "far":  # 10,000 A
        affine[..., 4:] += [600.0, 0.0, -800.0]
    if points == "outlier":  # one residue 1,000 A from all others
        affine[..., 2:3, 4:] += [60.0, 0.0, -80.0]
    if points == "domains":  # 300 A from each other
        affine[..., ::2, 4:] += [18.0, 0.0, -24.0]
    if points == "one_hot":  # each query sees the key of its own number only
        affine[..., 4] += 40.0 * np.arange(affine.shape[-2])

    def place(n, num_point):
        local = normal(*batch, n, config.num_head, num_point, 3)
        if points == "coincident":
            return np.broadcast_to([0.1, 0.2, 0.3], local.shape)
        rotation = oracle.rotation_matrix(affine[..., :n, :4])
        rotated = np.einsum("...nyx,...nhpx->...nhpy", rotation, local)
        return rotated + affine[..., :n, None, None, 4:]

    arrays = IPAInputs(
        q_scalar=normal(*batch, num_query, config.num_head, config.num_scalar_qk),
        k_scalar=normal(*batch, num_key, config.num_head, config.num_scalar_qk),
        v_scalar=normal(*batch, num_key, config.num_head, config.num_scalar_v),
        q_point=place(num_query, config.num_point_qk),
        k_point=place(num_key, config.num_point_qk),
        v_point=place(num_key, config.num_point_v),
        inputs_2d=normal(*batch, num_query, num_key, sizes.pair_channel),
        pair_weights=normal(sizes.pair_channel, config.num_head) / sizes.pair_channel**0.5,
        pair_bias=normal(config.num_head),
        # Softplus of normal numbers, scaled as in the monomer.
        point_weights=np.logaddexp(0, normal(config.num_head))
        * (2 / (3 * 9 * config.num_point_qk)) ** 0.5,
        q_mask=np.broadcast_to(_mask(mask, num_query), (*batch, num_query)),
        k_mask=np.broadcast_to(_mask(mask, num_key), (*batch, num_key)),
    )
    # Points and what weighs them stay float32, as in the modules.
    wide = {"q_point", "k_point", "v_point", "point_weights", "q_mask", "k_mask"}
    return IPAInputs(
        **{
            name: jnp.asarray(x.astype("float32" if name in wide else dtype))
            for name, x in arrays._asdict().items()
            if x is not None
        }
    )


def _module(sizes, *, implementation=None, zero_init=False, **call_options):
    def call(inputs_1d, inputs_2d, mask, affine):
        module = InvariantPointAttention(
            sizes.config,
            types.SimpleNamespace(zero_init=zero_init),
            implementation=implementation,
        )
        frames = QuatAffine.from_tensor(affine)
        return module(inputs_1d, inputs_2d, mask, frames, **call_options)

    return hk.without_apply_rng(hk.transform(call))


@pytest.fixture
def af2_is_left_as_it_was():
    yield
    in_use = classes_in_use()
    af2_folding.InvariantPointAttention, af2_folding_multimer.InvariantPointAttention = AF2_CLASSES
    assert in_use == AF2_CLASSES


@pytest.fixture(scope="session")
def sizes_of():
    """From a name to `Sizes`."""
    return SIZES.__getitem__


@pytest.fixture(scope="session")
def make_mask():
    """From "full", "padded", "holed" or "zero" and N to a mask [N]."""
    return _mask


@pytest.fixture(scope="session")
def make_inputs():
    """From `Sizes` and N to `ModuleInputs`."""
    return _module_inputs


@pytest.fixture(scope="session")
def make_core_inputs():
    """From `Sizes` and the numbers of queries and keys to `IPAInputs`."""
    return _core_inputs


@pytest.fixture(scope="session")
def make_module():
    """From `Sizes` to the transformed module, called with `ModuleInputs`."""
    return _module


@pytest.fixture(scope="session")
def make_params():
    """From a transformed module and its inputs to random parameters, none of them special."""

    def make_params(module, *inputs, seed=0):
        rng = np.random.default_rng(seed)
        shapes = jax.eval_shape(module.init, jax.random.key(0), *inputs)

        def draw(x):
            fan_in = x.shape[0] if len(x.shape) > 1 else 10
            return jnp.asarray((rng.normal(size=x.shape) / fan_in**0.5).astype(x.dtype))

        return jax.tree.map(draw, shapes)

    return make_params


@pytest.fixture
def debug_nans():
    """Every compiled function that returns a NaN raises."""
    with jax.debug_nans(True):
        yield


_bits = pytest.StashKey[dict[str, list[bool]]]()


@pytest.fixture(scope="session")
def count_bits(request):
    """Notes for the terminal summary whether the arrays of two pytrees agree in every bit."""
    counts = request.config.stash.setdefault(_bits, {})

    def count(what, actual, expected):
        same = all(
            np.array_equal(np.asarray(x).view(np.int32), np.asarray(y).view(np.int32))
            for x, y in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True)
        )
        counts.setdefault(what, []).append(same)
        return same

    return count


def pytest_sessionfinish(session):
    """A worker of pytest-xdist hands its counts to the process that prints the summary."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["bits"] = session.config.stash.get(_bits, {})


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    counts = node.config.stash.setdefault(_bits, {})
    for what, same in getattr(node, "workeroutput", {}).get("bits", {}).items():
        counts.setdefault(what, []).extend(same)


def pytest_terminal_summary(terminalreporter, config):
    for what, same in config.stash.get(_bits, {}).items():
        terminalreporter.write_line(f"bit-identical to AF2: {sum(same)} of {len(same)} {what}")
