"""Weights in other code bases' layouts: read, run against their own formulas, written, refused."""

import functools
import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import layout_formulas as formulas
import numpy as np
import pytest
from layout_formulas import AF2_SIZES, FRAMEDIFF_SIZES, IGFOLD_SIZES, ODD_SIZES, Sizes, make_inputs
from variants import OUR_MODULES, flat, transform

from ipa_haiku import IPAConfig, layouts, weights
from ipa_haiku.jax_versions import enable_x64

NUM_RESIDUES = 7


class Layout(NamedTuple):
    shapes: Callable
    formula: Callable
    name: str  # of the reader
    sizes: Sizes  # of the code base
    to: Callable | None  # the inverse of the reader
    variant: str = "monomer"
    row_vectors: bool = False
    masks_rows: bool = True  # as AF2 does, so that masked residues' outputs are the same
    dist_epsilon: float = 1e-8


def _to(name, **options):
    return functools.partial(getattr(layouts, f"to_{name}"), **options)


LAYOUTS = {
    "lucidrains": Layout(
        formulas.lucidrains_shapes, formulas.lucidrains, "lucidrains",
        IGFOLD_SIZES, _to("lucidrains"), row_vectors=True, masks_rows=False,
    ),
    "framediff": Layout(
        formulas.framediff_shapes, formulas.openfold, "framediff", FRAMEDIFF_SIZES, None
    ),
    "frameflow": Layout(
        formulas.frameflow_shapes, formulas.openfold, "framediff", FRAMEDIFF_SIZES, None
    ),
    "omegafold": Layout(
        formulas.omegafold_shapes, formulas.omegafold, "omegafold", AF2_SIZES, _to("omegafold"),
        masks_rows=False, dist_epsilon=0.0,
    ),
    "helixfold": Layout(
        formulas.helixfold_shapes, formulas.helixfold, "helixfold", AF2_SIZES, _to("helixfold")
    ),
    "genie": Layout(
        formulas.openfold_shapes, formulas.openfold, "openfold", AF2_SIZES,
        _to("openfold", layout="esmfold"),
    ),
    "ibex": Layout(
        formulas.ibex_shapes, formulas.openfold, "openfold", AF2_SIZES,
        _to("openfold", layout="ibex"),
    ),
    "unifold_multimer": Layout(
        formulas.unifold_multimer_shapes, formulas.unifold_multimer, "openfold", AF2_SIZES,
        _to("openfold", layout="unifold"), variant="multimer",
    ),
}  # fmt: skip
HALLMARKS = {
    "lucidrains": "point_weights",
    "framediff": "head_weights",
    "openfold": "head_weights",
    "omegafold": "trainable_point_weights",
    "helixfold": "trainable_point_weights",
}


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return LAYOUTS[request.param]


def reader(layout):
    return getattr(layouts, f"from_{layout.name}")


def sizes_for(layout, kind):
    if kind == "own":
        return layout.sizes
    # OpenFold's values have as many channels as its queries.
    shared = layout.name in ("openfold", "framediff")
    return ODD_SIZES._replace(scalar_v=ODD_SIZES.scalar_qk) if shared else ODD_SIZES


def tensors_of(layout, kind="odd", seed=0, dtype="float32"):
    return formulas.draw(layout.shapes(sizes_for(layout, kind)), seed, dtype)


def config_for(layout, kind):
    s = sizes_for(layout, kind)
    return IPAConfig(s.head, s.scalar_qk, s.scalar_v, s.point_qk, s.point_v, s.single)


# --- outputs -------------------------------------------------------------------------------------


@functools.cache
def compiled(variant, config, dist_epsilon):
    options = {"dist_epsilon": dist_epsilon, "implementation": "reference"}
    return jax.jit(transform(*OUR_MODULES[variant], config, **options).apply)


def ours(layout, params, inputs, dtype):
    single, pair, mask, rotation, translation = (x.astype(dtype) for x in inputs)
    if layout.row_vectors:
        rotation = rotation.swapaxes(-1, -2)
    apply = compiled(layout.variant, weights.config_of(params), layout.dist_epsilon)
    return apply(params, single, pair, mask[:, None], rotation, translation)


def error(layout, kind, dtype, mask):
    """The largest, of the largest element, in the rows that have to agree."""
    s, tensors = sizes_for(layout, kind), tensors_of(layout, kind, dtype=dtype)
    inputs = make_inputs(s, mask)
    wide = {key: x.astype(np.float64) for key, x in tensors.items()}
    expected = layout.formula(wide, s, *inputs)
    actual = np.asarray(ours(layout, reader(layout)(tensors), inputs, dtype))
    assert actual.dtype == dtype
    # Of masked rows float32 keeps 8e-3 of the logits, after the 1e5 of the mask.
    rows = slice(None) if layout.masks_rows and dtype == "float64" else mask > 0
    return np.max(np.abs(actual - expected)[rows]) / np.max(np.abs(expected[rows]))


