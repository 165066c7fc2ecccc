"""Invariant Point Attention of the AlphaFold 2 monomer: the twin of `folding.py`."""

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
    `folding.InvariantPointAttention`:

        q_scalar          [C_s, H*C]        kv_scalar       [C_s, H*(C+Cv)]
        q_point_local     [C_s, H*3*P]      kv_point_local  [C_s, H*3*(P+Pv)]
        attention_2d      [C_z, H]          trainable_point_weights  [H]
        output_projection [H*(Cv+4*Pv+C_z), num_channel]
    """

    def __call__(
        self,
        inputs_1d: jax.Array,
        inputs_2d: jax.Array | StructuredPair | None,
        mask: jax.Array,
        affine: Any,
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
          affine: frames of the residues, translations in units of `position_scale`: a `QuatAffine`
            (ours or AF2's), AF2's `Rigid3Array`, or a pair (rotation [..., N, 3, 3], translation
            [..., N, 3]).
          segment_ids: [..., N] any integers, for several proteins or chains in one call: residues
            attend to those of the same number, as if each segment were alone. None for one segment.
          return_attention: also return the attention weights and the logit terms.

        Returns:
          [..., N, num_channel] in the dtype that `inputs_1d` and the parameters promote to; with
          `return_attention` a pair of that and `AttentionTerms`.

        Raises:
          TypeError: if `affine` is of no known kind or an input is no array.
          AssertionError: naming the argument whose shape or dtype does not fit.
        """
        return self._attend(
            inputs_1d, inputs_2d, mask, affine, "affine", segment_ids, return_attention
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
        q_scalar = self._scalars(inputs_1d, "q_scalar", c.num_scalar_qk)
        kv_scalar = self._scalars(inputs_1d, "kv_scalar", c.num_scalar_qk + c.num_scalar_v)
        k_scalar, v_scalar = jnp.split(kv_scalar, [c.num_scalar_qk], axis=-1)
        local = [
            self._local_points(inputs_1d, "q_point_local", c.num_point_qk),
            self._local_points(inputs_1d, "kv_point_local", c.num_point_qk + c.num_point_v),
        ]
        q_point, k_point, v_point = self._global_points(frames, local)
        point_weights = self._point_weights(NUM_LOGIT_TERMS)
        pair_weights, pair_bias = self._pair_weights_and_bias(inputs_2d)
        return IPAInputs(
            q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
            inputs_2d, pair_weights, pair_bias, point_weights, mask, mask,
        )  # fmt: skip

    def _logit_scales(self) -> LogitScales:
        # For unit normal queries and keys each scalar channel contributes variance 1.
        return LogitScales(
            scalar=float(np.sqrt(1.0 / (NUM_LOGIT_TERMS * self.config.num_scalar_qk))),
            pair=float(np.sqrt(1.0 / NUM_LOGIT_TERMS)),
        )

    def _norm(self, point: Sequence[jax.Array]) -> jax.Array:
        x, y, z = map(jnp.square, point)
        return jnp.sqrt(self._dist_epsilon + x + y + z)

    @hk.transparent  # AF2 names the projections as children of `__call__`
    def _scalars(self, inputs_1d: jax.Array, name: str, num_channel: int) -> jax.Array:
        """Scalars [..., N, H, num_channel] (line 1)."""
        num_head = self.config.num_head
        projection = Linear(num_head * num_channel, precision=self._options.precision, name=name)
        return projection(inputs_1d).reshape(*inputs_1d.shape[:-1], num_head, num_channel)

    @hk.transparent
    def _local_points(self, inputs_1d: jax.Array, name: str, num_point: int) -> list[jax.Array]:
        """Points in the residues' own frames (lines 2 and 3): x, y, z [..., N, H, num_point].

        The projection runs at the highest precision on every device: the results are coordinates,
        and bfloat16 or TF32 passes would move them by up to 1 part in 1,000.
        """
        num_head = self.config.num_head
        projection = Linear(
            num_head * 3 * num_point, precision=jax.lax.Precision.HIGHEST, name=name
        )
        # The monomer lays out all x before all y before all z.
        components = jnp.split(projection(inputs_1d), 3, axis=-1)
        return [x.reshape(*inputs_1d.shape[:-1], num_head, num_point) for x in components]
