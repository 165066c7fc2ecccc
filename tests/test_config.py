"""Sizes: read from configs/*.toml, and refused where they are no sizes."""

import dataclasses
import types
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from alphafold.model import config as af2_config

from ipa_haiku import IPAConfig
from ipa_haiku.config import as_config

CONFIGS = Path(__file__).parents[1] / "configs"
SIZES = [field.name for field in dataclasses.fields(IPAConfig)]


@pytest.mark.parametrize(
    ("name", "model"), [("af2_monomer", "model_1_ptm"), ("af2_multimer", "model_1_multimer_v3")]
)
def test_af2s_sizes(name, model):
    structure_module = af2_config.model_config(model).model.heads.structure_module
    expected = IPAConfig(**{size: structure_module[size] for size in SIZES})
    assert IPAConfig() == expected
    assert IPAConfig.from_toml(CONFIGS / f"{name}.toml") == expected


@pytest.mark.parametrize("name", ["af2_monomer", "af2_multimer", "esmfold", "tiny"])
def test_shipped_files_are_read(name):
    config = IPAConfig.from_toml(str(CONFIGS / f"{name}.toml"))
    assert isinstance(config, IPAConfig)


def test_frozen_and_hashable():
    config = IPAConfig(num_head=8)
    assert {config: 1}[IPAConfig(num_head=8)] == 1
    assert config != IPAConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.num_head = 4


@pytest.mark.parametrize("value", [0, -1, 2.0, "3", None, True])
@pytest.mark.parametrize("name", SIZES)
def test_what_is_no_size_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got {value!r}"):
        IPAConfig(**{name: value})


@pytest.mark.parametrize("make", [np.int64, np.uint8, np.array, jnp.array])
def test_any_integer_becomes_pythons(make):
    config = as_config(types.SimpleNamespace(**dict.fromkeys(SIZES, make(8))))
    assert config == IPAConfig(*6 * [8])
    assert isinstance(hash(config), int)
    assert all(type(size) is int for size in dataclasses.astuple(config))


def test_what_has_no_sizes_is_named():
    with pytest.raises(ValueError, match=r"config must have the attribute num_head, .* got a dict"):
        as_config(dataclasses.asdict(IPAConfig()))


GOOD = dict.fromkeys(SIZES, 1)


def write(path, sizes, table="ipa"):
    path.write_text(f"[{table}]\n" + "".join(f"{k} = {v}\n" for k, v in sizes.items()))
    return path


def test_a_file_is_read(tmp_path):
    path = write(tmp_path / "good.toml", GOOD)
    assert IPAConfig.from_toml(path) == IPAConfig(1, 1, 1, 1, 1, 1)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (GOOD | {"num_heads": 2}, r"unknown \['num_heads'\]"),
        ({k: v for k, v in GOOD.items() if k != "num_head"}, r"missing \['num_head'\]"),
        (GOOD | {"num_head": 0}, "num_head must be a positive integer, got 0"),
        (GOOD | {"num_head": 1.5}, "num_head must be a positive integer, got 1.5"),
    ],
)
def test_a_bad_file_is_named(sizes, message, tmp_path):
    path = write(tmp_path / "bad.toml", sizes)
    with pytest.raises(ValueError, match=rf"\[ipa\] in .*bad\.toml: .*{message}"):
        IPAConfig.from_toml(path)


def test_a_file_without_the_table_is_named(tmp_path):
    path = write(tmp_path / "other.toml", GOOD, table="model")
    with pytest.raises(ValueError, match=r"other\.toml has no \[ipa\] table"):
        IPAConfig.from_toml(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent\.toml"):
        IPAConfig.from_toml(tmp_path / "absent.toml")
