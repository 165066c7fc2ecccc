"""Weights of AlphaFold 2, OpenFold and ESMFold: read, run, written back, refused when damaged.

`tests/data/*_ipa.npz` were made by `tests/data/make_torch_golden.py`, which says how.
"""

import io
import json
import os
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import utils as af2_utils
from variants import (
    AF2_MODULES,
    DATA,
    NAME,
    OUR_MODULES,
    SCOPE,
    VARIANTS,
    assert_same_bytes,
    flat,
    transform,
)

from ipa_haiku import IPAConfig, weights
from ipa_haiku.quat_affine import quat_to_rot, rot_list_to_tensor


def unflatten(arrays):
    params = {}
    for key, x in arrays.items():
        scope, name = key.split("//")
        params.setdefault(scope, {})[name] = x
    return params


@pytest.fixture(scope="module")
def arguments(sizes_of, make_inputs):
    """What both modules of "odd" sizes are called with."""
    inputs_1d, inputs_2d, mask, affine = make_inputs(sizes_of("odd"), 7, mask="holed")
    rotation = rot_list_to_tensor(quat_to_rot(affine[..., :4]))
    return inputs_1d, inputs_2d, mask, rotation, affine[..., 4:]


@pytest.fixture(scope="module")
def module_params(sizes_of, make_params, arguments):
    """From a variant to random parameters of AF2's own module."""

    def module_params(variant):
        module = transform(*AF2_MODULES[variant], sizes_of("odd").config)
        return jax.device_get(make_params(module, *arguments))

    return module_params


@pytest.fixture
def released(module_params):
    """From a variant to a flat dict as AF2's files hold it, with parameters of other modules."""

    def released(variant):
        rng = np.random.default_rng(0)
        module = {key.replace(NAME, SCOPE, 1): x for key, x in flat(module_params(variant)).items()}
        return {
            "alphafold/alphafold_iteration/evoformer/evoformer_iteration/msa_transition/"
            "transition1//weights": rng.normal(size=(4, 3, 12)).astype(np.float32),
            **module,
            "alphafold/alphafold_iteration/evoformer/~_relative_encoding/position_activations"
            "//bias": rng.normal(size=5),
            f"{SCOPE.removesuffix(NAME)}affine_update//bias": np.array([-0.0, np.nan, 1e-45], "f4"),
        }

    return released


@pytest.fixture
def npz(tmp_path, released):
    """From a variant to the path of a file with `released`, written without this package."""

    def npz(variant):
        path = tmp_path / f"params_{variant}.npz"
        np.savez(path, **released(variant))
        return path

    return npz


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_af2s_parameters_are_read_and_written_back(variant, npz, released, tmp_path):
    params = weights.read_npz(npz(variant))
    assert_same_bytes(flat(params), released(variant))
    weights.write_npz(tmp_path / "back", params)
    with np.load(tmp_path / "back", allow_pickle=False) as back:
        assert_same_bytes(dict(back), released(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_af2_reads_what_is_written(variant, npz, tmp_path):
    weights.write_npz(tmp_path / "back.npz", weights.read_npz(npz(variant)))
    with np.load(npz(variant)) as original, np.load(tmp_path / "back.npz") as back:
        expected = af2_utils.flat_params_to_haiku(original, to_jnp=False)
        actual = af2_utils.flat_params_to_haiku(back, to_jnp=False)
    assert_same_bytes(flat(actual), flat(expected))
    assert_same_bytes(flat(weights.read_npz(npz(variant))), flat(expected))


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameters_from_a_file_give_af2s_output(variant, npz, arguments, sizes_of):
    params = weights.read_npz(npz(variant))
    with np.load(npz(variant)) as file:
        af2_params = af2_utils.flat_params_to_haiku(file)
    af2_module = transform(*AF2_MODULES[variant], sizes_of("odd").config, SCOPE)
    expected = jax.jit(af2_module.apply)(af2_params, *arguments)
    of_module = weights.extract_module(params)
    config = weights.config_of(of_module)
    assert config == weights.config_of(params) == sizes_of("odd").config
    for scope, ours in [(NAME, of_module), (SCOPE, params)]:
        module = transform(*OUR_MODULES[variant], config, scope, implementation="reference")
        actual = jax.jit(module.apply)(ours, *arguments)
        assert np.max(np.abs(actual - expected)) <= 1e-6 * np.max(np.abs(expected))


def test_any_array_survives(tmp_path):
    arrays = {
        "scalar": np.float32(3), "empty": np.zeros((0, 3), np.float16), "int": np.arange(3),
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "bool": np.array([True]),
        "big_endian": np.arange(3, dtype=">f4"), "nan": np.array([np.nan, -0.0, np.inf]),
        "file": np.ones(1), "a/b": np.ones(2),
    }  # fmt: skip
    params = {"one": arrays, "one/two": {"x": np.ones(3)}}
    weights.write_npz(tmp_path / "x.npz", params)
    back = weights.read_npz(tmp_path / "x.npz")
    expected = {key: np.asarray(x) for key, x in flat(params).items()}
    assert_same_bytes(flat(back), expected)


def test_arrays_of_jax_are_written(tmp_path):
    weights.write_npz(tmp_path / "x.npz", {"a": {"w": jnp.arange(3.0)}})
    np.testing.assert_array_equal(weights.read_npz(tmp_path / "x.npz")["a"]["w"], [0, 1, 2])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": {"w": jnp.ones(2, jnp.bfloat16)}}, "a//w has dtype bfloat16"),
        ({"a": {"w": np.array([None])}}, "a//w has dtype object"),
        ({"a//b": {"w": np.ones(2)}}, "'a//b//w' is not of the form"),
        ({"": {"w": np.ones(2)}}, "'//w' is not of the form"),
        ({"a/": {"w": np.ones(2)}}, "'a///w' is not of the form"),
        ({"a": {"": np.ones(2)}}, "'a//' is not of the form"),
    ],
)
def test_what_a_file_cannot_hold_changes_nothing(params, message, tmp_path):
    path = tmp_path / "x.npz"
    path.write_bytes(b"what was there")
    with pytest.raises(ValueError, match=message):
        weights.write_npz(path, {"good": {"w": np.ones(1)}} | params)
    assert path.read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == ["x.npz"]


