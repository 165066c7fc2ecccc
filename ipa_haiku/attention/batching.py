"""What the fast implementations need to run on batches and inside of other people's programs."""

from collections.abc import Callable
from typing import Any

import jax

from ipa_haiku.attention.types import IPAInputs, IPAOutput, axes_of
from ipa_haiku.jax_versions import make_varying, varying_axes


def for_each_protein(
    attend: Callable[[IPAInputs], IPAOutput], inputs: IPAInputs, implementation: str
) -> IPAOutput:
    """Runs a fast implementation, written for one protein, over batch dimensions.

    Args:
      attend: from the arguments of one protein to its result.
      inputs: the array arguments, checked; points near the origin.
      implementation: its name.

    Returns:
      The results with all batch dimensions.

    Raises:
      TypeError: under forward-mode differentiation, which only `reference` supports.
    """
    in_axes: Any = jax.tree.map(lambda axes: 0 if "..." in axes else None, axes_of(inputs))
    for _ in range(inputs.q_mask.ndim - 1):
        attend = jax.vmap(attend, in_axes=(in_axes,))
    try:
        return attend(as_varying(inputs, inputs))
    except TypeError as error:
        if "forward-mode" in str(error):
            raise TypeError(
                f"implementation={implementation!r} has a hand-written reverse-mode gradient and "
                "no forward mode (jvp, jacfwd, linearize); use implementation='reference' for that."
            ) from error
        raise


def as_varying(tree: Any, like: Any) -> Any:
    """Arrays that vary over all axes of a mesh that any array of `like` varies over.

    Inside of `jax.shard_map` JAX follows over which axes of the mesh an array varies, and expects
    of a hand-written gradient that it varies as its argument does. A weight that does not vary has
    a gradient that does, until it is summed over the axis: JAX adds that sum where the weight is
    made varying, outside of the hand-written part. What a loop carries has to vary from the start.
    """
    axes = frozenset().union(*map(varying_axes, jax.tree.leaves(like)))

    def vary(x: jax.Array) -> jax.Array:
        missing = sorted(axes - varying_axes(x))
        return make_varying(x, missing) if missing else x

    return jax.tree.map(vary, tree)
