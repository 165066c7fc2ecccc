"""Parameters from and to AlphaFold 2's .npz files, OpenFold, ESMFold and what has their names.

Parameters are Haiku's, `{scope: {name: array}}`; those read or converted are NumPy arrays, so that
no bit changes on the way. An .npz file of AF2 holds them flat, under keys `<scope>//<name>`. Every
function checks all that it is given before it makes anything, and changes none of its arguments.
"""

import io
import os
import zipfile
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from ipa_haiku import openfold_layout
from ipa_haiku.config import IPAConfig
from ipa_haiku.openfold_layout import Layout
from ipa_haiku.parameter_shapes import (
    ANY_SIZES,
    POINT_WEIGHTS,
    Sizes,
    Variant,
    check_keys,
    check_module,
    check_shapes,
    check_zero,
    shapes_of,
)
from ipa_haiku.state_dict import start_of, take_module

Params = dict[str, dict[str, Any]]
ParamsLike = Mapping[str, Mapping[str, Any]]


# --- files and scopes ----------------------------------------------------------------------------


def read_npz(path: str | os.PathLike[str]) -> Params:
    """Reads all parameters of an .npz file such as AF2's `params_model_1.npz`.

    Args:
      path: of a file with arrays under keys `<scope>//<name>`; pickled arrays are refused.

    Returns:
      Haiku parameters of the whole model, in the order of the file.

    Raises:
      FileNotFoundError: if there is no such file.
      ValueError: if the file is no .npz or incomplete, or an array is damaged, pickled or under a
        key of another form, naming the file and the key.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            return _unflatten({m.removesuffix(".npy"): _read_array(archive, m) for m in members})
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        raise ValueError(f"cannot read {os.fspath(path)} as AF2's parameters: {error}") from error


# What `zipfile` and `np.load` raise for damaged data, depending on where it is damaged.
_DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, ValueError)


def _read_array(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    try:
        # All of the member is read, so that its checksum is compared.
        stream = io.BytesIO(archive.read(member))
        array = np.load(stream, allow_pickle=False)
    except _DAMAGED as error:
        raise ValueError(f"{member}: {error}") from error
    if not isinstance(array, np.ndarray) or stream.read(1):
        raise ValueError(f"{member}: it is not one array.")
    return array


def write_npz(path: str | os.PathLike[str], params: ParamsLike) -> None:
    """Writes parameters as an .npz file in AF2's form: the inverse of `read_npz`.

    Args:
      path: of the file; one that exists is replaced when the new one is complete.
      params: Haiku parameters.

    Raises:
      ValueError: if a scope or name makes no key `<scope>//<name>`, or an array is of a dtype that
        .npz does not keep, such as bfloat16, naming the key.
    """
    flat = {key: np.asarray(x) for key, x in _flatten(params).items()}
    for key, x in flat.items():
        if x.dtype.kind in "OV":  # objects, and types that are not NumPy's own
            raise ValueError(f"{key} has dtype {x.dtype}, which .npz does not keep.")
    partial = f"{os.fspath(path)}.partial"
    try:
        with open(partial, "wb") as file:
            np.savez(file, **flat)  # type: ignore[arg-type]  # no key names another argument
        os.replace(partial, path)
    finally:
        if os.path.exists(partial):
            os.remove(partial)


def rename_scope(params: ParamsLike, old: str, new: str) -> Params:
    """Moves all parameters at and below the scope `old` to the scope `new`.

    Args:
      params: Haiku parameters.
      old: scope such as `alphafold`.
      new: scope such as `my_model/alphafold`.

    Returns:
      All parameters, in their order.

    Raises:
      KeyError: if there are none at or below `old`.
      ValueError: if there are parameters already where others would go.
    """
    flat, moved = _flatten(params), _below(params, old)
    if any(new + key in flat and not (new + key).startswith(f"{old}/") for key in moved):
        raise ValueError(f"{old!r} cannot become {new!r}: there are parameters of these names.")
    names = {old + key: new + key for key in moved}
    return _unflatten({names.get(key, key): x for key, x in flat.items()})


def _flatten(params: ParamsLike) -> dict[str, Any]:
    flat = {}
    for scope, arrays in params.items():
        for name, x in arrays.items():
            key = f"{scope}//{name}"
            if _split(key) != (scope, name):
                raise ValueError(f"the key {key!r} is not of the form <scope>//<name>.")
            flat[key] = x
    return flat


def _unflatten(flat: Mapping[str, Any]) -> Params:
    params: Params = {}
    for key, x in flat.items():
        scope, name = _split(key)
        params.setdefault(scope, {})[name] = x
    return params


def _split(key: str) -> tuple[str, str]:
    parts = key.split("//")
    if len(parts) != 2 or not all(parts):
        raise ValueError(f"the key {key!r} is not of the form <scope>//<name>.")
    return parts[0], parts[1]


def _below(params: ParamsLike, scope: str) -> dict[str, Any]:
    """Parameters at and below the scope, under what their keys have after it."""
    flat = _flatten(params)
    below = {k.removeprefix(scope): x for k, x in flat.items() if k.startswith(f"{scope}/")}
    if not below:
        raise KeyError(f"no parameters at or below the scope {scope!r}")
    return below


# --- the attention module in a model -------------------------------------------------------------


def extract_module(
    params: ParamsLike,
    scope: str | None = None,
    *,
    name: str = "invariant_point_attention",
    variant: Variant | None = None,
    config: Any = None,
) -> Params:
    """Takes the parameters of one `InvariantPointAttention` out of a model's.

    Args:
      params: Haiku parameters of a model.
      scope: of the module in the model; None means the only one there is.
      name: scope of the module in the result.
      variant: the one that it has to be; None means either.
      config: the sizes that it has to have; None means any that fit together.

    Returns:
      The parameters of the module: all that it needs and no others.

    Raises:
      KeyError: if there is no such module, or naming what is missing or superfluous in it.
      ValueError: if it is of the other variant, or naming what has a wrong shape or dtype.
    """
    module = _module(params, scope, config)
    if variant not in (None, module.variant):
        raise ValueError(f"{module.scope} has parameters of the {module.variant}, not {variant}.")
    return _unflatten({name + key: x for key, x in module.arrays.items()})


def replace_module(
    params: ParamsLike, module_params: ParamsLike, scope: str | None = None
) -> Params:
    """Puts the parameters of one `InvariantPointAttention` in the place of those in a model.

    Args:
      params: Haiku parameters of a model.
      module_params: those of the module alone, under any name.
      scope: of the module in the model; None means the only one there is.

    Returns:
      Parameters of the model, in their order.

    Raises:
      KeyError: as in `extract_module`, of the model or of the module alone.
      ValueError: likewise, or if the two differ in variant or shapes.
    """
    old, new = _module(params, scope), _module(module_params)
    if old.variant != new.variant:
        raise ValueError(f"{old.scope} is of the {old.variant}, {new.scope} of the {new.variant}.")
    check_shapes(new.arrays, {key: x.shape for key, x in old.arrays.items()}, new.scope.__add__)
    replaced = {old.scope + key: x for key, x in new.arrays.items()}
    return _unflatten(_flatten(params) | replaced)


def config_of(params: ParamsLike, scope: str | None = None) -> IPAConfig:
    """The sizes of the `InvariantPointAttention` that has these parameters.

    Args:
      params: Haiku parameters of a model, or of the module alone.
      scope: of the module in `params`; None means the only one there is.

    Raises:
      KeyError: as in `extract_module`.
      ValueError: likewise.
    """
    return _module(params, scope).sizes.config


class _Module(NamedTuple):
    scope: str
    arrays: dict[str, np.ndarray]  # under what their keys have after the scope
    variant: Variant
    sizes: Sizes


def _module(params: ParamsLike, scope: str | None = None, config: Any = None) -> _Module:
    """The module at `scope`, checked; the only one there is if that is None."""
    if scope is None:
        scopes = [s for s, arrays in params.items() if POINT_WEIGHTS.removeprefix("//") in arrays]
        if len(scopes) != 1:
            raise KeyError(f"one scope with trainable_point_weights expected, found {scopes}")
        (scope,) = scopes
    arrays = {key: np.asarray(x) for key, x in _below(params, scope).items()}
    return _Module(scope, arrays, *check_module(arrays, scope.__add__, config))


# --- OpenFold and ESMFold ------------------------------------------------------------------------


def from_openfold(
    tensors: Mapping[str, Any],
    prefix: str | None = None,
    *,
    name: str = "invariant_point_attention",
) -> Params:
    """Converts the tensors of OpenFold and its kin to parameters of `InvariantPointAttention`.

    Reads OpenFold, ESMFold, Genie, Genie 2, FastFold, Uni-Fold's monomer and multimer, and Ibex,
    whose projections of residues and pairs may have no biases: then they are zeros. Uni-Fold adds
    1e-12 to squared norms, as the monomer does with `dist_epsilon=1e-12`; the norms of the multimer
    are within 5e-13 / norm of that.

    Args:
      tensors: a state dict of the module or of a whole model; NumPy arrays, torch tensors or
        anything that NumPy converts. Both spellings are read: `linear_q_points.weight` (ESMFold,
        OpenFold 1, Uni-Fold) and `linear_q_points.linear.weight` (OpenFold 2).
      prefix: of the module's keys, such as `trunk.structure_module.ipa`; None means the only place
        with `head_weights`.
      name: scope of the module in the result.

    Returns:
      The parameters of the module, monomer or multimer as the tensors are.

    Raises:
      KeyError: if there is no such module, or naming what is missing or superfluous in it.
      TypeError: naming a tensor that NumPy cannot hold, such as one of torch's bfloat16.
      ValueError: naming what has a wrong shape or dtype, or if the state dict is nested.
    """
    start, theirs = take_module(tensors, prefix, "head_weights")
    variant, layout = openfold_layout.kind_of(theirs.keys(), start)
    names = openfold_layout.keys_of(variant, layout, start)
    check_keys(theirs.keys(), set(names.values()))
    num_head = max(theirs[names[POINT_WEIGHTS]].size, 1)  # none at all is refused below
    module: dict[str, np.ndarray] = {}
    for key, shape in shapes_of(variant, ANY_SIZES).items():
        if key in names:
            x = openfold_layout.from_linear(theirs[names[key]], names[key], shape, num_head)
        else:
            weights = module[key.replace("//bias", "//weights")]
            x = np.zeros(weights.shape[1:], weights.dtype)
        module[key] = x
    check_module(module, lambda key: f"{names.get(key, key)}, transposed,")
    return _unflatten({name + key: x for key, x in module.items()})


def to_openfold(
    params: ParamsLike,
    scope: str | None = None,
    *,
    prefix: str = "",
    layout: Layout = "openfold",
) -> dict[str, np.ndarray]:
    """Converts parameters of `InvariantPointAttention` to tensors of OpenFold and its kin.

    Args:
      params: Haiku parameters of a model, or of the module alone.
      scope: of the module in `params`; None means the only one there is.
      prefix: of the keys of the result, such as `trunk.structure_module.ipa`.
      layout: "openfold" for the keys of OpenFold 2, "esmfold" for those of ESMFold, OpenFold 1 and
        Uni-Fold's monomer, "unifold" for Uni-Fold's multimer, "ibex" for Ibex without biases.

    Returns:
      A state dict of NumPy arrays, the inverse of `from_openfold`.

    Raises:
      KeyError: as in `extract_module`.
      ValueError: likewise, or if the layout has no module of this variant or these sizes, or no
        place for a bias that is not zero.
    """
    module = _module(params, scope)
    if (module.variant, layout) not in openfold_layout.KINDS:
        raise ValueError(f"there is no {module.variant} in the layout {layout!r}.")
    c, c_s = module.sizes.config, module.sizes.num_single
    if (c.num_scalar_v, c.num_channel) != (c.num_scalar_qk, c_s):
        raise ValueError(
            "OpenFold's values have as many scalar channels as its queries, and its outputs as "
            f"inputs_1d, got {c} and {c_s} channels of inputs_1d."
        )
    names = openfold_layout.keys_of(module.variant, layout, start_of(prefix))
    check_zero(module.arrays, module.arrays.keys() - names.keys(), module.scope.__add__)
    return {
        theirs: openfold_layout.to_linear(module.arrays[key], key) for key, theirs in names.items()
    }