def test_a_failed_write_changes_nothing(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    path.write_bytes(b"what was there")

    def full_disk(file, **_):
        file.write(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(np, "savez", full_disk)
    with pytest.raises(OSError, match="no space"):
        weights.write_npz(path, {"a": {"w": np.ones(1)}})
    assert path.read_bytes() == b"what was there"
    assert os.listdir(tmp_path) == ["x.npz"]


# --- damaged files -------------------------------------------------------------------------------


def npy(array, **options):
    stream = io.BytesIO()
    np.lib.format.write_array(stream, array, **options)
    return stream.getvalue()


def zipped(**members):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return stream.getvalue()


GOOD = npy(np.arange(64.0))
KEY = "a/b//w"


def flipped(data):
    """One bit of the array's data is wrong."""
    start = data.index(np.arange(64.0).tobytes()) + 100
    return data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :]


DAMAGED = {
    "empty": (b"", "not a zip file"),
    "text": (b"not an archive at all", "not a zip file"),
    "truncated": (zipped(**{f"{KEY}.npy": GOOD})[:-40], "not a zip file"),
    "flipped_bit": (flipped(zipped(**{f"{KEY}.npy": GOOD})), f"{KEY}.npy: Bad CRC-32"),
    "npy": (GOOD, "not a zip file"),
    "pickle": (pickle.dumps({KEY: np.ones(3)}), "not a zip file"),
    "pickled_array": (
        zipped(**{f"{KEY}.npy": npy(np.array([{}, []], dtype=object), allow_pickle=True)}),
        f"{KEY}.npy: Object arrays cannot be loaded when allow_pickle=False",
    ),
    "pickled_member": (zipped(**{f"{KEY}.npy": pickle.dumps(3)}), f"{KEY}.npy: .*pickled"),
    "short_member": (zipped(**{f"{KEY}.npy": GOOD[:-8]}), f"{KEY}.npy: "),
    "long_member": (zipped(**{f"{KEY}.npy": GOOD + b"?"}), f"{KEY}.npy: it is not one array"),
    "empty_member": (zipped(**{f"{KEY}.npy": b""}), f"{KEY}.npy: "),
    "nested": (zipped(**{f"{KEY}.npy": zipped(x=GOOD)}), f"{KEY}.npy: it is not one array"),
    "no_separator": (zipped(**{"a/w.npy": GOOD}), "'a/w' is not of the form <scope>//<name>"),
    "two_separators": (zipped(**{"a//b//w.npy": GOOD}), "'a//b//w' is not of the form"),
    "no_scope": (zipped(**{"//w.npy": GOOD}), "'//w' is not of the form"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files_are_refused(kind, tmp_path):
    data, message = DAMAGED[kind]
    path = tmp_path / "params.npz"
    path.write_bytes(data)
    with pytest.raises(
        ValueError, match=f"cannot read .*params.npz as AF2's parameters: .*{message}"
    ):
        weights.read_npz(path)
    assert path.read_bytes() == data


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.npz"):
        weights.read_npz(tmp_path / "nowhere.npz")


def test_no_damaged_array_is_read(tmp_path):
    """Any one byte changed, or any end cut off: an error, or no array that is not right."""
    good = zipped(**{f"{KEY}.npy": npy(np.arange(4.0)), "a//bias.npy": npy(np.arange(3))})
    (tmp_path / "good").write_bytes(good)
    expected = {k: x.tobytes() for k, x in flat(weights.read_npz(tmp_path / "good")).items()}
    rng = np.random.default_rng(0)
    damaged = [good[:end] for end in range(0, len(good), 7)]
    for i in range(len(good)):
        damaged.append(good[:i] + bytes([good[i] ^ rng.integers(1, 256)]) + good[i + 1 :])
    for data in damaged:
        (tmp_path / "x").write_bytes(data)
        try:
            actual = flat(weights.read_npz(tmp_path / "x"))
        except ValueError:
            continue
        assert {key: x.tobytes() for key, x in actual.items()}.items() <= expected.items()


# --- the module in a model -----------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_extract_and_replace_are_inverses(variant, released):
    params = weights.rename_scope(unflatten(released(variant)), "alphafold", "mine/alphafold")
    module = weights.extract_module(params, name="my/ipa", variant=variant)
    assert all(scope == "my/ipa" or scope.startswith("my/ipa/") for scope in module)
    assert_same_bytes(flat(weights.replace_module(params, module)), flat(params))
    doubled = jax.tree.map(lambda x: 2 * x, module)
    changed = flat(weights.replace_module(params, doubled, f"mine/{SCOPE}"))
    for key, x in flat(params).items():
        inside = key.startswith(f"mine/{SCOPE}/")
        np.testing.assert_array_equal(changed[key], 2 * x if inside else x)


def test_renamed_scopes():
    params = {"a": {"w": 1}, "a/b": {"w": 2}, "ab": {"w": 3}, "c/a": {"w": 4}}
    assert weights.rename_scope(params, "a", "d/e") == {
        "d/e": {"w": 1}, "d/e/b": {"w": 2}, "ab": {"w": 3}, "c/a": {"w": 4}
    }  # fmt: skip
    assert weights.rename_scope(params, "a", "a/a") == {
        "a/a": {"w": 1}, "a/a/b": {"w": 2}, "ab": {"w": 3}, "c/a": {"w": 4}
    }  # fmt: skip
    assert weights.rename_scope(params, "c/a", "c")["c"] == {"w": 4}
    with pytest.raises(KeyError, match="no parameters at or below the scope 'b'"):
        weights.rename_scope(params, "b", "d")
    with pytest.raises(ValueError, match="there are parameters of these names"):
        weights.rename_scope(params, "c/a", "ab")
    with pytest.raises(ValueError, match="not of the form"):
        weights.rename_scope(params, "a", "")


def test_a_model_without_the_module_or_with_two(released):
    params = unflatten(released("monomer"))
    two = params | weights.extract_module(params, name="second")
    assert weights.config_of(two, "second") == weights.config_of(two, SCOPE)
    for bad in ({}, {"a": {"w": np.ones(2)}}, two):
        with pytest.raises(KeyError, match="one scope with trainable_point_weights expected"):
            weights.extract_module(bad)
    with pytest.raises(KeyError, match="no parameters at or below the scope 'nowhere'"):
        weights.extract_module(params, "nowhere")


# --- parameters that do not make a module --------------------------------------------------------


def keys_of(variant):
    golden = json.loads((DATA / f"parameters_{variant}.json").read_text())
    return [f"{scope}//{name}" for scope, arrays in golden.items() for name in arrays]


EACH_KEY = [(variant, key) for variant in VARIANTS for key in keys_of(variant)]


def assert_refused(arrays, error, *words, **options):
    """Refused by all that takes the parameters of a module, in so many words, and left alone."""
    before = {key: np.copy(x) for key, x in arrays.items()}
    params = unflatten(arrays)
    calls = [
        lambda: weights.extract_module(params, NAME, **options),
        lambda: weights.config_of(params, NAME),
        lambda: weights.to_openfold(params, NAME),
        lambda: weights.replace_module(params, params, NAME),
    ]
    for call in calls[: 1 if options else None]:
        with pytest.raises(error) as info:
            call()
        assert all(word in str(info.value) for word in words), str(info.value)
    assert_same_bytes(arrays, before)


@pytest.mark.parametrize(("variant", "key"), EACH_KEY)
def test_a_missing_parameter_is_named(variant, key, module_params):
    arrays = flat(module_params(variant))
    del arrays[key]
    named = [key.rpartition("/")[2]] if key.endswith("point_weights") else ["missing", f"'{key}'"]
    assert_refused(arrays, KeyError, *named)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("key", [f"{NAME}//extra", f"{NAME}/extra//weights"])
def test_a_superfluous_parameter_is_named(variant, key, module_params):
    arrays = flat(module_params(variant)) | {key: np.ones(3, np.float32)}
    assert_refused(arrays, KeyError, f"superfluous ['{key}']")


@pytest.mark.parametrize(("variant", "key"), EACH_KEY)
def test_a_wrong_shape_is_named(variant, key, module_params, sizes_of):
    good = flat(module_params(variant))
    x = good[key]
    for wrong in [np.concatenate([x, x[-1:]]), x[:-1], x[:0], x.repeat(2, -1), x[..., :0]]:
        bad = good | {key: wrong}
        # Where the sizes are given, it is certain which one is wrong; input channels are free.
        shape = f"{key} has shape {wrong.shape} instead of {x.shape}"
        free = key.endswith(
            ("q_scalar//weights", "q_scalar_projection//weights", "attention_2d//weights")
        )
        named = [] if free else [shape]
        assert_refused(bad, ValueError, *named, config=sizes_of("odd").config)
        assert_refused(bad, ValueError, "has shape")
    for wrong in [x[None], x[0]]:
        assert_refused(good | {key: wrong}, ValueError, key, f"{x.ndim} dimensions")


@pytest.mark.parametrize(("variant", "key"), EACH_KEY)
def test_a_wrong_dtype_is_named(variant, key, module_params):
    good = flat(module_params(variant))
    for dtype in (np.int32, "V2", object):
        wrong = np.zeros(good[key].shape, dtype)
        assert_refused(good | {key: wrong}, ValueError, f"{key} must be floating-point")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_wrong_variant_is_refused(variant, module_params, npz):
    (other,) = set(VARIANTS) - {variant}
    params = weights.read_npz(npz(variant))
    assert weights.extract_module(params, variant=variant)
    with pytest.raises(ValueError, match=f"{SCOPE} has parameters of the {variant}, not {other}"):
        weights.extract_module(params, variant=other)
    with pytest.raises(ValueError, match=f"is of the {variant}, .* of the {other}"):
        weights.replace_module(params, module_params(other))


def test_both_variants_at_once_are_refused(module_params):
    both = flat(module_params("multimer")) | flat(module_params("monomer"))
    assert_refused(both, KeyError, "superfluous")


@pytest.mark.parametrize("variant", VARIANTS)
def test_sizes_that_are_not_those_asked_for_are_refused(variant, module_params):
    assert_refused(flat(module_params(variant)), ValueError, "has shape", config=IPAConfig())


def test_replacing_by_other_sizes_is_refused(module_params, make_params, arguments, sizes_of):
    params = module_params("monomer")
    wider = (arguments[0].repeat(2, -1), *arguments[1:])
    module = transform(*OUR_MODULES["monomer"], sizes_of("odd").config)
    with pytest.raises(ValueError, match="q_scalar//weights has shape"):
        weights.replace_module(params, make_params(module, *wider))


@pytest.mark.parametrize("variant", VARIANTS)
def test_openfold_has_no_values_of_other_sizes_than_keys(variant, module_params):
    with pytest.raises(ValueError, match="OpenFold's values"):  # 5 and 2 scalar channels
        weights.to_openfold(module_params(variant))
