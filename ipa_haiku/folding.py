"""Invariant Point Attention of the AlphaFold 2 monomer: the twin of `folding.py`."""

from typing import Any

import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np

from ipa_haiku import rigid
from ipa_haiku.attention.api import invariant_point_attention
from ipa_haiku.attention.base import (
    AttentionTerms,
    IPAOutput,
    LogitScales,
    assert_floating,
    assert_shape,
)
from ipa_haiku.common_modules import Linear
from ipa_haiku.config import check_config

NUM_LOGIT_TERMS = 3  # scalar, point and pair, each given a third of the logits' variance


class InvariantPointAttention(hk.Module):
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

    def __init__(
        self,
        config: Any,
        global_config: Any = None,
        dist_epsilon: float = 1e-8,
        name: str = "invariant_point_attention",
        *,
        implementation: str | None = None,
        precision: jax.lax.PrecisionLike = None,
    ):
        """Sets up the module; the first four arguments are AF2's.

        Args:
          config: sizes, an `IPAConfig` or anything with its attributes, such as AF2's own config.
          global_config: anything with `zero_init` (whether the output starts as zero); None means
            AF2's default, True.
          dist_epsilon: added to squared norms of output points, in squared units of translation, so
            that the norm has a gradient at zero.
          name: Haiku module name.
          implementation: of the attention core, as in `invariant_point_attention`.
          precision: of matrix products over scalar and pair channels, as in `jax.lax.dot`.

        Raises:
          ValueError: if a size in `config` is missing or not a positive integer.
        """
        super().__init__(name=name)
        check_config(config)
        self.config = config
        self.global_config = global_config
        self._zero_init = True if global_config is None else global_config.zero_init
        self._dist_epsilon = dist_epsilon
        self._implementation = implementation
        self._precision = precision

    def __call__(
        self,
        inputs_1d: jax.Array,
        inputs_2d: jax.Array,
        mask: jax.Array,
        affine: Any,
        *,
        return_attention: bool = False,
    ) -> jax.Array | tuple[jax.Array, AttentionTerms]:
        """Updates the activations of every residue from all others.

        Args:
          inputs_1d: [..., N, C_s] activations, floating-point.
          inputs_2d: [..., N, N, C_z] pair activations, floating-point.
          mask: [..., N, 1] 1 where a residue is real, 0 where it is padding.
          affine: frames of the residues, translations in units of `position_scale`: a `QuatAffine`
            (ours or AF2's), AF2's `Rigid3Array`, or a pair (rotation [..., N, 3, 3], translation
            [..., N, 3]).
          return_attention: also return the attention weights and the logit terms.

        Returns:
          [..., N, num_channel] in the dtype of `inputs_1d`; with `return_attention` a pair of that
          and `AttentionTerms`.

        Raises:
          TypeError: if `affine` is of no known kind or an input is no array.
          AssertionError: naming the argument whose shape or dtype does not fit.
        """
        rotation, translation = rigid.to_rotation_translation(affine)
        check_module_inputs(inputs_1d, inputs_2d, mask, rotation, frames_name="affine")

        c, frames = self.config, (rotation, translation)
        q_scalar = self._scalars(inputs_1d, "q_scalar", c.num_scalar_qk)
        kv_scalar = self._scalars(inputs_1d, "kv_scalar", c.num_scalar_qk + c.num_scalar_v)
        k_scalar, v_scalar = jnp.split(kv_scalar, [c.num_scalar_qk], axis=-1)
        q_point = self._points(inputs_1d, *frames, "q_point_local", c.num_point_qk)
        kv_point = self._points(
            inputs_1d, *frames, "kv_point_local", c.num_point_qk + c.num_point_v
        )
        k_point, v_point = jnp.split(kv_point, [c.num_point_qk], axis=-2)
        point_weights, scales = self._point_weights_and_scales()
        pair_bias = Linear(self.config.num_head, name="attention_2d")

        result = invariant_point_attention(
            q_scalar, k_scalar, v_scalar, q_point, k_point, v_point,
            inputs_2d, *pair_bias.weights_and_bias(inputs_2d), point_weights,
            mask[..., 0], mask[..., 0], scales,
            implementation=self._implementation,
            precision=self._precision,
            return_attention=return_attention,
        )  # fmt: skip

        point_local = rigid.invert_point(rotation, translation, result.point)
        x, y, z = (jnp.square(point_local[..., d]) for d in range(3))
        norm = jnp.sqrt(self._dist_epsilon + x + y + z)
        output = Linear(
            self.config.num_channel,
            initializer="zeros" if self._zero_init else "linear",
            precision=self._precision,
            name="output_projection",
        )(output_features(result, point_local, norm).astype(inputs_1d.dtype))
        return (output, result.attention) if return_attention else output

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

    def _point_weights_and_scales(self) -> tuple[jax.Array, LogitScales]:
        """Weights of squared distances [H] and the scales of the other logit terms.

        For unit normal queries and keys a scalar channel contributes variance 1 to the logit and a
        point 9/2; the scales give each term an equal share of variance 1 (w_C and w_L, line 7).
        """
        trainable = hk.get_parameter(
            "trainable_point_weights",
            shape=[self.config.num_head],
            init=hk.initializers.Constant(np.log(np.e - 1.0)),  # softplus of this is 1
        )
        point_scale = np.sqrt(1.0 / (NUM_LOGIT_TERMS * self.config.num_point_qk * 9.0 / 2.0))
        scales = LogitScales(
            scalar=float(np.sqrt(1.0 / (NUM_LOGIT_TERMS * self.config.num_scalar_qk))),
            pair=float(np.sqrt(1.0 / NUM_LOGIT_TERMS)),
        )
        return float(point_scale) * jax.nn.softplus(trainable), scales


def check_module_inputs(
    inputs_1d: jax.Array,
    inputs_2d: jax.Array,
    mask: jax.Array,
    rotation: jax.Array,
    *,
    frames_name: str,
) -> None:
    """Asserts that the arguments of a module fit each other.

    Raises:
      TypeError: if one is not an array.
      AssertionError: naming the first that does not fit, its axes and both shapes.
    """
    for name, x in (("inputs_1d", inputs_1d), ("inputs_2d", inputs_2d), ("mask", mask)):
        assert_floating(name, x)
    if inputs_1d.ndim < 2 or 0 in inputs_1d.shape:
        raise AssertionError(
            f"inputs_1d must have shape [..., N, C_s], none of them zero, got {inputs_1d.shape}."
        )
    batch = inputs_1d.shape[:-1]
    assert_shape("inputs_2d", inputs_2d, "... N N C_z", (*batch, batch[-1], None))
    assert_shape("mask", mask, "... N 1", (*batch, 1))
    assert_shape(f"{frames_name}'s rotation", rotation, "... N 3 3", (*batch, 3, 3))


def output_features(result: IPAOutput, point_local: jax.Array, norm: jax.Array) -> jax.Array:
    """Concatenates what the output projection reads (line 11): [..., N, H*(Cv + 4*Pv + C_z)].

    Args:
      result: of the attention core.
      point_local: [..., N, H, Pv, 3] output points in the local frames.
      norm: [..., N, H, Pv] their norms.

    Returns:
      The features in AF2's order: scalar, local x, local y, local z, norm, pair.
    """
    parts = [result.scalar, *(point_local[..., d] for d in range(3)), norm, result.pair]
    return jnp.concatenate([x.reshape(*x.shape[:-2], -1) for x in parts], axis=-1)