@pytest.mark.parametrize("kind", ["own", "odd"])
def test_outputs_are_those_of_the_code_base(layout, kind):
    masks = np.ones(NUM_RESIDUES), (np.arange(NUM_RESIDUES) % 3 != 1).astype(float)
    with enable_x64(True):
        for mask in masks:
            assert error(layout, kind, "float64", mask) <= 1e-10
    for mask in masks:
        assert error(layout, kind, "float32", mask) <= 1e-5


# --- there and back ------------------------------------------------------------------------------


def assert_same_tensors(actual, expected):
    assert actual.keys() == expected.keys()
    for key, x in expected.items():
        assert (actual[key].dtype, actual[key].shape) == (x.dtype, x.shape), key
        assert actual[key].tobytes() == x.tobytes(), key


@pytest.mark.parametrize("kind", ["own", "odd"])
def test_round_trips_are_exact(layout, kind):
    tensors = tensors_of(layout, kind)
    params = reader(layout)(tensors, name="a/b")
    assert weights.config_of(params) == config_for(layout, kind)
    assert weights.extract_module(params, "a/b", variant=layout.variant)
    assert all(x.dtype == np.float32 for x in flat(params).values())
    if layout.to is None:
        return
    back = layout.to(params)
    assert_same_tensors(back, tensors)
    assert_same_tensors(flat(reader(layout)(back, name="a/b")), flat(params))
    with_prefix = layout.to(params, "a/b", prefix="trunk.ipa.")
    assert_same_tensors(with_prefix, {f"trunk.ipa.{key}": x for key, x in tensors.items()})
    for x in flat(params).values():
        assert not any(np.shares_memory(x, y) for y in (*tensors.values(), *back.values()))


def test_framediffs_fold_has_no_inverse():
    assert not hasattr(layouts, "to_framediff")


def test_an_unused_projection_changes_nothing():
    tensors = tensors_of(LAYOUTS["framediff"])
    used = {key: x for key, x in tensors.items() if "rbf" not in key}
    read = layouts.from_framediff
    assert_same_tensors(flat(read(used)), flat(read(tensors)))


class Tensor:
    """What NumPy sees of a torch tensor that requires a gradient."""

    def __init__(self, x, detached=False):
        self.x, self.detached = x, detached

    def detach(self):
        return Tensor(self.x, detached=True)

    def cpu(self):
        return self

    def numpy(self):
        assert self.detached
        if self.x is None:
            raise TypeError("Got unsupported ScalarType BFloat16")
        return self.x


def test_arrays_of_any_library(layout):
    read, tensors = reader(layout), tensors_of(layout)
    expected = flat(read(tensors))
    for convert in (jnp.asarray, Tensor):
        actual = read({key: convert(x) for key, x in tensors.items()})
        assert all(type(x) is np.ndarray for x in flat(actual).values())
        assert_same_tensors(flat(actual), expected)
    key = next(iter(tensors))
    with pytest.raises(TypeError, match=rf"{key}: .*BFloat16"):
        read(tensors | {key: Tensor(None)})


def test_one_module_of_a_model(layout):
    read, tensors = reader(layout), tensors_of(layout)
    model = {f"trunk.0.ipa.{key}": x for key, x in tensors.items()} | {"trunk.norm.weight": None}
    expected = flat(read(tensors))
    for prefix in (None, "trunk.0.ipa", "trunk.0.ipa."):
        assert_same_tensors(flat(read(model, prefix)), expected)
    two = model | {key.replace("trunk.0", "trunk.1"): x for key, x in model.items()}
    assert_same_tensors(flat(read(two, "trunk.1.ipa")), expected)
    with pytest.raises(KeyError, match=r"one key .* expected, found .*`prefix` says which"):
        read(two)


# --- which modules there are ---------------------------------------------------------------------


def test_every_module_is_found():
    model = {"embedding.weight": None}
    for i, (name, layout) in enumerate(LAYOUTS.items()):
        model |= {f"{name}.{i}.ipa.{key}": x for key, x in tensors_of(layout, seed=i).items()}
    found = layouts.find_modules(model)
    assert found == [
        (layout.name, f"{name}.{i}.ipa", config_for(layout, "odd"))
        for i, (name, layout) in enumerate(LAYOUTS.items())
    ]
    for module in found:
        params = getattr(layouts, f"from_{module.layout}")(model, module.prefix)
        assert weights.config_of(params) == module.config


def test_a_module_alone_is_found(layout):
    tensors = tensors_of(layout)
    assert layouts.find_modules(tensors) == [(layout.name, "", config_for(layout, "odd"))]


def test_what_is_of_no_layout_is_not_found(layout):
    assert layouts.find_modules({}) == []
    tensors = tensors_of(layout)
    assert layouts.find_modules(tensors | {"rotary_emb.freqs": np.ones(3, "f4")}) == []
    assert layouts.find_modules({"ipa.point_weights": np.ones(3, "f4")}) == []


