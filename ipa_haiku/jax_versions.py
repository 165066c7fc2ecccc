"""What JAX calls otherwise from version to version, from 0.6.2 on; nothing else asks for one."""

from collections.abc import Iterable
from typing import Any

import jax

try:
    from jax import enable_x64 as enable_x64
except ImportError:  # before 0.8
    from jax.experimental import enable_x64 as enable_x64  # type: ignore[attr-defined, no-redef]


def varying_axes(x: Any) -> frozenset[str]:
    """Axes of a mesh that an array varies over, as JAX follows them inside of `jax.shard_map`.

    `jax.typeof(x).vma` up to 0.9.
    """
    kind = jax.typeof(x)
    return kind.manual_axis_type.varying if hasattr(kind, "manual_axis_type") else kind.vma


def make_varying(x: jax.Array, axes: Iterable[str]) -> jax.Array:
    """`x`, which varies over more axes of a mesh: `jax.lax.pvary` before `jax.lax.pcast`."""
    axes = tuple(axes)
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, axes, to="varying")
    return jax.lax.pvary(x, axes)  # type: ignore[attr-defined]


def shape_like(shape: jax.ShapeDtypeStruct, like: jax.Array) -> jax.ShapeDtypeStruct:
    """`shape` of an array that varies over the axes that `like` varies over."""
    kind = jax.typeof(like)
    if hasattr(kind, "manual_axis_type"):
        options = {"manual_axis_type": kind.manual_axis_type}
    else:
        options = {"vma": kind.vma}
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, **options)


def abstract_device() -> Any:
    """The device that a program is lowered for without having it; None, and so before 0.7.2."""
    return getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)


def reshard(x: jax.Array, sharding: jax.sharding.NamedSharding) -> jax.Array:
    """`jax.sharding.reshard`, for meshes with explicit axes.

    Raises:
      NotImplementedError: before 0.7, which has no such function.
    """
    if not hasattr(jax.sharding, "reshard"):
        raise NotImplementedError(
            f"RowSharding over explicit axes needs JAX 0.7 or later, this is {jax.__version__}: "
            "make the mesh with axis_types=(AxisType.Auto, ...)."
        )
    return jax.sharding.reshard(x, sharding)
