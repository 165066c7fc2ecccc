"""The same attention over several devices: each computes the query rows that it holds.

Of `inputs_2d`, the queries and the results a device holds its rows; keys, values and weights it
holds in full. So the forward pass needs no communication but gathering keys and values where they
are sharded, and the gradient none but the sum of theirs and the weights' gradients: of `inputs_2d`
and its gradient, nothing ever leaves its device.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from ipa_haiku.attention.types import IPAInputs, IPAOutput, axes_of, narrow, widen
from ipa_haiku.jax_versions import reshard

# Those of each array in a field.
_OUTPUT_AXES = {
    "scalar": "... Nq H Cv",
    "point": "... Nq H Pv 3",
    "pair": "... Nq H C_z",
    "attention": "... H Nq Nk",
}


@dataclasses.dataclass(frozen=True)
class RowSharding:
    """Which axes of a device mesh query rows and batches are sharded over.

    Attributes:
      mesh: the devices, of one host or of several.
      row_axis: axis of `mesh` that the rows of `inputs_2d`, and with them queries and results, are
        sharded over. Where it has D devices, each computes ceil(N / D) rows. Arrays that are an
        input or a result of a jitted function can only be sharded where D divides N; where it does
        not, rows are padded inside, and `inputs_2d` is best padded (and masked) by the caller.
      batch_axis: axis of `mesh` that the first batch dimension is sharded over; None to have all
        proteins on every device of `row_axis`.

    Raises:
      ValueError: if `mesh` has no such axis, or both are the same.
    """

    mesh: jax.sharding.Mesh | jax.sharding.AbstractMesh
    row_axis: str
    batch_axis: str | None = None

    def __post_init__(self) -> None:
        names = self.mesh.axis_names
        for what in ("row_axis", "batch_axis"):
            name = getattr(self, what)
            if name not in names and not (what == "batch_axis" and name is None):
                raise ValueError(f"{what} must be an axis of the mesh {names}, got {name!r}.")
        if self.row_axis == self.batch_axis:
            raise ValueError(f"row_axis and batch_axis must differ, got {self.row_axis!r} twice.")

    def local_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The part [..., H, Nq, Nk] of attention weights of such a shape that a device computes.

        Raises:
          ValueError: if there is a `batch_axis` that does not divide the first batch dimension.
        """
        *batch, num_head, num_query, num_key = shape
        if self.batch_axis is not None:
            size = self.mesh.shape[self.batch_axis]
            if not batch or batch[0] % size:
                raise ValueError(
                    f"batch_axis {self.batch_axis!r} has {size} devices and the arguments have "
                    f"batch dimensions {tuple(batch)}: the first must be a multiple of {size}."
                )
            batch[0] //= size
        return (*batch, num_head, -(-num_query // self.mesh.shape[self.row_axis]), num_key)

    def run(self, attend: Callable[[IPAInputs], IPAOutput], inputs: IPAInputs) -> IPAOutput:
        """Runs an implementation on the rows of each device.

        Args:
          attend: from all arguments to the result, for any number of queries.
          inputs: the array arguments, checked.

        Returns:
          What `attend(inputs)` is, sharded over rows.
        """
        num_query, num_batch = inputs.num_query, inputs.q_mask.ndim - 1
        padding = -num_query % self.mesh.shape[self.row_axis]
        axes = axes_of(inputs)
        specs = jax.tree.map(lambda a: self._spec(a, num_batch), axes)
        # Implementations widen everything. What every device holds is widened out here already, so
        # that its gradients are narrowed after their sum over devices, as they are on one device.
        arrays = jax.tree.map(
            lambda x, w, a, spec: self._place(
                _pad_queries(x, a, padding) if "Nq" in a else w, spec
            ),
            inputs, widen(inputs), axes, specs,
        )  # fmt: skip
        out_specs: Any = {name: self._spec(a, num_batch) for name, a in _OUTPUT_AXES.items()}
        out = jax.shard_map(
            attend,
            mesh=self.mesh,
            in_specs=(specs,),
            out_specs=IPAOutput(**out_specs),
            # Implementations do not say over which axes what they make varies (loop carries,
            # kernels), so this cannot be checked. JAX then sums the gradients of what is
            # replicated over all devices, which is what is wanted of keys, values and weights.
            check_vma=False,
        )(arrays)
        out = narrow(out, inputs)
        if not padding:
            return out

        def unpad(x: jax.Array, axes: str) -> jax.Array:
            # Rows that the devices do not divide cannot be sharded.
            x = self._place(x, self._spec(axes, num_batch, sharded_rows=False))
            return jax.lax.slice_in_dim(x, 0, num_query, axis=x.ndim + _query_axis(axes))

        fields = out._asdict().items()
        return IPAOutput(
            **{k: jax.tree.map(lambda x, k=k: unpad(x, _OUTPUT_AXES[k]), v) for k, v in fields}
        )

    def on_every_device(self, x: jax.Array, axes: str) -> jax.Array:
        """An array with such axes, "... N" or "... N 3", all N on every device of `row_axis`."""
        return self._place(x, self._spec(axes, x.ndim - len(axes.split()) + 1))

    def _spec(self, axes: str, num_batch: int, sharded_rows: bool = True) -> PartitionSpec:
        """How an array with such axes, as in the comments of `IPAInputs`, is sharded."""
        batched, *names = axes.split() if "..." in axes else ("", *axes.split())
        batch = (self.batch_axis, *[None] * num_batch)[:num_batch] if batched else ()
        rows = self.row_axis if sharded_rows else None
        return PartitionSpec(*batch, *(rows if name == "Nq" else None for name in names))

    def _place(self, x: jax.Array, spec: PartitionSpec) -> jax.Array:
        """Moves `x` to where it belongs; with automatic axes, `jax.shard_map` does."""
        if AxisType.Explicit not in self.mesh.axis_types:
            return x
        return reshard(x, NamedSharding(self.mesh, spec))


def _query_axis(axes: str) -> int:
    """The axis of queries, counted from the last."""
    names = axes.split()
    return names.index("Nq") - len(names)


def _pad_queries(x: jax.Array, axes: str, padding: int) -> jax.Array:
    """`padding` more rows of zeros, masked as such; `x` itself if there is nothing to pad."""
    if not padding:
        return x
    widths = [(0, 0)] * x.ndim
    widths[_query_axis(axes)] = (0, padding)
    return jnp.pad(x, widths)