def test_a_damaged_module_is_named(layout):
    model = {f"ipa.{key}": x for key, x in tensors_of(layout).items()}
    key = next(key for key in model if key.endswith("weight"))
    with pytest.raises(ValueError, match=r"ipa\..* has shape"):
        layouts.find_modules(model | {key: model[key][:, 1:]})


# --- what does not fit ---------------------------------------------------------------------------


def test_bad_tensors_are_named(layout):
    read = reader(layout)
    model = {f"ipa.{key}": x for key, x in tensors_of(layout).items()}
    unused = ("ipa.linear_rbf.weight", "ipa.linear_rbf.bias")
    for key, x in model.items():
        if key in unused:
            continue
        name = re.escape(key)
        others = {k: y for k, y in model.items() if k != key}
        with pytest.raises(KeyError, match=rf"missing .*{name}'"):
            read(others, "ipa")
        with pytest.raises(ValueError, match=rf"{name} must have {x.ndim} dimensions"):
            read(model | {key: x[None]})
        with pytest.raises(ValueError, match=rf"{name}.* must be floating"):
            read(model | {key: x.astype(int)})
        for wrong in (x[:-1], x[:0], x.repeat(2, -1)):
            with pytest.raises(ValueError, match=r"ipa\..* (has shape|must have outputs)"):
                read(model | {key: wrong})
    with pytest.raises(KeyError, match=r"superfluous \['ipa\.scale'\]"):
        read(model | {"ipa.scale": np.ones(2)})


def test_a_prefix_that_is_not_there(layout):
    model = {f"trunk.ipa.{key}": x for key, x in tensors_of(layout).items()}
    with pytest.raises(KeyError, match=r"no key begins with 'trunk\.ipa_0\.'"):
        reader(layout)(model, "trunk.ipa_0")


@pytest.mark.parametrize("path", [["model"], ["state_dict"], ["ema", "params"]])
def test_a_nested_checkpoint(layout, path):
    tensors = {f"ipa.{key}": x for key, x in tensors_of(layout).items()}
    checkpoint = tensors
    for key in reversed(path):
        checkpoint = {"epoch": 3, key: checkpoint, "optimizer": {"state": {0: {"step": 1}}}}
    where = re.escape("checkpoint" + "".join(f"[{key!r}]" for key in path))
    for call in (
        lambda: reader(layout)(checkpoint),
        lambda: reader(layout)(checkpoint, "ipa"),
        lambda: layouts.find_modules(checkpoint),
    ):
        with pytest.raises(ValueError, match=f"pass {where}"):
            call()


@pytest.mark.parametrize("other", ["lucidrains", "framediff", "omegafold", "helixfold", "genie"])
def test_a_file_of_another_layout(layout, other):
    other = LAYOUTS[other]
    if other.name == layout.name:
        return
    tensors, read = tensors_of(other), reader(layout)
    if HALLMARKS[other.name] == HALLMARKS[layout.name]:
        with pytest.raises(KeyError, match=r"missing .*, superfluous"):
            read(tensors)
        return
    with pytest.raises(KeyError, match=rf"found \[\], but .*`from_{other.name}`"):
        read(tensors)
    with pytest.raises(KeyError, match=f"superfluous .*{HALLMARKS[other.name]}"):
        read(tensors_of(layout) | tensors)


def params_of(config, seed=0):
    """Random parameters of the monomer with 9 and 22 channels."""
    s = Sizes(9, 22, *(getattr(config, f"num_{x}") for x in Sizes._fields[2:]))
    tensors = formulas.draw(formulas.helixfold_shapes(s), seed, "float32")
    for key in "output_projection.weight", "output_projection.bias":
        tensors[key] = tensors[key][..., : config.num_channel]
    return layouts.from_helixfold(tensors)


def test_what_a_layout_cannot_hold():
    config = IPAConfig(3, 4, 10, 2, 6, 9)
    params = params_of(config)
    with pytest.raises(ValueError, match=r"no place for \[.*lucidrains's to_point_k\.bias"):
        layouts.to_lucidrains(params)
    assert_same_tensors(flat(layouts.from_omegafold(layouts.to_omegafold(params))), flat(params))
    with pytest.raises(ValueError, match="as many channels as inputs_1d, got 8 and 9"):
        layouts.to_omegafold(params_of(IPAConfig(3, 4, 10, 2, 6, 8)))
    with pytest.raises(ValueError, match=r"no place for .*/kv_scalar//bias"):
        layouts.to_openfold(params_of(IPAConfig(3, 4, 4, 2, 6, 9)), layout="ibex")
    multimer = reader(LAYOUTS["unifold_multimer"])(tensors_of(LAYOUTS["unifold_multimer"]))
    for write in (layouts.to_lucidrains, layouts.to_omegafold, layouts.to_helixfold):
        with pytest.raises(ValueError, match="of the multimer, not monomer"):
            write(multimer)
