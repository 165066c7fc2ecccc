"""Weights of OpenFold and ESMFold: converted, run, refused when they do not fit.

`tests/data/*_ipa.npz` were made by `tests/data/make_torch_golden.py`, which says how.
"""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from variants import DATA, OUR_MODULES, assert_same_bytes, flat, transform

from ipa_haiku import weights

GOLDEN = {
    "esmfold_ipa": ("monomer", "esmfold"),
    "openfold_monomer_ipa": ("monomer", "openfold"),
    "openfold_multimer_ipa": ("multimer", "openfold"),
}
INPUTS = ("single", "pair", "mask", "rotation", "translation")


@pytest.fixture(params=GOLDEN)
def golden(request):
    """Variant, layout, tensors, inputs and output of a torch module."""
    with np.load(DATA / f"{request.param}.npz") as file:
        tensors = dict(file)
    inputs = {name: tensors.pop(name) for name in INPUTS}
    inputs["mask"] = inputs["mask"][:, None]
    output = tensors.pop("output")
    return *GOLDEN[request.param], tensors, inputs, output


def test_openfold_weights_give_openfolds_output(golden):
    variant, _, tensors, inputs, output = golden
    params = weights.from_openfold(tensors)
    module = transform(*OUR_MODULES[variant], weights.config_of(params))
    actual = jax.jit(module.apply)(params, *inputs.values())
    assert_same_rows(actual, output, inputs["mask"])


def assert_same_rows(actual, expected, mask):
    """Of masked rows float32 keeps 8e-3 of the logits, after the 1e5 of the mask."""
    valid = np.flatnonzero(mask)
    assert 0 < len(valid) < len(mask)
    assert np.max(np.abs(actual - expected)[valid]) <= 1e-5 * np.max(np.abs(expected[valid]))


def test_openfold_round_trips_are_exact(golden):
    variant, layout, tensors, _, _ = golden
    params = weights.from_openfold(tensors, name="a/b")
    assert weights.extract_module(params, variant=variant)
    assert all(scope.startswith("a/b") for scope in params)
    back = weights.to_openfold(params, layout=layout)
    assert back.keys() == tensors.keys()
    assert_same_bytes({key: back[key] for key in tensors}, tensors)
    again = weights.from_openfold(back, name="a/b")
    assert_same_bytes(flat(again), flat(params))


def test_openfold_tensors_of_a_whole_model(golden):
    _, layout, tensors, _, _ = golden
    prefix = "trunk.structure_module.ipa"
    model = {f"{prefix}.{key}": x for key, x in tensors.items()} | {"trunk.linear.weight": None}
    params = weights.from_openfold(tensors)
    assert_same_bytes(flat(weights.from_openfold(model)), flat(params))
    for written in (prefix, f"{prefix}."):
        assert_same_bytes(flat(weights.from_openfold(model, written)), flat(params))
    back = weights.to_openfold(params, prefix=prefix, layout=layout)
    assert back.keys() == model.keys() - {"trunk.linear.weight"}
    two = model | {key.replace("trunk", "other"): x for key, x in model.items()}
    assert_same_bytes(flat(weights.from_openfold(two, prefix)), flat(params))
    for bad in ({}, two):
        with pytest.raises(KeyError, match="one key head_weights expected"):
            weights.from_openfold(bad)


def test_converted_arrays_are_copies(golden):
    _, layout, tensors, _, _ = golden
    params = weights.from_openfold(tensors)
    for x in jax.tree.leaves(params):
        assert not any(np.shares_memory(x, tensor) for tensor in tensors.values())
    for tensor in weights.to_openfold(params, layout=layout).values():
        assert not any(np.shares_memory(x, tensor) for x in jax.tree.leaves(params))


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


def test_tensors_are_detached(golden):
    _, _, tensors, _, _ = golden
    params = weights.from_openfold({key: Tensor(x) for key, x in tensors.items()})
    assert_same_bytes(flat(params), flat(weights.from_openfold(tensors)))
    of_jax = weights.from_openfold({key: jnp.asarray(x) for key, x in tensors.items()})
    assert_same_bytes(flat(of_jax), flat(params))


def test_a_tensor_that_numpy_cannot_hold_is_named(golden):
    _, _, tensors, _, _ = golden
    with pytest.raises(TypeError, match=r"linear_b\.weight: .*BFloat16"):
        weights.from_openfold(tensors | {"linear_b.weight": Tensor(None)})


def test_bad_openfold_tensors_are_named(golden):
    _, _, tensors, _, _ = golden
    model = {f"ipa.{key}": x for key, x in tensors.items()}
    for key, x in model.items():
        others = {k: y for k, y in model.items() if k != key}
        with pytest.raises(KeyError, match=f"missing .*{key}|head_weights expected"):
            weights.from_openfold(others)
        with pytest.raises(KeyError, match=rf"missing \['{key}'\]"):
            weights.from_openfold(others, "ipa")
        with pytest.raises(ValueError, match=rf"{key} must have {x.ndim} dimensions"):
            weights.from_openfold(model | {key: x[None]})
        with pytest.raises(ValueError, match=rf"{key}, transposed, must be floating"):
            weights.from_openfold(model | {key: x.astype(int)})
        for wrong in (x[:-1], x[:0], x.repeat(2, -1)):
            with pytest.raises(ValueError, match=r"ipa\..* (has shape|must have outputs)"):
                weights.from_openfold(model | {key: wrong})
    with pytest.raises(KeyError, match=r"superfluous \['ipa.linear_q.scale'\]"):
        weights.from_openfold(model | {"ipa.linear_q.scale": np.ones(2)})


def test_what_openfold_has_no_module_for(golden):
    variant, _, tensors, _, _ = golden
    with pytest.raises(ValueError, match=f"no {variant} in the layout 'torch'"):
        weights.to_openfold(weights.from_openfold(tensors), layout="torch")
    if variant == "multimer":
        with pytest.raises(ValueError, match="no multimer in the layout 'esmfold'"):
            weights.to_openfold(weights.from_openfold(tensors), layout="esmfold")


@pytest.mark.torch
def test_esmfold_itself():
    import torch

    make = runpy.run_path(str(DATA / "make_torch_golden.py"))
    module, make_frames = make["esmfold_module"]()
    rng = np.random.default_rng(3)
    make["randomize"](module, rng)
    inputs = make["make_inputs"](rng)
    with torch.no_grad():
        frames = make_frames(inputs["rotation"], inputs["translation"])
        output = module(inputs["single"], inputs["pair"], frames, inputs["mask"]).numpy()

    params = weights.from_openfold(module.state_dict())  # torch tensors
    arrays = {name: x.numpy() for name, x in inputs.items()}
    arrays["mask"] = arrays["mask"][:, None]
    ours = transform(*OUR_MODULES["monomer"], weights.config_of(params))
    actual = jax.jit(ours.apply)(params, *arrays.values())
    assert_same_rows(actual, output, arrays["mask"])

    back = weights.to_openfold(params, layout="esmfold")
    module.load_state_dict({key: torch.tensor(x) for key, x in back.items()})
    assert_same_bytes(flat(weights.from_openfold(module.state_dict())), flat(params))
