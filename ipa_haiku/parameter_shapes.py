"""Names and shapes of a module's parameters, and checks that given ones are of a module.

Keys are what follows the module's scope in `<scope>//<name>`: `/q_scalar//weights`, or
`//trainable_point_weights`.
"""

import dataclasses
import types
from collections.abc import Callable, Iterable, Mapping, Set
from typing import Any, Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from ipa_haiku.config import IPAConfig

Variant = Literal["monomer", "multimer"]

POINT_WEIGHTS = "//trainable_point_weights"


class Sizes(NamedTuple):
    """What the shapes depend on."""

    num_single: int  # channels of inputs_1d
    num_pair: int  # channels of inputs_2d
    config: Any


ANY_SIZES = Sizes(1, 1, IPAConfig())  # for names and numbers of dimensions


def shapes_of(variant: Variant, sizes: Sizes) -> dict[str, tuple[int, ...]]:
    """The parameters of a module and their shapes."""
    c, c_s, c_z = sizes.config, sizes.num_single, sizes.num_pair
    h, p, pv = c.num_head, c.num_point_qk, c.num_point_v
    shapes: dict[str, tuple[int, ...]] = {POINT_WEIGHTS: (h,)}
    if variant == "monomer":
        shapes |= _linear("q_scalar", c_s, h * c.num_scalar_qk)
        shapes |= _linear("kv_scalar", c_s, h * (c.num_scalar_qk + c.num_scalar_v))
        shapes |= _linear("q_point_local", c_s, h * 3 * p)
        shapes |= _linear("kv_point_local", c_s, h * 3 * (p + pv))
    else:
        for x, channels in ("q", c.num_scalar_qk), ("k", c.num_scalar_qk), ("v", c.num_scalar_v):
            shapes[f"/{x}_scalar_projection//weights"] = (c_s, h, channels)
        for x, points in ("q", p), ("k", p), ("v", pv):
            shapes |= _linear(f"{x}_point_projection/point_projection", c_s, h, 3 * points)
    shapes |= _linear("attention_2d", c_z, h)
    return shapes | _linear("output_projection", h * (c.num_scalar_v + 4 * pv + c_z), c.num_channel)


def _linear(child: str, inputs: int, *outputs: int) -> dict[str, tuple[int, ...]]:
    return {f"/{child}//weights": (inputs, *outputs), f"/{child}//bias": outputs}


def _sizes(variant: Variant, module: Mapping[str, np.ndarray]) -> Sizes:
    """The sizes of a module of which the shapes fit together, and something for any other."""
    shapes = {key: x.shape for key, x in module.items()}
    h = max(shapes[POINT_WEIGHTS][0], 1)  # none at all is refused for its shape
    if variant == "monomer":
        q, kv, q_point, kv_point = (
            shapes[f"/{child}//bias"][0] // h
            for child in ("q_scalar", "kv_scalar", "q_point_local", "kv_point_local")
        )
        v, v_point = kv - q, kv_point - q_point
        num_single = shapes["/q_scalar//weights"][0]
    else:
        num_single, _, q = shapes["/q_scalar_projection//weights"]
        v = shapes["/v_scalar_projection//weights"][2]
        q_point, v_point = (
            shapes[f"/{x}_point_projection/point_projection//bias"][1] for x in "qv"
        )
    config = types.SimpleNamespace(
        num_head=h,
        num_scalar_qk=q,
        num_scalar_v=v,
        num_point_qk=q_point // 3,
        num_point_v=v_point // 3,
        num_channel=shapes["/output_projection//bias"][0],
    )
    return Sizes(num_single, shapes["/attention_2d//weights"][0], config)


def check_module(
    module: Mapping[str, np.ndarray], label: Callable[[str], str], config: Any = None
) -> tuple[Variant, Sizes]:
    """Checks names, dtypes and shapes of all parameters; returns the kind of module they make.

    Args:
      module: the parameters by key.
      label: from a key to what errors call the parameter.
      config: the sizes that the module has to have; None means any that fit together.

    Returns:
      The variant and the sizes, `config` as an `IPAConfig`.

    Raises:
      KeyError: naming what is missing or superfluous.
      ValueError: naming what has a wrong dtype or shape.
    """
    variant = max(
        get_args(Variant), key=lambda v: len(shapes_of(v, ANY_SIZES).keys() & module.keys())
    )
    expected = shapes_of(variant, ANY_SIZES)
    check_keys({label(key) for key in module}, {label(key) for key in expected})
    check_ranks(module, expected, label)
    sizes = _sizes(variant, module)
    if config is not None:
        sizes = sizes._replace(config=config)
    check_shapes(module, shapes_of(variant, sizes), label)
    fields = (field.name for field in dataclasses.fields(IPAConfig))
    return variant, sizes._replace(
        config=IPAConfig(**{field: getattr(sizes.config, field) for field in fields})
    )


def check_keys(found: Set[str], expected: Set[str]) -> None:
    """Raises a KeyError that tells what is missing or superfluous, if anything is."""
    missing, superfluous = sorted(expected - found), sorted(found - expected)
    if missing or superfluous:
        raise KeyError(f"parameters of the module: missing {missing}, superfluous {superfluous}")


def check_ranks(
    module: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    label: Callable[[str], str],
) -> None:
    """Raises a ValueError for an array that is not floating-point or has not so many dimensions."""
    for key, x in module.items():
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(f"{label(key)} must be floating-point, got {x.dtype}.")
        if x.ndim != len(expected[key]):
            raise ValueError(
                f"{label(key)} must have {len(expected[key])} dimensions, got {x.shape}."
            )


def check_zero(
    module: Mapping[str, np.ndarray], keys: Iterable[str], label: Callable[[str], str]
) -> None:
    """Raises a ValueError that tells which of these are not zero, if any are not."""
    wrong = [label(key) for key in sorted(keys) if np.any(module[key] != 0)]
    if wrong:
        raise ValueError(f"the layout has no place for {wrong}, which are not zero.")


def check_shapes(
    module: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    label: Callable[[str], str],
) -> None:
    """Raises a ValueError that tells which shapes are not the expected ones, if any are not."""
    wrong = [
        f"{label(key)} has shape {x.shape} instead of {expected[key]}"
        for key, x in module.items()
        if x.shape != expected[key]
    ]
    if wrong:
        raise ValueError("; ".join(wrong))
