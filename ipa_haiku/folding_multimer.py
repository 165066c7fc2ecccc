"""Invariant Point Attention of AlphaFold-Multimer: the twin of `folding_multimer.py`."""

from collections.abc import Sequence
from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku.attention.pair import StructuredPair
from ipa_haiku.attention.types import AttentionTerms, IPAInputs, LogitScales
from ipa_haiku.base_module import NUM_LOGIT_TERMS, BaseInvariantPointAttention
from ipa_haiku.common_modules import Linear
from ipa_haiku.quat_affine import QuatAffine


class InvariantPointAttention(BaseInvariantPointAttention):
    """Attention over residues by scalars, points in their frames, and pairs (Suppl. Alg. 22).

    The output is unchanged when one rotation and translation moves all frames.

    Shapes: N residues, C_s and C_z channels, H heads, C (Cv) scalar channels and P (Pv) points of
    queries and keys (values) per head. Parameters and initial values are those of AF2's
    `folding_multimer.InvariantPointAttention`:

        q_scalar_projection, k_scalar_projection  [C_s, H, C]   without bias
        v_scalar_projection                       [C_s, H, Cv]  without bias
        q_point_projection/point_projection       [C_s, H, 3*P]
        k_point_projection/point_projection       [C_s, H, 3*P]
        v_point_projection/point_projection       [C_s, H, 3*Pv]
        attention_2d                              [C_z, H]
        trainable_point_weights                   [H]
        output_projection                         [H*(Cv+4*Pv+C_z), num_channel]
    """

    def __call__(
        self,
        inputs_1d: jax.Array,
        inputs_2d: jax.Array | StructuredPair | None,
        mask: jax.Array,
        rigid: Any,
        *,
        segment_ids: jax.Array | None = None,
        return_attention: bool = False,
    ) -> jax.Array | tuple[jax.Array, AttentionTerms]:
        """Updates the activations of every residue from all others.

        Args:
          inputs_1d: [..., N, C_s] activations, floating-point.
          inputs_2d: [..., N, N, C_z] pair activations, floating-point; or a `FactorizedPair` or
            `RelativePositionPair` that stands for them; or None for a model without any, which has
            no `attention_2d` and no pair features in `output_projection`.
          mask: [..., N, 1] 1 where a residue is real, 0 where it is padding; bool, integers or
            floating-point.
          rigid: frames of the residues, translations in units of `position_scale`: AF2's
            `Rigid3Array`, a `QuatAffine` (ours or AF2's), or a pair (rotation [..., N, 3, 3],
            translation [..., N, 3]).
          segment_ids: [..., N] any integers, for several proteins or chains in one call: residues
            attend to those of the same number, as if each segment were alone. None for one segment.
          return_attention: also return the attention weights and the logit terms.

        Returns:
          [..., N, num_channel] in the dtype that `inputs_1d` and the parameters promote to; with
          `return_attention` a pair of that and `AttentionTerms`.

        Raises:
          TypeError: if `rigid` is of no known kind or an input is no array.
          AssertionError: naming the argument whose shape or dtype does not fit.
        """
        return self._attend(
            inputs_1d, inputs_2d, mask, rigid, "rigid", segment_ids, return_attention
        )

    @hk.transparent
    def _core_inputs(
        self,
        inputs_1d: jax.Array,
        inputs_2d: jax.Array | StructuredPair | None,
        mask: jax.Array,
        frames: QuatAffine,
    ) -> IPAInputs:
        c = self.config
        point_weights = self._point_weights(logit_terms=1)
        q_local = self._local_points(inputs_1d, "q_point_projection", c.num_point_qk)
        k_local = self._local_points(inputs_1d, "k_point_projection", c.num_point_qk)
        q_scalar = self._scalars(inputs_1d, "q_scalar_projection", c.num_scalar_qk)
        k_scalar = self._scalars(inputs_1d, "k_scalar_projection", c.num_scalar_qk)
        pair_weights, pair_bias = self._pair_weights_and_bias(inputs_2d)
        v_scalar = self._scalars(inputs_1d, "v_scalar_projection", c.num_scalar_v)
        v_local = self._local_points(inputs_1d, "v_point_projection", c.num_point_v)
        q_point, k_point, v_point = self._global_points(frames, [q_local, k_local, v_local])
        return IPAInputs(
            q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
            inputs_2d, pair_weights, pair_bias, point_weights, mask, mask,
        )  # fmt: skip

    def _logit_scales(self) -> LogitScales:
        # Each term has variance 1 for unit normal queries and keys; their sum, the mask included,
        # is scaled back to 1.
        return LogitScales(
            scalar=float(np.sqrt(1.0 / self.config.num_scalar_qk)),
            pair=1.0,
            total=float(np.sqrt(1.0 / NUM_LOGIT_TERMS)),
        )

    def _norm(self, point: Sequence[jax.Array]) -> jax.Array:
        x, y, z = map(jnp.square, point)
        return jnp.sqrt(jnp.maximum(x + y + z, self._dist_epsilon**2))

    @hk.transparent
    def _scalars(self, inputs_1d: jax.Array, name: str, num_channel: int) -> jax.Array:
        """Scalars [..., N, H, num_channel] (line 1)."""
        shape = (self.config.num_head, num_channel)
        return Linear(shape, use_bias=False, precision=self._options.precision, name=name)(
            inputs_1d
        )

    @hk.transparent
    def _local_points(self, inputs_1d: jax.Array, name: str, num_point: int) -> list[jax.Array]:
        """Points in the residues' own frames (lines 2 and 3): x, y, z [..., N, H, num_point]."""
        local = _PointProjection(self.config.num_head, num_point, name=name)(inputs_1d)
        # The multimer lays out all x before all y before all z inside each head.
        return jnp.split(local, 3, axis=-1)


class _PointProjection(hk.Module):
    """Projects residues [..., N, C_s] to points [..., N, H, 3 * num_point] in their own frames."""

    def __init__(self, num_head: int, num_point: int, name: str):
        super().__init__(name=name)
        self.num_head = num_head
        self.num_point = num_point

    def __call__(self, inputs_1d: jax.Array) -> jax.Array:
        # At the highest precision, as in AF2: the results are coordinates.
        return Linear(
            (self.num_head, 3 * self.num_point),
            precision=jax.lax.Precision.HIGHEST,
            name="point_projection",
        )(inputs_1d)
