"""Invariant Point Attention of the AlphaFold 2 monomer: the twin of `folding.py`."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku import rigid
from ipa_haiku.attention.base import AttentionTerms, IPAInputs, LogitScales
from ipa_haiku.base_module import NUM_LOGIT_TERMS, BaseInvariantPointAttention
from ipa_haiku.common_modules import Linear
from ipa_haiku.pair import StructuredPair


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
          mask: [..., N, 1] 1 where a residue is real, 0 where it is padding.
          affine: frames of the residues, translations in units of `position_scale`: a `QuatAffine`
            (ours or AF2's), AF2's `Rigid3Array`, or a pair (rotation [..., N, 3, 3], translation
            [..., N, 3]).
          segment_ids: [..., N] any integers, for several proteins or chains in one call: residues
            attend to those of the same number, as if each segment were alone. None for one segment.
          return_attention: also return the attention weights and the logit terms.

        Returns:
          [..., N, num_channel] in the dtype of `inputs_1d`; with `return_attention` a pair of that
          and `AttentionTerms`.

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
        rotation: jax.Array,
        translation: jax.Array,
    ) -> IPAInputs:
        c, frames = self.config, (rotation, translation)
        q_scalar = self._scalars(inputs_1d, "q_scalar", c.num_scalar_qk)
        kv_scalar = self._scalars(inputs_1d, "kv_scalar", c.num_scalar_qk + c.num_scalar_v)
        k_scalar, v_scalar = jnp.split(kv_scalar, [c.num_scalar_qk], axis=-1)
        q_point = self._points(inputs_1d, *frames, "q_point_local", c.num_point_qk)
        kv_point = self._points(
            inputs_1d, *frames, "kv_point_local", c.num_point_qk + c.num_point_v
        )
        k_point, v_point = jnp.split(kv_point, [c.num_point_qk], axis=-2)
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

    def _norm(self, point: jax.Array) -> jax.Array:
        x, y, z = (jnp.square(point[..., d]) for d in range(3))
        return jnp.sqrt(self._dist_epsilon + x + y + z)

    @hk.transparent  # AF2 names the projections as children of `__call__`
    def _scalars(self, inputs_1d: jax.Array, name: str, num_channel: int) -> jax.Array:
        """Scalars [..., N, H, num_channel] (line 1)."""
        num_head = self.config.num_head
        projection = Linear(num_head * num_channel, precision=self._precision, name=name)
        return projection(inputs_1d).reshape(*inputs_1d.shape[:-1], num_head, num_channel)

    @hk.transparent
    def _points(
        self,
        inputs_1d: jax.Array,
        rotation: jax.Array,
        translation: jax.Array,
        name: str,
        num_point: int,
    ) -> jax.Array:
        """Points [..., N, H, num_point, 3] in the global frame (lines 2 and 3).

        The projection runs at the highest precision on every device: the results are coordinates,
        and bfloat16 or TF32 passes would move them by up to 1 part in 1,000.
        """
        num_head = self.config.num_head
        projection = Linear(
            num_head * 3 * num_point, precision=jax.lax.Precision.HIGHEST, name=name
        )
        local = projection(inputs_1d).astype(translation.dtype)
        # The monomer lays out all x before all y before all z: [..., N, H * num_point, 3].
        local = jnp.stack(jnp.split(local, 3, axis=-1), axis=-1)
        points = rigid.apply_to_point(rotation, translation, local)
        return points.reshape(*inputs_1d.shape[:-1], num_head, num_point, 3)
